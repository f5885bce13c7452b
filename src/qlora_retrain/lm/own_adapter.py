"""Adapters that PEFT's modules do not hold: their parameters lie in the model itself, beside its own.

`virtual_tokens` and `bottleneck` attach them. A model has at most one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm.adapter_kind import WEIGHTS_FILE

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

_ATTRIBUTE = "own_adapter"


@dataclass(slots=True)
class OwnAdapter:
    """An adapter in a model.

    Attributes:
        config: Its adapter_config.json.
        parameters: What trains, by the names in its file.
        is_on: Whether the model computes with it.
    """

    config: dict[str, Any]
    parameters: dict[str, Parameter] = field(default_factory=dict)
    is_on: bool = True

    def weights(self) -> dict[str, Tensor]:
        """Return the trained numbers by the names in the file: those of the model itself."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy numbers into the model.

        Raises:
            IntegrityError: If names or shapes are others than the model's.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        expected = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        if shapes != expected:
            name = next(name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name))
            raise IntegrityError(
                f"adapter: {name} has the shape {shapes.get(name)}, and {expected.get(name)} is expected over this "
                "base; it was trained over another one"
            )
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[name])


def put(model: Any, adapter: OwnAdapter) -> None:
    """Note the adapter that was attached.

    Raises:
        UsageError: If the model has one already.
    """
    if find(model) is not None:
        raise UsageError("the model has an adapter already; load the base again")
    setattr(model, _ATTRIBUTE, adapter)


def find(model: Any) -> OwnAdapter | None:
    """Return the adapter that was attached to a model, if any."""
    adapter: OwnAdapter | None = vars(model).get(_ATTRIBUTE)
    return adapter


def drop(model: Any) -> None:
    """Forget the adapter, after its parameters were removed from the model."""
    delattr(model, _ATTRIBUTE)


def load_weights(model: Any, folder: Path) -> None:
    """Copy the numbers of an adapter's folder into the model, to which an adapter of this kind was attached.

    Raises:
        IntegrityError: If the file is damaged or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    adapter = find(model)
    assert adapter is not None, "an adapter is attached before its numbers are read"
    try:
        adapter.set_weights(load_file(folder / WEIGHTS_FILE))
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{folder.name}/{WEIGHTS_FILE}: damaged: {error}") from error


def disabled(model: Any) -> AbstractContextManager[Any]:
    """Return a context in which the model computes as its base does; for PEFT's adapters too."""
    if find(model) is None:
        context: AbstractContextManager[Any] = model.disable_adapter()
        return context
    return _switched_off(find(model))


@contextmanager
def _switched_off(adapter: Any) -> Iterator[None]:
    adapter.is_on = False
    try:
        yield
    finally:
        adapter.is_on = True
