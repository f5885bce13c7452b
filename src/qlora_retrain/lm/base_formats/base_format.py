"""The interface of a base format: how `base_nf4` holds the weights of the base's linear layers.

Embeddings, norms and the output layer stay in 16 bits in every format. A format says what it stores, how many bits a
weight takes by arithmetic, how one weight is unpacked, and how a folder is loaded. No other code knows a format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Linear
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from qlora_retrain.lm.weight_files import SafetensorsFolder, TensorSpec


@dataclass(frozen=True, slots=True)
class StorageBits:
    """The storage of the weights that are in the format, counted from the stored tensors.

    Attributes:
        weights: The number of these weights.
        per_weight: The bits that grow with the layer, such as codes and scales. The arithmetic must give the same.
        per_weight_with_tables: The same plus the tables of fixed size (with bitsandbytes about 1.2 KB per tensor). The
            tables are 0.5 % of a model of 100 M weights and negligible in larger ones. This number is shown and not
            checked.
    """

    weights: int
    per_weight: float
    per_weight_with_tables: float


class BaseFormat(ABC):
    """A value of `quantize.format`, with the settings that go with it.

    Attributes:
        is_packed: Whether weights of linear layers are stored as something else than 16-bit numbers.
        scratch_bytes_per_weight: What a weight of a layer takes while it is unpacked to be computed with in 16 bits.
    """

    is_packed: ClassVar[bool]
    scratch_bytes_per_weight: ClassVar[int]

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Take the values of the section `quantize`."""

    @property
    @abstractmethod
    def bits_per_weight(self) -> float:
        """The bits of a weight by the method's arithmetic, without tables of fixed size."""

    @property
    def code_bits_per_weight(self) -> float:
        """The bits of these that FSDP shards: the codes, where scales are whole in every process; else all of them."""
        return self.bits_per_weight

    @abstractmethod
    def storage(self, specs: Mapping[str, TensorSpec]) -> StorageBits:
        """Count the bits of a folder's weights from its tensors' types and shapes, by name."""

    @abstractmethod
    def packed_names(self, names: Iterable[str]) -> set[str]:
        """Return the names of the packed weights among the names of a folder's tensors."""

    @abstractmethod
    def unpack(self, name: str, tensors: SafetensorsFolder) -> Tensor:
        """Return the values (out, in) of a packed weight of a folder: those with which its layer computes."""

    @staticmethod
    @abstractmethod
    def is_packed_layer(layer: Any) -> bool:
        """Return whether a loaded layer's weight is packed in this format."""

    @staticmethod
    @abstractmethod
    def layer_weight(layer: Any) -> Tensor:
        """Return the weight (out, in) of a loaded layer for which `is_packed_layer` is true."""

    @abstractmethod
    def layer_type(self) -> type[Linear]:
        """Return the class of the layers that the format stores; its other linear layers stay in 16 bits."""

    @abstractmethod
    def transformers_config(self) -> QuantizationConfigMixin | None:
        """Return the settings by which transformers packs a model in this format; None where nothing is packed."""

    @abstractmethod
    def load(self, from_pretrained: Callable[[str], PreTrainedModel], *, is_float32: bool) -> PreTrainedModel:
        """Load a folder in this format.

        Args:
            from_pretrained: Loads it by transformers, with the dtype that it is given.
            is_float32: Whether the model shall compute in float32, with the values of its weights.
        """
