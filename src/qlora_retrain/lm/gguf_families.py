"""Tell which models can be written as GGUF, by config.json alone: the families, and what GGUF stores of each.

A GGUF file stores the settings of a model only where its family's reader asks for them. A setting that a reader does
not ask for has a fixed value there, and a model with another value would load and answer nonsense. It is refused (12).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_retrain.core.errors import UsageError

_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
_UNSCALED = ("default", "linear")


@dataclass(frozen=True, slots=True)
class Family:
    """A model family in GGUF.

    Attributes:
        arch: GGUF's name of the architecture.
        interleaved: Whether the two numbers of a rotary pair are neighbours; transformers has them half a head apart.
        norm_offset: What transformers adds to the weight of a norm; GGUF stores the sum.
        rope_types: The scalings of rotary embeddings that GGUF can store.
        fixed: The values of settings that GGUF does not store.
        sliding_period: One layer of so many sees the whole text; None where all do.
        has_sliding_window: Whether llama.cpp applies the sliding window.
    """

    arch: str
    interleaved: bool = False
    norm_offset: float = 0.0
    rope_types: tuple[str, ...] = _UNSCALED
    fixed: Mapping[str, Any] = field(default_factory=lambda: _SILU)
    sliding_period: int | None = None
    has_sliding_window: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family("llama", interleaved=True, rope_types=(*_UNSCALED, "llama3")),
    "MistralForCausalLM": Family("llama", interleaved=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Gemma2ForCausalLM": Family(
        "gemma2", norm_offset=1.0, rope_types=("default",), fixed=_GELU, sliding_period=2, has_sliding_window=True
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3",
        norm_offset=1.0,
        fixed={**_GELU, "use_bidirectional_attention": False, "attn_logit_softcapping": None},
        sliding_period=6,
        has_sliding_window=True,
    ),
    "Phi3ForCausalLM": Family("phi3", rope_types=("default", "longrope")),
    "GraniteForCausalLM": Family("granite", interleaved=True),
}
_FIXED_SETTINGS = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
# llama.cpp takes the largest model of each Gemma family by its number of layers, and scales its attention by the
# hidden size that a head has, and not by the head's size.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}


def architecture(config: Mapping[str, Any]) -> str:
    """Return the class that a config.json names, one of `FAMILIES`.

    Raises:
        UsageError: If it is none of them, or GGUF has no place for a setting.
    """
    name = str((config.get("architectures") or ["none"])[0])
    if name not in FAMILIES:
        raise UsageError(f"merge.exports: GGUF is written for {', '.join(FAMILIES)}; the base is {name}")

    family = FAMILIES[name]
    for rope in rope_settings(config):
        _refuse_rope(family, config, rope)
    if (sliding := rope_type(_rope(config).get("sliding_attention") or {})) != "default":
        raise _no_place("rope_parameters.sliding_attention.rope_type", sliding, "default")
    for setting, value in {**_FIXED_SETTINGS, **family.fixed}.items():
        if config.get(setting) not in (None, value):
            raise _no_place(setting, config[setting], value)
    if family.sliding_period:
        _refuse_gemma(family, config)
    elif family.arch == "phi3" and config.get("head_dim"):
        _refuse_other(config, "head_dim", config["hidden_size"] // config["num_attention_heads"])
    return name


def rope_settings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the settings of the rotary embeddings, one for each kind of layer that has its own."""
    rope = _rope(config)
    by_layer_type = [value for value in rope.values() if isinstance(value, Mapping)]
    return by_layer_type or [rope]


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers 5 writes `rope_parameters`; older config.json files have `rope_scaling`, and the oldest `type`.
    rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope


def rope_type(rope: Mapping[str, Any]) -> str:
    """Return the kind of scaling, by its name of today."""
    name = str(rope.get("rope_type", rope.get("type", "default")))
    return "longrope" if name == "su" else name


def reading_differences(config: Mapping[str, Any]) -> list[str]:
    """Return in one sentence each what llama.cpp computes in another way than transformers, for the certificate."""
    window, family = config.get("sliding_window"), FAMILIES[architecture(config)]
    differences = []
    if window and not family.has_sliding_window and window < config.get("max_position_embeddings", 0):
        differences.append(
            f"llama.cpp applies no sliding window, and the model has one of {window} tokens: a longer text is read in "
            "another way than in training"
        )
    if any(rope_type(rope) == "longrope" for rope in rope_settings(config)):
        differences.append(
            "llama.cpp chooses the rotary factors for long texts by the size of its context, and transformers by the "
            "length of the text: start it with a context no larger than the texts need"
        )
    return differences


def _refuse_rope(family: Family, config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    name = rope_type(rope)
    if name not in family.rope_types:
        raise UsageError(
            f"merge.exports: GGUF is written for rotary embeddings of the type {' or '.join(family.rope_types)} in "
            f"this family; the base has {name}"
        )
    fraction = config.get("partial_rotary_factor", rope.get("partial_rotary_factor"))
    if family.arch != "phi3" and fraction not in (None, 1.0):
        raise _no_place("partial_rotary_factor", fraction, 1.0)


def _refuse_gemma(family: Family, config: Mapping[str, Any]) -> None:
    layers, heads = config.get("num_hidden_layers", 0), config.get("num_attention_heads")
    head_dim = config.get("head_dim", 256)
    if layers == _LARGEST_GEMMA[family.arch] and heads:
        head_dim = config["hidden_size"] // heads
    _refuse_other(config, "query_pre_attn_scalar", head_dim)
    if config.get("layer_types"):
        _refuse_other(config, "layer_types", sliding_layers(family, layers))
    if "sliding_window" in config and config["sliding_window"] is None:
        raise _no_place("sliding_window", None, "a number of tokens")
    if family.arch == "gemma2":
        _refuse_other(config, "tie_word_embeddings", True)
        for setting in ("attn_logit_softcapping", "final_logit_softcapping"):
            if setting in config and config[setting] is None:
                raise _no_place(setting, None, "a number")


def sliding_layers(family: Family, num_layers: int) -> list[str]:
    """Return the kind of attention of every layer as llama.cpp takes it."""
    period = family.sliding_period or 1
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(num_layers)]


def _refuse_other(config: Mapping[str, Any], setting: str, value: float | Sequence[str]) -> None:
    if config.get(setting) not in (None, value):
        raise _no_place(setting, config[setting], value)


def _no_place(setting: str, value: Any, expected: Any) -> UsageError:
    return UsageError(
        f"merge.exports: GGUF has no place for {setting}: {value}, so the export would be read with {expected}; "
        "remove the gguf exports from the list"
    )
