"""Whether what usually serves adapters would take this one: warnings, since the merged model needs no such thing.

What each server does with `adapter_config.json` was read in its source (vLLM's `peft_helper.py` and `config/lora.py`,
TGI's `adapters/lora.py`, llama.cpp's `convert_lora_to_gguf.py`). Servers move on, so a warning refuses nothing.
What no merged model can come from (`modules_to_save`, trained biases) is refused before this is asked (`lora`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.merge_adapter.lora import Adapter

# vLLM's --max-lora-rank: the values that it takes, and the one it has where nothing is said.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16
# The linear layers of llama-like families; all three put LoRA on these.
_SERVED = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
_ENDS = frozenset(("lm_head", "embed_tokens"))


def read(adapter: Path) -> list[str]:
    """What is known against serving the adapter as it is, a sentence each."""
    with Adapter(adapter) as trained:
        return warnings(trained.config, trained.modules)


def warnings(config: Mapping[str, Any], modules: Sequence[str]) -> list[str]:
    """The same of a config and the names of the layers that it changes."""
    return [*_ranks(config), *_kinds(config), *_targets(modules)]


def _ranks(config: Mapping[str, Any]) -> list[str]:
    ranks = {int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values())}
    found = []
    if max(ranks) > _VLLM_RANKS[-1]:
        found.append(f"vLLM: rank {max(ranks)} is above {_VLLM_RANKS[-1]}, the most that --max-lora-rank takes")
    elif max(ranks) > _VLLM_DEFAULT_RANK:
        enough = next(rank for rank in _VLLM_RANKS if rank >= max(ranks))
        found.append(f"vLLM: rank {max(ranks)} is above its default; serve with --max-lora-rank {enough}")
    if len(ranks) > 1:
        found.append("vLLM, TGI: rank_pattern is not read, so modules with a rank of their own are scaled wrongly")
    if config.get("alpha_pattern"):
        found.append("vLLM, TGI, llama.cpp: alpha_pattern is not read; every module is scaled by lora_alpha")
    return found


def _kinds(config: Mapping[str, Any]) -> list[str]:
    found = []
    if config.get("use_dora"):
        found.append("vLLM, TGI, llama.cpp: DoRA is not supported; serve the merged model")
    if config.get("use_rslora"):
        found.append("llama.cpp: use_rslora is not read, so the adapter acts weaker than it was trained")
    return found


def _targets(modules: Sequence[str]) -> list[str]:
    names = {module.rsplit(".", 1)[-1] for module in modules}
    found = []
    if ends := sorted(names & _ENDS):
        found.append(f"vLLM, TGI, llama.cpp: not for every model is LoRA on {', '.join(ends)} supported")
    if strange := sorted(names - _SERVED - _ENDS):
        found.append(f"vLLM, TGI, llama.cpp: layers named {', '.join(strange)} may be unknown to the server")
    return found
