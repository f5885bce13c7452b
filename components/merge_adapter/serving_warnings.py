"""Warn where common servers cannot serve the adapter without merging; the merged model is not affected.

What each server does with `adapter_config.json` was read in its source (vLLM's `peft_helper.py` and `config/lora.py`,
TGI's `adapters/lora.py`, llama.cpp's `convert_lora_to_gguf.py`). Servers change, so a warning refuses nothing.
Adapters with trained biases are refused before this, in `lora`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.merge_adapter.lora import LoraAdapter
from qlora_retrain.lm.adapter_kind import IA3, LORA, adapter_kind

# The values that vLLM's --max-lora-rank allows, and its default.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16
# The linear layers of llama-like families; all three servers support LoRA on these.
_SUPPORTED_LAYERS = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
_EMBEDDINGS_AND_HEAD = frozenset(("lm_head", "embed_tokens"))


def read_warnings(adapter: Path) -> list[str]:
    """Return the warnings for the adapter in this folder, one sentence each; none where all weights trained."""
    kind = adapter_kind(adapter)
    if kind is None:
        return []
    if kind != LORA:
        remedy = "serve the merged model" if kind == IA3 else "serve it over its base with the library that trained it"
        return [f"vLLM, TGI, llama.cpp: adapters of the kind {kind} are not supported; {remedy}"]
    with LoraAdapter(adapter) as lora:
        return warnings(lora.config, lora.modules)


def warnings(config: Mapping[str, Any], modules: Sequence[str]) -> list[str]:
    """Return the warnings for an adapter_config.json and the names of the layers that the adapter changes."""
    return [*_rank_warnings(config), *_variant_warnings(config), *_layer_warnings(modules)]


def _rank_warnings(config: Mapping[str, Any]) -> list[str]:
    # A server must allow the largest rank of any module.
    ranks = {int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values())}
    messages = []
    if max(ranks) > _VLLM_RANKS[-1]:
        messages.append(f"vLLM: rank {max(ranks)} is above {_VLLM_RANKS[-1]}, the largest value of --max-lora-rank")
    elif max(ranks) > _VLLM_DEFAULT_RANK:
        smallest = next(rank for rank in _VLLM_RANKS if rank >= max(ranks))
        messages.append(f"vLLM: rank {max(ranks)} is above its default; serve with --max-lora-rank {smallest}")

    if len(ranks) > 1:
        messages.append("vLLM, TGI: rank_pattern is not read, so modules with a rank of their own are scaled wrongly")
    if config.get("alpha_pattern"):
        messages.append("vLLM, TGI, llama.cpp: alpha_pattern is not read; every module is scaled by lora_alpha")
    return messages


def _variant_warnings(config: Mapping[str, Any]) -> list[str]:
    messages = []
    if config.get("modules_to_save"):
        messages.append("vLLM, TGI, llama.cpp: modules_to_save are not read; serve the merged model")
    if config.get("use_dora"):
        messages.append("vLLM, TGI, llama.cpp: DoRA is not supported; serve the merged model")
    if config.get("use_rslora"):
        messages.append("llama.cpp: use_rslora is not read, so the adapter has a smaller effect than in training")
    return messages


def _layer_warnings(modules: Sequence[str]) -> list[str]:
    names = {module.rsplit(".", 1)[-1] for module in modules}
    messages = []
    if unsupported := sorted(names & _EMBEDDINGS_AND_HEAD):
        messages.append(f"vLLM, TGI, llama.cpp: LoRA on {', '.join(unsupported)} is not supported for every model")
    if unknown := sorted(names - _SUPPORTED_LAYERS - _EMBEDDINGS_AND_HEAD):
        messages.append(f"vLLM, TGI, llama.cpp: layers named {', '.join(unknown)} may be unknown to the server")
    return messages
