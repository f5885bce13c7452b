"""Make another adapter of a trained one: of a smaller rank, weaker, averaged with others, or with fewer intruders.

Reads an adapter folder and writes another one, always as plain LoRA: alpha is the rank, and the scale is in B. The
adapter that was trained is never changed. Computes in fp64 on the CPU and writes fp32.

DoRA's magnitudes stay as they are. Only B A is cut or weakened, so that the lengths of the rows remain those that were
trained. This is an approximation, and the measurement of the form judges it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from components.merge_adapter.lora import CONFIG_FILE, WEIGHTS_FILE, LoraAdapter
from qlora_retrain.core import progress
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import singular_vectors
from qlora_retrain.lm.adapter_scale import NESTED_METHODS
from qlora_retrain.lm.weight_files import TensorSpec, write_file

# The part of an intruder dimension that stays; what PEFT's `reduce_intruder_dimension` keeps by default.
INTRUDER_STRENGTH = 0.75

Matrices = tuple[Tensor, Tensor]  # A (rank, in) and B (out, rank), with delta W = B A
Change = Callable[[str, Tensor, Tensor], Matrices]
_LORA_SETTINGS = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}


def rank_of(adapter: Path) -> int:
    """Return the largest rank of any layer."""
    with LoraAdapter(adapter) as lora:
        return max(lora.rank(module) for module in lora.modules)


def has_magnitudes(adapter: Path) -> bool:
    """Return whether this is a DoRA adapter."""
    with LoraAdapter(adapter) as lora:
        return bool(lora.config.get("use_dora"))


def cut(adapter: Path, folder: Path, rank: int) -> None:
    """Write the adapter with a smaller rank.

    DyLoRA trained every smaller rank, so its cut is the first rows of A and columns of B. Of any other adapter the cut
    is the best approximation of B A, by its singular values.

    Raises:
        UsageError: If the adapter has not so many ranks.
    """
    full_rank = rank_of(adapter)
    if rank > full_rank:
        raise UsageError(
            f"merge.rank: {rank} is more than the adapter has, which is {full_rank}; set {full_rank} or less, or full"
        )
    is_nested = _method(adapter) in NESTED_METHODS

    def change(module: str, a: Tensor, b: Tensor) -> Matrices:
        # Training scales rank b by alpha / b, and the file by alpha / full rank.
        return (a[:rank], b[:, :rank] * (full_rank / rank)) if is_nested else truncated(a, b, rank)

    _rewrite(adapter, folder, rank, change, "cutting the adapter")


def average(adapter: Path, others: Sequence[Path], folder: Path) -> None:
    """Write the mean of B A of several adapters, cut to the rank of the first.

    The mean of n products is one product of all their A and B, divided by n. So it is exact until it is cut.

    Raises:
        IntegrityError: If they are not B A in the same layers.
    """
    rank = rank_of(adapter)
    with ExitStack() as stack:
        first, *further = [stack.enter_context(LoraAdapter(path)) for path in (adapter, *others)]
        for path, earlier in zip(others, further, strict=True):
            if earlier.modules != first.modules or earlier.config.get("use_dora"):
                raise IntegrityError(
                    f"earlier_adapters: {path.parent.name}: expected LoRA in the {len(first.modules)} layers of this "
                    "run's adapter; set merge.soup: null"
                )

        def change(module: str, a: Tensor, b: Tensor) -> Matrices:
            updates = [(a, b), *(earlier.update(module) for earlier in further)]
            joined_a = torch.cat([update[0] for update in updates])  # (sum of ranks, in)
            joined_b = torch.cat([update[1] for update in updates], 1)  # (out, sum of ranks)
            return truncated(joined_a, joined_b / len(updates), rank)

        _rewrite(adapter, folder, rank, change, "averaging adapters")


def weaken(adapter: Path, folder: Path, strength: float) -> None:
    """Write the adapter with its update multiplied by `strength`."""
    _rewrite(adapter, folder, rank_of(adapter), lambda module, a, b: (a, b * strength), "weakening the adapter")


def reduce_intruders(
    adapter: Path, folder: Path, weight_of: Callable[[str], Tensor], top_k: int, epsilon: float
) -> int:
    """Write the adapter with the intruder dimensions of W + B A scaled down, and return their number.

    An intruder u is scaled down by subtracting (1 - INTRUDER_STRENGTH) u u^T (W + B A). This adds a rank, so the sum is
    cut back to the adapter's rank.

    Args:
        adapter: A LoRA adapter, not a DoRA one, whose magnitudes would scale the rows after this.
        folder: Where the result goes.
        weight_of: Returns W of a module, (out, in).
        top_k: The number of each layer's strongest directions that are looked at.
        epsilon: The cosine below which a direction is an intruder.
    """
    rank, num_intruders = rank_of(adapter), 0

    def change(module: str, a: Tensor, b: Tensor) -> Matrices:
        nonlocal num_intruders
        weight = weight_of(module).float()
        tuned = torch.addmm(weight, b.float(), a.float())
        directions = singular_vectors.intruders(weight, tuned, top_k, epsilon)  # (out, intruders)
        num_intruders += directions.shape[1]
        if not directions.shape[1]:
            return a, b
        rows = (directions.T.float() @ tuned).double()  # (intruders, in)
        return truncated(torch.cat([a, rows]), torch.cat([b, (INTRUDER_STRENGTH - 1) * directions], 1), rank)

    _rewrite(adapter, folder, rank, change, "intruder dimensions")
    return num_intruders


def truncated(a: Tensor, b: Tensor, rank: int) -> Matrices:
    """Return the matrices of the best approximation of B A with this rank (Eckart and Young), in fp64.

    B A is decomposed through the QR decompositions of B and A^T. So no matrix of (out, in) is ever made.
    """
    q_b, r_b = torch.linalg.qr(b)  # (out, k), (k, r), with k the smaller of out and r
    q_a, r_a = torch.linalg.qr(a.T)  # (in, l), (l, r)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    b, a = q_b @ left[:, :rank], right[:rank] @ q_a.T

    # A pair of vectors may have either sign. The largest number of a column is positive, so that files are comparable.
    largest = b.gather(0, b.abs().argmax(0, keepdim=True))  # (1, rank)
    signs = torch.where(largest < 0, -1.0, 1.0)
    # The values are shared by both, so that neither has numbers of another size than the other.
    root = values[: b.shape[1]].sqrt()
    return a * (signs.view(-1, 1) * root.view(-1, 1)), b * (signs * root)


def _method(adapter: Path) -> str:
    """Return `train.method` of the adapter; empty where no training of ours made it."""
    path = adapter / "training.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return str(document.get("settings", {}).get("method", ""))


def _rewrite(adapter: Path, folder: Path, rank: int, change: Change, description: str) -> None:
    """Write the adapter with the matrices of each layer changed; layers with fewer ranks get rows of zeros.

    Args:
        adapter: The adapter.
        folder: A folder that does not exist yet.
        rank: The rank of all layers of the result.
        change: Returns a layer's matrices from its name, A and B, all in fp64; the scale is in B.
        description: The name of the work in the progress line.
    """
    folder.mkdir(parents=True)
    with LoraAdapter(adapter) as lora:
        # Written layer by layer, so that only one layer's matrices are in fp64.
        @lru_cache(maxsize=1)
        def changed(module: str) -> dict[str, Tensor]:
            a, b = change(module, *lora.update(module))
            missing = rank - len(a)
            tensors = {"A": pad(a, (0, 0, 0, missing)).float(), "B": pad(b, (0, missing)).float()}
            return tensors | lora.magnitudes(module)

        specs, parts = [], {}
        for module in lora.modules:
            for part, (name, shape) in lora.tensors(module, rank).items():
                specs.append(TensorSpec(name, torch.float32, shape))
                parts[name] = module, part

        def make_tensor(name: str) -> Tensor:
            module, part = parts[name]
            return changed(module)[part]

        def on_tensor(name: str) -> None:
            module, part = parts[name]
            if part == "B":
                progress.update(description, lora.modules.index(module) + 1, len(lora.modules))

        write_file(folder / WEIGHTS_FILE, specs, make_tensor, on_tensor)
        config: dict[str, Any] = {**lora.config, **_LORA_SETTINGS, "r": rank, "lora_alpha": rank}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
