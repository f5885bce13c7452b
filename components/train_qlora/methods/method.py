"""The interface of all methods: how the trained parameters learn from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.nn import Parameter

from qlora_retrain.config.sections import TrainConfig


class Method:
    """A method that learns as AdamW says, without anything beside it.

    Attributes:
        config: The settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @property
    def num_virtual_tokens(self) -> int:
        """The tokens that the method puts before each row."""
        return 0

    def rate_factor(self, parameter_name: str) -> float:
        """Return what a parameter's learning rate is, as a multiple of `train.learning_rate`."""
        return 1.0

    def begin_step(self, step: int, total_steps: int) -> None:
        """Prepare an optimizer step, numbered from 0, of all the run's."""

    def penalty(self, parameters: Mapping[str, Parameter]) -> Tensor | None:
        """Return what is added to the loss of a step, in nats per token."""
        return None

    def end_step(self, parameters: Mapping[str, Parameter]) -> None:
        """Change what the optimizer has stepped, while its gradients are there."""

    def state(self, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
        """Return the tensors beside the parameters that a resumed run needs; they are changed in place to load them."""
        return {}

    def ranks(self, tensors: Iterable[tuple[str, Mapping[str, Tensor]]]) -> dict[str, int]:
        """Return the rank of each layer by its name, where the method chose them while it trained; else nothing."""
        return {}
