"""Options that several verbs share, as argparse parents."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

from qlora_retrain.core.arguments import Parser
from qlora_retrain.core.line_names import is_line_name


@dataclass(frozen=True)
class Options:
    """Parsers with shared options, for argparse's `parents=[...]`.

    Attributes:
        common: For every verb.
        stored: For verbs that need the store; includes `common`.
        settings: For verbs that can change a line's settings.
        orchestrator: For verbs that an orchestrator runs as tasks.
    """

    common: Parser
    stored: Parser
    settings: Parser
    orchestrator: Parser


def shared_options() -> Options:
    """Build the shared parsers."""
    # Parents add no --help of their own: the verb's parser has it.
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    # --root may be missing here: `store_root` then takes the environment's, and reports where neither is set.
    stored = Parser(add_help=False, parents=[common])
    stored.add_argument("--root", metavar="URI", help="the store: file:///folder or s3://bucket/prefix")

    settings = Parser(add_help=False)
    settings.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change a setting of the line (repeatable)",
    )

    orchestrator = Parser(add_help=False)
    orchestrator.add_argument(
        "--orchestrator-id",
        action="append",
        default=[],
        type=_orchestrator_id,
        metavar="ID",
        help="an id of the run in the orchestrator (repeatable); the same ids find the same plan",
    )
    orchestrator.add_argument(
        "--report-to", type=Path, metavar="FILE", help="write the report for the orchestrator's UI there"
    )
    return Options(common, stored, settings, orchestrator)


def _orchestrator_id(text: str) -> str:
    """Return the id; refuse a template that the orchestrator did not fill in, which would be the same for every run."""
    if not text.strip() or "{{" in text:
        raise argparse.ArgumentTypeError(
            f"expected the id of a run, found {text!r}, which the orchestrator did not fill in"
        )
    return text


def line_name(text: str) -> str:
    """Return the name of a line; refuse what no line is called, such as `LINE@ALIAS`."""
    if not is_line_name(text):
        raise argparse.ArgumentTypeError(
            f"expected the name of a line alone (small letters, digits and hyphens), found {text!r}"
        )
    return text


def destination(text: str) -> Path:
    """Return the path; refuse an empty text, which would mean the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty text; the working directory is .")
    return Path(text)


def generation(text: str) -> int:
    """Return the number of moves of an alias."""
    if not re.fullmatch("[0-9]{1,12}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, found {text!r}")
    return int(text)


def json_list(text: str) -> list[str]:
    """Parse `--set-json`: a JSON list of strings."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    # KFP fills a list parameter in as JSON; anything else is a mistake in the pipeline.
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f'expected a list like ["train.learning_rate=1e-4"], found {text}')
    return value
