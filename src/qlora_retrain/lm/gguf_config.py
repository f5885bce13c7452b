"""Read the config of the model in a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_retrain.core.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def read(path: Path) -> PreTrainedConfig:
    """Return the config, with the width of heads, which transformers reads for some families alone.

    Raises:
        UsageError: If it is the file of no causal language model that transformers reads.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path.name}: cannot be loaded as a causal language model: {error}") from error
    reader = GGUFReader(path)
    arch = reader.get_field("general.architecture")
    field = reader.get_field(f"{arch.contents()}.attention.key_length") if arch else None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if field and field.contents() != head_dim:
        config.head_dim = int(field.contents())
    return config
