"""KL and greedy agreement against a plain computation, row by row, and the two halves of the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from components.merge_adapter import agreement, candidates
from components.merge_adapter.agreement import Agreement
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.evaluation.scoring import Row
from qlora_retrain.lm import chat, loading

TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "where is the parcel of order number 4?"},
    {"role": "assistant", "content": "on its way"},
]


def rows() -> list[Row]:
    short = [Row(f"short-{i}", "eval", [{"role": "user", "content": "x" * i}, TALK[1]]) for i in range(1, 8)]
    return [Row("talk", "eval", TALK), *short]


def test_batches_give_what_one_row_at_a_time_gives(tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    unmerged = loading.attach_adapter(loading.load_nf4(tiny_nf4, dtype="float32"), tiny_adapter)
    merged, tokenizer = loading.load_base(tiny_model, dtype="float32"), chat.load_tokenizer(tiny_model)
    agreements = agreement.compare_models(unmerged, merged, tokenizer, rows(), 256, "comparing")

    # Each row alone, without padding, in fp64 and by the definition: sum of p log(p / q).
    for row, ours in zip(rows(), agreements, strict=True):
        (encoded,) = tokenizer.encode(row.messages)
        ids, is_target = torch.tensor([encoded.input_ids]), torch.tensor(encoded.supervised)[1:]
        with torch.no_grad():
            p, q = (model(ids).logits[0, :-1][is_target].double().softmax(-1) for model in (unmerged, merged))
        assert (ours.id, ours.tokens) == (row.id, int(is_target.sum()))
        assert ours.kl_nats == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)
        assert ours.agreed_tokens == int((p.argmax(-1) == q.argmax(-1)).sum())
    assert any(ours.agreed_tokens < ours.tokens for ours in agreements)


def test_a_model_agrees_with_itself(tiny_model: Path) -> None:
    model, tokenizer = loading.load_base(tiny_model, dtype="float32"), chat.load_tokenizer(tiny_model)
    agreements = agreement.compare_models(model, model, tokenizer, rows(), 256, "comparing")
    settings = EvaluateConfig(bootstrap_samples=200)
    for compute, expected in ((agreement.mean_kl, 0.0), (agreement.greedy_agreement, 1.0)):
        interval = compute(agreements, settings)
        assert interval is not None
        assert (interval.value, interval.low, interval.high) == pytest.approx((expected,) * 3, abs=1e-6)


def test_long_rows_weigh_by_their_tokens_and_nan_is_no_number() -> None:
    agreements = [Agreement("a", 1, 1.0, 1), Agreement("b", 3, 1.0, 0)]
    settings = EvaluateConfig(bootstrap_samples=200)
    interval = agreement.mean_kl(agreements, settings)
    assert interval is not None
    assert interval.value == 0.5
    assert agreement.mean_kl([*agreements, Agreement("c", 1, float("nan"), 0)], settings) is None
    assert agreement.mean_kl([], settings) is None


def test_halves_depend_on_the_ids_alone_and_cover_them() -> None:
    many = [Row(f"{i:016x}", "eval", TALK) for i in range(101)]
    selection, certification = candidates.split_halves(many)
    assert (len(selection), len(certification)) == (50, 51)
    assert selection | certification == {row.id for row in many}
    assert candidates.split_halves(many[::-1]) == (selection, certification)
    assert 10 < len(selection & {row.id for row in many[:50]}) < 40  # not the file's order


def talk(number: int, *contents: str) -> Row:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return Row(f"{number:016x}", "eval", turns)


def test_the_rows_of_one_conversation_are_in_one_half() -> None:
    many = [
        talk(10 * i + n, f"question {i}", "a", *["more", "b"] * n) for i in range(40) for n in range(3 if i % 2 else 1)
    ]
    selection, certification = candidates.split_halves(many)
    assert selection | certification == {row.id for row in many}
    for i in range(40):
        conversation = {row.id for row in many if row.messages[0]["content"] == f"question {i}"}
        assert conversation <= selection or conversation <= certification
    assert len(many) // 2 - 3 < len(selection) <= len(many) // 2


@pytest.mark.parametrize(
    ("base", "num_rows", "resolved"),
    [
        ("auto", 60, "measured"),
        ("auto", 59, "dequantized"),
        ("auto", 30, "dequantized"),
        # Too few to certify anything: refused as such.
        ("auto", 29, "measured"),
        ("measured", 10, "measured"),
        ("original", 1000, "original"),
    ],
)
def test_both_bases_are_measured_where_each_half_has_enough_rows(base: Any, num_rows: int, resolved: str) -> None:
    rows = [talk(i, f"question {i}", "a") for i in range(num_rows)]
    config, reason = candidates.resolve_base(MergeConfig(base=base), rows)
    assert config.base == resolved
    assert bool(reason) == (resolved != "measured")
    assert (f"{num_rows} evaluation rows are too few" in reason) == (base == "auto" and resolved == "dequantized")


def test_one_conversation_that_is_most_of_the_rows_is_divided() -> None:
    rows = [talk(i, "hello", "hi", f"question {i}", "a") for i in range(60)]
    assert sorted(map(len, candidates.split_halves(rows))) == [30, 30]
