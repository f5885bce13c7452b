"""Measure what a line forgets over successive retrainings, and what a start from production, replay and averages save.

Five parts of BANKING77 that grow: each retraining has the rows of the parts before and new ones. Every variant is a
line in a store of its own, run by the ordinary pipeline, so that each version is judged against the one before it and
published:

    base              every retraining begins with a new adapter over the base
    champion          train.start: champion
    champion, replay  the same, with general rows among the training rows
    soup              as base, with merge.soup: 3

Writes, for each variant and part, the accuracy on test.csv and the loss on reference text of what shipped (the merged
model), and how much more that loss is than the untrained base's: nats per token forgotten. All variants have the same
number of optimizer steps, rows and seed.

Command: `python benchmarks/forgetting.py --data FOLDER [--steps 120]`, with BANKING77's train.csv and test.csv there.
`--work` holds the stores and the results, so the same command goes on where it was stopped. `--reference` and
`--replay` name folders of general text and of general chats; without them both are halves of the demo's few passages.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
BASE = PROJECT / ".state" / "base" / "smollm2-135m-instruct"
DEMO = PROJECT / "pipelines" / "demo" / "reference.jsonl"
NAME = "forgetting"
VARIANTS: Mapping[str, Sequence[str]] = {
    "base": (),
    "champion": ("train.start=champion",),
    "champion, replay": ("train.start=champion", "sources.replay_data=replay", "data.replay_fraction=0.2"),
    "soup": ("merge.soup=3",),
}
# Limits that no version fails: what is measured is what would have shipped.
LINE: Mapping[str, Any] = {
    "line": NAME,
    "data": {"prompt_field": "text", "response_field": "category", "task": "labels", "max_length_tokens": 256,
             "system": "Name the intent of the customer's message.", "max_quarantined_fraction": 1.0},
    "train": {"learning_rate": 1e-3, "dropout": 0.0, "micro_batch_size": 32, "global_batch_size": 32},
    "evaluate": {"allow_first_release": True, "min_gain_over_base": 0.0, "max_loss_to_champion": 1.0,
                 "max_forgetting_nats": None, "max_slice_regression": None, "min_stopped_fraction": 0.0,
                 "stop_rows": 0, "intruder_top_k": 0},
    "merge": {"max_loss_increase_nats": 10.0},
}  # fmt: skip


def main() -> None:
    """Run what is missing of each variant, and write the table and the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with BANKING77's train.csv and test.csv")
    parser.add_argument("--base", type=Path, default=BASE, help="the 16-bit model")
    parser.add_argument("--reference", type=Path, help="folder of general text, on which forgetting is measured")
    parser.add_argument("--replay", type=Path, help="folder of general chats that train beside the line's rows")
    parser.add_argument("--parts", type=int, default=5)
    parser.add_argument("--rows", type=int, default=10_000, help="rows of train.csv, over all parts")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each retraining")
    parser.add_argument("--eval-rows", type=int, default=500, help="rows of test.csv")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / NAME)
    options = parser.parse_args()

    results_file = options.work / "results.json"
    results = json.loads(results_file.read_text(encoding="utf-8")) if results_file.is_file() else {}
    for variant in options.only:
        folder = options.work / variant.replace(", ", "-")
        write_line(options, folder)
        for part in range(1, options.parts + 1):
            if str(part) in results.setdefault(variant, {}):
                continue
            write_part(options, folder, part)
            results[variant][str(part)] = measure(options, folder, VARIANTS[variant])
            print(f"{variant}, part {part}: {results[variant][str(part)]}", file=sys.stderr, flush=True)
            results_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.work / "forgetting.html").write_text(page(results), encoding="utf-8")
    print(table(results))


def write_line(options: argparse.Namespace, folder: Path) -> None:
    """Write the variant's line, its evaluation rows, and its general text where no folder was named."""
    for name in ("raw", "test", "reference", "replay"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    reference = options.reference.resolve() if options.reference else folder / "reference"
    replay = options.replay.resolve() if options.replay else folder / "replay"
    passages = [json.loads(line) for line in DEMO.read_text(encoding="utf-8").split("\n") if line]
    if not options.reference:
        write_jsonl(reference / "general.jsonl", passages[::2])
    if not options.replay:
        write_jsonl(replay / "general.jsonl", map(as_chat, passages[1::2]))

    write_rows(folder / "test" / "test.csv", shuffled_rows(options.data / "test.csv")[: options.eval_rows])
    sources = {"raw_data": "raw", "eval_data": "test", "base_model": str(options.base.resolve())}
    document = {**LINE, "sources": {**sources, "reference_data": str(reference)}}
    document["train"] = {**document["train"], "max_steps": options.steps}
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")


def write_part(options: argparse.Namespace, folder: Path, part: int) -> None:
    """Write the rows of the first parts, always the same ones."""
    rows = shuffled_rows(options.data / "train.csv")[: options.rows]
    write_rows(folder / "raw" / "train.csv", rows[: round(len(rows) * part / options.parts)])


def measure(options: argparse.Namespace, folder: Path, settings: Iterable[str]) -> dict[str, Any]:
    """Run the line once, and return the numbers of the version that it published.

    Raises:
        SystemExit: If the run does not publish.
    """
    store = folder / "store"
    overrides = [s.replace("=replay", f"={options.replay or folder / 'replay'}") for s in settings]
    command = [sys.executable, "-m", "qlora_retrain.cli", "run", str(folder / f"{NAME}.yaml"), "--root", store.as_uri()]
    command += [f"--set={setting}" for setting in (*overrides, *options.settings)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT / "src"), str(PROJECT)])}
    with (folder / "log").open("wb") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
    if code:
        text = (folder / "log").read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"{folder.name}: the run ended with {code}:\n{text[-4000:]}")

    alias = json.loads((store / f"models/{NAME}/aliases/production.json").read_text(encoding="utf-8"))
    version = store / f"models/{NAME}/versions/{alias['version']}"
    evaluation, certificate, training = (
        json.loads((version / path).read_text(encoding="utf-8"))
        for path in ("evaluation/evaluation.json", "evaluation/certificate.json", "training/training.json")
    )
    shipped = certificate["forms"]["certification"][certificate["form"]]
    reference = certificate["reference"]["merged"]["loss"]
    return {
        "version": alias["version"],
        "form": certificate["form"],
        "start": training["start"],
        "accuracy": shipped["accuracy"],
        "loss": shipped["loss"],
        "reference_loss": reference,
        "forgotten_nats": reference - evaluation["reference"]["base"]["loss"],
    }


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the results as a Markdown table, with a row for each variant and part."""
    lines = [
        "| variant | part | accuracy | task loss | forgotten, nats per token | shipped |",
        "|---|---|---|---|---|---|",
    ]
    for variant, parts in results.items():
        for part, numbers in sorted(parts.items(), key=lambda item: int(item[0])):
            lines.append(
                f"| {variant} | {part} | {numbers['accuracy']:.3f} | {numbers['loss']:.4f} | "
                f"{numbers['forgotten_nats']:.4f} | {numbers['form']} |"
            )
    return "\n".join(lines)


def page(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return a page with what each variant forgets and knows over the retrainings, and both against each other."""
    from qlora_retrain.core import html
    from qlora_retrain.core.html_scatter import ScatterPoint, scatter_chart

    def curves(name: str) -> dict[str, list[tuple[float, float]]]:
        return {v: sorted((float(part), n[name]) for part, n in parts.items()) for v, parts in results.items()}

    points = [
        ScatterPoint(f"{variant}, part {part}", numbers["forgotten_nats"], numbers["loss"])
        for variant, parts in results.items()
        for part, numbers in parts.items()
    ]
    last = {v: parts[max(parts, key=int)] for v, parts in results.items() if parts}
    sentence = "; ".join(
        f"{v}: a task loss of {n['loss']:.3f}, {n['accuracy']:.3f} accuracy, {n['forgotten_nats']:.3f} nats forgotten"
        for v, n in last.items()
    )
    return html.page(
        "Forgetting over successive retrainings",
        f"After the last part: {sentence}.",
        html.section(
            "Over the retrainings",
            html.line_chart(curves("forgotten_nats"), "part", "nats per token forgotten"),
            html.line_chart(curves("loss"), "part", "task loss, nats per token"),
            html.line_chart(curves("accuracy"), "part", "accuracy"),
        ),
        html.section("What each version knows and forgets", scatter_chart(points, "nats forgotten", "task loss")),
    )


def as_chat(passage: Mapping[str, Any]) -> dict[str, Any]:
    """Return a passage as a chat: a text is what the model answers to a request for one."""
    if "messages" in passage:
        return dict(passage)
    request = "Write a paragraph that begins with: " + " ".join(passage["text"].split()[:4])
    turns = [{"role": "user", "content": request}, {"role": "assistant", "content": passage["text"]}]
    return {"messages": turns}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with the columns text and category."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def shuffled_rows(path: Path) -> list[dict[str, str]]:
    """Read such a file in an order that is always the same: BANKING77's files are sorted by label."""
    rows = read_rows(path)
    random.Random(0).shuffle(rows)
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write such a file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("text", "category"))
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
