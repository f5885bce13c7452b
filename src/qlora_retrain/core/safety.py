"""Refuse a model folder that holds code, or files that run code when they are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from qlora_retrain.core.errors import IntegrityError

# By suffix. `torch.load` unpickles, and a pickle can call any function while it is read.
_UNSAFE = {
    ".py": "Python code",
    ".bin": "a pickle",
    ".pt": "a pickle",
    ".pth": "a pickle",
    ".pkl": "a pickle",
    ".pickle": "a pickle",
    ".joblib": "a pickle",
    ".ckpt": "a pickle",
    ".so": "machine code",
}
# The files in which transformers looks for `auto_map`, the names of Python classes to import from the repository.
MAY_NAME_CODE = ("config.json", "tokenizer_config.json", "generation_config.json")


def refuse_names(paths: Iterable[str], hint: str = "") -> None:
    """Raise `IntegrityError` for a file that is code, or may run code when it is loaded.

    Args:
        paths: The names of all files.
        hint: Where files can be left out; the message then has the patterns that leave out all unsafe ones.
    """
    unsafe = {path: kind for path in paths if (kind := _UNSAFE.get(PurePosixPath(path).suffix.lower()))}
    for path, kind in unsafe.items():
        patterns = dict.fromkeys(f"'!*{PurePosixPath(path).suffix}'" for path in unsafe)
        convert = "; save_pretrained of transformers writes a model as safetensors" if kind == "a pickle" else ""
        way = f"; {hint}: ['**', {', '.join(patterns)}]" if hint else convert
        raise IntegrityError(f"base_model: {path} is {kind}; only safetensors models without code are loaded{way}")


def refuse_code(path: str, data: bytes) -> None:
    """Raise `IntegrityError` if a JSON file asks for its own code (`auto_map`), or is not valid JSON."""
    try:
        document = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"base_model: {path} is not valid JSON: {error}") from error
    if isinstance(document, dict) and "auto_map" in document:
        raise IntegrityError(f'base_model: {path} has "auto_map": it would run code of its own; choose another model')


def refuse_unsafe(folder: Path) -> None:
    """Raise `IntegrityError` if a folder on disk fails `refuse_names` or `refuse_code`."""
    refuse_names(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
    for name in MAY_NAME_CODE:
        if (folder / name).is_file():
            refuse_code(name, (folder / name).read_bytes())
