"""The curves as a TensorBoard event file, by tensorboardX: messages and checksums without TensorBoard's web server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

NAME = "events.out.tfevents.0.train"  # the library's own names hold the host and the time


def write(folder: Path, steps: Iterable[tuple[int, float, Mapping[str, float]]]) -> None:
    """Write (step, seconds since 1970, numbers by their tags)."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

    records = RecordWriter(str(folder / NAME))
    records.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
    for step, when, numbers in steps:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        records.write(Event(wall_time=when, step=step, summary=Summary(value=values)).SerializeToString())
    records.close()
