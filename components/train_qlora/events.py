"""Write the training curves as a TensorBoard event file.

tensorboardX supplies the messages and checksums, without TensorBoard's web server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

# The library's default name contains the host and the time, which an artifact must not hold.
FILE_NAME = "events.out.tfevents.0.train"


def write(folder: Path, curves: Iterable[tuple[int, float, Mapping[str, float]]]) -> None:
    """Write one event for each (step, seconds since 1970, values by tag)."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

    # Every file starts with its version.
    writer = RecordWriter(str(folder / FILE_NAME))
    writer.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())

    for step, wall_time, scalars in curves:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        writer.write(Event(wall_time=wall_time, step=step, summary=Summary(value=values)).SerializeToString())
    writer.close()
