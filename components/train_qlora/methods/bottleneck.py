"""Bottleneck adapters: a small network behind the MLP of each layer learns (Houlsby et al., arXiv 1902.00751)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from components.train_qlora.methods.without_matrices import WithoutMatrices
from qlora_retrain.lm import bottleneck


class Bottleneck(WithoutMatrices):
    """`train.rank` is the width of the networks."""

    def attach(self, model: PreTrainedModel) -> Any:
        """Attach networks that change no output yet."""
        bottleneck.attach(model, self.config.rank, self.config.dropout)
        return model
