"""Near-duplicates are those that comparing every row with every other finds, whatever the order of the rows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from components.validate_data import minhash, near_duplicates
from components.validate_data.near_duplicates import find_near_duplicates

VOCABULARY = [f"word{i}" for i in range(3000)]


def sentences(count: int, seed: int = 0, words: int = 12) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.sample(VOCABULARY, generator.randint(words - 6, words + 6))) for _ in range(count)]


def edited(text: str, generator: random.Random) -> str:
    """Return the text with one word changed, inserted, left out, swapped or misspelt."""
    words = text.split()
    i = generator.randrange(len(words) - 1)
    match generator.randrange(5):
        case 0:
            words[i] = "other"
        case 1:
            words.insert(i, "please")
        case 2:
            del words[i]
        case 3:
            words[i], words[i + 1] = words[i + 1], words[i]
        case _:
            words[i] = words[i][1:]
    return " ".join(words)


def brute_force(texts: Sequence[str], threshold: float) -> list[tuple[int, int]]:
    sets = [set(text.lower().split()) for text in texts]
    return [
        (i, j)
        for i, j in itertools.combinations(range(len(texts)), 2)
        if len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j])
    ]


def components(pairs: Sequence[tuple[int, int]], count: int) -> list[int]:
    """Return the smallest row of each row's component, by spreading it until nothing changes."""
    first = list(range(count))
    is_changed = True
    while is_changed:
        is_changed = False
        for i, j in pairs:
            smallest = min(first[i], first[j])
            is_changed |= first[i] != smallest or first[j] != smallest
            first[i] = first[j] = smallest
    return first


@pytest.fixture(scope="module")
def mixed_texts() -> list[str]:
    """Return 300 texts, an edited copy of 200 of them, and one of 100 of these, shuffled."""
    generator = random.Random(1)
    texts = sentences(300)
    texts += [edited(text, generator) for text in texts[:200]]
    texts += [edited(text, generator) for text in texts[300:400]]
    generator.shuffle(texts)
    return texts


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_the_clusters_are_those_of_comparing_all_pairs(mixed_texts: list[str], threshold: float) -> None:
    expected = components(brute_force(mixed_texts, threshold), len(mixed_texts))
    result = find_near_duplicates(mixed_texts, threshold).first_rows.tolist()

    # No row is joined with another that is no near-duplicate, and hardly one is missed.
    assert all(expected[row] == expected[first] for row, first in enumerate(result))
    assert sum(a != b for a, b in zip(result, expected, strict=True)) <= 0.01 * len(mixed_texts)


def test_rows_that_nearly_equal_a_reserved_row_are_those_of_comparing_all_pairs(mixed_texts: list[str]) -> None:
    is_reserved = [row % 5 == 0 for row in range(len(mixed_texts))]
    pairs = brute_force(mixed_texts, 0.8)
    near = {(i, j) for i, j in [*pairs, *((j, i) for i, j in pairs)] if is_reserved[j] and not is_reserved[i]}

    result = find_near_duplicates(mixed_texts, 0.8, is_reserved)
    matches = [(row, match) for row, match in enumerate(result.reserved_rows.tolist()) if match >= 0]

    assert set(matches) <= near
    assert len({row for row, _ in near} - {row for row, _ in matches}) <= 0.01 * len(near)
    # A reserved row joins no cluster, nor two rows that are near to it alone.
    free = [(i, j) for i, j in pairs if not is_reserved[i] and not is_reserved[j]]
    assert result.first_rows.tolist() == components(free, len(mixed_texts))


def test_a_reserved_row_can_have_a_threshold_of_its_own(mixed_texts: list[str]) -> None:
    is_reserved = [row % 5 == 0 for row in range(len(mixed_texts))]
    result = find_near_duplicates(mixed_texts, 0.9, is_reserved, 0.7)
    near = {frozenset(pair) for pair in brute_force(mixed_texts, 0.7)}
    free = [pair for pair in brute_force(mixed_texts, 0.9) if not any(is_reserved[row] for row in pair)]

    num_different = np.sum(result.first_rows != components(free, len(mixed_texts)))
    assert num_different <= 0.01 * len(mixed_texts)
    matches = {frozenset((row, match)) for row, match in enumerate(result.reserved_rows.tolist()) if match >= 0}
    assert matches <= near
    rows = {row for pair in near if sum(is_reserved[row] for row in pair) == 1 for row in pair if not is_reserved[row]}
    assert len(matches) >= 0.99 * len(rows)


def test_the_result_does_not_depend_on_the_order_of_the_rows(mixed_texts: list[str]) -> None:
    texts = mixed_texts + [f"the same five words {i % 3}" for i in range(60)]
    is_reserved = [row % 7 == 0 for row in range(len(texts))]
    order = random.Random(5).sample(range(len(texts)), len(texts))

    result = find_near_duplicates(texts, 0.7, is_reserved)
    shuffled = find_near_duplicates([texts[row] for row in order], 0.7, [is_reserved[row] for row in order])

    def partition(first_rows: list[int], rows: Sequence[int]) -> set[frozenset[int]]:
        clusters: dict[int, set[int]] = {}
        for row, first in zip(rows, first_rows, strict=True):
            clusters.setdefault(first, set()).add(row)
        return {frozenset(cluster) for cluster in clusters.values()}

    assert partition(result.first_rows.tolist(), range(len(texts))) == partition(shuffled.first_rows.tolist(), order)
    near = {row for row, match in enumerate(result.reserved_rows.tolist()) if match >= 0}
    assert near == {order[row] for row, match in enumerate(shuffled.reserved_rows.tolist()) if match >= 0}


def test_nothing_one_row_and_rows_without_a_word() -> None:
    assert find_near_duplicates([], 0.8).first_rows.tolist() == []
    assert find_near_duplicates(["one"], 0.8).first_rows.tolist() == [0]
    texts = ["", " \n", "?!", "!?", "👍", "👎", "👍\ufe0f"]
    assert find_near_duplicates(texts, 0.8).first_rows.tolist() == [0, 1, 2, 2, 4, 5, 4]
    assert find_near_duplicates(texts, 0.8, [True, *[False] * 6]).reserved_rows.tolist() == [-1] * 7


def test_equal_rows_are_one_cluster_and_each_is_near_the_reserved_one() -> None:
    result = find_near_duplicates(["Where is it?"] * 200, 0.9, [True, True, *[False] * 198])
    assert result.first_rows.tolist() == [0, 1, *[2] * 198]
    assert set(result.reserved_rows.tolist()[2:]) <= {0, 1}
    assert result.reserved_rows.tolist()[:2] == [-1, -1]


@pytest.mark.parametrize("threshold", [0.49, 1.01, float("nan")])
def test_another_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"expected 0\.5 to 1"):
        find_near_duplicates(["a"], threshold)
    with pytest.raises(ValueError, match=r"expected 0\.5 to 1"):
        find_near_duplicates(["a"], 0.8, [False], threshold)


def test_an_instruction_that_all_rows_share_does_not_make_them_near_duplicates() -> None:
    instruction = "Read this request of a customer and answer with the name of its intent and nothing else please"
    questions = sentences(200, words=7)
    generator = random.Random(3)
    copies = [edited(question, generator) for question in questions[:20]]
    texts = [f"{instruction}: {question}" for question in questions + copies]

    result = find_near_duplicates(texts, 0.6)

    assert result.first_rows.tolist() == find_near_duplicates(questions + copies, 0.6).first_rows.tolist()
    assert len(set(result.first_rows.tolist())) < 190 + 20


def test_a_word_that_most_rows_have_counts_where_there_is_no_template() -> None:
    texts = [f"my card {text}" for text in sentences(80, words=12)]
    # With the two words 9 of 11 words are shared, without them 7 of 9, which is less than 0.8.
    texts += ["my card one two three four five six seven eight", "my card one two three four five six seven nine"]
    assert find_near_duplicates(texts, 0.8).first_rows.tolist()[-2:] == [80, 80]


def test_many_rows_that_share_most_of_their_words_cost_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six of seven rows share a bucket in most bands here, and none is a near-duplicate of another."""
    monkeypatch.setattr(near_duplicates, "MIN_TEMPLATE_ROWS", 10**9)
    generator = random.Random(2)
    template = " ".join(generator.sample(VOCABULARY, 60))
    comparisons = 0

    def count_comparison(words: set[bytes], others: set[bytes]) -> float:
        nonlocal comparisons
        comparisons += 1
        return len(words & others) / len(words | others)

    monkeypatch.setattr(near_duplicates, "similarity", count_comparison)
    texts = [f"{template} {' '.join(generator.sample(VOCABULARY, 16))}" for _ in range(1000)]
    # Near-copies within are found all the same.
    texts += [text.rsplit(" ", 1)[0] for text in texts[:20]]
    result = find_near_duplicates(texts, 0.9)

    assert result.first_rows.tolist()[1000:] == list(range(20))
    bands = 256 // 13
    assert comparisons < len(texts) * bands * minhash.NEIGHBOURS / 10 < len(texts) ** 2 / 2 / 10


def test_pairs_at_the_threshold_are_candidates_as_often_as_stated() -> None:
    """2,000 pairs of sets of 9 with 8 elements in common: a similarity of exactly 0.8."""
    generator = np.random.Generator(np.random.PCG64(1))
    sets = []
    for _ in range(2000):
        elements = generator.integers(0, 2**32, 10, dtype=np.uint32)
        sets += [elements[:9], np.concatenate([elements[:8], elements[9:]])]

    signatures = minhash.sign(sets, len(sets), 0.8)
    pairs: set[tuple[int, int]] = set()
    for first, second in minhash.candidates(signatures, np.arange(len(sets)), np.zeros(len(sets), bool), 0.8):
        pairs |= {(min(pair), max(pair)) for pair in zip(first.tolist(), second.tolist(), strict=True)}

    num_present = sum((i, i + 1) in pairs for i in range(0, len(sets), 2))
    assert num_present >= minhash.MIN_RECALL * 2000 - 15
    assert len(pairs) - num_present < 20


def test_a_long_row_is_compared_like_others() -> None:
    generator = random.Random(4)
    words = [f"w{generator.getrandbits(40)}" for _ in range(30_000)]
    texts = [" ".join(words), "short", " ".join(words[:29_000]), " ".join(words[:15_000])]
    assert find_near_duplicates(texts, 0.9).first_rows.tolist() == [0, 1, 0, 3]
