"""Read the sizes of a decoder from its config.json alone: widths, layers, linear layers, and what its layers keep.

Standard library only, so that a plan can be made where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_retrain.lm.context_length import language_config

# Names that families give to the same size.
_WIDTH = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_MLP_WIDTH = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")

# Families that differ from Llama, from whose modules most decoders are copied. By family: whether an MLP has a gate,
# and the names of the linear layers: queries, keys and values in one (else three), output, into the MLP, out of it.
_NEOX = (False, "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_LAYER_NAMES = {
    "phi3": (True, "qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "glm": (True, "", "o_proj", "gate_up_proj", "down_proj"),
    "glm4": (True, "", "o_proj", "gate_up_proj", "down_proj"),
    "granitemoehybrid": (True, "", "o_proj", "input_linear", "output_linear"),
    "gpt_neox": _NEOX,
    "bloom": _NEOX,
    "phi": (False, "", "dense", "fc1", "fc2"),
    "starcoder2": (False, "", "o_proj", "c_fc", "c_proj"),
    "nemotron": (False, "", "o_proj", "up_proj", "down_proj"),
    "arcee": (False, "", "o_proj", "up_proj", "down_proj"),
    "apertus": (False, "", "o_proj", "up_proj", "down_proj"),
    "gpt_bigcode": (False, "c_attn", "c_proj", "c_fc", "c_proj"),
    "gpt_neo": (False, "", "out_proj", "c_fc", "c_proj"),
    "gptj": (False, "", "out_proj", "fc_in", "fc_out"),
    "opt": (False, "", "out_proj", "fc1", "fc2"),
    "mpt": (False, "Wqkv", "out_proj", "up_proj", "down_proj"),
}
_LLAMA_NAMES = (True, "", "o_proj", "", "down_proj")
# Whatever their files say, these have as many heads of keys as of queries.
_FULL_KEYS = ("gpt_neox", "bloom", "gpt_neo", "gptj", "opt", "mpt")
_LAYER_NORM = (
    *_FULL_KEYS, "phi", "starcoder2", "nemotron", "gpt_bigcode", "stablelm", "cohere", "cohere2", "olmo", "persimmon",
)  # fmt: skip
_TIED_BY_DEFAULT = ("gemma", "cohere", "opt", "bloom", "starcoder2", "gpt_bigcode", "gpt_neo", "mpt")
_QUERY_KEY_NORM = ("qwen3", "gemma3", "gemma4", "olmo2", "olmo3", "exaone4", "apertus", "hunyuan_v1_dense")
_NORMS_PER_LAYER = {"gemma2": 4, "gemma3": 4, "glm4": 4, "phi": 1, "cohere": 1, "cohere2": 1, "gptj": 1}
# What an estimate does not count, by a field that says so.
_UNKNOWN_PARTS = {"kv_lora_rank": "latent keys and values", "hidden_size_per_layer_input": "embeddings of each layer"}


# No size of a model is larger; products of such numbers still fit into a float.
_MAX_SIZE = 2**31 - 1


class UnknownShape(ValueError):
    """A config.json that does not say what an estimate needs."""


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer of a decoder layer.

    Attributes:
        name: The last part of its path.
        in_width: The width of its input.
        out_width: The width of its output.
        group: Layers of a group have the same input: `qkv`, `o`, `up`, `down`.
    """

    name: str
    in_width: int
    out_width: int
    group: str

    @property
    def weights(self) -> int:
        """The number of weights."""
        return self.in_width * self.out_width


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder whose layers are all alike.

    Attributes:
        width: The width of the hidden states.
        mlp_width: The width inside an MLP.
        layers: The number of decoder layers.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        head_width: The width of a head.
        vocabulary: Rows of the embedding.
        is_tied: Whether the output layer is the embedding.
        linear_layers: The linear layers of a decoder layer.
        is_gated: Whether an MLP has a gate beside the projection up.
        has_fused_mlp: Whether training replaces the MLP by its own function (`memory_efficient`).
        norm: `rms` where training replaces the norms by its own function, `rms_fp32` where autograd keeps their input
            in fp32, `layer_norm`.
        norms_per_layer: Norms as wide as the hidden states.
        has_query_key_norm: Whether queries and keys are normalized, too.
        has_window: Whether a layer's attention has a window, a chunk or capped scores; then rows are padded.
        has_plain_logits: Whether the logits are the output layer's output, neither scaled nor capped.
    """

    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    is_tied: bool
    linear_layers: tuple[LinearLayer, ...]
    is_gated: bool = True
    has_fused_mlp: bool = True
    norm: str = "rms"
    norms_per_layer: int = 2
    has_query_key_norm: bool = False
    has_window: bool = False
    has_plain_logits: bool = True

    @classmethod
    def from_config(cls, document: Mapping[str, Any]) -> ModelShape:
        """Read the sizes from a config.json.

        Raises:
            UnknownShape: If a size is missing, or if the layers are of a kind that this does not describe.
        """
        config = language_config(document)
        family = str(config.get("model_type", "")).removesuffix("_text")
        for name, meaning in _UNKNOWN_PARTS.items():
            if config.get(name):
                raise UnknownShape(f"config.json: {name}: the memory of {meaning} is not estimated")
        width, layers, heads = (_size(config, *names) for names in (_WIDTH, _LAYERS, _HEADS))
        mlp_width = _size(config, *_MLP_WIDTH, default=4 * width)
        kv_heads = _size(config, "num_key_value_heads", default=1 if config.get("multi_query") else heads)
        kv_heads = heads if family in _FULL_KEYS else kv_heads
        head_width = _size(config, "head_dim", default=width // heads)

        default_activation = "gelu" if family.startswith("gemma") else "silu"
        # Where a file has both, the first is the one that counts.
        activation = config.get("hidden_activation") or config.get("hidden_act") or default_activation
        names = _LAYER_NAMES.get(family, _LLAMA_NAMES)
        return cls(
            width=width,
            mlp_width=mlp_width,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            vocabulary=_size(config, "vocab_size"),
            is_tied=bool(config.get("tie_word_embeddings", family.startswith(_TIED_BY_DEFAULT))),
            linear_layers=_linear_layers(names, width, mlp_width, heads * head_width, kv_heads * head_width),
            is_gated=names[0],
            has_fused_mlp=names is _LLAMA_NAMES and activation in ("silu", "swish"),
            norm=_norm(family),
            norms_per_layer=_NORMS_PER_LAYER.get(family, 2),
            has_query_key_norm=family in _QUERY_KEY_NORM or bool(config.get("use_qk_norm")),
            has_window=_has_window(config),
            has_plain_logits=not (config.get("final_logit_softcapping") or _is_scaled(config)),
        )

    @property
    def q_width(self) -> int:
        """The width of the queries of all heads."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """The width of the keys of all heads, which is that of the values."""
        return self.kv_heads * self.head_width

    @property
    def layer_weights(self) -> int:
        """The weights of the linear layers of all decoder layers: those that are stored in 4 bits."""
        return self.layers * sum(layer.weights for layer in self.linear_layers)

    @property
    def embedding_weights(self) -> int:
        """The weights of the embedding and the output layer, which stay in 16 bits."""
        return self.width * self.vocabulary * (1 if self.is_tied else 2)

    @property
    def norm_weights(self) -> int:
        """The weights of the norms; those of queries and keys are as wide as a head."""
        per_layer = self.width * self.norms_per_layer + 2 * self.head_width * self.has_query_key_norm
        return self.layers * per_layer + self.width

    @property
    def weights(self) -> int:
        """All weights; biases, of which a model has a few thousand, are left out."""
        return self.layer_weights + self.embedding_weights + self.norm_weights

    @property
    def largest_weights(self) -> int:
        """The weights of the largest tensor."""
        return max(self.width * self.vocabulary, *(layer.weights for layer in self.linear_layers))


def _linear_layers(
    names: tuple[bool, str, str, str, str], width: int, mlp_width: int, q_width: int, kv_width: int
) -> tuple[LinearLayer, ...]:
    is_gated, qkv, o, up, down = names
    qkv_sizes = {qkv: q_width + 2 * kv_width} if qkv else {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
    up_sizes = {up: mlp_width * (1 + is_gated)} if up else {"gate_proj": mlp_width, "up_proj": mlp_width}
    return (
        *(LinearLayer(name, width, size, "qkv") for name, size in qkv_sizes.items()),
        LinearLayer(o, q_width, width, "o"),
        *(LinearLayer(name, width, size, "up") for name, size in up_sizes.items()),
        LinearLayer(down, mlp_width, width, "down"),
    )


def _norm(family: str) -> str:
    if family in _LAYER_NORM:
        return "layer_norm"
    return "rms_fp32" if family.startswith("gemma") else "rms"


def _has_window(config: Mapping[str, Any]) -> bool:
    """Return whether `packing.can_pack` of the training step refuses the model's attention."""
    layer_kinds = config.get("layer_types")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    is_full = not isinstance(layer_kinds, list) or all(kind == "full_attention" for kind in layer_kinds)
    return bool(window or config.get("attn_logit_softcapping") or config.get("attention_chunk_size")) or not is_full


def _is_scaled(config: Mapping[str, Any]) -> bool:
    return any(config.get(name, 1) not in (1, None) for name in ("logits_scaling", "logit_scale", "lm_head_multiplier"))


def _size(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_SIZE:
            return value
    if default is None:
        raise UnknownShape(f"config.json: has none of {', '.join(names)}, and an estimate needs it")
    return default
