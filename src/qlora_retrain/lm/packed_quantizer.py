"""Let transformers build, load and save models with the layers of `packed_linear`.

config.json of such a folder names the method below, the format, and the format's settings. The tensors of a layer lie
under the layer's path, with the names of `packed_linear`: `...q_proj.weight`, `...q_proj.scales`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from qlora_retrain.lm import base_formats
from qlora_retrain.lm.base_formats.packed_linear import CODES, PackedFormat, packed_linear, replace_linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.quantizers import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = base_formats.OWN_METHOD


@cache
def register() -> type[QuantizationConfigMixin]:
    """Register the quantizer with transformers, once in a process, and return the class of its settings."""
    from transformers.quantizers import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(METHOD)
    class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
        """The settings as config.json has them, each an attribute."""

        def __init__(self, **settings: Any) -> None:
            self.__dict__.update(settings)
            self.quant_method = METHOD

    register_quantizer(METHOD)(quantizer_class())
    settings_class: type[QuantizationConfigMixin] = PackedConfig
    return settings_class


@cache
def quantizer_class() -> type[HfQuantizer]:
    """Return the class by which transformers replaces layers; how weights are packed is `streaming_quantizer`'s."""
    from transformers.quantizers import HfQuantizer

    class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
        """Replace the linear layers; the folder's tensors then go into them by their names."""

        def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
            settings = self.quantization_config.__dict__
            base_format = base_formats.FORMATS[settings["format"]].from_settings(settings)
            assert isinstance(base_format, PackedFormat)
            excluded = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
            replace_linear_layers(model, base_format, excluded)

        def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
            # Of what is packed already, transformers compares the shapes with those of the layers.
            path, _, name = param_name.rpartition(".")
            return not self.pre_quantized and name == CODES and isinstance(model.get_submodule(path), packed_linear())

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    return PackedQuantizer
