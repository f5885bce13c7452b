"""Ask the names of a base model's weights, before any work is done, whether the layers that `train` names exist.

What names and shapes do not tell is left to the steps, which say the same of the model itself. Of weights in several
files the first one's header has shapes, and the others are known by name.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm.base_formats.int4 import GROUP_SIZE
from qlora_retrain.lm.bottleneck import MLP_NAMES
from qlora_retrain.lm.context_length import language_config
from qlora_retrain.lm.four_bit import BLOCK_SIZE
from qlora_retrain.lm.model_shape import ModelShape, UnknownShape
from qlora_retrain.lm.target_layers import matches

# What transformers puts before the paths of a file that leaves out the name of the model's body.
_BODIES = ("", "model.", "transformer.")
_KINDS = ("all-linear", "attention", "mlp")
_IA3_NAMES = {"k_proj", "v_proj", "down_proj"}
# For these PEFT knows which layers are keys, values and the MLP's last one, whatever their names are.
IA3_FAMILIES = (
    "t5", "mt5", "gpt2", "bloom", "roberta", "opt", "gptj", "gpt_neox", "gpt_neo", "bart", "gpt_bigcode", "llama",
    "llama4", "mistral", "mixtral", "bert", "deberta-v2", "deberta", "RefinedWebModel", "RefinedWeb", "falcon", "phi",
    "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3",
)  # fmt: skip
# Methods that begin with as many singular vectors of each weight as there are ranks.
_OF_SINGULAR_VECTORS = ("lora-xs", "loftq", "lq-lora")
# Formats that pack layers alone whose inputs fill blocks of so many; methods that need every adapted layer packed.
_BLOCK_INPUTS = {"int4": GROUP_SIZE, "mixed": BLOCK_SIZE, "nf4-shifted": BLOCK_SIZE}
_OVER_PACKED_LAYERS = (*_OF_SINGULAR_VECTORS, "qa-lora")
# The output layer, whose name in the file may be another than in the model.
_HEADS = ("lm_head", "embed_out")
_WITHOUT_TARGETS = ("ia3", "prompt", "prefix", "bottleneck", "full")


@dataclass(frozen=True, slots=True)
class _Layers:
    """The matrices of a model.

    Attributes:
        paths: Those of the decoder's layers, as the file has them.
        outside: The others: embeddings and output layer.
        shapes: The shapes (out, in) of those in a header.
    """

    paths: tuple[str, ...]
    outside: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensor_names: Collection[str]) -> _Layers:
        shapes = {
            name.removesuffix(".weight"): tuple(entry.get("shape", ()))
            for name, entry in header.items()
            if name.endswith(".weight") and isinstance(entry, Mapping)
        }
        # The last norm may be in another file than its header.
        vectors = {_last(path) for path, shape in shapes.items() if len(shape) != 2} | {"norm", "ln_f"}
        paths = sorted(name.removesuffix(".weight") for name in tensor_names if name.endswith(".weight"))
        matrices = [path for path in paths if _last(path) not in vectors]
        inside = [path for path in matrices if any(part.isdigit() for part in path.split("."))]
        return cls(tuple(inside), tuple(path for path in matrices if path not in inside), shapes)

    @property
    def names(self) -> list[str]:
        return sorted({_last(path) for path in self.paths})

    def adapted(self, targets: object) -> list[str]:
        """Return the paths that may be adapted: of `attention` and `mlp` all, which only the model tells apart."""
        if isinstance(targets, list):
            return [path for path in self.paths if _last(path) in targets]
        if targets in _KINDS:
            return list(self.paths)
        return [path for path in self.paths if _fits(str(targets), path, "train.target_modules")]


def faults(
    train: Mapping[str, Any],
    base_format: str,
    config: Mapping[str, Any],
    header: Mapping[str, Any],
    tensor_names: Collection[str],
) -> list[str]:
    """Return what `train` asks for that the base does not have, each as a sentence with what to do.

    Args:
        train: The values of the section.
        base_format: `quantize.format`.
        config: The parsed config.json.
        header: The entry of each tensor in the first file of the weights.
        tensor_names: The names of all weights.
    """
    layers = _Layers.from_tensors(header, tensor_names)
    try:
        shape = ModelShape.from_config(config)
    except UnknownShape:
        return []
    # Some families have other names in their files than in the model, and those of others are not known here.
    if not layers.paths or not {layer.name for layer in shape.linear_layers} <= set(layers.names):
        return []
    try:
        return list(_faults(train, base_format, config, layers, is_tied=shape.is_tied))
    except UsageError as error:  # a pattern that is no regular expression
        return [str(error)]


def _faults(
    train: Mapping[str, Any], base_format: str, config: Mapping[str, Any], layers: _Layers, *, is_tied: bool
) -> Iterator[str]:
    method = train["method"]
    if method == "ia3":
        yield from _ia3_faults(config, layers)
    if method == "bottleneck" and not any(set(path.split(".")) & set(MLP_NAMES) for path in layers.paths):
        yield (
            f"train.method: bottleneck goes behind the MLP of each layer, and no part of {layers.paths[0]} and the "
            f"other paths of this base is called {' or '.join(MLP_NAMES)}; set train.method: lora"
        )
    if method in _WITHOUT_TARGETS:
        return
    if reason := _target_fault(train["target_modules"], layers):
        yield reason
        return
    adapted = layers.adapted(train["target_modules"])
    for knob in ("rank_pattern", "alpha_pattern"):
        for pattern in train[knob]:
            if not any(_fits(rf"(?:.*\.)?(?:{pattern})", path, f"train.{knob}") for path in adapted):
                yield f"train.{knob}: {pattern!r} matches no adapted layer; a path is such as {adapted[0]}"
    yield from _whole_module_faults(train["modules_to_save"], layers, is_tied=is_tied)
    shapes = {path: layers.shapes[path] for path in adapted if path in layers.shapes}
    if method in _OVER_PACKED_LAYERS:
        yield from _width_faults(base_format, method, shapes)
    if method in _OF_SINGULAR_VECTORS:
        yield from _rank_faults(train["rank"], method, shapes)


def _target_fault(targets: object, layers: _Layers) -> str | None:
    listed = ", ".join(layers.names)
    if isinstance(targets, list):
        for name in targets:
            if name not in layers.names:
                nearest = difflib.get_close_matches(name, layers.names, 1)
                hint = f"; did you mean {nearest[0]}?" if nearest else ""
                return f"train.target_modules: no layer is called {name!r}, there are {listed}{hint}"
    if not layers.adapted(targets):
        return (
            f"train.target_modules: {targets!r} matches no layer, there are {listed}; a regular expression must match "
            f"a whole path, such as {layers.paths[0]}"
        )
    return None


def _whole_module_faults(modules: Collection[str], layers: _Layers, *, is_tied: bool) -> Iterator[str]:
    outside = sorted({_last(path) for path in layers.outside})
    if modules and is_tied and not set(_HEADS) & set(outside):
        yield (
            f"train.modules_to_save: {', '.join(modules)}: the embeddings and the output layer of this base share one "
            "weight (tie_word_embeddings), so neither can learn alone; leave it out, or choose a base with two weights"
        )
        return
    for name in modules:
        if name not in (*outside, *_HEADS):
            yield (
                f"train.modules_to_save: {name} is none of {' and '.join(outside)}, the embeddings and the output "
                "layer of this base; other layers learn by train.target_modules"
            )


def _width_faults(base_format: str, method: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    inputs = _BLOCK_INPUTS.get(base_format, 1)
    odd = next((path for path, shape in shapes.items() if shape[1] % inputs), None)
    if odd is not None:
        yield (
            f"train.method: {method} needs layers that quantize.format: {base_format} packs, in blocks of {inputs} "
            f"inputs, and {odd} has {shapes[odd][1]} inputs; name the others in train.target_modules, or set "
            "train.method: lora"
        )


def _rank_faults(rank: int, method: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    narrow = min(shapes, key=lambda path: min(shapes[path]), default=None)
    if narrow is not None and rank > (most := min(shapes[narrow])):
        yield (
            f"train.rank: {rank}, and train.method: {method} begins with as many singular vectors of each layer, of "
            f"which {narrow} has {most}; set train.rank to {most} or less, or train.method: lora"
        )


def _ia3_faults(config: Mapping[str, Any], layers: _Layers) -> Iterator[str]:
    family = language_config(config).get("model_type")
    if not set(layers.names) >= _IA3_NAMES and family not in IA3_FAMILIES:
        yield (
            "train.method: ia3 scales keys, values and the input of the MLP's last layer, and nothing tells which of "
            f"the layers of this base ({family}) these are: {', '.join(layers.names)}; set train.method: lora"
        )


def _fits(pattern: str, path: str, knob: str) -> bool:
    # Where the package is missing, the step that trains asks.
    if importlib.util.find_spec("regex") is None:
        return True
    return any(matches(pattern, body + path, knob) for body in _BODIES)


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]
