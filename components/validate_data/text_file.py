"""Keep what rows say in a file without a name, so that the memory of the data gate does not grow with their texts."""

from __future__ import annotations

import marshal
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any, NewType

Place = NewType("Place", int)  # where a value begins and how many bytes it has, as one number
_LENGTH_BITS = 32
_BUFFER_BYTES = 1 << 20


class TextFile:
    """Values that Python can marshal (texts, numbers, lists, dicts), by their place in the file.

    The file is gone with this object, or with the process. Nobody else can open it, so reading it back is safe.
    """

    def __init__(self, folder: Path) -> None:
        """Open the file on the disk that has this folder."""
        # Open as long as this object.
        self._file = tempfile.TemporaryFile(dir=folder, buffering=_BUFFER_BYTES)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._descriptor = self._file.fileno()
        self._size = self._num_flushed = 0

    def append(self, value: Any) -> Place:
        """Write a value, and return its place.

        Raises:
            OSError: Where the disk is full.
        """
        data = marshal.dumps(value)
        self._file.write(data)
        place = Place(self._size << _LENGTH_BITS | len(data))
        self._size += len(data)
        return place

    def read(self, place: Place) -> Any:
        """Return the value at a place, made anew."""
        start, length = place >> _LENGTH_BITS, place & ((1 << _LENGTH_BITS) - 1)
        if start + length > self._num_flushed:
            self._file.flush()
            self._num_flushed = self._size
        # Nobody else can have written it.
        return marshal.loads(os.pread(self._descriptor, length, start))  # noqa: S302
