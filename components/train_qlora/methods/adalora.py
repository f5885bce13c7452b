"""AdaLoRA: a budget of rank moves between the layers while they train (Zhang et al., arXiv 2303.10512).

    delta W = P diag(E) Q       A is Q, B is P, and both are kept near orthogonal by a penalty (eq. 3 and 4)

Each triplet of a row of A, a number of E and a column of B has a score, from how much the loss depends on its numbers.
The budget falls from the initial rank to `train.rank` of each layer on average. Triplets beyond it have their E set to
zero; while the budget falls they still learn and may come back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, ParameterDict, init

from components.train_qlora.fused_lora import ADAPTER_NAME
from components.train_qlora.methods.lora import Lora, Matrices
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm.adapter_scale import adapter_scale

# LoRA's B moves out x rank numbers of a layer in a step, and E only rank of them. With orthonormal A and B, a step of E
# by this multiple of the rate changes a weight of common widths about as much.
RATE_OF_E = 16.0
# Fractions of the run's steps: first with the whole budget, at the end with the final one.
WARMUP_FRACTION, FINAL_FRACTION = 0.1, 0.5
SMOOTHING = 0.85  # of a number's sensitivity and of its uncertainty (eq. 9 and 10; beta 1 and beta 2 in sec. 4)
PENALTY_WEIGHT = 0.5
SENSITIVITY, UNCERTAINTY = "sensitivity", "uncertainty"


class AdaLora(Lora):
    """The matrices are (A * E, B): the scale of a row of A is its singular value.

    Attributes:
        step: The number of the optimizer step, from 0.
        total_steps: The run's.
        averages: The moving averages of each parameter's scores, by name.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.step, self.total_steps = 0, 1
        self.averages: dict[str, dict[str, Tensor]] = {}

    def scale(self, layer: Any) -> float:
        """Return alpha divided by the rank that layers have in the end on average."""
        return adapter_scale(self.config.rank, self.alpha, self.config.method)

    def extend(self, layer: Any, start: object) -> None:
        """Start with E at zero, and with random orthonormal A and B, as the penalty wants them."""
        matrices = super().matrices(layer)
        for matrix in matrices:
            init.orthogonal_(matrix)
        layer.lora_E = ParameterDict({ADAPTER_NAME: Parameter(matrices[0].new_zeros(self.rank, 1))})

    def rate_factor(self, parameter_name: str) -> float:
        """Return what makes up for E's few numbers."""
        return RATE_OF_E if ".lora_E." in parameter_name else 1.0

    def matrices(self, layer: Any) -> Matrices:
        """Return A * E (rank, in) and B (out, rank)."""
        a, b = super().matrices(layer)
        return a * layer.lora_E[ADAPTER_NAME], b

    def begin_step(self, step: int, total_steps: int) -> None:
        """Note how far the run is, which decides about the budget."""
        self.step, self.total_steps = step, total_steps

    def penalty(self, parameters: Mapping[str, Parameter]) -> Tensor:
        """Return the weighted mean of |M M^T - I| over all A and all transposed B: zero where rows are orthonormal."""
        rows = [p if ".lora_A." in name else p.T for name, p in parameters.items() if ".lora_E." not in name]
        distances = [torch.linalg.matrix_norm(m @ m.T - torch.eye(len(m), device=m.device)) for m in rows]
        return PENALTY_WEIGHT * torch.stack(distances).mean()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def end_step(self, parameters: Mapping[str, Parameter]) -> None:
        """Score every triplet while the budget falls, and set E to zero for those beyond the budget."""
        step = self.step + 1
        first, last = round(WARMUP_FRACTION * self.total_steps), round((1 - FINAL_FRACTION) * self.total_steps)
        all_e = {name: p for name, p in parameters.items() if ".lora_E." in name}
        if step > last:
            # The ranks are fixed; the optimizer's momentum must not bring a triplet back.
            for name, e in all_e.items():
                e.mul_(self._averages(name, e)[SENSITIVITY] >= 0)
            return

        for name, parameter in parameters.items():
            self._update_averages(name, parameter)
        if step <= first and step < last:
            return
        scores = {name: self._scores(name, parameters) for name in all_e}
        budget = budget_of_step(step, first, last, self.rank * len(all_e), self.config.rank * len(all_e))
        joined = torch.cat(list(scores.values()))
        is_beyond_budget = torch.ones_like(joined, dtype=torch.bool)
        is_beyond_budget[torch.topk(joined, budget).indices] = False
        for (name, e), part in zip(all_e.items(), is_beyond_budget.split(self.rank), strict=True):
            is_beyond = part.view(-1, 1)
            e.masked_fill_(is_beyond, 0.0)
            if step == last:
                # From now on the averages only say which triplets stay: a sensitivity is never negative.
                self._averages(name, e)[SENSITIVITY].masked_fill_(is_beyond, -1.0)

    def state(self, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
        """Return the moving averages."""
        return {
            f"{name}.{part}": tensor
            for name, parameter in parameters.items()
            for part, tensor in self._averages(name, parameter).items()
        }

    def to_lora(self, tensors: Mapping[str, Tensor], scale: float) -> Matrices:
        """Leave out the triplets whose E is zero; at least one stays."""
        is_used = tensors["E"].view(-1) != 0
        is_used[0] |= not is_used.any()
        return (tensors["A"] * tensors["E"])[is_used], tensors["B"][:, is_used] * scale

    def ranks(self, tensors: Iterable[tuple[str, Mapping[str, Tensor]]]) -> dict[str, int]:
        """Return how many triplets each layer has in the end."""
        return {name: int((of_layer["E"] != 0).sum()) for name, of_layer in tensors}

    def _averages(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        if name not in self.averages:
            self.averages[name] = {part: torch.zeros_like(parameter.data) for part in (SENSITIVITY, UNCERTAINTY)}
        return self.averages[name]

    def _update_averages(self, name: str, parameter: Parameter) -> None:
        """Move the averages by a parameter's sensitivity |w dL/dw| (eq. 8) and by its distance from its average."""
        averages = self._averages(name, parameter)
        sensitivity = (parameter * parameter.grad).abs()
        averages[SENSITIVITY].lerp_(sensitivity, 1 - SMOOTHING)
        averages[UNCERTAINTY].lerp_((sensitivity - averages[SENSITIVITY]).abs(), 1 - SMOOTHING)

    def _scores(self, name_e: str, parameters: Mapping[str, Parameter]) -> Tensor:
        """Return the score of each triplet (rank,): that of its E, and the means of its row of A and column of B."""
        name_a, name_b = (name_e.replace(f".lora_E.{ADAPTER_NAME}", f".lora_{m}.{ADAPTER_NAME}.weight") for m in "AB")
        score_e, score_a, score_b = (
            self.averages[name][SENSITIVITY] * self.averages[name][UNCERTAINTY] for name in (name_e, name_a, name_b)
        )
        return score_e.view(-1) + score_a.mean(1) + score_b.mean(0)


def budget_of_step(step: int, first: int, last: int, initial: int, final: int) -> int:
    """Return how many triplets all layers have in a step: it falls as a cube from `initial` to `final` (eq. 12)."""
    if step >= last:
        return final
    remaining = 1 - (step - first) / (last - first) if step > first else 1.0
    return int(final + (initial - final) * remaining**3)
