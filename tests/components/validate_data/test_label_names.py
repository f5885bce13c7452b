"""Labels that are one label written in two ways are named; labels that are two labels are left alone."""

from __future__ import annotations

import pytest

from components.validate_data.label_names import (
    find_misspelt_labels,
    find_personal_labels,
    find_single_labels,
    find_unknown_labels,
    find_untrained_labels,
)


@pytest.mark.parametrize(
    ("label", "target"),
    [
        ("refudn", "refund"),  # swapped
        ("refnd", "refund"),  # missing
        ("refuund", "refund"),  # doubled
        ("refind", "refund"),  # wrong
        ("efund", "refund"),
        ("refunds", "refund"),
        ("card arival", "card_arrival"),
        ("crad_arrival", "card_arrival"),
        ("cardarrival", "card_arrival"),
        ("re fund", "refund"),
        ("возврта", "возврат"),
    ],
)
def test_a_rare_label_with_one_wrong_letter_is_a_misspelling(label: str, target: str) -> None:
    counts = {target: 100, label: 3, "something else": 50}
    assert [(x.label, x.count, x.target, x.target_count) for x in find_misspelt_labels(counts)] == [
        (label, 3, target, 100)
    ]


@pytest.mark.parametrize(
    "label", ["Card arrival", "card-arrival", "CARD_ARRIVAL", "card  arrival.", "ｃａｒｄ_arrival"]
)
def test_another_way_to_write_a_label_counts_however_frequent_it_is(label: str) -> None:
    assert [(x.label, x.target) for x in find_misspelt_labels({"card_arrival": 51, label: 50})] == [
        (label, "card_arrival")
    ]


@pytest.mark.parametrize(
    ("label", "target"),
    [
        ("level 1", "level 2"),
        ("version1", "version2"),
        ("1.5", "15"),
        ("class 1 5", "class 15"),
        ("-1", "1"),
        ("C", "C++"),
        ("cat", "car"),
        ("yes", "yet"),
        ("atypical", "typical"),
        ("unsupported", "supported"),
        ("cash_refund", "card_refund"),
        ("👎", "👍"),
        ("female", "male"),
        ("", "card_arrival"),
    ],
)
def test_two_labels_are_left_alone(label: str, target: str) -> None:
    assert find_misspelt_labels({target: 100, label: 1}) == []


def test_two_frequent_labels_with_one_different_letter_are_left_alone() -> None:
    assert find_misspelt_labels({"sender": 100, "tender": 21}) == []
    assert len(find_misspelt_labels({"sender": 100, "tender": 20})) == 1


def test_the_most_frequent_similar_label_is_the_target() -> None:
    counts = {"refund": 100, "refunt": 30, "refunx": 1, "REFUND": 2}
    assert {x.label: x.target for x in find_misspelt_labels(counts)} == {"refunx": "refund", "REFUND": "refund"}


def test_many_labels_take_no_square_of_comparisons_and_answers_are_no_labels() -> None:
    counts = {f"label about {word} and {second_word}": 10 for word in WORDS for second_word in WORDS}
    assert find_misspelt_labels(counts | {"label abuot bear and wolf": 1})[0].target == "label about bear and wolf"
    assert find_misspelt_labels({f"answer{i}": 9 for i in range(5000)} | {"ansewr1": 1}) == []
    assert find_misspelt_labels({"x" * 10_000: 100, "x" * 9_999: 1}) == []


WORDS = "bear wolf horse sheep tiger eagle whale mouse camel snake".split()


def test_single_untrained_and_unknown_labels() -> None:
    assert find_single_labels({"b": 1, "a": 1, "c": 2}) == ["a", "b"]
    assert find_untrained_labels(["a", "b"], ["c", "b", "c"]) == ["c"]
    assert find_unknown_labels(["refnd", "card", "zzz"], ["refund", "card"]) == {"refnd": "refund", "zzz": None}


@pytest.mark.parametrize(
    "label",
    ["jane.doe@example.com", "owner: jane@example.org", "John Smith", "maria garcía lópez", "Smith, John", "José Pérez",
     "thomas_mueller", "Dr. Okafor", "Mrs Dalloway", "Alice"],
)  # fmt: skip
def test_addresses_and_names_are_noticed(label: str) -> None:
    assert find_personal_labels(["refund", label]) == [label]


@pytest.mark.parametrize(
    "label",
    ["card_arrival", "Mark Paid", "Grace Period", "May Sales", "Bill Payment", "@mention", "user@host", "New York",
     "top_up_by_card_charge", "positive", "Paris", "Washington", "maria 2", "why did anna write to us", ""],
)  # fmt: skip
def test_other_labels_are_not_taken_for_names(label: str) -> None:
    assert find_personal_labels([label]) == []
