"""Wrong labels are found where they are planted, and hardly anywhere else; a label that is hard is not called wrong."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from components.validate_data import label_errors
from components.validate_data.label_errors import LabelErrors, find_label_errors

FILLER = [f"common{i}" for i in range(150)]
THRESHOLD = 0.1


def label_data(counts: Sequence[int], seed: int = 0, words: int = 3) -> tuple[list[str], list[str]]:
    """Return texts of 5 common words and some of 12 that the label likes, and their labels."""
    generator = random.Random(seed)
    texts, labels = [], []
    for number, count in enumerate(counts):
        topic = [f"topic{number}of{i}" for i in range(12)]
        for _ in range(count):
            parts = generator.sample(FILLER, 5) + generator.sample(topic, words)
            texts.append(" ".join(generator.sample(parts, len(parts))))
            labels.append(f"label {number}")
    order = generator.sample(range(len(texts)), len(texts))
    return [texts[i] for i in order], [labels[i] for i in order]


def flip(labels: Sequence[str], num_flips: int, seed: int = 1) -> tuple[list[str], set[int]]:
    generator, names = random.Random(seed), sorted(set(labels))
    rows = set(generator.sample(range(len(labels)), num_flips))
    flipped = [
        generator.choice([name for name in names if name != label]) if row in rows else label
        for row, label in enumerate(labels)
    ]
    return flipped, rows


def recall_and_false_alarms(result: LabelErrors, rows: set[int], num_rows: int) -> tuple[float, float]:
    reported = {error.row for error in result.errors}
    return len(reported & rows) / max(1, len(rows)), len(reported - rows) / (num_rows - len(rows))


@pytest.mark.parametrize("counts", [[200, 200], [100] * 10, [20] * 60, [600, 60, 40, 30]])
def test_planted_errors_are_found_and_hardly_another(counts: list[int]) -> None:
    # Two labels leave a wrong one less unlikely than many do, so more of a text must say which it is.
    texts, labels = label_data(counts, words=6 if len(counts) == 2 else 3)
    labels, rows = flip(labels, len(labels) // 50)

    result = find_label_errors(texts, labels, THRESHOLD)

    recall, false_alarms = recall_and_false_alarms(result, rows, len(texts))
    assert recall > 0.9
    assert false_alarms < 0.01
    assert result.num_rows == len(texts)
    assert 0.005 <= result.error_fraction <= 0.05


def test_the_right_label_is_suggested() -> None:
    texts, labels = label_data([100] * 5)
    flipped, rows = flip(labels, 10)
    result = find_label_errors(texts, flipped, THRESHOLD)
    assert {error.row: error.suggestion for error in result.errors if error.row in rows} == {
        row: labels[row] for row in rows
    }


def test_a_clean_file_has_no_errors() -> None:
    assert find_label_errors(*label_data([100] * 10), THRESHOLD).errors == []


def test_labels_that_nothing_predicts_are_not_called_wrong() -> None:
    """A random label is as unlikely as the others, so nothing is known about any of them."""
    texts, labels = label_data([100] * 4)
    random.Random(3).shuffle(labels)
    assert len(find_label_errors(texts, labels, THRESHOLD).errors) < 0.02 * len(texts)


def test_hard_labels_give_few_false_alarms_though_the_classifier_often_errs() -> None:
    """Half of the rows have no word of their label, so the classifier errs at two of five rows."""
    texts, labels = label_data([200] * 5)
    generator = random.Random(4)
    texts = [" ".join(generator.sample(FILLER, 8)) if i % 2 else text for i, text in enumerate(texts)]
    flipped, rows = flip(labels, 20)
    _, false_alarms = recall_and_false_alarms(find_label_errors(texts, flipped, THRESHOLD), rows, len(texts))
    assert false_alarms < 0.01


def test_of_very_many_errors_as_many_are_reported_as_keep_false_alarms_rare() -> None:
    texts, labels = label_data([200] * 5, words=2)
    flipped, rows = flip(labels, 200)
    recall, false_alarms = recall_and_false_alarms(find_label_errors(texts, flipped, 0.0), rows, len(texts))
    assert recall > 0.3
    assert false_alarms < 0.02


def test_nothing_is_said_about_rows_whose_label_is_rare() -> None:
    texts, labels = label_data([50, 50, 4, 1])
    result = find_label_errors(texts, labels, 0.0)
    assert result.num_rows == 100
    assert not {labels[error.row] for error in result.errors} & {"label 2", "label 3"}
    assert not {error.suggestion for error in result.errors} & {"label 2", "label 3"}


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        ([], []),
        (["a text"], ["a label"]),
        (["a text"] * 50, ["one label"] * 50),
        (["a text"] * 20, [f"label {i}" for i in range(20)]),
        (["", " ", "?!", "👍"] * 10, ["a", "b"] * 20),
        (["the same"] * 40, ["a", "b"] * 20),
        ([f"text {i}" for i in range(11_000)], [f"label {i // 10}" for i in range(11_000)]),
    ],
    ids=["empty", "one row", "one label", "each once", "no words", "all equal", "1,100 labels"],
)
def test_data_that_says_nothing_gives_no_errors(texts: list[str], labels: list[str]) -> None:
    assert find_label_errors(texts, labels, THRESHOLD).errors == []


def test_the_result_does_not_depend_on_the_order_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_errors, "MAX_ROWS", 450)  # so that rows are sampled too
    texts, labels = label_data([100] * 6)
    labels, _ = flip(labels, 30)
    order = random.Random(5).sample(range(len(texts)), len(texts))

    result = find_label_errors(texts, labels, THRESHOLD)
    shuffled = find_label_errors([texts[i] for i in order], [labels[i] for i in order], THRESHOLD)

    assert result.num_rows == shuffled.num_rows == 450
    assert {(e.row, e.suggestion) for e in result.errors} == {(order[e.row], e.suggestion) for e in shuffled.errors}
    assert len(result.errors) > 10


def test_texts_without_spaces_and_of_other_scripts_are_classified() -> None:
    cards, transfers = (
        ("我的银行卡丢了怎么办", "银行卡还没有寄到", "请帮我换一张银行卡"),
        ("转账什么时候到", "我想取消转账", "转账失败了"),
    )
    texts = [f"{text}{i}" for i in range(15) for text in (*cards, *transfers)]
    labels = ["card", "card", "card", "transfer", "transfer", "transfer"] * 15
    labels[0] = "transfer"
    assert [error.row for error in find_label_errors(texts, labels, THRESHOLD).errors] == [0]


def test_the_log_probabilities_are_those_of_naive_bayes_by_hand() -> None:
    """Multinomial naive Bayes with the smoothing 0.1, each row predicted from the other four fifths."""
    texts, labels = label_data([15, 10])
    targets = np.array([int(label[-1]) for label in labels])
    features = label_errors._features(texts, 2)
    hashes = np.arange(len(texts))
    logits = label_errors._predict(features, targets, hashes, 2)

    weights = features.toarray().astype(np.float64)
    assert np.allclose((weights**2).sum(axis=1), 1, atol=1e-5)
    order = sorted(range(len(texts)), key=lambda row: (targets[row], hashes[row]))
    folds = {row: place % 5 for place, row in enumerate(order)}
    for row in range(len(texts)):
        for label in range(2):
            others = [i for i in range(len(texts)) if folds[i] != folds[row] and targets[i] == label]
            sums = weights[others].sum(axis=0) + 0.1
            expected = sum(weights[row] * np.log(sums / sums.sum()))
            assert logits[row, label] == pytest.approx(expected, abs=1e-2)


def test_the_features_are_tf_idf_by_hand() -> None:
    texts = ["ab ab cd", "cd", "ef gh"]
    parts = [
        Counter("ab|ab|cd|ab ab|ab cd|# ab |# ab |# cd ".split("|")),
        Counter("cd|# cd ".split("|")),
        Counter("ef|gh|ef gh|# ef |# gh ".split("|")),
    ]
    features = label_errors._features(texts, 2).toarray()
    for row, counts in enumerate(parts):
        weights = sorted(
            (1 + math.log(count)) * (math.log(4 / (1 + sum(part in texts_parts for texts_parts in parts))) + 1)
            for part, count in counts.items()
        )
        norm = math.sqrt(sum(weight**2 for weight in weights))
        assert sorted(features[row][features[row] > 0]) == pytest.approx(
            [weight / norm for weight in weights], rel=1e-5
        )
