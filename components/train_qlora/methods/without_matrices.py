"""The interface of the methods whose adapter is no pair of matrices for each layer.

They train through PEFT's modules, or through those of `lm`. What is trained ships as it is.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from transformers import PreTrainedModel

from components.train_qlora.methods.method import Method
from qlora_retrain.lm.small_adapters import num_virtual_tokens


class WithoutMatrices(Method):
    """A method with an adapter of its own kind."""

    @abstractmethod
    def attach(self, model: PreTrainedModel) -> Any:
        """Attach a new adapter to the base, which is frozen, and return what trains.

        Raises:
            UsageError: If the family cannot have such an adapter.
        """


class WithVirtualTokens(WithoutMatrices):
    """A method whose adapter stands before each row."""

    @property
    def num_virtual_tokens(self) -> int:
        """`train.num_virtual_tokens`."""
        return num_virtual_tokens(self.config.model_dump())
