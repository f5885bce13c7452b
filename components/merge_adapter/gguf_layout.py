"""Turn the tensors of a transformers model into those of a GGUF file, and back: names, order of rows, offsets.

Reads config.json alone, as transformers loads it. Every tensor of a model has exactly one in the file. Beside them
GGUF has tensors for rotary embeddings that are scaled by other rules than one factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import gguf_families
from qlora_retrain.lm.gguf_families import FAMILIES, Family

OUTPUT, EMBEDDINGS = "output.weight", "token_embd.weight"
_ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Layout:
    """How one model lies in a GGUF file.

    Attributes:
        family: The model's family.
        config: Its config.json as this version of transformers understands it.
        name_map: GGUF's names of the tensors.
    """

    family: Family
    config: dict[str, Any]
    name_map: gguf.TensorNameMap

    @classmethod
    def from_folder(cls, model: Path) -> Layout:
        """Read it from a model's folder.

        Raises:
            UsageError: If the model cannot be written as GGUF.
        """
        config = load_config(model)
        family = FAMILIES[gguf_families.architecture(config)]
        name_map = gguf.get_tensor_name_map(_ARCHITECTURES[family.arch], config["num_hidden_layers"])
        return cls(family, config, name_map)

    def gguf_name(self, name: str) -> str:
        """Return the name of a tensor in the file.

        Raises:
            UsageError: If it has none.
        """
        gguf_name: str | None = self.name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UsageError(
                f"merge.exports: GGUF has no name for the tensor {name}; remove the gguf exports from the list"
            )
        return gguf_name

    def is_stored(self, name: str) -> bool:
        """Return whether the file has this tensor: not a head that is a copy of the embeddings, nor frequencies.

        Files of Llama 2 have the rotary frequencies, which everybody computes from the settings.
        """
        if name.endswith("rotary_emb.inv_freq"):
            return False
        return name != "lm_head.weight" or not self.config.get("tie_word_embeddings")

    def to_gguf(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the model as the file has it."""
        if self._is_norm(name):
            tensor = tensor + self.family.norm_offset
        return self.permute_rotary(name, tensor, inverse=False)

    def from_gguf(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the file as the model has it."""
        if self._is_norm(name):
            tensor = tensor - self.family.norm_offset
        return self.permute_rotary(name, tensor, inverse=True)

    def permute_rotary(self, name: str, tensor: torch.Tensor, *, inverse: bool) -> torch.Tensor:
        """Permute the rows of query and key weights: in GGUF a head's two halves are adjacent pairs."""
        layer_name = name.split(".")[-2]
        if not self.family.interleaved or layer_name not in ("q_proj", "k_proj"):
            return tensor
        heads = self.config["num_attention_heads" if layer_name == "q_proj" else "num_key_value_heads"]
        shape = (heads, -1, 2) if inverse else (heads, 2, -1)
        halves = tensor.reshape(*shape, *tensor.shape[1:])  # (H, 2, D / 2, in features)
        return halves.transpose(1, 2).reshape(tensor.shape).contiguous()

    def rotary_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that scale rotary embeddings, by their names in the file."""
        (rope,) = gguf_families.rope_settings(self.config)[:1]
        kind = gguf_families.rope_type(rope)
        if kind == "longrope":
            names = {"long": "rope_factors_long.weight", "short": "rope_factors_short.weight"}
            return {name: torch.tensor(rope[f"{length}_factor"]) for length, name in names.items()}
        if kind == "llama3":
            return {"rope_freqs.weight": self._llama3_factors(rope)}
        return {}

    def _llama3_factors(self, rope: Mapping[str, Any]) -> torch.Tensor:
        """Return by what the frequencies are divided, by transformers' own rule."""
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        sizes = {name: self.config[name] for name in ("hidden_size", "num_attention_heads", "head_dim")}
        config = LlamaConfig(**sizes, rope_parameters=dict(rope))
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        powers = torch.arange(0, self.config["head_dim"], 2, dtype=torch.float32) / self.config["head_dim"]
        factors: torch.Tensor = 1.0 / (rope["rope_theta"] ** powers) / scaled
        return factors

    def _is_norm(self, name: str) -> bool:
        return name.endswith("norm.weight") and self.family.norm_offset != 0.0


def load_config(model: Path) -> dict[str, Any]:
    """Read config.json as this version of transformers understands it: old names are renamed, defaults filled in."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)

    # Configs may leave these two out: the heads then divide the hidden size, and each has keys of its own.
    heads = config.num_attention_heads
    fields: dict[str, Any] = config.to_dict()
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields["num_key_value_heads"] = getattr(config, "num_key_value_heads", None) or heads
    return fields
