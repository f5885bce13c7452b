"""Say which files of a folder are the model's weights: one answer for the plan, every step and the merge.

transformers takes `model.safetensors` before an index, lets config.json name another file, and loads an adapter that
lies beside the weights on top of them. Other readers choose differently. So a folder whose files leave a choice is
refused (12), with the candidates and the patterns that pick one of them. Standard library only.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from qlora_retrain.core import safety
from qlora_retrain.core.errors import IntegrityError, UsageError

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# PEFT's names. transformers loads an adapter of these names on top of the weights beside it.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_SUFFIX, _INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
_MAX_NAMES = 3  # in a message

ReadJson = Callable[[str], Any]


def weight_files(names: Iterable[str], read_json: ReadJson, label: str = "the model") -> tuple[str, ...]:
    """Return the files that hold the model's weights, sorted.

    Args:
        names: The relative paths of all files there are.
        read_json: Returns the parsed JSON file of a path; called for the index, and for config.json where there is one.
        label: What the files are, for messages.

    Raises:
        UsageError: If there are no weights, weights of more than one model, a left-over adapter, or too few shards.
        IntegrityError: If the index is no index, or names a file outside the folder.
    """
    paths = sorted(set(names))
    adapter_files = [path for path in paths if path in ADAPTER_FILES]
    candidates = _candidates([path for path in paths if path not in adapter_files], read_json, label)
    if not candidates:
        raise UsageError(f"{label}: {_reason_without_weights(paths, adapter_files)}")
    if len(candidates) > 1 or adapter_files:
        raise UsageError(f"{label}: {_ambiguity(candidates, adapter_files, paths)}")

    (head, files), *_ = candidates.items()
    if head not in (SINGLE_FILE, INDEX):
        raise UsageError(f"{label}: {_reason_for_other_name(head)}")
    if missing := [path for path in files if path not in paths]:
        raise UsageError(
            f"{label}: {INDEX} names {_listing(missing)}, which {'is' if len(missing) == 1 else 'are'} not there; "
            "fetch the model again, or have sources.base_model.files let the missing files in"
        )
    # A config.json may have transformers load another file than everybody else reads.
    config = read_json("config.json") if "config.json" in paths else None
    explicit = config.get("transformers_weights") if isinstance(config, Mapping) else None
    if explicit not in (None, head):
        raise UsageError(
            f'{label}: config.json has "transformers_weights": {explicit!r}, and the weights are {head}; remove that '
            "entry from config.json"
        )
    return tuple(path for path in files if path != INDEX)


def weight_paths(folder: Path, label: str | None = None) -> list[Path]:
    """Return the files that hold the weights of a model folder on disk; folders in it are not looked at.

    Args:
        folder: The folder.
        label: What it is, for messages; None: its name.

    Raises:
        UsageError: As `weight_files`.
        IntegrityError: As `weight_files`.
    """
    label, read_json = label or folder.name, read_json_in(folder)
    names = [path.name for path in folder.iterdir() if path.is_file()]
    # The index may name shards in a folder below.
    if INDEX in names:
        names += [path for path in index_files(read_json(INDEX), label) if (folder / path).is_file()]
    return [folder / name for name in weight_files(names, read_json, label)]


def write_config(base: Mapping[str, Any], dtype: str, folder: Path) -> None:
    """Write a base's config.json for 16-bit weights that were made from it and have its names.

    Args:
        base: The base's config.json.
        dtype: The type of the weights, e.g. `bfloat16`.
        folder: The new model's.
    """
    # `torch_dtype` is the older name of `dtype`; a config with both could contradict itself. The files have new names.
    dropped = ("quantization_config", "torch_dtype", "transformers_weights")
    config = {name: value for name, value in base.items() if name not in dropped} | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json_in(folder: Path) -> ReadJson:
    """Return a reader of a folder's JSON files, which maps what is no JSON to `IntegrityError`."""
    return lambda name: safety.read_json(folder / name, folder.name)


def index_files(document: Any, label: str) -> list[str]:
    """Return the files that an index names, sorted.

    Raises:
        IntegrityError: If it is no index, or names something else than safetensors files below its folder.
    """
    weight_map = document.get("weight_map") if isinstance(document, Mapping) else None
    if not isinstance(weight_map, Mapping) or {type(path) for path in weight_map.values()} != {str}:
        raise IntegrityError(f'{label}: {INDEX} has no "weight_map" from the names of tensors to files')

    files = sorted(set(weight_map.values()))
    for path in files:
        parts = PurePosixPath(path)
        # Windows' separator too, so that the answer does not depend on the machine.
        if parts.is_absolute() or ".." in parts.parts or "\\" in path or parts.as_posix() != path:
            raise IntegrityError(f"{label}: {INDEX} names {path!r}, which is not below its folder")
        if parts.suffix != _SUFFIX:
            raise IntegrityError(f"{label}: {INDEX} names {path}, which is no safetensors file")
    return files


def _candidates(paths: Sequence[str], read_json: ReadJson, label: str) -> dict[str, list[str]]:
    """Return every set of weights there is: its files, by the name that stands for it."""
    candidates: dict[str, list[str]] = {}
    if SINGLE_FILE in paths:
        candidates[SINGLE_FILE] = [SINGLE_FILE]
    if INDEX in paths:
        shards = index_files(read_json(INDEX), label)
        # An index of the single file alone leaves no choice: everybody reads that file.
        if shards != [SINGLE_FILE] or SINGLE_FILE not in paths:
            candidates[INDEX] = [INDEX, *shards]

    placed = {INDEX, *(path for files in candidates.values() for path in files)}
    for path in paths:
        if path not in placed and path.lower().endswith((_SUFFIX, _INDEX_SUFFIX)):
            parent = PurePosixPath(path).parent
            # What lies in a folder below is one candidate, and so is a series of shards without an index.
            head = _series(path) if parent == PurePosixPath(".") else f"{parent}/"
            candidates.setdefault(head, []).append(path)
    return candidates


def _ambiguity(candidates: Mapping[str, Sequence[str]], adapter_files: Sequence[str], paths: Sequence[str]) -> str:
    """Describe several sets of weights, or an adapter beside them: the names, and the patterns that pick one."""
    ways = []
    for head in (h for h in (SINGLE_FILE, INDEX) if set(candidates.get(h, [""])) <= set(paths)):
        # A shard of this index may be a file of another candidate too, and it has to stay.
        others = {path for files in candidates.values() for path in files} - set(candidates[head])
        if unwanted := sorted((others & set(paths)) | set(adapter_files)):
            ways.append(f"{_files_setting(unwanted, candidates[head])} keeps {head}")

    faults = []
    if len(candidates) > 1:
        descriptions = [
            f"{head} ({_listing(files)})" if len(files) > 1 else files[0] for head, files in candidates.items()
        ]
        faults.append(f"these are the weights of more than one model: {'; '.join(descriptions)}")
    if adapter_files:
        faults.append(
            f"an adapter lies beside the weights ({_listing(adapter_files)}), and transformers would load it on top"
        )
    return f"{'; '.join(faults)}. {' | '.join(ways) or f'Keep one set, named {SINGLE_FILE} or with {INDEX}'}"


def _files_setting(unwanted: Sequence[str], needed: Sequence[str]) -> str:
    """Return the setting that leaves files out; a folder and a series of shards become one pattern."""
    patterns: dict[str, None] = {}
    for path in unwanted:
        parent = PurePosixPath(path).parent
        pattern = f"{glob.escape(str(parent))}/*" if parent != PurePosixPath(".") else _series(glob.escape(path))
        is_too_wide = any(fnmatch.fnmatchcase(name, pattern) for name in needed)
        patterns[glob.escape(path) if is_too_wide else pattern] = None
    listed = ", ".join("'!{}'".format(pattern.replace("'", "''")) for pattern in patterns)
    return f"sources.base_model.files: ['**', {listed}]"


def _series(path: str) -> str:
    """Return the pattern of a shard's series, e.g. `model-*-of-00003.safetensors`; another path as it is."""
    return re.sub(r"-\d{5}-of-(\d{5})\b", r"-*-of-\1", path)


def _reason_without_weights(paths: Sequence[str], adapter_files: Sequence[str]) -> str:
    suffixes = {PurePosixPath(path).suffix.lower() for path in paths}
    if adapter_files:
        return (
            f"{_listing(adapter_files)}: this is an adapter and no model; give the model that it was trained over, or "
            "both merged"
        )
    if ".gguf" in suffixes:
        return "has only GGUF weights, which are packed for inference; give the original 16-bit safetensors model"
    if suffixes & {".bin", ".pt", ".pth"}:
        return "has only pickled weights; save_pretrained of transformers converts them to safetensors"
    return f"has no weights; expected {SINGLE_FILE}, or {INDEX} with its files"


def _reason_for_other_name(head: str) -> str:
    if head.endswith("/"):
        return f"has weights only in {head}; give that folder as sources.base_model.uri"
    if "-*-of-" in head:
        return f"has the shards {head} and no {INDEX}, which says what is in them; fetch that file too"
    if head.lower().endswith(_INDEX_SUFFIX):
        return f"the weights' index is {head}, and transformers reads {INDEX}; rename it"
    return (
        f"the weights are {head}, and transformers reads {SINGLE_FILE}, or {INDEX} with its files; rename the file, or "
        "add the index"
    )


def _listing(paths: Sequence[str]) -> str:
    count = f", … ({len(paths)} in all)" if len(paths) > _MAX_NAMES else ""
    return ", ".join(paths[:_MAX_NAMES]) + count
