"""How long finding intruder dimensions takes, beside the two full singular value decompositions that define them.

Every n-th block of the model with its adapter is looked at by both, matrix by matrix in turn, on one thread: CPU
seconds, and the largest difference of a cosine to that of decompositions in fp64.

Command: `python benchmarks/intruders.py --base-nf4 FOLDER --adapter FOLDER [--every 5]`
FOLDER is an artifact of a run; its place is in the step's log.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import process_time
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
TOP = 10


def main() -> None:
    """Measure, and print a line for each shape and one for all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base-nf4", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--every", type=int, default=5, help="look at every so manyth block")
    options = parser.parse_args()

    import torch

    from components.evaluate import intruders
    from qlora_retrain.lm import loading

    torch.set_num_threads(1)
    model: Any = loading.attach(loading.load_nf4(options.base_nf4, dtype="float32"), options.adapter)
    seconds: dict[tuple[int, ...], list[float]] = {}
    furthest = [0.0, 0.0]
    with torch.inference_mode():
        for name, base, tuned in intruders.pairs(model):
            block = next((int(part) for part in name.split(".") if part.isdigit()), 0)
            if block % options.every:
                continue
            exact = defined(base.double(), tuned.double())
            spent = seconds.setdefault(tuple(base.shape), [0.0, 0.0])
            for i, how in enumerate((lambda b, t: intruders.similarity(b, t, TOP), defined)):
                started = process_time()
                found = how(base, tuned)
                spent[i] += process_time() - started
                furthest[i] = max(furthest[i], float((found.double() - exact).abs().max()))
    print("matrix           ours, CPU s   two SVDs   ratio")
    total = [sum(spent[i] for spent in seconds.values()) for i in (0, 1)]
    for shape, (ours, theirs) in [*seconds.items(), ("all", total)]:
        print(f"{shape!s:15}  {ours:11.2f}   {theirs:8.2f}   {theirs / ours:5.1f}")
    print(f"furthest from fp64: ours {furthest[0]:.1e}, two SVDs in fp32 {furthest[1]:.1e}")


def defined(base: Any, tuned: Any) -> Any:
    """The definition as it is written."""
    import torch

    old, _, _ = torch.linalg.svd(base, full_matrices=False)
    new, _, _ = torch.linalg.svd(tuned, full_matrices=False)
    return (new[:, :TOP].T @ old).abs().amax(dim=1)


if __name__ == "__main__":
    main()
