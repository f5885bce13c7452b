"""Metrics of written answers, each against values counted by hand or another library."""

from __future__ import annotations

import random
from functools import cache

import pytest

from qlora_retrain.evaluation.metrics import texts


def test_rouge_l_is_the_f1_over_the_longest_common_subsequence() -> None:
    # Lin 2004, section 3.1: "police killed the gunman" against "police kill the gunman" shares 3 of 4 and 4 words.
    assert texts.rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(3 / 4)
    assert texts.rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(2 / 4)
    assert texts.rouge_l("a b c d", "A, b!") == pytest.approx(2 * 2 / 6)
    assert texts.rouge_l("где посылка", "посылка где она") == pytest.approx(2 / 5)
    assert (texts.rouge_l("", ""), texts.rouge_l("a", ""), texts.rouge_l("", "a")) == (1.0, 0.0, 0.0)


def test_rouge_l_agrees_with_the_recursion_on_random_words() -> None:
    draw = random.Random(0)
    for _ in range(50):
        first, second = (tuple(draw.choices("abcd", k=draw.randint(1, 9))) for _ in range(2))

        @cache
        def common(i: int, j: int, a: tuple[str, ...] = first, b: tuple[str, ...] = second) -> int:
            if not i or not j:
                return 0
            return common(i - 1, j - 1) + 1 if a[i - 1] == b[j - 1] else max(common(i - 1, j), common(i, j - 1))

        expected = 2 * common(len(first), len(second)) / (len(first) + len(second))
        assert texts.rouge_l(" ".join(first), " ".join(second)) == pytest.approx(expected)


def test_chrf_is_1_for_the_same_text_and_counts_character_ngrams() -> None:
    assert texts.chrf("the parcel is on its way", "the parcel is on its way") == pytest.approx(1.0)
    assert texts.chrf("abc", "xyz") == pytest.approx(0.0, abs=1e-9)
    # "ab" against "abc": of 1-grams 2/3 precision and all recall, of 2-grams 1/2 and all; F2 of the means.
    precision, recall = (2 / 3 + 1 / 2) / 2, 1.0
    expected = 5 * precision * recall / (4 * precision + recall)
    assert texts.chrf("ab", "abc") == pytest.approx(expected, abs=0.02)


def test_json_metrics_look_at_fields_and_never_at_the_order() -> None:
    answer = '{"id": 7, "tags": ["a", "b"], "who": {"name": "Ann", "age": 3}, "open": true}'
    written = '{"open": 1, "who": {"age": 3, "name": "Bob"}, "id": 7, "tags": ["a"], "more": null}'
    # Of id, tags[0], tags[1], who.name, who.age and open, right are id, tags[0] and who.age; true is not 1.
    assert texts.field_accuracy(answer, written) == pytest.approx(3 / 6)
    assert texts.field_accuracy(answer, answer) == 1.0
    assert texts.field_accuracy(answer, "{") == 0.0
    assert texts.field_accuracy("[]", "{}") == 0.0
    assert texts.json_validity(answer, written) == 1.0
    assert texts.json_validity(answer, "Here it is: " + written) == 0.0


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_words_that_python_reads_and_json_does_not_have_are_no_json(word: str) -> None:
    assert texts.json_validity('{"price": 1}', f'{{"price": {word}}}') == 0.0
    assert texts.field_accuracy('{"price": 1}', f'{{"price": {word}}}') == 0.0
    assert texts.json_validity(f"[{word}]", "[1]") is None


def test_where_the_answer_is_no_json_its_metrics_say_nothing() -> None:
    found = texts.measure(("exact_match", "json_validity", "field_accuracy"), "refund", " refund\n")
    assert found == {"exact_match": 1.0}
