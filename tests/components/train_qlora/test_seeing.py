"""The progress line, the page, TensorBoard's file and the trackers: where a person watches a run."""

import json
import struct

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from components.train_qlora.report import EVENT_FILE
from qlora_retrain.core.errors import UsageError


def read_events(data: bytes) -> list[tuple[int, float, dict[str, float]]]:
    """Parse (step, time, values) with protobuf, by TensorBoard's published field numbers and not the writer's own."""
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto2")
    types = descriptor_pb2.FieldDescriptorProto
    for name, fields in {
        "Value": [("tag", 1, types.TYPE_STRING, 1, ""), ("simple_value", 2, types.TYPE_FLOAT, 1, "")],
        "Summary": [("value", 1, types.TYPE_MESSAGE, 3, ".t.Value")],
        "Event": [
            ("wall_time", 1, types.TYPE_DOUBLE, 1, ""),
            ("step", 2, types.TYPE_INT64, 1, ""),
            ("file_version", 3, types.TYPE_STRING, 1, ""),
            ("summary", 5, types.TYPE_MESSAGE, 1, ".t.Summary"),
        ],
    }.items():
        message = file.message_type.add(name=name)
        for field, number, field_type, label, type_name in fields:
            message.field.add(name=field, number=number, type=field_type, label=label, type_name=type_name or None)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    event_class = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))

    # A record is its length (8 bytes), a checksum of that (4), the message, and a checksum of the message (4).
    parsed, offset = [], 0
    while offset < len(data):
        (length,) = struct.unpack_from("<Q", data, offset)
        event = event_class.FromString(data[offset + 12 : offset + 12 + length])
        parsed.append((event.step, event.wall_time, {v.tag: v.simple_value for v in event.summary.value}))
        offset += 12 + length + 4
    assert offset == len(data)
    return parsed


def test_the_event_file_holds_the_curves(step):
    run = step()
    run(max_steps=4, num_evals=2)
    header, *curves = read_events((run.adapter / EVENT_FILE).read_bytes())
    assert header == (0, 0.0, {})

    # The file must say the same as the step's other outputs.
    steps = [json.loads(line) for line in (run.adapter / "loss.jsonl").read_text().splitlines()]
    losses = {step: values["train/loss"] for step, _, values in curves if "train/loss" in values}
    assert losses == pytest.approx({entry["step"]: entry["loss"] for entry in steps})

    eval_losses = [(step, values["train/eval_loss"]) for step, _, values in curves if "train/eval_loss" in values]
    assert eval_losses == [(s, pytest.approx(loss)) for s, loss in run.document["evaluation_losses"]]
    assert {"train/grad_norm", "train/learning_rate", "train/tokens_per_second", "train/memory_mib"} <= set(
        curves[0][2]
    )


def test_the_progress_line_has_steps_loss_speed_remaining_time_and_memory(step, capsys):
    step()(log_every_steps=4, max_steps=8)
    updates = [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"training"' in line]
    assert [line["done"] for line in updates] == [4, 8]
    fields = {"loss", "learning_rate", "tokens_per_second", "eta_seconds", "memory_mib"}
    assert all(fields <= line.keys() for line in updates)
    # At the last step nothing is left to do.
    assert updates[0]["eta_seconds"] >= 0
    assert updates[1]["eta_seconds"] == 0
    assert 100 < updates[1]["memory_mib"] < 20_000


def test_the_page_shows_every_curve_the_settings_and_what_was_trained(step):
    run = step()
    run(max_steps=6, num_evals=3)
    page = (run.adapter / "report.html").read_text()

    # A chart's legend names each of its curves.
    for curve in ("training", "evaluation", "gradient norm", "learning rate", "tokens/s", "memory"):
        assert f"</i> {curve}</span>" in page, curve

    # The sentence, the trained layers, a setting's help, and a value that the plan chose, escaped.
    assert "where the evaluation loss was lowest" in page
    assert "<td>down_proj</td>" in page
    assert "scales the adapter by alpha/rank" in page
    assert "<td>eager</td><td>chosen by the plan: faster on &lt;short&gt; rows</td>" in page

    # Rank 4: two layers, 4 * (128 + 64) parameters each.
    assert '<td>down_proj</td><td class="n">2</td><td class="n">1,536</td>' in page


def test_a_tracker_that_is_not_installed_is_refused_by_name(step):
    with pytest.raises(UsageError, match=r"train\.report_to: .*wandb"):
        step()(report_to=["wandb"])
