"""What a person sees of a run: the progress line, the page, TensorBoard's file, trackers."""

import json
import struct

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from components.train_qlora import events
from qlora_retrain.core.errors import UsageError


def read_events(data: bytes) -> list[tuple[int, float, dict[str, float]]]:
    """(step, time, values) by protobuf's parser, from TensorBoard's published field numbers and not the writer's."""
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in {
        "Value": [("tag", 1, kinds.TYPE_STRING, 1, ""), ("simple_value", 2, kinds.TYPE_FLOAT, 1, "")],
        "Summary": [("value", 1, kinds.TYPE_MESSAGE, 3, ".t.Value")],
        "Event": [
            ("wall_time", 1, kinds.TYPE_DOUBLE, 1, ""),
            ("step", 2, kinds.TYPE_INT64, 1, ""),
            ("file_version", 3, kinds.TYPE_STRING, 1, ""),
            ("summary", 5, kinds.TYPE_MESSAGE, 1, ".t.Summary"),
        ],
    }.items():
        message = file.message_type.add(name=name)
        for field, number, kind, label, of in fields:
            message.field.add(name=field, number=number, type=kind, label=label, type_name=of or None)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    event_class = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))
    found, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = event_class.FromString(data[at + 12 : at + 12 + length])
        found.append((event.step, event.wall_time, {v.tag: v.simple_value for v in event.summary.value}))
        at += 12 + length + 4
    assert at == len(data)
    return found


def test_the_event_file_holds_the_curves(step):
    run = step()
    run(max_steps=4, evaluations=2)
    first, *rest = read_events((run.adapter / events.NAME).read_bytes())
    assert first == (0, 0.0, {})
    steps = [json.loads(line) for line in (run.adapter / "loss.jsonl").read_text().splitlines()]
    losses = {step: values["train/loss"] for step, _, values in rest if "train/loss" in values}
    assert losses == pytest.approx({entry["step"]: entry["loss"] for entry in steps})
    measured = [(step, values["train/eval_loss"]) for step, _, values in rest if "train/eval_loss" in values]
    assert measured == [(s, pytest.approx(loss)) for s, loss in run.papers["evaluation_losses"]]
    assert {"train/grad_norm", "train/learning_rate", "train/tokens_per_second", "train/memory_mib"} <= set(rest[0][2])


def test_the_progress_line_says_how_far_how_good_how_fast_and_how_long_still(step, capsys):
    step()(log_every_steps=4, max_steps=8)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"training"' in line]
    assert [line["done"] for line in said] == [4, 8]
    wanted = {"loss", "learning_rate", "tokens_per_second", "eta_seconds", "memory_mib"}
    assert all(wanted <= line.keys() for line in said)
    assert said[0]["eta_seconds"] >= 0
    assert said[1]["eta_seconds"] == 0
    assert 100 < said[1]["memory_mib"] < 20_000


def test_the_page_shows_every_curve_the_settings_and_what_was_trained(step):
    run = step()
    run(max_steps=6, evaluations=3)
    page = (run.adapter / "report.html").read_text()
    for curve in ("training", "evaluation", "gradient norm", "learning rate", "tokens/s", "memory"):
        assert f"</i> {curve}</span>" in page, curve
    assert "the best measured" in page
    assert "<td>down_proj</td>" in page
    assert "scales the adapter by alpha/rank" in page
    assert "<td>eager</td><td>chosen: faster on &lt;short&gt; rows</td>" in page
    # rank 4: two layers, 4 * (128 + 64) numbers each
    assert '<td>down_proj</td><td class="n">2</td><td class="n">1,536</td>' in page


def test_a_tracker_that_is_not_installed_is_refused_by_name(step):
    with pytest.raises(UsageError, match=r"train\.report_to: .*wandb"):
        step()(report_to=["wandb"])
