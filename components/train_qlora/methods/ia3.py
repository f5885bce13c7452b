"""IA3: scales of keys, of values and of the MLP's inner numbers learn (Liu et al., arXiv 2205.05638).

    k' = l_k * k    v' = l_v * v    y = W (l_m * h)        all scales start at 1

PEFT's modules compute it. A scale of outputs multiplies rows of a weight, one of inputs its columns, so it merges.
"""

from __future__ import annotations

from typing import Any

from peft import IA3Config, get_peft_model
from transformers import PreTrainedModel

from components.train_qlora.methods.without_matrices import WithoutMatrices
from qlora_retrain.lm.target_layers import ia3_layers

_BASE_NAME = "base_nf4"  # in adapter_config.json, in place of a path of this machine


class Ia3(WithoutMatrices):
    """One number for each output of keys and values, and for each input of the MLP's last layer."""

    def attach(self, model: PreTrainedModel) -> Any:
        """Attach scales of 1, in fp32."""
        layers, scaled_inputs = ia3_layers(model)
        config = IA3Config(target_modules=layers, feedforward_modules=scaled_inputs, task_type="CAUSAL_LM")
        model.config.use_cache = False
        peft_model = get_peft_model(model, config)
        peft_model.peft_config["default"].base_model_name_or_path = _BASE_NAME
        return peft_model
