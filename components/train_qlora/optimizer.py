"""bitsandbytes' AdamW over the trained parameters, its learning rate at each step, and its state as plain tensors.

A parameter in 16 bits is stepped through a copy in fp32, its master: where a weight is a thousand times its update, the
sum rounds back to the weight. The gradients add up in fp32 too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from bitsandbytes.optim import AdamW
from torch import Tensor
from torch.nn import Parameter

from components.train_qlora.methods import Method, method_of
from components.train_qlora.processes import distributed
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm.warmup import num_warmup_steps

# bitsandbytes' tables of 8-bit values are the same in every run.
CONSTANT_PARTS = ("qmap1", "qmap2")
MASTER_PART = "master"


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        config: The highest rate, the steps that rise to it, and the schedule behind them.
        step: The number of the step, from 0.
        total_steps: The optimizer steps of the whole run.
    """
    warmup_steps = num_warmup_steps(total_steps, steps=config.warmup_steps, ratio=config.warmup_ratio)
    falling_steps = max(1, total_steps - warmup_steps)
    if step < warmup_steps:
        factor = step / warmup_steps
    elif config.schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * ((step - warmup_steps) / falling_steps)))
    elif config.schedule == "linear":
        factor = (total_steps - step) / falling_steps
    else:
        factor = 1.0
    return config.learning_rate * factor


class AdapterOptimizer:
    """AdamW, as the settings describe it.

    Attributes:
        config: The settings.
        method: The one of the settings; the model shares it.
        trained: The model's parameters that it trains, by name.
        parameters: The same in fp32, with gradients before a step; masters where the model's are in 16 bits.
        adamw: bitsandbytes' optimizer over these parameters.
    """

    def __init__(
        self, config: TrainConfig, named_parameters: Iterable[tuple[str, Parameter]], method: Method | None = None
    ) -> None:
        self.config, self.method = config, method or method_of(config)
        self.trained = dict(named_parameters)
        self.parameters = {name: _master(parameter) for name, parameter in self.trained.items()}
        groups = self._groups()
        self._rate_factors = list(groups)
        self.adamw = AdamW(
            [{"params": group} for group in groups.values()],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            optim_bits=8 if config.optimizer.endswith("8bit") else 32,
            # bitsandbytes pages no memory of a CPU.
            is_paged=config.optimizer.startswith("paged_") and config.device == "cuda",
        )

    def begin(self) -> None:
        """Prepare for a run's backward passes: a 16-bit gradient goes to the master as soon as it is complete.

        With several processes it has to wait for the sum over all of them.
        """
        if distributed.world_size() > 1:
            return
        for name, parameter in self.trained.items():
            if parameter is not self.parameters[name]:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._collect_gradient(name))

    def collect_gradients(self) -> None:
        """Add every gradient of a 16-bit parameter to its master's, before they are clipped."""
        for name in self.trained:
            self._collect_gradient(name)

    def _collect_gradient(self, name: str) -> None:
        parameter, master = self.trained[name], self.parameters[name]
        if parameter is master or parameter.grad is None:
            return
        gradient, parameter.grad = parameter.grad, None
        # In place, in fp32, without a copy of the gradient in fp32.
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    def step(self, rate: float) -> None:
        """Change the parameters by their gradients, and forget these."""
        for group, factor in zip(self.adamw.param_groups, self._rate_factors, strict=True):
            group["lr"] = rate * factor
        self.adamw.step()
        with torch.no_grad():
            for name, parameter in self.trained.items():
                if parameter is not self.parameters[name]:
                    parameter.copy_(self.parameters[name])
        self.method.end_step(self.parameters)
        self.adamw.zero_grad()

    def reset(self) -> None:
        """Begin anew, with the weights that the model has now."""
        self.adamw.state.clear()
        for name, parameter in self.trained.items():
            if parameter is not self.parameters[name]:
                self.parameters[name].data.copy_(parameter.data)

    def state(self) -> dict[str, Tensor]:
        """Return the moments, the scales of 8-bit ones, masters, and what the method keeps, by `<parameter>.<part>`."""
        return dict(self._state_tensors())

    def load_state(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Bring the optimizer to the state that it had after `step` steps.

        The values are copied into memory that bitsandbytes allocates, since only such memory is paged.
        """
        self._allocate()
        for name, tensor in self._state_tensors():
            tensor.copy_(tensors[name])
        for parameter in self.parameters.values():
            self.adamw.state[parameter]["step"] = step

    def empty_state(self) -> dict[str, Tensor]:
        """Return what `state` has after a step, as tensors of the meta device, which take no memory."""
        twins = {
            name: Parameter(torch.empty_like(parameter, device="meta")) for name, parameter in self.trained.items()
        }
        twin = AdapterOptimizer(self.config, twins.items())
        twin.adamw.is_paged = False
        twin._allocate()
        return twin.state()

    def describe(self) -> str:
        """Describe the optimizer, and whether its state is paged; on a CPU it never is."""
        setting = self.config.optimizer
        if self.config.device != "cuda":
            name = setting.removeprefix("paged_")
            return f"{name}, not paged: bitsandbytes pages no memory on a CPU (the setting is {setting})"
        tensors = self.state().values()
        num_paged = sum(1 for tensor in tensors if getattr(tensor, "is_paged", False))
        return f"{setting}, {num_paged} of {len(tensors)} state tensors are paged (small ones never are)"

    def _allocate(self) -> None:
        for i, group in enumerate(self.adamw.param_groups):
            for j, parameter in enumerate(group["params"]):
                if not self.adamw.state[parameter]:
                    self.adamw.init_state(group, parameter, i, j)

    def _groups(self) -> dict[float, list[Parameter]]:
        """Return the parameters by the factor of their learning rate."""
        groups: dict[float, list[Parameter]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(self.method.rate_factor(name), []).append(parameter)
        return groups

    def _state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            if parameter is not self.trained[name]:
                yield f"{name}.{MASTER_PART}", parameter.detach()
            for part, tensor in self.adamw.state[parameter].items():
                if isinstance(tensor, Tensor) and part not in CONSTANT_PARTS:
                    yield f"{name}.{part}", tensor
        yield from self.method.state(self.parameters).items()


def _master(parameter: Parameter) -> Parameter:
    is_wide = parameter.dtype.itemsize > torch.bfloat16.itemsize
    return parameter if is_wide else Parameter(parameter.detach().float())
