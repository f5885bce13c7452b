"""Prompt tuning: the embeddings of a few virtual tokens before each row learn (Lester et al., arXiv 2104.08691).

They start as the embeddings of tokens of the vocabulary that the seed draws, as the paper found best for small models.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PromptTuningConfig
from transformers import PreTrainedModel

from components.train_qlora.methods.without_matrices import WithVirtualTokens
from qlora_retrain.lm import virtual_tokens


class Prompt(WithVirtualTokens):
    """Rows with more tokens in front: they are packed, and their prompt is computed once."""

    def attach(self, model: PreTrainedModel) -> Any:
        """Attach virtual tokens with the embeddings of tokens that the seed draws."""
        weight = model.get_input_embeddings().weight
        config = PromptTuningConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            token_dim=weight.shape[1],
            num_transformer_submodules=1,
            num_attention_heads=model.config.get_text_config().num_attention_heads,
            num_layers=model.config.get_text_config().num_hidden_layers,
            task_type="CAUSAL_LM",
        )
        generator = torch.Generator().manual_seed(self.config.seed)
        token_ids = torch.randint(len(weight), (self.num_virtual_tokens,), generator=generator)
        # Through the module, since some families scale what they look up.
        with torch.no_grad():
            words = model.get_input_embeddings()(token_ids.to(weight.device)).float()

        # `to_dict` has PEFT's own kinds of values, and the file has their texts.
        document = {name: getattr(value, "value", value) for name, value in config.to_dict().items()}
        adapter = virtual_tokens.attach(model, document | {"inference_mode": True})
        adapter.set_weights({virtual_tokens.NAME: words})
        return model
