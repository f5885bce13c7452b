"""List the files that make up a model folder's tokenizer.

`quantize_model` and `merge_adapter` copy these files into the model folders that they write; `validate_data` fetches no
other file of the base. They are listed here, and not in the graph, because `core` is not hashed: a change of the list
changes what is copied, so it must change the code identity of these steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

# Glob patterns. config.json is among them because AutoTokenizer reads the model type from it.
TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    # It may name further tokens at which an answer ends.
    "generation_config.json",
    "*.model",
)


def copy_files(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    """Copy the files that match a pattern, byte by byte, each to its path below the folder."""
    # A set, since two patterns can match one file.
    for path in sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()}):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
