"""The curves as a TensorBoard event file: a few bytes a step, written without TensorBoard, which brings a web server.

A file is a row of records, each its length, the length's checksum, an `Event` message and its checksum. `Event` holds
a time (1), a step (2) and a summary (5) of values (1), each a tag (1) and a number (2).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

NAME = "events.out.tfevents.0.train"
_TABLE: list[int] = []


def write(folder: Path, steps: Iterable[tuple[int, float, Mapping[str, float]]]) -> None:
    """Write (step, seconds since 1970, numbers by their tags)."""
    events = [_double(1, 0.0) + _bytes(3, b"brain.Event:2")]
    for step, when, numbers in steps:
        values = b"".join(_bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in numbers.items())
        events.append(_double(1, when) + _tag(2, 0) + _varint(step) + _bytes(5, values))
    (folder / NAME).write_bytes(b"".join(_record(event) for event in events))


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum."""
    if not _TABLE:
        for byte in range(256):
            for _ in range(8):
                byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # noqa: PLW2901
            _TABLE.append(byte)
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = _TABLE[(checksum ^ byte) & 0xFF] ^ checksum >> 8
    return checksum ^ 0xFFFFFFFF


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    checksum = crc32c(data)
    return struct.pack("<I", ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _tag(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _bytes(field: int, data: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(data)) + data


def _double(field: int, value: float) -> bytes:
    return _tag(field, 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _tag(field, 5) + struct.pack("<f", value)
