"""Read a folder of files as the data gate does, up to records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.validate_data.files import Record, read_records
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

ReadFiles = Callable[..., list[Record]]
RefuseFiles = Callable[..., str]


@pytest.fixture
def read_files(tmp_path: Path) -> ReadFiles:
    """Writes files by their names into a source's folder, and returns their records; settings are those of `data`."""

    def call(files: dict[str, bytes | str], **settings: Any) -> list[Record]:
        for name, content in files.items():
            path = tmp_path / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return list(read_records(tmp_path / "source", DataConfig(**settings), "raw_data"))

    return call


@pytest.fixture
def refuse_files(read_files: ReadFiles) -> RefuseFiles:
    """Like `read_files`, of files that are refused; returns the message."""

    def call(files: dict[str, bytes | str], **settings: Any) -> str:
        with pytest.raises(UsageError) as caught:
            read_files(files, **settings)
        return str(caught.value)

    return call
