"""Look at a line's data before anything is planned: rows as the model sees them, or what the data gate would say.

It is no step: it makes no artifact, and its code enters no key. It reads the line's document from the standard input.

Command: `qlora-retrain preview CONFIG [--rows N]`, `qlora-retrain check CONFIG --data`
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory

from components.validate_data import step
from components.validate_data.checks import Row, check_row, explain_fault
from components.validate_data.encoding import encode_rows
from components.validate_data.raw_rows import RowReader
from qlora_retrain.config.data import DataConfig
from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.core import safety, visible_text
from qlora_retrain.core.errors import Problem
from qlora_retrain.lm.chat import ChatTokenizer, EncodedChat, load_tokenizer
from qlora_retrain.lm.chat_format import ChatFormat
from qlora_retrain.lm.tokenizer_files import TOKENIZER_FILES
from qlora_retrain.pipeline.auto_settings import resolve_auto_settings
from qlora_retrain.pipeline.explain import source_notes
from qlora_retrain.pipeline.template_date import resolve_template_date
from qlora_retrain.storage import sources

# Rows that are read for a preview, at most: enough to meet N good ones behind some bad ones.
_MAX_ROWS_READ = 1000
_GREEN, _GREY, _PLAIN = "\x1b[1;32m", "\x1b[90m", "\x1b[0m"
_VISIBLE = {" ": "\u00b7", "\t": "\u2192\t", "\n": "\u21b5\n", "\r": "\u240d", "\u00a0": "\u237d"}


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="qlora-retrain preview")
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    visible_text.protect_output()
    try:
        config = load(sys.stdin.read())
        with TemporaryDirectory(prefix="qlora-retrain-preview-") as scratch:
            data, folders = _resolve(config, Path(scratch))
            if arguments.check:
                return _check(data, folders, Path(scratch) / "dataset")
            _preview(data, folders, arguments.rows)
            return 0
    except Problem as problem:
        print(f"qlora-retrain: {problem}", file=sys.stderr)
        return problem.exit_code
    # `qlora-retrain preview line.yaml | head` must not end in a traceback.
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _resolve(config: LineConfig, scratch: Path) -> tuple[DataConfig, dict[str, Path]]:
    """Return the settings as a plan would resolve them, and a local folder of each source that the gate reads."""
    folders: dict[str, Path] = {}
    base = None
    # Reference text is read beside replay rows alone, as the graph has it.
    further = ("replay_data", "reference_data") if config.sources.replay_data else ()
    for name in ("raw_data", "base_model", "golden_data", "eval_data", *further):
        source = getattr(config.sources, name)
        if source is None:
            continue
        # Of the base model only the tokenizer is fetched: its weights may be hundreds of gigabytes.
        patterns = TOKENIZER_FILES if name == "base_model" else source.files
        pinned = sources.pin(name, source.uri, patterns)
        base = pinned if name == "base_model" else base
        # Of the base, what is taken here is not what a plan takes.
        if name != "base_model":
            for note in source_notes(name, pinned, config.data.format):
                print(note)
        folders[name] = scratch / name
        (scratch / name).mkdir()
        sources.fetch(pinned, scratch / name)
        if name == sources.BASE:
            safety.refuse_unsafe(scratch / name, name)

    settings, _ = resolve_auto_settings(config)
    data = settings["data"]
    assert isinstance(data, DataConfig)
    if data.template_date == "auto":
        day, _ = resolve_template_date(data, base, None, datetime.now(UTC))
        data = data.model_copy(update={"template_date": day})
    return data, folders


def _check(data: DataConfig, folders: dict[str, Path], dataset: Path) -> int:
    """Run the data gate itself, without a store; return the exit code that it would end with."""
    dataset.mkdir()
    # Drift from a published version, and what the line has evaluated before, need the store: both are left to the step.
    result = step.run(
        data.model_copy(update={"reference_version": None}),
        raw_data=folders["raw_data"],
        base_model=folders["base_model"],
        golden_data=folders.get("golden_data"),
        eval_data=folders.get("eval_data"),
        reference_profile=None,
        evaluation_history=None,
        replay_data=folders.get("replay_data"),
        reference_data=folders.get("reference_data"),
        dataset=dataset,
    )
    if data.reference_version:
        print("drift from data.reference_version is checked when the line runs, since it needs the store")
    if result.refused is not None:
        raise result.refused
    print(f"accepted: {', '.join(f'{name} {value}' for name, value in result.numbers.items() if value is not None)}")
    return 0


def _preview(data: DataConfig, folders: dict[str, Path], num_rows: int) -> None:
    tokenizer = load_tokenizer(folders["base_model"], ChatFormat.from_config(data))
    reader = RowReader(folders["raw_data"], data, "raw_data")
    # The reader's own lines and its progress are for a log; what matters here is printed below.
    with contextlib.redirect_stdout(io.StringIO()):
        rows = [check_row(raw, data) for raw in islice(reader.rows(), _MAX_ROWS_READ)]
        encode_rows(rows, data, tokenizer, "raw_data")

    good_rows = [row for row in rows if not row.reason][:num_rows]
    for line in _facts(data, tokenizer, reader):
        print(line)
    is_terminal = sys.stdout.isatty()
    print("learnt: green, the rest grey" if is_terminal else "learnt: between [[ and ]]")
    for row in good_rows:
        print()
        # Its colours are meant; the texts of the row are visible already.
        visible_text.write_controls("\n".join(_row_lines(row, tokenizer, is_terminal)) + "\n")

    bad_rows = [row for row in rows if row.reason]
    if bad_rows:
        print(f"\n{len(bad_rows):,} of the first {len(rows):,} rows are left out:")
        for reason, count in Counter(str(row.reason) for row in bad_rows).most_common():
            first = next(row for row in bad_rows if row.reason == reason)
            print(f"  {reason}: {count:,}, first {explain_fault(first, data)}")


def _facts(data: DataConfig, tokenizer: ChatTokenizer, reader: RowReader) -> Iterator[str]:
    """Yield what was recognised, a line each."""
    for file, layout in reader.layouts.items():
        yield f"{file}: {layout}"
    name = data.template if data.template and "{" not in data.template else None
    own = "a Jinja file of the line" if data.template else "the tokenizer's own"
    yield f"chat template: {name or own}" + (f", on {data.template_date}" if data.template_date else "")
    yield f"generation stops at: {', '.join(tokenizer.stop_texts)}"
    yield from tokenizer.notes
    yield from reader.warnings


def _row_lines(row: Row, tokenizer: ChatTokenizer, is_terminal: bool) -> Iterator[str]:
    examples = tokenizer.encode(row.messages, row.tools)
    learnt = sum(example.supervised_tokens for example in examples)
    note = f"; {', '.join(row.warnings)}" if row.warnings else ""
    head = f"{row.location}: {sum(len(e.input_ids) for e in examples)} tokens, {learnt} learnt{note}"
    yield visible_text.escape_controls(head)
    for i, example in enumerate(examples):
        if len(examples) > 1:
            yield f"-- example {i + 1} of {len(examples)}: the template writes earlier answers otherwise"
        yield _marked(example, tokenizer, is_terminal)


def _marked(example: EncodedChat, tokenizer: ChatTokenizer, is_terminal: bool) -> str:
    """Return the example's text with the supervised tokens marked and white space visible."""
    parts = []
    for is_supervised, group in groupby(range(len(example.input_ids)), key=lambda i: example.supervised[i]):
        positions = list(group)
        text = _visible(_text_between(example.input_ids, positions[0], positions[-1] + 1, tokenizer))
        if is_terminal:
            parts.append(f"{_GREEN if is_supervised else _GREY}{text}{_PLAIN}")
        else:
            parts.append(f"[[{text}]]" if is_supervised else text)
    return "".join(parts)


def _visible(text: str) -> str:
    """Return a text with white space as signs, and any other character that no terminal shows as its escape."""
    # Such a character may also be the begin of a command to the terminal.
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def _text_between(ids: Sequence[int], start: int, end: int, tokenizer: ChatTokenizer) -> str:
    # As a difference, because some tokenizers drop the first space of what they decode.
    return tokenizer.decode(ids[:end])[len(tokenizer.decode(ids[:start])) :]


if __name__ == "__main__":
    sys.exit(main())
