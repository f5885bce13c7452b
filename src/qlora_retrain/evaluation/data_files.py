"""Which files of a source hold rows, by their names: the data gate reads these, and the plan names all others."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal

Format = Literal["json", "csv", "parquet", "arrow", "text"]
SUFFIXES: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json-lines", ".jsonlines", ".jl", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv", ".tab", ".psv"), "csv"),
    **dict.fromkeys((".parquet", ".pq", ".parq"), "parquet"),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
}
# Files that lie beside data and hold no rows; a name that begins with a dot is one too.
_BESIDE_DATA = (
    "readme", "readme.*", "licen[sc]e", "licen[sc]e.*", "license-*", "notice", "notice.*", "citation*", "changelog*",
    "*.bib", "*.crc", "*.md5", "*.sha256", "*.lock", "thumbs.db", "desktop.ini",
    "_success", "_committed_*", "_started_*", "_metadata", "_common_metadata",
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "dvc.yaml",
)  # fmt: skip
_DOCUMENTATION = ("*.md", "*.rst", "*.py")  # with `data.format: text` they may be the texts


def find_beside_data(names: Sequence[str], data_format: str) -> list[str]:
    """Return the names that say that a file holds no rows: hidden, a licence, a checksum, metadata.

    Args:
        names: The paths of all files of a source.
        data_format: The setting `data.format`.
    """
    hidden = {name for name in names if any(part.startswith(".") for part in name.split("/"))}
    # Where a source has nothing else, its patterns name hidden files, which are meant then.
    hidden = hidden if len(hidden) < len(names) else set()
    return [name for name in names if name in hidden or _is_beside_data(name.lower(), data_format)]


def _is_beside_data(name: str, data_format: str) -> bool:
    path = PurePosixPath(name)
    # A file license-questions.csv holds rows.
    if path.suffix in SUFFIXES and path.name not in _BESIDE_DATA:
        return False
    patterns = _BESIDE_DATA if data_format == "text" else _BESIDE_DATA + _DOCUMENTATION
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)
