"""Measure the peak memory of every step of a small run, on real model folders, as multiples of the model's size.

Runs the demo line with few rows and few optimizer steps on each model, up to the merge, in a store of its own. The
steps are processes of their own, as in any run, and are watched from outside: their memory is read 50 times a second.
Prints a Markdown table with a row for each model. A cell has two multiples of the model's weights in 16 bits:

    anonymous    what the step's processes allocate (RssAnon, with shared memory); the system cannot drop it
    (resident)   the same with mapped files (RSS): weights that are read, libraries; the system can drop these pages

Python and the libraries alone are a part of both, the same for each model: see the step `validate_data`.

Command: `python benchmarks/peaks.py MODEL_FOLDER... [--rows 30] [--steps 4] [--set SECTION.FIELD=VALUE]`
Needs disk for 6 times the model in 16 bits, and memory for about 3 times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
LINE = PROJECT / "pipelines" / "support-intents.yaml"
STEPS = ("validate_data", "quantize_model", "train_qlora", "evaluate", "merge_adapter")
SECONDS_BETWEEN_SAMPLES = 0.02
GB = 1e9
LINES = {"reference_data": 10, "golden_data": 12}  # how many of the line's own are taken
# A small run whose rules nothing fails: what is measured is memory, and not quality.
SETTINGS = (
    "evaluate.primary_metric=loss",
    "evaluate.min_accuracy=0.0",
    "evaluate.min_gain_over_base=0.0",
    "evaluate.max_slice_regression=null",
    "evaluate.min_stopped_fraction=0.0",
    "evaluate.max_loss_to_champion=10.0",
    "evaluate.bootstrap_samples=200",
    "evaluate.stop_rows=8",
    "evaluate.train_rows=8",
    "evaluate.text_in_reports=false",
    "merge.base=dequantized",
    "merge.max_loss_increase_nats=10.0",
)


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of processes in bytes; shared memory counts as anonymous, since it has no file either."""

    anonymous: int = 0
    files: int = 0

    def __add__(self, process: Memory) -> Memory:
        return Memory(self.anonymous + process.anonymous, self.files + process.files)

    @classmethod
    def of_process(cls, pid: int) -> Memory:
        """Read a process's memory; nothing where it has ended."""
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return cls()
        sizes = {name: 1024 * int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines
                 if line.startswith("Rss"))}  # fmt: skip
        return cls(sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0), sizes.get("RssFile", 0))


@dataclass(slots=True)
class Peaks:
    """The peaks of one step, in bytes."""

    anonymous: int = 0
    resident: int = 0

    def add(self, memory: Memory) -> None:
        """Take one sample."""
        self.anonymous = max(self.anonymous, memory.anonymous)
        self.resident = max(self.resident, memory.anonymous + memory.files)


def main() -> None:
    """Measure every model, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=30, help="evaluation rows")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--work", type=Path, help="the folder for the store; a temporary one is removed at the end")
    options = parser.parse_args()

    rows = []
    for model in options.models:
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        settings = [f"sources.base_model={model.resolve()}", f"data.max_eval_rows={options.rows}",
                    f"train.max_steps={options.steps}", *SETTINGS, *own_settings(model), *options.settings]  # fmt: skip
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            peaks, seconds = run_line(settings, Path(work))
        rows.append((model.name, size, peaks))
        print(f"{model.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))


def own_settings(model: Path) -> list[str]:
    """Return the settings that a model of this family needs: a pretrained Gemma has no chat template."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    has_template = (model / "chat_template.jinja").is_file()
    return ["data.template=gemma"] if "gemma" in config["model_type"] and not has_template else []


def run_line(settings: Iterable[str], work: Path) -> tuple[dict[str, Peaks], float]:
    """Run the line up to the merge; return the peaks by step, and the seconds that all of it took."""
    command = [sys.executable, "-m", "qlora_retrain.cli", "run", str(LINE), "--root", (work / "store").as_uri(),
               "--until", STEPS[-1], *(f"--set={setting}" for setting in settings)]  # fmt: skip
    for source, count in LINES.items():
        name = f"{source.removesuffix('_data')}.jsonl"
        lines = (LINE.parent / "demo" / name).read_text(encoding="utf-8").split("\n")[:count]
        (work / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        command.append(f"--set=sources.{source}={work / name}")
    paths = os.pathsep.join([str(PROJECT / "src"), str(PROJECT)])
    environment = {**os.environ, "PYTHONPATH": paths, "QLORA_RETRAIN_CACHE": str(work / "cache")}
    environment |= {"TMPDIR": str(work), "HF_HUB_OFFLINE": "1"}

    started, peaks = time.monotonic(), defaultdict[str, Peaks](Peaks)
    log = work / "log"
    with log.open("wb") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process:
        while process.poll() is None:
            for step, memory in memory_by_step(process.pid).items():
                peaks[step].add(memory)
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}:\n" + log.read_text(errors="replace")[-4000:])
    return peaks, time.monotonic() - started


def memory_by_step(root: int) -> Mapping[str, Memory]:
    """Return by step the memory of its processes, among all descendants of a process."""
    sums = defaultdict[str, Memory](Memory)
    for pid, step in processes_of_steps(root, None):
        sums[step] += Memory.of_process(pid)
    return sums


def processes_of_steps(pid: int, step: str | None) -> Iterator[tuple[int, str]]:
    """Yield every process below this one that belongs to a step; a step's own processes belong to it too."""
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in map(int, children):
            child_step = step or step_of(child)
            if child_step:
                yield child, child_step
            yield from processes_of_steps(child, child_step)


def step_of(pid: int) -> str | None:
    """Return the step that a process's command line names."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next((step for step in STEPS if f"components.{step}" in words), None)


def table(rows: Iterable[tuple[str, int, Mapping[str, Peaks]]]) -> str:
    """Return the Markdown table of all models."""
    lines = [f"| model (weights in 16 bits) | {' | '.join(STEPS)} |", f"|---|{'---|' * len(STEPS)}"]
    for name, size, peaks in rows:
        cells = [f"{peaks[s].anonymous / size:.2f} ({peaks[s].resident / size:.2f})" for s in STEPS]
        lines.append(f"| {name} ({size / GB:.2f} GB) | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
