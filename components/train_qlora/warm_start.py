"""Start from the adapter of the version in production, as it ships: A and B of each layer, with delta W = B A.

Reads champion_adapter: `adapter/` of that version, and `data/profile.json`, which says how its data was split.
Refuses (12) evaluation rows that the version may have learnt, and an adapter of other layers or of a larger rank.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_retrain.core import graph, progress
from qlora_retrain.core.errors import IntegrityError, UsageError

_PREFIX = "base_model.model."  # of PEFT, before a layer's path
# A rank whose part of B A is below this share of the largest one's is padding, or the rounding of a cut.
_MIN_SHARE = 1e-6
_RESERVED_SOURCES = ("golden_data/", "eval_data/")
Matrices = tuple[Tensor, Tensor]


def read(champion_adapter: Path, dataset: Path) -> dict[str, Matrices]:
    """Return A (rank, in) and B (out, rank) of each layer, by its path in the model.

    Raises:
        UsageError: If rows that the champion has learnt may be evaluation rows of this data set.
        IntegrityError: If the adapter is no plain LoRA, as versions hold it.
    """
    _compare_evaluation(champion_adapter / graph.PROFILE_PATH, dataset)
    folder = champion_adapter / graph.ADAPTER_PART
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config["r"] != config["lora_alpha"] or config["use_rslora"] or config["use_dora"]:
        raise IntegrityError("champion_adapter: expected plain LoRA whose alpha is its rank, as versions hold it")
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {
        name.removeprefix(_PREFIX): (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"])
        for name in sorted(names)
    }


def refuse_other_layers(start: Mapping[str, Matrices], paths: Collection[str]) -> None:
    """Refuse an adapter of other layers than those that train.

    Raises:
        UsageError: With one of these layers.
    """
    if differing := sorted(set(start).symmetric_difference(paths)):
        owner = "the adapter in production" if differing[0] in start else "this run's adapter"
        raise UsageError(
            f"train.start: champion: {owner} alone adapts {differing[0]}; set train.target_modules as it was, or "
            "train.start: base"
        )


@torch.no_grad()  # type: ignore[untyped-decorator]
def fill(parameters: Matrices, start: Matrices, scale: float) -> None:
    """Copy a layer's start into its A and B. Further ranks stay those of a new adapter, which change nothing.

    Args:
        parameters: A and B of a new adapter.
        start: A and B with delta W = B A.
        scale: What the forward pass multiplies B A by.

    Raises:
        UsageError: If the start has more ranks than the layer.
    """
    shares = torch.linalg.vector_norm(start[0], dim=1) * torch.linalg.vector_norm(start[1], dim=0)  # (rank,)
    is_used = shares > _MIN_SHARE * shares.max()
    a, b = start[0][is_used], start[1][:, is_used]
    if len(a) > len(parameters[0]):
        raise UsageError(
            f"train.start: champion: the adapter in production has rank {len(a)} in a layer where this run has "
            f"{len(parameters[0])}; set train.rank or train.rank_pattern to as much, or train.start: base"
        )
    parameters[0][: len(a)] = a.to(parameters[0])
    parameters[1][:, : len(a)] = b.to(parameters[1]) / scale


def _compare_evaluation(champion_profile: Path, dataset: Path) -> None:
    """Compare what evaluates with what did for the champion, which has learnt the other rows.

    Raises:
        UsageError: If a larger fraction of the rows is evaluation.
    """
    # The profile of an older release's version lacks what was not measured then.
    before, now = (
        json.loads(path.read_text(encoding="utf-8")) for path in (champion_profile, dataset / "profile.json")
    )
    fraction_before, fraction = (profile.get("split", {}).get("eval_fraction") for profile in (before, now))
    if fraction_before is not None and fraction is not None and fraction > fraction_before:
        raise UsageError(
            f"train.start: champion: {fraction:.3g} of the prompts are evaluation now, and {fraction_before:.3g} were "
            "for the version in production, which has learnt some of them; give more rows, set data.eval_fraction to "
            "as much as before, or train.start: base"
        )
    if _reserved_files(now) - _reserved_files(before):
        progress.say(
            "golden_data or eval_data is not what it was for the version in production: rows of them that it has "
            "learnt are known already; train.start: base begins anew"
        )


def _reserved_files(profile: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Return the golden and evaluation files of a data set, with their hashes."""
    return {(path, pin) for path, pin in profile.get("data_pins", {}).items() if path.startswith(_RESERVED_SOURCES)}
