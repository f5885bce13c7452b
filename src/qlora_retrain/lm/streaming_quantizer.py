"""Quantize a model while transformers loads it, tensor by tensor, with next to nothing of it in memory.

transformers builds the model without memory, knows every family's names, and hands each weight of a linear layer to a
quantizer, memory-mapped from the safetensors file. The quantizers here are bitsandbytes' and that of `packed_quantizer`
in all but one thing: they put codes and scales into memory mapped from files, which the system writes to disk when
memory is short. So what stays in memory is what transformers itself converts: weights outside the quantized layers that
are stored in another type than the one to compute in, and experts that it joins.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.lm import base_formats, four_bit, loading, packed_quantizer
from qlora_retrain.lm.base_formats.packed_linear import CODES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

    Adjust = Callable[[str, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]

# The quantizers' names, by which transformers selects one.
_BITSANDBYTES, _OWN = "bitsandbytes_4bit_streamed", f"{base_formats.OWN_METHOD}_streamed"


def load_quantized(
    base: Path,
    settings: QuantizationConfigMixin,
    folder: Path,
    *,
    device: str,
    dtype: str,
    check_skeleton: Callable[[PreTrainedModel], object] | None = None,
    adjust: Adjust | None = None,
) -> PreTrainedModel:
    """Load a 16-bit model with its linear layers packed, in memory that is mapped from unnamed files.

    Args:
        base: The model, as `loading.load_base` reads it.
        settings: The packed form: `transformers_config` of a base format.
        folder: Where the files are written, as large as the packed weights. They vanish with the model.
        device: Where tensors are packed, one at a time: `cpu` or `cuda`. With bitsandbytes their bytes may differ.
        dtype: The type of what is not quantized, and the one from which weights are quantized.
        check_skeleton: Is called with the model before its weights are read, and may raise.
        adjust: Is called with the name and the weights of each linear layer, and a function that returns the values of
            a tensor's packed form; what it returns is quantized.

    Raises:
        UsageError: If `base` is no causal language model in 16 bits.
        IntegrityError: If it is unsafe, damaged or lacks weights, or bitsandbytes gives unexpected codes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_own = settings.quant_method == base_formats.OWN_METHOD
    if device == "cpu" and not is_own:
        four_bit.refuse_another_code(settings.bnb_4bit_quant_type)

    # transformers selects the quantizer by the method's name, and hands it these settings with all that is in them.
    _register_quantizers()
    streamed: Any = copy.copy(settings)
    streamed.quant_method = _OWN if is_own else _BITSANDBYTES
    streamed.folder, streamed.device, streamed.check_skeleton = folder, device, check_skeleton
    # transformers copies the settings with every object in them, the object of a method too, but no function.
    streamed.adjust = None if adjust is None else lambda *args: adjust(*args)  # noqa: PLW0108
    try:
        model = loading.load_base(base, dtype=dtype, quantization=streamed)
    except _QuantizationFailed as failure:
        raise failure.error from None

    # The files must name the method that reads them.
    model.config.quantization_config = model.hf_quantizer.quantization_config = settings
    model.quantization_method = settings.quant_method
    return model


class _QuantizationFailed(BaseException):
    """Carries an error, such as a full disk, past transformers, which reports every `Exception` as unfit weights."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@cache
def _register_quantizers() -> None:
    """Register both quantizers with results that are mapped from files, once in a process.

    The classes are made here, because a module of the library imports neither torch nor transformers by itself.
    """
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    class StreamedQuantize(ConversionOps):  # type: ignore[misc]
        """Turn one linear layer's weight into its packed form."""

        def __init__(self, streamed: Any) -> None:
            self.streamed = streamed

        def convert(
            self, input_dict: dict[str, Any], *, model: PreTrainedModel, **kwargs: Any
        ) -> dict[str, torch.Tensor]:
            """Return by their names the tensors that replace those on the meta device."""
            ((name, tensors),) = input_dict.items()
            weights = tensors[0] if isinstance(tensors, list) else tensors
            module: Any = model.get_submodule(name.rpartition(".")[0])
            pack = _pack_own if self.streamed.quant_method == _OWN else _pack_bitsandbytes
            try:
                return pack(name, weights, module, self.streamed)
            except Exception as error:
                raise _QuantizationFailed(error) from error

    class Streaming:
        """What differs from the quantizer that the class is joined with."""

        quantization_config: Any

        def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
            """Replace the linear layers; here the model has shapes and no weights yet."""
            super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[misc]
            if self.quantization_config.check_skeleton is not None:
                self.quantization_config.check_skeleton(model)

        def get_quantize_ops(self) -> ConversionOps:
            """Return what transformers calls with each weight of a linear layer."""
            return StreamedQuantize(self.quantization_config)

    for name, quantizer in ((_BITSANDBYTES, Bnb4BitHfQuantizer), (_OWN, packed_quantizer.quantizer_class())):
        register_quantizer(name)(type(f"Streaming{quantizer.__name__}", (Streaming, quantizer), {}))


def _pack_bitsandbytes(name: str, weights: torch.Tensor, module: Any, streamed: Any) -> dict[str, torch.Tensor]:
    """Return a layer's weight in 4 bits, and set the layer's scales."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit
    from transformers.pytorch_utils import Conv1D

    if issubclass(module.source_cls, Conv1D):
        weights = weights.T
    placeholder = module.weight

    def quantize(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return four_bit.quantize(tensor, placeholder.quant_type, placeholder.compress_statistics, streamed.device)

    if streamed.adjust is not None:
        weights = streamed.adjust(name, weights, lambda tensor: dequantize_4bit(*quantize(tensor)))
    codes, state = quantize(weights)
    state.absmax = _map_to_file(state.absmax, streamed.folder)
    module.quant_state = state
    module._is_hf_initialized = True
    options = placeholder.__dict__ | {"quant_state": state, "bnb_quantized": True}
    return {name: Params4bit(_map_to_file(codes, streamed.folder), requires_grad=False, **options)}


def _pack_own(name: str, weights: torch.Tensor, module: Any, streamed: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer of `packed_linear`."""
    import torch

    expected = (module.out_features, module.in_features)
    if tuple(weights.shape) != expected:
        raise IntegrityError(
            f"base_model: its weights do not fit its config.json: {name} is {tuple(weights.shape)} in the files, and "
            f"config.json declares {expected}; fetch the model again"
        )

    def pack(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        packed: dict[str, torch.Tensor] = module.layout.pack(tensor.to(streamed.device))
        return packed

    if streamed.adjust is not None:
        weights = streamed.adjust(name, weights, lambda tensor: module.layout.unpack(pack(tensor)).to(tensor.device))
    path = name.rpartition(".")[0]
    tensors = {part: _map_to_file(tensor, streamed.folder) for part, tensor in pack(weights).items()}
    tensors[CODES] = torch.nn.Parameter(tensors[CODES], requires_grad=False)
    return {f"{path}.{part}": tensor for part, tensor in tensors.items()}


def _map_to_file(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """Copy a tensor to memory that is mapped from a file without a name, which lives as long as the copy."""
    import torch

    path = folder / "weight.tmp"
    with path.open("xb") as file:
        # Room is made now: a disk that is full later would kill the process where it writes to the memory.
        os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
    mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    path.unlink()
    return mapped.copy_(tensor)
