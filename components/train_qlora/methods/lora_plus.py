"""LoRA+: B learns faster than A, since it starts at zero and A does not (Hayou et al., arXiv 2402.12354)."""

from __future__ import annotations

from components.train_qlora.methods.lora import Lora

DEFAULT_RATIO = 16.0


class LoraPlus(Lora):
    """The rate of B is `train.learning_rate_ratio` times `train.learning_rate`, and that of A is the latter."""

    def rate_factor(self, parameter_name: str) -> float:
        """Return the ratio for the matrices B."""
        ratio = self.config.learning_rate_ratio
        return (DEFAULT_RATIO if ratio is None else ratio) if ".lora_B." in parameter_name else 1.0
