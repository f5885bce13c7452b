"""Measure the data gate on generated chats: CPU time and peak memory, beside `datasets.map` on the same rows.

The peer renders each chat by the tokenizer's chat template and tokenizes it, as a training script does, and checks
nothing. Each contestant is a process of its own. Prints a Markdown table with a row for each number of chats.

Command: `python benchmarks/validate_data.py [--rows 10000 100000 1000000] [--base FOLDER] [--set CHECK=SEVERITY]`
Needs about 250 MB of disk and 1.5 GB of memory for a million chats.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
BASE = PROJECT / ".state" / "base" / "smollm2-135m-instruct"
CONTESTANTS = ("gate", "datasets.map")
MIB = 2**20

SUBJECTS = (
    "order parcel invoice account password card kettle router lamp refund voucher delivery warranty screen".split()
)
VERBS = "arrived vanished broke stopped changed expired blinked failed doubled leaked restarted froze moved".split()
PLACES = "kitchen office garden cellar shop depot station hotel school studio harbour market airport".split()


def write_chats(path: Path, num_rows: int, long_rows: int = 0) -> None:
    """Write chats of about 60 words, no two alike; one in fifty has a further question.

    Args:
        path: The file to write.
        num_rows: How many chats.
        long_rows: How many further chats, each of 8 million characters.
    """
    generator = random.Random(0)
    words = [f"{first}{last}" for first in ("re", "un", "over", "under", "mis") for last in VERBS] + SUBJECTS + PLACES

    def sentence(length: int) -> str:
        return " ".join(generator.choices(words, k=length)).capitalize() + "."

    with path.open("w", encoding="utf-8") as file:
        for i in range(num_rows):
            turns = [{"role": "user", "content": f"{sentence(20)} My case is {i}. {sentence(8)}"}]
            turns += [{"role": "assistant", "content": f"{sentence(15)} {sentence(12)}"}]
            if i % 50 == 0:
                turns += [
                    {"role": "user", "content": sentence(6)},
                    {"role": "assistant", "content": sentence(9)},
                ]
            file.write(json.dumps({"messages": turns}) + "\n")
        for i in range(long_rows):
            turns = [{"role": "user", "content": f"{i} {sentence(1000)} " * (8_000_000 // len(sentence(1000)))}]
            file.write(json.dumps({"messages": [*turns, {"role": "assistant", "content": sentence(8)}]}) + "\n")


def run_gate(raw: Path, base: Path, work: Path, checks: dict[str, str]) -> None:
    """Run the data gate on the folder."""
    from components.validate_data.step import run
    from qlora_retrain.config.data import DataConfig

    dataset = work / "dataset"
    dataset.mkdir()
    run(DataConfig(split_seed="benchmark", checks=checks), raw, base, None, None, None, None, dataset)


def run_map(raw: Path, base: Path, work: Path) -> None:
    """Render and tokenize the same chats by `datasets.map`, in one process."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = datasets.load_dataset("json", data_files=str(raw / "chats.jsonl"), split="train", cache_dir=str(work))
    # In batches, and each chat by itself: the two ways in which scripts do it; this one is the faster.
    rows.map(
        lambda batch: tokenizer.apply_chat_template(batch["messages"], return_dict=True), batched=True, batch_size=1000
    )


def measure(
    contestant: str, num_rows: int, base: Path, checks: Sequence[str] = (), long_rows: int = 0
) -> dict[str, float]:
    """Return seconds of CPU and of the clock, and the peak of resident memory in bytes, of a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw")
        raw.mkdir()
        write_chats(raw / "chats.jsonl", num_rows, long_rows)
        command = [sys.executable, __file__, "--contestant", contestant, "--work", folder, "--base", str(base)]
        command += ["--set", *checks] if checks else []
        # As in the step: the tokenizer's own threads, and no progress on the screen.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        numbers: dict[str, float] = json.loads(output.splitlines()[-1])
        return numbers


def run_contestant(arguments: argparse.Namespace) -> None:
    """Do the work in this process, and print what it took."""
    start = time.perf_counter()
    raw = arguments.work / "raw"
    if arguments.contestant == "gate":
        run_gate(raw, arguments.base, arguments.work, dict(text.split("=") for text in arguments.set))
    else:
        run_map(raw, arguments.base, arguments.work)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    numbers = {
        "cpu": usage.ru_utime + usage.ru_stime,
        "clock": time.perf_counter() - start,
        "peak": usage.ru_maxrss * 1024,
    }
    print(json.dumps(numbers))


def main() -> None:
    """Measure the contestants in turn, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--set", nargs="*", default=[], metavar="CHECK=SEVERITY", help="as data.checks")
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        return run_contestant(arguments)

    print("| chats | contestant | CPU s | µs a chat | clock s | peak MiB |\n|---|---|---|---|---|---|")
    for num_rows in arguments.rows:
        for contestant in arguments.contestants:
            m = measure(contestant, num_rows, arguments.base, arguments.set)
            per_chat = m["cpu"] / num_rows * 1e6
            print(
                f"| {num_rows:,} | {contestant} | {m['cpu']:.1f} | {per_chat:.0f} | {m['clock']:.1f} "
                f"| {m['peak'] / MIB:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
