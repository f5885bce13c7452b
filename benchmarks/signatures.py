"""What signing costs: seconds and bytes that it adds to a run of six steps and to a pull.

The steps compute nothing, so that what is left is the pipeline's own work: plan, manifests, copies, hashes, aliases.
Stores with and without keys take turns. The share of a real run is that of a run which lasts `--run-seconds`.

Command: `python benchmarks/signatures.py [--mib 256] [--rounds 7] [--run-seconds 274]`
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from components.publish.step import run as publish
from qlora_retrain.core import graph
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import execute, make_plan
from qlora_retrain.storage import open_store, pull, registry

_LINE = "line: signatures\nsources:\n  raw_data: rows.jsonl\n  base_model: base\ntrain:\n  device: cpu\n"
_VERDICT = '{"verdict": "pass", "sentence": "It may ship.", "rules": [], "contestants": {}}'


def stub_step(step: graph.Step, model_bytes: int) -> Callable[..., StepResult]:
    """Return a step that writes the files that `publish` copies, and computes nothing."""

    def run(**arguments: Any) -> StepResult:
        output: Path = arguments[step.makes]
        for name in ("report.html", "profile.json", "training.json", "certificate.json", "config.json"):
            (output / name).write_text("{}")
        (output / "evaluation.json").write_text(_VERDICT)
        with (output / "model.safetensors").open("wb") as file:
            file.truncate(model_bytes if step.name == graph.producer_name("model") else 1)
        return StepResult({"steps": 1})

    names = ["config", step.makes, *(item.name for item in step.reads), *(["scratch"] if step.scratch else [])]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    )
    return run


def make_line(folder: Path) -> Path:
    """Write a line whose base has a configuration and no weights to speak of."""
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "base" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (folder / "rows.jsonl").write_text("{}\n")
    (folder / "line.yaml").write_text(_LINE)
    return folder / "line.yaml"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Print nothing."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def one_round(folder: Path, model_bytes: int) -> dict[str, float]:
    """Plan, run six steps and pull in a new store; return seconds, and the bytes of the store's documents."""
    line, root = make_line(folder), (folder / "store").as_uri()
    times = {}
    with quiet():
        clock = time.perf_counter()
        plan = make_plan.make_plan(line, root)
        for step in graph.STEPS:
            run = publish if step.kind == graph.StepKind.PUBLISH else stub_step(step, model_bytes)
            assert execute.run_step(plan, step.name, lambda run=run: run).code == 0  # type: ignore[misc]
        times["run"] = time.perf_counter() - clock

        clock = time.perf_counter()
        release = pull.pull(open_store(root), f"{plan.line}@{registry.PRODUCTION}", folder / "pulled")
        times["pull"] = time.perf_counter() - clock
        clock = time.perf_counter()
        registry.verify_version(open_store(root), release)
        times["hash every byte"] = time.perf_counter() - clock

    documents = [p for p in (folder / "store").rglob("*.json") if p.name in ("plan.json", "_manifest.json")]
    documents += [p for p in (folder / "store" / "models").rglob("*.json") if p.parent.name in ("aliases", "audit")]
    documents += list((folder / "store" / "models").glob("*/versions/*/m*"))
    times["bytes"] = sum(p.stat().st_size for p in documents if p.is_file())
    return times


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mib", type=int, default=256, help="the size of the model (256)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each kind (7)")
    parser.add_argument("--run-seconds", type=float, default=274.0, help="how long a real run takes (the demo's: 274)")
    arguments = parser.parse_args()

    rounds: dict[str, list[dict[str, float]]] = {"with keys": [], "without": []}
    for number in range(arguments.rounds + 1):
        for kind, results in rounds.items():
            with tempfile.TemporaryDirectory(prefix="signatures-") as name:
                os.environ["XDG_CONFIG_HOME"] = f"{name}/config"
                # A container makes no keys for a new store.
                os.environ.pop("QLORA_RETRAIN_IMAGE", None)
                if kind == "without":
                    os.environ["QLORA_RETRAIN_IMAGE"] = "none"
                result = one_round(Path(name), arguments.mib * 2**20)
                if number:  # the first round of each kind imports and warms up
                    results.append(result)

    print(f"{'':<18}{'with keys':>12}{'without':>12}{'added':>12}")
    for measure in rounds["without"][0]:
        signed, unsigned = (statistics.median(r[measure] for r in results) for results in rounds.values())
        print(f"{measure:<18}{signed:>12.4g}{unsigned:>12.4g}{signed - unsigned:>12.4g}")
    pairs = zip(rounds["with keys"], rounds["without"], strict=True)
    added = statistics.median(signed["run"] - unsigned["run"] for signed, unsigned in pairs)
    print(f"signing adds {added:.3f} s to a run: {added / arguments.run_seconds:.3%} of {arguments.run_seconds:g} s")


if __name__ == "__main__":
    main()
