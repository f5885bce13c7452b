"""KL and greedy agreement against a plain computation, row by row, and the two halves of the rows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import pytest
import torch

from components.merge_adapter import agreement, choice, halves
from components.merge_adapter.agreement import Agreement, UnmergedLogits
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.evaluation.scoring import Row
from qlora_retrain.lm import chat, forward, loading

TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "where is the parcel of order number 4?"},
    {"role": "assistant", "content": "on its way"},
]


def rows() -> list[Row]:
    short = [Row(f"short-{i}", "eval", [{"role": "user", "content": "x" * i}, TALK[1]]) for i in range(1, 8)]
    return [Row("talk", "eval", TALK), *short]


def stored(model: Any, tokenizer: Any, file: BinaryIO, max_bytes: int = 2**30) -> UnmergedLogits:
    return UnmergedLogits.from_model(model, tokenizer, rows(), 256, file, max_bytes)


def row_alone(row: Row, unmerged: Any, merged: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL and agreement at every supervised token of a row: without padding or file, in fp64, by definition."""
    (encoded,) = tokenizer.encode(row.messages)
    ids, is_target = torch.tensor([encoded.input_ids]), torch.tensor(encoded.supervised)[1:]
    with torch.no_grad():
        p, q = (model(ids).logits[0, :-1][is_target].double().softmax(-1) for model in (unmerged, merged))
    return (p * (p / q).log()).sum(-1), p.argmax(-1) == q.argmax(-1)


@pytest.mark.parametrize("chunk_bytes", [2**26, 2100])  # 2100: every position is a chunk
def test_what_the_file_gives_is_what_both_models_side_by_side_give(
    tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setitem(forward.CHUNK_BYTES, "cpu", chunk_bytes)
    unmerged = loading.attach_adapter(loading.load_nf4(tiny_nf4, dtype="float32"), tiny_adapter)
    merged, tokenizer = loading.load_base(tiny_model, dtype="float32"), chat.load_tokenizer(tiny_model)
    with TemporaryFile() as file:
        logits = stored(unmerged, tokenizer, file)
        agreements = logits.compare(merged, "comparing")
        assert logits.compare(merged, "once more") == agreements  # as for the next form
    for row, ours in zip(rows(), agreements, strict=True):
        kl, is_same = row_alone(row, unmerged, merged, tokenizer)
        assert (ours.id, ours.tokens) == (row.id, len(kl))
        assert ours.kl_nats == pytest.approx(float(kl.sum()), rel=1e-3)
        assert ours.agreed_tokens == int(is_same.sum())
    assert any(ours.agreed_tokens < ours.tokens for ours in agreements)
    assert logits.positions == {"compared": logits.all_positions, "of": sum(ours.tokens for ours in agreements)}
    assert logits.sentence.endswith("supervised tokens (all)")


def test_a_file_that_is_too_small_holds_tokens_chosen_by_hash_and_says_so(
    tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    unmerged = loading.attach_adapter(loading.load_nf4(tiny_nf4, dtype="float32"), tiny_adapter)
    merged, tokenizer = loading.load_base(tiny_model, dtype="float32"), chat.load_tokenizer(tiny_model)
    vocab_size = merged.config.vocab_size
    max_bytes = 4 * vocab_size * 40 + 3  # 40 positions
    with TemporaryFile() as file:
        logits = stored(unmerged, tokenizer, file, max_bytes)
        assert file.seek(0, 2) == 4 * vocab_size * 40 <= max_bytes
        agreements = logits.compare(merged, "comparing")
    total = sum(len(row_alone(row, unmerged, merged, tokenizer)[0]) for row in rows())
    assert logits.positions == {"compared": 40, "of": total}
    assert f"40 of {total} supervised tokens (chosen by hash" in logits.sentence
    assert sum(ours.tokens for ours in agreements) == 40 < total

    # The choice, a second time by the definition: the smallest hashes of row, sequence and position.
    hashes = []
    for row in rows():
        (encoded,) = tokenizer.encode(row.messages)
        positions = [k - 1 for k, is_target in enumerate(encoded.supervised) if is_target]
        names = [f"agreement:{row.id}:0:{position}" for position in positions]
        hashes += [(hashlib.sha256(name.encode()).digest()[:8], row.id, n) for n, name in enumerate(names)]
    smallest = sorted(hashes)[:40]
    for row, ours in zip(rows(), agreements, strict=True):
        kl, is_same = row_alone(row, unmerged, merged, tokenizer)
        indices = sorted(n for _, row_id, n in smallest if row_id == row.id)
        assert ours.tokens == len(indices)
        assert ours.kl_nats == pytest.approx(float(kl[indices].sum()), rel=1e-3)
        assert ours.agreed_tokens == int(is_same[indices].sum())


def test_the_chosen_tokens_do_not_depend_on_the_order_of_the_rows(tiny_model: Path) -> None:
    model, tokenizer = loading.load_base(tiny_model, dtype="float32"), chat.load_tokenizer(tiny_model)
    choices = []
    for ordered in (rows(), rows()[::-1]):
        with TemporaryFile() as file:
            logits = UnmergedLogits.from_model(model, tokenizer, ordered, 256, file, 4 * model.config.vocab_size * 25)
        choices.append({(logits.row_ids[s.row], k) for batch in logits.batches for s in batch for k in s.positions})
    assert choices[0] == choices[1]
    assert len(choices[0]) == 25


def test_a_file_that_lost_its_end_is_an_error(tiny_model: Path) -> None:
    model, tokenizer = loading.load_base(tiny_model, dtype="float32"), chat.load_tokenizer(tiny_model)
    with TemporaryFile() as file:
        logits = stored(model, tokenizer, file)
        file.truncate(file.seek(0, 2) - 1)
        with pytest.raises(OSError, match="shorter than what was written"):
            logits.compare(model, "comparing")


def test_a_model_agrees_with_itself(tiny_model: Path) -> None:
    model, tokenizer = loading.load_base(tiny_model, dtype="float32"), chat.load_tokenizer(tiny_model)
    with TemporaryFile() as file:
        agreements = stored(model, tokenizer, file).compare(model, "comparing")
    settings = EvaluateConfig(bootstrap_samples=200)
    for compute, expected in ((agreement.mean_kl, 0.0), (agreement.greedy_agreement, 1.0)):
        interval = compute(agreements, settings)
        assert interval is not None
        assert (interval.value, interval.low, interval.high) == pytest.approx((expected,) * 3, abs=1e-6)


def test_long_rows_weigh_by_their_tokens_and_nan_is_no_number() -> None:
    agreements = [Agreement("a", "a", 1, 1.0, 1), Agreement("b", "b", 3, 1.0, 0)]
    settings = EvaluateConfig(bootstrap_samples=200)
    interval = agreement.mean_kl(agreements, settings)
    assert interval is not None
    assert interval.value == 0.5
    assert agreement.mean_kl([*agreements, Agreement("c", "c", 1, float("nan"), 0)], settings) is None
    assert agreement.mean_kl([], settings) is None


def test_halves_depend_on_the_ids_alone_and_cover_them() -> None:
    many = [Row(f"{i:016x}", "eval", TALK) for i in range(101)]
    selection, certification = halves.split_rows(many).as_dict().values()
    assert (len(selection), len(certification)) == (50, 51)
    assert selection | certification == {row.id for row in many}
    assert halves.split_rows(many[::-1]) == halves.split_rows(many)
    assert 10 < len(selection & {row.id for row in many[:50]}) < 40  # not the file's order


def talk(number: int, *contents: str) -> Row:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return Row(f"{number:016x}", "eval", turns, prompt_id=contents[0] if contents[0] != "hello" else "")


def test_the_rows_of_one_prompt_are_in_one_half() -> None:
    many = [
        talk(10 * i + n, f"question {i}", "a", *["more", "b"] * n) for i in range(40) for n in range(3 if i % 2 else 1)
    ]
    selection, certification = halves.split_rows(many).as_dict().values()
    assert selection | certification == {row.id for row in many}
    for i in range(40):
        conversation = {row.id for row in many if row.messages[0]["content"] == f"question {i}"}
        assert conversation <= selection or conversation <= certification
    # Each half has 20 of the 40 prompts.
    assert len({row.messages[0]["content"] for row in many if row.id in selection}) == 20


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
    config, reason = choice.resolve_base(MergeConfig(base=base), rows)
    assert config.base == resolved
    assert bool(reason) == (resolved != "measured")
    is_too_few = base == "auto" and resolved == "dequantized"
    assert (f"rows of {num_rows} different prompts are too few" in reason) == is_too_few


def test_prompts_and_not_rows_are_what_two_halves_need() -> None:
    """Two rows of each of 40 prompts would be halves of 40 rows, but they are only 20 prompts each."""
    rows = [talk(2 * i + n, f"question {i}", f"answer {n}") for i in range(40) for n in range(2)]
    config, reason = choice.resolve_base(MergeConfig(base="auto"), rows)
    assert config.base == "dequantized"
    assert "rows of 40 different prompts are too few" in reason


def test_chats_that_only_begin_alike_are_divided() -> None:
    rows = [talk(i, "hello", "hi", f"question {i}", "a") for i in range(60)]
    assert sorted(map(len, halves.split_rows(rows).as_dict().values())) == [30, 30]
