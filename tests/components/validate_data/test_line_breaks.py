r"""Texts with every character that a program may take for a line's end go through whole, from the files to the scores.

Only `\n` ends a line of JSON lines. `str.splitlines` cuts at ten other characters, and a text file opened without
`newline` at one of them.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from components.train_qlora.data import IGNORE_INDEX, load_tokenized_dataset
from components.validate_data.step import run
from qlora_retrain.config.data import DataConfig
from qlora_retrain.evaluation import reference_text
from qlora_retrain.evaluation.rows import RowScore, read_rows, read_scores, write_scores
from qlora_retrain.lm.chat import load_tokenizer
from qlora_retrain.lm.chat_format import ChatFormat

LINE_BREAKS = ("\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")
PLACES = ("{0}a{1}b", "a{1}{1}b{0}", "{0}, and a sentence{1}{1} that goes on{1}here")
PAIRS = {
    place.format(f"question {i} {n}", line_break): f"answer{line_break}{i} {n}"
    for n, place in enumerate(PLACES)
    for i, line_break in enumerate(LINE_BREAKS)
}


def jsonl(rows: list[dict[str, str]]) -> bytes:
    # As other programs write it: only JSON's own control characters are escaped.
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def comma_separated(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["prompt", "response"], quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, str]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


FORMS = {
    "rows.jsonl": jsonl,
    "rows.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1).encode(),
    "rows.csv": comma_separated,
    "rows.parquet": parquet,
}


def gate(folder: Path, tiny_model: Path, name: str) -> Path:
    """Run the data gate on the pairs in a file of this form, and return the data set."""
    (folder / "raw").mkdir(parents=True)
    rows = [{"prompt": prompt, "response": answer} for prompt, answer in PAIRS.items()]
    (folder / "raw" / name).write_bytes(FORMS[name](rows))
    (folder / "dataset").mkdir()
    config = DataConfig(
        split_seed="line",
        eval_fraction=0.3,
        min_train_rows=1,
        min_eval_prompts=1,
        system="Be\u2028brief.\x85",
        checks={"control_characters": "warn", "mojibake": "warn", "near_evaluation": "off"},
    )
    report = run(config, folder / "raw", tiny_model, None, None, None, None, folder / "dataset")
    assert report.numbers["rows_read"] == len(PAIRS)
    assert report.numbers["rows_quarantined"] == 0
    return folder / "dataset"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines in the plainest way."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_gives_the_texts_as_they_are(tmp_path: Path, tiny_model: Path, name: str) -> None:
    dataset = gate(tmp_path, tiny_model, name)
    rows = [row for split in ("train", "eval") for row in rows_of(dataset / f"{split}.jsonl")]
    assert {row["messages"][-2]["content"]: row["messages"][-1]["content"] for row in rows} == PAIRS
    assert {row["messages"][0]["content"] for row in rows} == {"Be\u2028brief.\x85"}
    # A program that cuts at every one of these characters finds whole rows too.
    text = (dataset / "train.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == rows_of(dataset / "train.jsonl")


def test_training_and_evaluation_read_the_rows_that_were_written(tmp_path: Path, tiny_model: Path) -> None:
    dataset = gate(tmp_path, tiny_model, "rows.jsonl")
    tokenizer = load_tokenizer(tiny_model, ChatFormat.from_folder(dataset))
    for split in ("train", "eval"):
        rows = rows_of(dataset / f"{split}.jsonl")
        examples = load_tokenized_dataset(dataset / f"{split}.jsonl", tokenizer).examples
        supervised = [
            tokenizer.tokenizer.decode([token for token in example["labels"] if token != IGNORE_INDEX])
            for example in examples
        ]
        answers = [row["messages"][-1]["content"] for row in rows]
        assert [text.removesuffix("<|im_end|>") for text in supervised] == answers

        scored = read_rows(dataset / f"{split}.jsonl", split)
        assert [(row.id, list(row.messages)) for row in scored] == [(row["id"], row["messages"]) for row in rows]


def test_scores_hold_such_characters_in_labels_and_slices(tmp_path: Path) -> None:
    scores = {
        "challenger": [
            RowScore(f"row {i}", "eval", 1.5, 2, predicted=f"a{line_break}b", slices=(f"label=a{line_break}b",))
            for i, line_break in enumerate(LINE_BREAKS)
        ]
    }
    write_scores(tmp_path / "scores.jsonl", scores)
    assert read_scores(tmp_path / "scores.jsonl") == scores


def test_reference_text_is_cut_at_line_ends_and_blank_lines_alone(tmp_path: Path) -> None:
    texts = [f"a{line_break}b" for line_break in LINE_BREAKS]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl([{"text": text} for text in texts]))
    assert reference_text.read_passages(tmp_path) == texts

    # In plain text, carriage returns end lines, as in every text file; form feeds and the like do not.
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.txt").write_bytes("\r\n\r\n".join(texts[3:]).encode())
    assert reference_text.read_passages(tmp_path) == texts[3:]
