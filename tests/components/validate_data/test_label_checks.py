"""Labels that are probably wrong, misspelt, of a person, or only in the golden set."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from components.validate_data.checks import Row, Split
from components.validate_data.label_checks import check_labels
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

WORDS = {"refund": "money back return repay amount".split(), "delivery": "parcel late courier door arrive".split()}


def row(number: int, text: str, label: str, split: Split | None = "train") -> Row:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
    return Row("a.jsonl", number, turns, "0", split=split)


def rows_of(count: int, split: Split = "train") -> list[Row]:
    rng = random.Random(0)
    labels = ["refund" if i % 2 else "delivery" for i in range(count)]
    return [row(i, f"{' '.join(rng.choices(WORDS[label], k=4))} {i}", label, split) for i, label in enumerate(labels)]


def check(rows: Sequence[Row], golden: Sequence[Row] = (), **settings: object) -> list[str]:
    return [s.location for s in check_labels(rows, golden, DataConfig(task="labels", **settings))]


def test_a_flipped_label_is_found_with_the_likely_one() -> None:
    rows = rows_of(200)
    rows[17] = row(17, "money back return repay amount", "delivery")
    suspects = check_labels(rows, [], DataConfig(task="labels"))
    assert [(s.location, s.label, s.suggestion) for s in suspects] == [("a.jsonl:17", "delivery", "refund")]
    assert suspects[0].probability >= 0.1
    assert [r.number for r in rows if "label_errors" in r.hits] == [17]
    assert rows[17].split == "train"


def test_only_training_rows_are_dropped() -> None:
    rows = rows_of(200)
    rows[17] = row(17, "money back return repay amount", "delivery")
    rows[19] = row(19, "parcel late courier door arrive", "refund", "eval")
    assert set(check(rows, checks={"label_errors": "drop"})) == {"a.jsonl:17", "a.jsonl:19"}
    assert (rows[17].reason, rows[17].split) == ("label_errors", None)
    assert (rows[19].reason, rows[19].split) == (None, "eval")


def test_nothing_is_checked_where_answers_are_texts_or_the_check_is_off() -> None:
    rows = rows_of(200)
    rows[17] = row(17, "money back return repay amount", "delivery")
    assert check_labels(rows, [row(1, "x", "unknown")], DataConfig()) == []
    assert check(rows, checks={"label_errors": "off"}) == []
    assert all(r.hits == () for r in rows)


def test_misspelt_and_personal_labels_are_noted() -> None:
    rows = [*rows_of(60), row(90, "money repay", "refudn"), row(91, "door late", "ann.lee@mail-host.io")]
    check(rows, checks={"misspelt_labels": "drop"})
    assert [(r.number, r.hits, r.reason) for r in rows if r.hits] == [
        (90, ("misspelt_labels",), "misspelt_labels"),
        (91, ("personal_labels",), None),
    ]


def test_a_golden_label_that_is_nowhere_in_the_data_is_refused_with_the_near_match() -> None:
    golden = [row(3, "x", "refund", None), row(4, "y", "refunds", None)]
    with pytest.raises(UsageError, match=r'golden_data: labels .*: a\.jsonl:4: "refunds" \(did you mean refund\?\);'):
        check(rows_of(20), golden)
    check(rows_of(20), golden, checks={"unknown_golden_labels": "warn"})
    assert [r.hits for r in golden] == [(), ("unknown_golden_labels",) * 2]


def test_a_misspelt_label_is_not_found_a_second_time() -> None:
    rows = rows_of(200)
    for i in range(1, 20, 2):
        rows[i] = row(i, "money back return repay amount", "REFUND")
    assert check(rows) == []
    assert sum("misspelt_labels" in r.hits for r in rows) == 10


def test_a_label_with_personal_data_is_noted_and_shown_without_it() -> None:
    rows = rows_of(200)
    rows += [row(300 + i, f"where does he sit {i}", "ann.lee@mail-host.io") for i in range(8)]
    rows += [row(400 + i, f"which number has she {i}", "+49 170 1234567") for i in range(8)]
    rows[17] = row(17, "where does he sit", "delivery")
    rows[18] = row(18, "which number has she", "refund")
    suspects = check_labels(rows, [], DataConfig(task="labels", label_error_threshold=0.01))
    assert {r.number // 100 for r in rows if "personal_labels" in r.hits} == {3, 4}
    assert not any(text in str(suspects) for text in ("ann.lee", "1234567"))


def test_an_unknown_golden_label_is_named_without_its_secret() -> None:
    secret = "sk_" + "live_4eC39HqLyjWDarjtT1zdp7dc"
    with pytest.raises(UsageError, match="labels that are nowhere in the data") as caught:
        check(rows_of(200), [row(1, "a question", secret)])
    assert '"[access key]"' in str(caught.value)
    assert secret not in str(caught.value)
