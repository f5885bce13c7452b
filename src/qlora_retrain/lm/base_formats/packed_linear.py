"""Linear layers of our own whose weight is packed, for the formats that no library of ours stores.

A format gives each linear layer a `Layout`: which tensors hold the layer's weight, how they are computed of it, and how
they give it back. Everything else is here, once for all formats: the layer, how a folder's tensors are read, how
a model's linear layers are replaced. `packed_quantizer` tells transformers of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_retrain.lm import dequantize
from qlora_retrain.lm.base_formats.base_format import BaseFormat, StorageBits

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Linear
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from qlora_retrain.lm.weight_files import SafetensorsFolder, TensorSpec

CODES = "weight"  # the tensor of a layer that holds the codes; the layer's other tensors have names of the layout's own
TensorForm = tuple[str, tuple[int, ...]]  # the name of torch's type, and the shape


class Layout(ABC):
    """How the weight of one linear layer is stored, in tensors that begin with one row for each output."""

    @abstractmethod
    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorForm]:
        """Return the form of each tensor of a layer by its name; `CODES` and at least one other are among them."""

    @abstractmethod
    def pack(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a weight (out, in) of any float type, on its device."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the weight (out, in) that the tensors hold, in a float type that has its values exactly."""


class PackedFormat(BaseFormat):
    """A base format with layers of our own.

    Attributes:
        tensor_names: The tensors that a layer may have beside the codes; every packed layer has the first one.
        compute_dtype: The type of what is not packed.
    """

    is_packed: ClassVar[bool] = True
    tensor_names: ClassVar[tuple[str, ...]]
    compute_dtype: str

    @abstractmethod
    def layout(self, name: str, out_features: int, in_features: int) -> Layout | None:
        """Return how a layer's weight is stored, by the layer's path in the model; None where it stays in 16 bits."""

    @abstractmethod
    def quantization(self) -> dict[str, Any]:
        """Return what config.json says of the format: its name as `format`, and what `from_settings` reads."""

    def storage(self, specs: Mapping[str, TensorSpec]) -> StorageBits:
        """Add up the bytes of every tensor that belongs to a packed weight; there are no tables."""
        weights = total_bytes = 0
        for name in self.packed_names(specs):
            parts = {part: specs[path] for part, path in self._paths(name).items() if path in specs}
            total_bytes += sum(spec.size_bytes for spec in parts.values())
            weights += self.count_weights({part: spec.shape for part, spec in parts.items()})
        bits = 8 * total_bytes / weights if weights else 0.0
        return StorageBits(weights, bits, bits)

    @abstractmethod
    def count_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return how many weights a layer has, by the shapes of its tensors."""

    def packed_names(self, names: Iterable[str]) -> set[str]:
        """Return the weights beside which the first of the other tensors lies."""
        names, mark = set(names), f".{self.tensor_names[0]}"
        weights = {f"{name.removesuffix(mark)}.{CODES}" for name in names if name.endswith(mark)}
        return weights & names

    def unpack(self, name: str, tensors: SafetensorsFolder) -> Tensor:
        """Return the values of a packed weight of a folder."""
        parts = {part: tensors.tensor(path) for part, path in self._paths(name).items() if path in tensors}
        return self.layout_of(name.rpartition(".")[0], parts).unpack(parts)

    def layout_of(self, name: str, tensors: Mapping[str, Tensor]) -> Layout:
        """Return the layout of a layer whose tensors are read."""
        out_features = tensors[CODES].shape[0]
        weights = self.count_weights({part: tuple(tensor.shape) for part, tensor in tensors.items()})
        layout = self.layout(name, out_features, weights // out_features)
        assert layout is not None, f"{name} is stored packed, and the format leaves it in 16 bits"
        return layout

    @staticmethod
    def is_packed_layer(layer: Any) -> bool:
        """Return whether the layer is one of `packed_linear`."""
        return isinstance(getattr(layer, "layout", None), Layout)

    @staticmethod
    def layer_weight(layer: Any) -> Tensor:
        """Return the values of a layer's weight."""
        weight: Tensor = layer.unpacked()
        return weight

    def layer_type(self) -> type[Linear]:
        """Return the class of the packed layers."""
        return packed_linear()

    def load(self, from_pretrained: Callable[[str], PreTrainedModel], *, is_float32: bool) -> PreTrainedModel:
        """Load the weights packed, or unpack them once: the same values at 6 to 8 times the memory."""
        from qlora_retrain.lm import packed_quantizer

        packed_quantizer.register()
        model = from_pretrained("auto")
        return dequantize.dequantize(model, self) if is_float32 else model

    def transformers_config(self) -> QuantizationConfigMixin:
        """Return the settings by which transformers finds `packed_quantizer`."""
        from qlora_retrain.lm import packed_quantizer

        return packed_quantizer.register()(**self.quantization())

    def _paths(self, name: str) -> dict[str, str]:
        """Return the names in a folder of all tensors that a weight may have, by their names in the layer."""
        layer = name.rpartition(".")[0]
        return {part: f"{layer}.{part}" for part in (CODES, *self.tensor_names)}


def replace_linear_layers(model: PreTrainedModel, base_format: PackedFormat, excluded: list[str]) -> None:
    """Replace the linear layers that the format packs by layers without values, in place.

    Args:
        model: A model on the meta device.
        base_format: The format.
        excluded: The names of modules that stay as they are, such as the output layer.
    """
    import torch
    from transformers.quantizers.quantizers_utils import should_convert_module

    linear = [(name, module) for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    for name, module in linear:
        layout = base_format.layout(name, module.out_features, module.in_features)
        if layout is not None and should_convert_module(name, excluded):
            with torch.device("meta"):
                model.set_submodule(name, packed_linear()(layout, module))


@cache
def packed_linear() -> type[Any]:
    """Return the class of the layers, made once: a module of the library imports torch only when it is used."""
    import torch
    from torch.nn.functional import linear

    class FrozenLinearFunction(torch.autograd.Function):  # type: ignore[misc]
        """Multiply by a packed weight, and unpack it again in the backward pass, so that it is not kept until then."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
            """Return x W^T + bias, (..., out)."""
            ctx.layer = layer
            return linear(x, layer.unpacked().to(x.dtype), layer.bias)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
            """Return the gradient of x, (..., in)."""
            return grad_output @ ctx.layer.unpacked().to(grad_output.dtype), None

    class PackedLinear(torch.nn.Linear):  # type: ignore[misc]
        """A linear layer with a frozen packed weight: a parameter for the codes, and a buffer for each other tensor.

        Attributes:
            layout: How the weight is stored.
        """

        def __init__(self, layout: Layout, source: Linear) -> None:
            torch.nn.Module.__init__(self)  # Linear would make room for a weight of its own
            self.layout = layout
            self.in_features, self.out_features = source.in_features, source.out_features
            self.tensor_names = tuple(layout.tensors(self.out_features, self.in_features))
            for name, (dtype, shape) in layout.tensors(self.out_features, self.in_features).items():
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                if name == CODES:
                    self.weight = torch.nn.Parameter(tensor, requires_grad=False)
                else:
                    self.register_buffer(name, tensor)
            self.bias = source.bias

        def unpacked(self) -> Tensor:
            """Return the weight (out, in)."""
            return self.layout.unpack({name: getattr(self, name) for name in self.tensor_names})

        def forward(self, x: Tensor) -> Tensor:
            """Return x W^T + bias."""
            output: Tensor = FrozenLinearFunction.apply(x, self)
            return output

        # PEFT asks layers of HQQ, which have `W_q`, for their weight, where it computes DoRA's first magnitudes.
        @property
        def W_q(self) -> Tensor:  # noqa: N802
            """The codes."""
            return self.weight

        def dequantize(self) -> Tensor:
            """Return the weight (out, in)."""
            return self.unpacked()

    return PackedLinear
