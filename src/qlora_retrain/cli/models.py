"""The verbs of `qlora-retrain models`: look at a store's published models, check them, move them and mend them.

`pull`, `promote`, `rollback`, `history` and `gc` are the verbs of the same name at the top level. All take `--json`.
Exit codes are those of `core/errors.py`: 12 for what does not exist or may not be, 13 for bytes that differ, 75 to
repeat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qlora_retrain.cli import gc, versions
from qlora_retrain.cli.json_output import add_json, print_json
from qlora_retrain.cli.options import Options, destination, line_name
from qlora_retrain.cli.versions import open_registry, resumable
from qlora_retrain.core import visible_text
from qlora_retrain.core.aliases import is_alias_name
from qlora_retrain.core.errors import Exit, IntegrityError, UsageError
from qlora_retrain.core.visible_text import escape_controls

if TYPE_CHECKING:
    from qlora_retrain.registry import Registry

_REFERENCE = "LINE@ALIAS or LINE@VERSION"


def add_verbs(models: argparse.ArgumentParser, options: Options) -> None:
    """Add the verbs below `models`."""
    verbs = models.add_subparsers(required=True, metavar="VERB")
    versions.add_shared_verbs(verbs, options)
    gc.add_verbs(verbs, options)
    parents = [options.stored]

    verb = verbs.add_parser("list", help="print a line's versions and aliases, with their verdicts", parents=parents)
    verb.add_argument("line", type=line_name, help="the line's name")
    _finish(verb, _list)

    verb = verbs.add_parser("show", help="print who published a version, when, why, and its verdict", parents=parents)
    verb.add_argument("reference", metavar="LINE@ALIAS", help=_REFERENCE)
    _finish(verb, _show)

    verb = verbs.add_parser("diff", help="print what differs between two versions", parents=parents)
    verb.add_argument("first", metavar="LINE@ALIAS", help=_REFERENCE)
    verb.add_argument("second", metavar="LINE@ALIAS", help=_REFERENCE)
    _finish(verb, _diff)

    verb = verbs.add_parser("verify", help="read every byte of a version, or of all (--all)", parents=parents)
    verb.add_argument("reference", metavar="LINE@ALIAS", help=f"{_REFERENCE}; with --all: LINE")
    verb.add_argument("--all", action="store_true", help="verify every version of the line")
    _finish(verb, _verify)

    for name, action in (("reject", "reject"), ("unreject", "lift the rejection of")):
        verb = verbs.add_parser(
            name, help=f"{action} a version for an alias, by its content and its recipe", parents=parents
        )
        verb.add_argument("line", type=line_name, help="the line's name")
        verb.add_argument("version", help="a published version of the line")
        verb.add_argument("--alias", default="production", help="default: production")
        verb.add_argument("--reason", required=True, help="a sentence for the audit trail")
        _finish(verb, _reject if name == "reject" else _unreject)

    verb = verbs.add_parser(
        "repair",
        help="repair a line's aliases, audit trail and files, and say what cannot be repaired",
        parents=parents,
    )
    verb.add_argument("line", type=line_name, help="the line's name")
    verb.add_argument(
        "version", nargs="*", help="repair the files of these versions, too; default: those that aliases name"
    )
    verb.add_argument("--reason", default="repaired by hand", help="a sentence for the audit trail")
    verb.add_argument("--dry-run", action="store_true", help="only print what would be done")
    _finish(verb, _repair)

    verb = verbs.add_parser("probe", help="check that the store honours conditional writes", parents=parents)
    _finish(verb, _probe)

    verb = verbs.add_parser("export", help="download one export of a version and verify it", parents=parents)
    verb.add_argument("reference", metavar="LINE@ALIAS", help=_REFERENCE)
    verb.add_argument("name", help="the export, e.g. gguf-q8_0")
    verb.add_argument("destination", metavar="DEST", type=destination, help="a file, e.g. ./model.gguf, or a folder")
    _finish(verb, _export)


def _finish(verb: argparse.ArgumentParser, run: object) -> None:
    add_json(verb)
    verb.set_defaults(run=run)


def _print(lines: Iterator[str]) -> None:
    """Print what the store holds for a person; no text of it may steer the terminal or pass for a further line."""
    for line in lines:
        visible_text.write_controls(f"{escape_controls(line.replace(chr(10), ' '))}\n")


def _list(args: argparse.Namespace) -> int:
    from qlora_retrain.cli import models_text

    summary = open_registry(args).list(args.line)
    if args.json:
        print_json(summary)
    else:
        _print(models_text.line(summary))
    # A version that cannot be read hides no other one, and is no success either.
    return int(Exit.INTEGRITY) if summary.faults else 0


def _show(args: argparse.Namespace) -> int:
    from qlora_retrain.cli import models_text

    details = open_registry(args).show(args.reference)
    if args.json:
        print_json(details)
    else:
        _print(models_text.version(details))
    return int(Exit.INTEGRITY) if details.faults else 0


def _diff(args: argparse.Namespace) -> int:
    from qlora_retrain.cli import models_text

    diff = open_registry(args).diff(args.first, args.second)
    if args.json:
        print_json(diff)
    else:
        _print(models_text.difference(diff))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import audit

    registry = open_registry(args)
    references = _all_references(registry, args.reference) if args.all else [args.reference]
    faults: dict[str, str | None] = {}
    versions: list[str] = []
    exit_code = Exit.DONE
    for reference in references:
        try:
            release = registry.verify(reference)
            faults[reference] = None
            text = f"{reference}: {release.version}: {len(release.files)} files are what was published"
        except (IntegrityError, UsageError) as error:
            # Of several versions, one that this user may not read hides no other one.
            if isinstance(error, UsageError) and not args.all:
                raise
            faults[reference] = str(error)
            exit_code = max(exit_code, error.exit_code)
            # Without its name only what aliases name is mended.
            name = reference.partition("@")[2]
            versions += [] if isinstance(error, UsageError) or is_alias_name(name) else [name]
            text = f"{reference}: {error}"
        if not args.json:
            _print(iter([text]))
    if args.json:
        print_json([{"reference": name, "fault": fault} for name, fault in faults.items()])
    if exit_code == Exit.INTEGRITY:
        command = audit.repair_command(registry.store, args.reference.partition("@")[0], *versions)
        print(f"to mend what can be mended: {command}", file=sys.stderr)
    return int(exit_code)


def _all_references(registry: Registry, line: str) -> list[str]:
    if "@" in line:
        raise UsageError(f"{line}: with --all expected the name of a line alone")
    return [f"{line}@{version}" for version in registry.versions(line)]


def _reject(args: argparse.Namespace) -> int:
    state = open_registry(args).reject(args.line, args.version, reason=args.reason, alias=args.alias)
    return _print_change(args, "rejected", state is not None)


def _unreject(args: argparse.Namespace) -> int:
    state = open_registry(args).unreject(args.line, args.version, reason=args.reason, alias=args.alias)
    return _print_change(args, "not rejected", state is not None)


def _print_change(args: argparse.Namespace, status: str, has_changed: bool) -> int:
    if args.json:
        print_json({"line": args.line, "alias": args.alias, "version": args.version, "status": status,
                    "changed": has_changed})  # fmt: skip
    else:
        print(f"{args.line}@{args.alias}: {args.version} is {status}" + ("" if has_changed else " (already)"))
    return 0


def _repair(args: argparse.Namespace) -> int:
    from qlora_retrain.cli import models_text

    findings = open_registry(args).repair(args.line, args.version, reason=args.reason, is_dry_run=args.dry_run)
    if args.json:
        print_json(findings)
    else:
        _print(models_text.findings(args.line, findings, is_dry_run=args.dry_run))
    return 0 if all(finding.is_mended for finding in findings) else int(Exit.INTEGRITY)


def _probe(args: argparse.Namespace) -> int:
    registry = open_registry(args)
    registry.probe()
    if args.json:
        print_json({"root": registry.store.uri, "conditional_writes": True})
    else:
        print(f"{registry.store.uri}: conditional writes are honoured, so aliases move safely")
    return 0


def _export(args: argparse.Namespace) -> int:
    with resumable():
        paths = open_registry(args).export(args.reference, args.name, args.destination)
    if args.json:
        print_json({"reference": args.reference, "export": args.name, "files": [str(path) for path in paths]})
    else:
        _print(f"{path}: verified" for path in paths)
    return 0
