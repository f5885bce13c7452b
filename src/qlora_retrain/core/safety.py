"""What a model folder must not hold: code that would be run, and files that run code when they are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from qlora_retrain.core.errors import IntegrityError

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
MAY_NAME_CODE = ("config.json", "tokenizer_config.json", "generation_config.json")


def refuse_names(paths: Iterable[str]) -> None:
    """Raise `IntegrityError` for a file that is, or may run, code."""
    for path in paths:
        kind = _UNSAFE.get(PurePosixPath(path).suffix.lower())
        if kind is not None:
            raise IntegrityError(f"base_model: {path} is {kind}; only safetensors models without code are loaded")


def refuse_code(path: str, data: bytes) -> None:
    """Raise `IntegrityError` if a JSON file asks for code of its own (`auto_map`) or is no JSON object."""
    try:
        document = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"base_model: {path} is not valid JSON: {error}") from error
    if isinstance(document, dict) and "auto_map" in document:
        raise IntegrityError(f'base_model: {path} has "auto_map": it would run code of its own; choose another model')


def refuse_unsafe(folder: Path) -> None:
    """Both checks over a folder on disk."""
    refuse_names(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
    for name in MAY_NAME_CODE:
        if (folder / name).is_file():
            refuse_code(name, (folder / name).read_bytes())
