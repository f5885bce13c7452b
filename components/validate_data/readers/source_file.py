"""A file of a source: its bytes after unpacking, and its text as lines.

Which compression and which encoding a file has is read from its first bytes, never from its name.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, TextIO, cast

import pyarrow

from components.validate_data.readers import encodings, limits
from qlora_retrain.core.errors import UsageError

HEAD_BYTES = 65_536
_BEGINNINGS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_SUFFIXES = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd", ".lz4")


_LINE_BYTES = 16


class _CountedStream(io.RawIOBase):
    """Unpacked bytes, and no more of them than a file of this size may hold."""

    def __init__(self, stream: IO[bytes], file: SourceFile) -> None:
        self._stream, self._file = stream, file
        self._remaining = file.max_characters

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._stream.read(len(buffer))
        # A line takes time however short it is.
        self._remaining -= len(part) + part.count(b"\n") * _LINE_BYTES
        if self._remaining < 0:
            raise self._file.too_large()
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._stream.close()
        super().close()


@dataclass(frozen=True)
class SourceFile:
    """A file and the name that messages give it: its path below the source's folder."""

    name: str
    path: Path
    num_files: int = 1  # of the source

    @cached_property
    def max_characters(self) -> int:
        """How many characters it may hold, or unpacked bytes."""
        return limits.max_file_characters(self.path.stat().st_size, self.num_files)

    def too_large(self) -> UsageError:
        """Return the error about a file that holds more."""
        return UsageError(
            f"{self.name}: the file has {self.path.stat().st_size:,} bytes and unpacks to more than "
            f"{self.max_characters:,}, which no data does that people wrote; leave it out, or write its rows as plain "
            "JSON lines if they are meant"
        )

    @cached_property
    def compression(self) -> str | None:
        """The program that unpacks it; None for a file that is not packed."""
        with self.path.open("rb") as stream:
            beginning = stream.read(8)
        return next((program for magic, program in _BEGINNINGS.items() if beginning.startswith(magic)), None)

    @cached_property
    def head(self) -> bytes:
        """The first bytes, unpacked."""
        with self.unpacking_errors(), self.open() as stream:
            return stream.read(HEAD_BYTES)

    @property
    def suffix(self) -> str:
        """The suffix that names the format, in lower case: `.csv` of `a.CSV.gz`."""
        path = Path(self.name.lower())
        return path.with_suffix("").suffix if path.suffix in _SUFFIXES else path.suffix

    @cached_property
    def encoding(self) -> str:
        """The name of the text's encoding, for Python."""
        return encodings.detect(self.head)

    @cached_property
    def line_end(self) -> Literal["\n", "\r"]:
        r"""The character that ends a line: `\r` for files of old systems, which have no `\n` at all."""
        text = self.head.decode(self.encoding, "replace")
        return "\r" if "\r" in text.rstrip("\r") and "\n" not in text else "\n"

    @property
    def command_input(self) -> str:
        """How a shell command gets the unpacked bytes, e.g. `< a.csv` or `gzip -dc a.csv.gz |`, for messages."""
        name = shlex.quote(self.name)
        return f"{self.compression} -dc {name} | " if self.compression else f"< {name} "

    def open(self) -> IO[bytes]:
        """Open the unpacked bytes; reading more of them than data packs to is a `UsageError`."""
        if self.compression is None:
            return self.path.open("rb")
        return cast(IO[bytes], io.BufferedReader(_CountedStream(self._open_packed(), self)))

    def _open_packed(self) -> IO[bytes]:
        match self.compression:
            case "gzip":
                return cast(IO[bytes], gzip.open(self.path))
            case "bzip2":
                return bz2.open(self.path)
            case "xz":
                return lzma.open(self.path)
            case program:
                packed = pyarrow.OSFile(str(self.path))
                return cast(IO[bytes], pyarrow.CompressedInputStream(packed, program))

    def open_text(self) -> TextIO:
        """Open the text; no line end is translated."""
        return io.TextIOWrapper(self.open(), encoding=self.encoding, newline=self.line_end)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield each line with its number from 1, without its end.

        Raises:
            UsageError: For bytes that are no text of the file's encoding, a packed file that is damaged or holds too
                much, or a line that is too long.
        """
        with self.reading_errors(), self.open_text() as stream:
            lines = limits.BoundedLines(stream, self.name)
            for line in lines:
                yield lines.number, line.removesuffix(self.line_end).removesuffix("\r")
                lines.begin_row()

    @contextmanager
    def reading_errors(self) -> Iterator[None]:
        """Turn errors of unpacking and decoding into errors that a person can act on."""
        with self.unpacking_errors():
            try:
                yield
            except UnicodeDecodeError as error:
                with self.open() as stream:
                    text = encodings.explain(error, stream, self.name, self.suffix, self.command_input)
                raise UsageError(text) from None

    @contextmanager
    def unpacking_errors(self) -> Iterator[None]:
        """Turn errors of unpacking into an error that names the file."""
        try:
            yield
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            # An error of the disk is no fault of the file.
            if not self.compression:
                raise
            raise UsageError(
                f"{self.name}: cannot be unpacked with {self.compression} ({error}); the file is damaged or was cut "
                "off: fetch it again"
            ) from error
