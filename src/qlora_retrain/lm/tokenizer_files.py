"""List the files that make up a model folder's tokenizer.

`quantize_model` and `merge_adapter` copy these files into the model folders that they write; `validate_data` fetches no
other file of the base. They are listed here, and not in the graph, because `core` is not hashed: a change of the list
changes what is copied, so it must change the code identity of these steps.
"""

from __future__ import annotations

# Glob patterns. config.json is among them because AutoTokenizer reads the model type from it.
TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
)
