"""Ask a model golden questions, whose answers are known, and say how many answers are right.

The file of questions has a JSON object on each line, in one of three forms:

    {"question": "Where is my parcel?", "answer": "delivery"}     the whole answer, up to white space
    {"question": "Where is my parcel?", "contains": "tracking"}   a part of the answer, in upper or lower case
    {"messages": [...]}                                           a chat of `golden_data`; its last turn is the answer

Command: `qlora-retrain ask-golden FOLDER QUESTIONS [--min-right-fraction 0.9] [--report FILE]`
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_retrain.cli.options import Options
from qlora_retrain.core import json_lines, progress, visible_text
from qlora_retrain.core.errors import QualityRefused, UsageError

MAX_QUESTIONS = 10_000
_MAX_FILE_BYTES = 32 * 2**20
_FORMS = '{"question": ..., "answer": ...}, {"question": ..., "contains": ...} or {"messages": [...]}'


@dataclass(frozen=True, slots=True)
class GoldenQuestion:
    """A question whose answer is known.

    Attributes:
        line_number: Its line in the file.
        turns: The chat up to where the answer begins.
        answer: The answer.
        is_part: Whether the answer only has to contain it.
    """

    line_number: int
    turns: tuple[dict[str, Any], ...]
    answer: str
    is_part: bool = False

    @classmethod
    def from_object(cls, line_number: int, fields: Any) -> GoldenQuestion:
        """Parse a line of the file.

        Raises:
            ValueError: If it has none of the three forms.
        """
        if not isinstance(fields, dict):
            raise ValueError(f"expected {_FORMS}, found {type(fields).__name__}")
        if messages := fields.get("messages"):
            return cls(line_number, *_split_chat(messages))
        keys = [name for name in ("answer", "contains") if isinstance(fields.get(name), str) and fields[name].strip()]
        question = fields.get("question")
        if not isinstance(question, str) or not question.strip() or len(keys) != 1 or len(fields) != 2:
            raise ValueError(f"expected {_FORMS}, found an object with {', '.join(map(repr, fields)) or 'nothing'}")
        return cls(line_number, ({"role": "user", "content": question},), fields[keys[0]], keys[0] == "contains")

    def is_right(self, text: str) -> bool:
        """Return whether an answer is right; white space does not count."""
        actual, expected = " ".join(text.split()), " ".join(self.answer.split())
        return expected.casefold() in actual.casefold() if self.is_part else actual == expected


@dataclass(frozen=True, slots=True)
class Answered:
    """A golden question with the model's answer."""

    question: GoldenQuestion
    text: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is right."""
        return self.question.is_right(self.text)


def _split_chat(messages: Any) -> tuple[tuple[dict[str, Any], ...], str]:
    """Return the turns of a chat before its last one, and the text of the last one.

    Raises:
        ValueError: If the last turn is no text of the assistant, or no turn is before it.
    """
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages) or len(messages) < 2:
        raise ValueError('"messages": expected a list of at least two turns')
    last = messages[-1]
    if last.get("role") != "assistant" or not isinstance(last.get("content"), str) or not last["content"].strip():
        raise ValueError('"messages": expected a last turn of the assistant, with a text')
    return tuple(messages[:-1]), last["content"]


def read_questions(path: Path) -> list[GoldenQuestion]:
    """Read a file of golden questions.

    Raises:
        UsageError: If it cannot be read, or a line is no golden question.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise UsageError(f"{path}: expected at most {_MAX_FILE_BYTES // 2**20} MiB of golden questions")
        questions = list(_parse(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if not 0 < len(questions) <= MAX_QUESTIONS:
        raise UsageError(f"{path}: expected 1 to {MAX_QUESTIONS} golden questions, found {len(questions)}")
    return questions


def _parse(path: Path) -> Iterator[GoldenQuestion]:
    number = 0
    try:
        for number, line in json_lines.read_lines(path):
            yield GoldenQuestion.from_object(number, json.loads(line))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: the file is not UTF-8: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}:{number}: {error}") from error


def ask_golden(
    folder: Path,
    questions: Sequence[GoldenQuestion],
    max_new_tokens: int,
    base: Path | None = None,
    root: str | None = None,
) -> list[Answered]:
    """Return a model's greedy answer to each golden question.

    Args:
        folder: A pulled version, or a model folder.
        questions: The questions.
        max_new_tokens: A longer answer is cut after this many tokens.
        base: The base of a version that is an adapter alone.
        root: The store's URI, where that base may be.

    Raises:
        UsageError: If the folder cannot be loaded, or its chat template refuses a question.
    """
    from qlora_retrain.cli import ask
    from qlora_retrain.lm import chat, generation

    model, tokenizer, system = ask.load(folder, base, root)
    answered = []
    for question in questions:
        has_system = question.turns[0].get("role") == "system"
        turns = [*([{"role": "system", "content": system}] if system and not has_system else []), *question.turns]
        try:
            prompt = tokenizer.prompt_ids(turns)
        except chat.RowRefused as refusal:
            raise UsageError(f"golden question in line {question.line_number}: {refusal.detail}") from refusal
        # One question at a time: batches would need padding, which changes answers in 16 bits.
        (completion,) = generation.generate_batch(model, tokenizer, [prompt], max_new_tokens)
        answered.append(Answered(question, completion.text))
        progress.update("golden questions", len(answered), len(questions))
    return answered


def add_verbs(verbs: Any, options: Options) -> None:
    """Add the verb to a parser's subparsers."""
    verb = verbs.add_parser(
        "ask-golden", help="ask a pulled version questions with known answers", parents=[options.stored]
    )
    verb.add_argument("folder", type=Path, help="a pulled version, or a model folder")
    verb.add_argument("questions", type=Path, help="a file with a question and its answer on each line, as JSON")
    verb.add_argument("--base", type=Path, metavar="FOLDER", help="the base of a version that is an adapter alone")
    verb.add_argument(
        "--min-right-fraction",
        type=float,
        default=1.0,
        metavar="FRACTION",
        help="end with exit code 11 if a smaller share of the answers is right; default: 1.0",
    )
    verb.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="TOKENS", help="cut longer answers; default: 64"
    )
    verb.add_argument(
        "--no-text",
        action="store_true",
        help="print the line numbers of wrong answers and no text, for a log that others read",
    )
    verb.add_argument("--report", type=Path, metavar="FILE", help="write every answer to this file, as JSON lines")
    verb.set_defaults(run=_ask_golden)


def _ask_golden(args: argparse.Namespace) -> int:
    from qlora_retrain.storage.pulled_folder import reading

    if not 0.0 <= args.min_right_fraction <= 1.0:
        raise UsageError(f"--min-right-fraction: expected 0 to 1, got {args.min_right_fraction:g}")
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens: expected at least 1, got {args.max_new_tokens}")
    questions = read_questions(args.questions)
    # Before the answers, which may take hours.
    if args.report is not None and (args.report.is_dir() or not args.report.absolute().parent.is_dir()):
        raise UsageError(f"--report {args.report}: expected a file in a folder that exists; create the folder")
    # The next pull leaves this version where it is until the answers are there.
    with reading(args.folder) as folder:
        answered = ask_golden(folder, questions, args.max_new_tokens, args.base, args.root)
    if args.report is not None:
        write_report(args.report, answered)
    for item in answered:
        if not item.is_right:
            visible_text.write_controls(f"{_describe(args.questions, item, has_text=not args.no_text)}\n")

    num_right = sum(item.is_right for item in answered)
    sentence = f"{num_right} of {len(answered)} answers are right"
    num_needed = math.ceil(args.min_right_fraction * len(answered) - 1e-9)
    if num_right < num_needed:
        raise QualityRefused(f"{sentence}; at least {num_needed} must be")
    print(sentence, flush=True)
    return 0


def _describe(path: Path, item: Answered, *, has_text: bool) -> str:
    place = f"{path.name}:{item.question.line_number}: a wrong answer"
    if not has_text:
        return place
    expected = f"{'a text with ' if item.question.is_part else ''}{item.question.answer!r}"
    text = f"{place}: expected {expected}, found {item.text!r}"
    return visible_text.escape_controls(text) if sys.stdout.isatty() else text


def write_report(path: Path, answered: Sequence[Answered]) -> None:
    """Write every answer, one JSON object a line.

    Raises:
        UsageError: If the file cannot be written.
    """
    records = (
        {
            "line": item.question.line_number,
            "right": item.is_right,
            "expected": item.question.answer,
            "answer": item.text,
        }
        for item in answered
    )
    try:
        json_lines.write(path, records)
    except OSError as error:
        raise UsageError(f"--report {path}: cannot be written: {error.strerror}") from error
