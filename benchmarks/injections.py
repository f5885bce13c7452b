"""Inject defects of every kind into a file of labelled texts, and count how many of them the data gate finds.

For each kind the gate runs once on the file with some rows changed, and once on the file as it is; a row that a check
finds in the latter is a false alarm, unless a person would call it right. Prints a Markdown table: recall, and false
alarms as a fraction of the clean rows. `injected_defects.py` generates what is injected.

Command: `python benchmarks/injections.py [FILE.csv] [--text FIELD --label FIELD] [--count 50] [--base FOLDER]`
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]

from benchmarks.injected_defects import EDITS, text_defects  # noqa: E402

BASE = PROJECT / ".state" / "base" / "smollm2-135m-instruct"
DEMO = PROJECT / "pipelines" / "demo" / "tickets.jsonl"
Rows = list[tuple[str, str]]
Edit = Callable[[list[str], random.Random], list[str]]
MIN_WORDS = 8  # of a question that is copied: with fewer, one edit makes another question


def run_gate(rows: Rows, base: Path, golden: Rows | None = None) -> dict[str, set[str]]:
    """Run the data gate, and return by check the texts of the rows that it found; every check only warns."""
    from components.validate_data.gate_rows import read_gate_rows
    from qlora_retrain.config.data import DataConfig
    from qlora_retrain.lm import conversations
    from qlora_retrain.lm.chat import load_tokenizer
    from qlora_retrain.lm.chat_format import ChatFormat

    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("raw", rows), ("golden", golden or [])):
            Path(folder, name).mkdir()
            lines = [json.dumps({"prompt": text, "response": label}) + "\n" for text, label in content]
            Path(folder, name, "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        config = DataConfig(split_seed="injections", task="labels")
        config = DataConfig(split_seed="injections", task="labels", checks=dict.fromkeys(config.checks, "warn"))
        tokenizer = load_tokenizer(base, ChatFormat.from_config(config))
        gate = read_gate_rows(config, tokenizer, Path(folder, "raw"), Path(folder, "golden") if golden else None, None)

    hits: dict[str, set[str]] = {name: set() for name in config.checks}
    for row in gate.rows:
        text = conversations.turn_text(row.messages[0]) if row.messages else ""
        for name in row.hits:
            hits[name].add(text)
        hits.setdefault(row.split or row.reason or "", set()).add(text)
    return hits


def measure(rows: Rows, count: int, base: Path) -> Iterator[tuple[str, int, int, float]]:
    """Yield of each kind of defect how many were found of how many, and the fraction of false alarms."""
    rng, defects = random.Random(0), text_defects()
    clean = run_gate(rows, base)
    # The text defects all in one file, at different rows; each check must find its own.
    places = rng.sample(range(len(rows)), count * len(defects))
    changed, injected = list(rows), {defect.kind: set[str]() for defect in defects}
    for i, defect in zip(places, defects * count, strict=True):
        text = defect.change(rows[i][0], rng)
        changed[i] = text, rows[i][1]
        injected[defect.kind].add(text)
    hits = run_gate(changed, base)
    for defect in defects:
        texts = injected[defect.kind]
        false_alarms = len(set().union(*(clean[check] for check in defect.checks))) / len(rows)
        num_hits = len(texts & set().union(*(hits[check] for check in defect.checks)))
        yield defect.kind, num_hits, len(texts), false_alarms

    # Near-copies: of evaluation rows, and of golden rows that stand in another file.
    by_text = dict(rows)
    false_alarms = len(clean["near_evaluation"]) / len(rows)
    for source, texts in (("evaluation", clean["eval"]), ("golden", clean["train"])):
        originals = sorted(text for text in texts if len(text.split()) >= MIN_WORDS)
        copies = {kind: _edit(rng.sample(originals, count), edit, rng) for kind, edit in EDITS.items()}
        copied_rows = [(copy, by_text[text]) for pairs in copies.values() for copy, text in pairs]
        golden_texts = {text for pairs in copies.values() for _, text in pairs} if source == "golden" else set()
        golden = [(text, by_text[text]) for text in sorted(golden_texts)]
        hits = run_gate([*(row for row in rows if row[0] not in golden_texts), *copied_rows], base, golden)
        # A copy that the hash sends to the evaluation as well is no leak.
        safe = hits["eval"] | hits.get("exact_duplicate", set()) | hits.get("in_golden_set", set())
        for kind, pairs in copies.items():
            leaks = {copy for copy, _ in pairs} - safe
            num_safe = len({copy for copy, _ in pairs}) - len(leaks)
            num_found = len(leaks & hits["near_evaluation"]) + num_safe
            yield f"copies of {source} rows: {kind}", num_found, len(leaks) + num_safe, false_alarms


def _edit(texts: Sequence[str], edit: Edit, rng: random.Random) -> list[tuple[str, str]]:
    """Return each text that the edit changes, edited, with the text itself."""
    pairs = [(" ".join(edit(text.split(), rng)), text) for text in texts]
    return [(copy, text) for copy, text in pairs if copy != text]


def measure_labels(rows: Rows, count: int, base: Path) -> Iterator[tuple[str, int, int, float]]:
    """Yield the same of labels that are flipped to another one, and of labels that are misspelt."""
    rng = random.Random(1)
    clean = run_gate(rows, base)
    labels = sorted({label for _, label in rows})
    places = rng.sample(range(len(rows)), 6 * count)

    # Flipped ones are five times as many: the share of wrong labels is a part of what the classifier estimates.
    flipped = list(rows)
    for i in places[: 5 * count]:
        flipped[i] = rows[i][0], rng.choice([label for label in labels if label != rows[i][1]])
    texts = {rows[i][0] for i in places[: 5 * count]}
    hits = run_gate(flipped, base)
    good = {text for text, _ in rows} - texts
    yield "flipped labels", len(texts & hits["label_errors"]), len(texts), len(good & hits["label_errors"]) / len(rows)

    misspelt = list(rows)
    for i in places[5 * count :]:
        label = rows[i][1]
        k = rng.randrange(1, len(label) - 2)
        misspelt[i] = rows[i][0], rng.choice((label[:k] + label[k + 1] + label[k] + label[k + 2 :], label.upper()))
    texts = {rows[i][0] for i in places[5 * count :] if misspelt[i][1] != rows[i][1]}
    hits = run_gate(misspelt, base)
    yield (
        "misspelt labels",
        len(texts & hits["misspelt_labels"]),
        len(texts),
        len(clean["misspelt_labels"]) / len(rows),
    )


def read_file(path: Path, text_field: str, label_field: str) -> Rows:
    """Read the texts and labels of a CSV file, or the good rows of the demo."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [(row[text_field], row[label_field]) for row in csv.DictReader(file)]
    records = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [r for r in records if isinstance(r, list) and len(r) == 2 and isinstance(r[0]["content"], str)]
    return [(prompt["content"], answer["content"]) for prompt, answer in pairs if prompt["content"]]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--text", default="text", help="the field of the text, in a CSV file")
    parser.add_argument("--label", default="category", help="the field of the label, in a CSV file")
    parser.add_argument("--count", type=int, default=40, help="defects of each kind")
    parser.add_argument("--base", type=Path, default=BASE)
    arguments = parser.parse_args()

    rows = read_file(arguments.file, arguments.text, arguments.label)
    results = [*measure(rows, arguments.count, arguments.base), *measure_labels(rows, arguments.count, arguments.base)]
    print(f"{len(rows):,} rows\n\n| defect | found | of | recall | false alarms |\n|---|---|---|---|---|")
    for name, num_found, num_injected, false_alarms in results:
        print(f"| {name} | {num_found} | {num_injected} | {num_found / num_injected:.0%} | {false_alarms:.2%} |")


if __name__ == "__main__":
    main()
