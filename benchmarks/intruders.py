"""Compare our search for intruder dimensions with the two full singular value decompositions that define them.

Both process every n-th block of the model with its adapter, matrix by matrix in turn, on one thread. The table has the
CPU seconds, and the largest error of a cosine against decompositions in fp64.

Command: `python benchmarks/intruders.py --base-nf4 FOLDER --adapter FOLDER [--every 5]`
FOLDER is an artifact of a run; its path is in the step's log.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import process_time
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
TOP_K = 10


def main() -> None:
    """Measure, and print one line per shape and one for all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base-nf4", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--every", type=int, default=5, help="process every n-th block")
    options = parser.parse_args()

    import torch

    from components.evaluate import intruders
    from qlora_retrain.lm import loading, singular_vectors

    # One thread, so that CPU seconds are comparable.
    torch.set_num_threads(1)
    model: Any = loading.attach_adapter(loading.load_nf4(options.base_nf4, dtype="float32"), options.adapter)
    seconds: dict[tuple[int, ...], list[float]] = {}  # by shape: those of ours, those of two SVDs
    largest_error = [0.0, 0.0]
    with torch.inference_mode():
        for name, base, tuned in intruders.weight_pairs(model):
            # A path such as model.layers.5.mlp.up_proj names its block by the first number.
            block = next((int(part) for part in name.split(".") if part.isdigit()), 0)
            if block % options.every:
                continue
            # In fp64, to measure the errors; not timed.
            exact = similarities_by_definition(base.double(), tuned.double())
            elapsed = seconds.setdefault(tuple(base.shape), [0.0, 0.0])
            methods = (lambda b, t: singular_vectors.max_similarities(b, t, TOP_K), similarities_by_definition)
            for i, method in enumerate(methods):
                started = process_time()
                similarities = method(base, tuned)
                elapsed[i] += process_time() - started
                largest_error[i] = max(largest_error[i], float((similarities.double() - exact).abs().max()))

    print("matrix           ours, CPU s   two SVDs   ratio")
    total = [sum(elapsed[i] for elapsed in seconds.values()) for i in (0, 1)]
    for shape, (ours, theirs) in [*seconds.items(), ("all", total)]:
        print(f"{shape!s:15}  {ours:11.2f}   {theirs:8.2f}   {theirs / ours:5.1f}")
    print(f"largest error against fp64: ours {largest_error[0]:.1e}, two SVDs in fp32 {largest_error[1]:.1e}")


def similarities_by_definition(base: Any, tuned: Any) -> Any:
    """Compute the similarities directly by their definition, with two full decompositions."""
    import torch

    base_vectors, _, _ = torch.linalg.svd(base, full_matrices=False)
    tuned_vectors, _, _ = torch.linalg.svd(tuned, full_matrices=False)
    return (tuned_vectors[:, :TOP_K].T @ base_vectors).abs().amax(dim=1)


if __name__ == "__main__":
    main()
