"""Say which files of a model are read at all, and refuse those that ask for code of their own.

A base may hold anything: only files of the allow list are fetched, and the plan names the others. A folder that this
project made holds what this project writes, so any other file in it was put there by somebody else (13).
The JSON files are bounded by size and depth before anything reads what is in them. Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from qlora_retrain.core.errors import IntegrityError

# What a model is loaded from: weights, settings, a tokenizer's files, chat templates. Licences are text and stay.
_MODEL_FILE = re.compile(
    r".+\.(safetensors|json|jinja|txt|model(\.v\w+)?|tiktoken|spm|bpe|codes|vocab)"
    r"|(licen[cs]e|notice|copying)(\.md|\.txt)?",
    re.IGNORECASE,
)
# What this project writes besides, into artifacts and versions.
_OWN_FILE = re.compile(r".+\.(gguf|html|jsonl|sig)|(README|LICENCE)\.md|Modelfile|events\.out\.tfevents\.\d+\.train")
# `torch.load` and `numpy.load` may unpickle, and a pickle can call any function while it is read.
_PICKLE = re.compile(r".+\.(bin|pt|pth|pkl|pickle|ckpt|joblib|npy|npz|h5|msgpack)", re.IGNORECASE)
_WEIGHTS = re.compile(r".+\.(safetensors|gguf)", re.IGNORECASE)

# What transformers, PEFT and the tokenizers read as a whole, and so what has a limit and is looked at. The largest in
# use: settings of 1 MiB, a vocabulary of 33 MiB; a parsed file takes up to 20 times its size in memory.
_SETTINGS = re.compile(r".*config.*\.json|special_tokens_map\.json|chat_template.*\.json|.+\.jinja", re.IGNORECASE)
_VOCABULARY = re.compile(
    r"(tokenizer|vocab|tekken|added_tokens|merges).*|.+\.index\.json|.+\.(model(\.v\w+)?|tiktoken|spm|bpe|codes)",
    re.IGNORECASE,
)
_MAX_SETTINGS_BYTES, _MAX_VOCABULARY_BYTES = 8 * 2**20, 64 * 2**20
# Of 2 million in the largest vocabulary; 64 MiB of `[],` alone would take 1.8 GiB.
_MAX_VALUES = 8_000_000
# What can hold more values.
_HOLDERS = (dict, list)
# Real files have a dozen. What comes after us copies and prints documents by recursion.
_MAX_LEVELS = 64

# Keys by which transformers or PEFT import code: from the repository, from another one, or any module by its name.
_CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate", "auto_mapping", "megatron_config")
_CLASS_KEY = re.compile(r"(\w+_)?(tokenizer|processor|feature_extractor)_class")


def is_model_file(path: str) -> bool:
    """Return whether a base's file is one that a model is loaded from; all others are left where they are."""
    return not _is_hidden(path) and bool(_MODEL_FILE.fullmatch(PurePosixPath(path).name))


def refuse_foreign(paths: Iterable[str], label: str) -> None:
    """Raise `IntegrityError` for a file that neither belongs to a model nor is one that this project writes."""
    for path in paths:
        name = PurePosixPath(path).name
        if _is_hidden(path) or not (_MODEL_FILE.fullmatch(name) or _OWN_FILE.fullmatch(name)):
            raise IntegrityError(
                f"{label}: {path!r} is no file that this project writes; somebody else put it there: remove what is "
                "there, and have it made again"
            )


def refuse_only_pickles(paths: Iterable[str], left_out: Iterable[str], label: str) -> None:
    """Raise `IntegrityError` for a base whose only weights are pickles, with the way to convert them."""
    pickles = sorted(path for path in left_out if _PICKLE.fullmatch(path))
    if pickles and not any(_WEIGHTS.fullmatch(path) for path in paths):
        raise IntegrityError(
            f"{label}: {pickles[0]} is a pickle, which can run code when it is read, and there are no safetensors "
            "weights; convert it where you trust it: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) of "
            "transformers writes safetensors"
        )


def max_bytes(path: str) -> int | None:
    """Return the largest size that a file may have which is read as a whole; None for weights and all others."""
    name = PurePosixPath(path).name
    if _WEIGHTS.fullmatch(name):
        return None
    if _SETTINGS.fullmatch(name):
        return _MAX_SETTINGS_BYTES
    return _MAX_VOCABULARY_BYTES if _VOCABULARY.fullmatch(name) else None


def refuse_large(path: str, size_bytes: int, label: str) -> None:
    """Raise `IntegrityError` for a file of a model that is far larger than such files are."""
    limit = max_bytes(path)
    if limit is not None and size_bytes > limit:
        raise IntegrityError(
            f"{label}: expected {path} of at most {limit >> 20} MiB, found {size_bytes:,} bytes; no model needs such a "
            "file: fetch the model again, or choose another one"
        )


def parse_json(path: str, data: bytes, label: str) -> Any:
    """Return a parsed JSON file of a model.

    Raises:
        IntegrityError: If it is too large, has too many values, is no JSON, is nested too deeply, or asks for code.
    """
    refuse_large(path, len(data), label)
    if sum(data.count(sign) for sign in (b",", b"[", b"{")) > _MAX_VALUES:
        raise IntegrityError(
            f"{label}: {path} has more than {_MAX_VALUES:,} values; no model needs that: choose another one"
        )
    try:
        document = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"{label}: {path} is not valid JSON: {error}") from error
    except RecursionError:
        raise _depth_error(path, label) from None
    _refuse_code(path, document, label)
    return document


def read_json(path: Path, label: str) -> Any:
    """Return a parsed JSON file of a model on disk; raise `IntegrityError` as `parse_json` does."""
    return parse_json(path.name, _read_start(path, (max_bytes(path.name) or _MAX_VOCABULARY_BYTES) + 1), label)


def refuse_content(sizes_bytes: Iterable[tuple[str, int]], read_start: Callable[[str, int], bytes], label: str) -> None:
    """Raise `IntegrityError` for a file that is too large, or that asks for code.

    Args:
        sizes_bytes: The path and the size of each file.
        read_start: Reads the first bytes of a file.
        label: What the files are, for messages.
    """
    for path, size_bytes in sizes_bytes:
        refuse_large(path, size_bytes, label)
        limit = max_bytes(path)
        if limit is not None and path.lower().endswith(".json"):
            parse_json(path, read_start(path, limit + 1), label)


def refuse_unsafe(folder: Path, label: str = "") -> None:
    """Raise `IntegrityError` if a folder on disk has a foreign file, or a file that asks for code or is too large."""
    label = label or folder.name
    paths = sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink())
    refuse_foreign((p.relative_to(folder).as_posix() for p in paths), label)
    if broken := [p.name for p in paths if not p.exists()]:
        raise IntegrityError(f"{label}: {broken[0]} is a link to nothing; fetch the model again")
    sizes_bytes = [(p.relative_to(folder).as_posix(), p.stat().st_size) for p in paths if p.is_file()]
    refuse_content(sizes_bytes, lambda path, count: _read_start(folder / path, count), label)


def _read_start(path: Path, size_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size_bytes)


def _refuse_code(path: str, document: Any, label: str) -> None:
    """Look at every object of a document, level by level: a config may be nested in another one."""
    level = [document]
    for _ in range(_MAX_LEVELS):
        for value in level:
            if isinstance(value, dict):
                for key in value:
                    if _asks_for_code(key, value[key]):
                        raise IntegrityError(
                            f"{label}: {path} has {json.dumps(key)}: it would run code from outside of the library; "
                            "choose another model"
                        )
        # Only what can hold more, since a vocabulary has hundreds of thousands of numbers and texts.
        nested = (
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, _HOLDERS)
        )
        level = [item for items in nested for item in items if isinstance(item, _HOLDERS)]
        if not level:
            return
    raise _depth_error(path, label)


def _asks_for_code(key: str, value: Any) -> bool:
    # A vocabulary maps any text to a number.
    if isinstance(value, int | float) and not isinstance(value, bool):
        return False
    if key in _CODE_KEYS:
        return key == "auto_map" or bool(value)
    # A class is a name of the library; a module or a repository has one of these signs.
    if _CLASS_KEY.fullmatch(key):
        return bool(re.search(r"[./\\]|--", str(value)))
    # An implementation of attention with a / is fetched from that repository.
    return key.endswith("attn_implementation") and "/" in str(value)


def _depth_error(path: str, label: str) -> IntegrityError:
    return IntegrityError(
        f"{label}: {path} is nested more than {_MAX_LEVELS} levels deep; no model needs that: choose another one"
    )


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(path).parts)
