"""Check the metrics of completions against values computed by hand or by another library."""

from __future__ import annotations

import random
from functools import cache

import pytest

from qlora_retrain.evaluation.metrics.completion_metrics import chrf, compute, field_accuracy, json_validity, rouge_l


def test_rouge_l_is_the_f1_over_the_longest_common_subsequence() -> None:
    # Lin 2004, section 3.1: "police killed the gunman" against "police kill the gunman" shares 3 of 4 and 4 words.
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(3 / 4)
    assert rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(2 / 4)
    assert rouge_l("a b c d", "A, b!") == pytest.approx(2 * 2 / 6)
    assert rouge_l("где посылка", "посылка где она") == pytest.approx(2 / 5)
    assert (rouge_l("", ""), rouge_l("a", ""), rouge_l("", "a")) == (1.0, 0.0, 0.0)


def test_rouge_l_agrees_with_the_recursion_on_random_words() -> None:
    generator = random.Random(0)
    for _ in range(50):
        first, second = (tuple(generator.choices("abcd", k=generator.randint(1, 9))) for _ in range(2))

        # The textbook recursion, where the code fills a table.
        @cache
        def common(i: int, j: int, a: tuple[str, ...] = first, b: tuple[str, ...] = second) -> int:
            if not i or not j:
                return 0
            return common(i - 1, j - 1) + 1 if a[i - 1] == b[j - 1] else max(common(i - 1, j), common(i, j - 1))

        expected = 2 * common(len(first), len(second)) / (len(first) + len(second))
        assert rouge_l(" ".join(first), " ".join(second)) == pytest.approx(expected)


def test_chrf_is_1_for_the_same_text_and_counts_character_ngrams() -> None:
    assert chrf("the parcel is on its way", "the parcel is on its way") == pytest.approx(1.0)
    assert chrf("abc", "xyz") == pytest.approx(0.0, abs=1e-9)
    # "ab" against "abc": of 1-grams 2/3 precision and all recall, of 2-grams 1/2 and all; F2 of the means.
    precision, recall = (2 / 3 + 1 / 2) / 2, 1.0
    expected = 5 * precision * recall / (4 * precision + recall)
    assert chrf("ab", "abc") == pytest.approx(expected, abs=0.02)


def test_json_metrics_compare_fields_and_never_their_order() -> None:
    answer = '{"id": 7, "tags": ["a", "b"], "who": {"name": "Ann", "age": 3}, "open": true}'
    completion = '{"open": 1, "who": {"age": 3, "name": "Bob"}, "id": 7, "tags": ["a"], "more": null}'
    # Of id, tags[0], tags[1], who.name, who.age and open three are right: id, tags[0] and who.age; true is not 1.
    assert field_accuracy(answer, completion) == pytest.approx(3 / 6)
    assert field_accuracy(answer, answer) == 1.0
    assert field_accuracy(answer, "{") == 0.0
    assert field_accuracy("[]", "{}") == 0.0
    assert json_validity(answer, completion) == 1.0
    assert json_validity(answer, "Here it is: " + completion) == 0.0


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_python_accepts_and_json_does_not_are_no_json(word: str) -> None:
    assert json_validity('{"price": 1}', f'{{"price": {word}}}') == 0.0
    assert field_accuracy('{"price": 1}', f'{{"price": {word}}}') == 0.0
    assert json_validity(f"[{word}]", "[1]") is None


def test_where_the_answer_is_no_json_the_metrics_of_json_are_not_defined() -> None:
    # "refund" is not JSON, so of three metrics only one is defined.
    values = compute(("exact_match", "json_validity", "field_accuracy"), "refund", " refund\n")
    assert values == {"exact_match": 1.0}
