"""The layers that get 8 bits are the best ones that the budget allows: compared with all choices there are."""

from __future__ import annotations

import itertools
import random

import pytest

from qlora_retrain.lm import bit_budget
from qlora_retrain.lm.base_formats import MixedBits
from qlora_retrain.lm.bit_budget import choose_layers


@pytest.mark.parametrize("seed", range(40))
def test_no_other_choice_within_the_budget_avoids_more_error(seed: int) -> None:
    numbers = random.Random(seed)
    sizes = [64 * numbers.choice([3, 5, 8]) for _ in range(numbers.randint(1, 9))]
    avoided = [size * numbers.random() for size in sizes]
    capacity = numbers.randint(0, sum(sizes) + 100)

    def total(values: list, choice: tuple) -> float:
        return sum(value for value, is_chosen in zip(values, choice, strict=True) if is_chosen)

    choices = itertools.product([False, True], repeat=len(sizes))
    best = max(total(avoided, choice) for choice in choices if total(sizes, choice) <= capacity)
    choice = choose_layers(sizes, avoided, capacity)
    assert total(sizes, choice) <= capacity
    assert total(avoided, choice) == pytest.approx(best)


def test_layers_that_gain_nothing_or_are_too_large_stay_in_4_bits() -> None:
    assert choose_layers([64, 64, 640], [0.0, 1.0, 100.0], 200) == [False, True, False]
    assert choose_layers([], [], 0) == []


def test_sizes_without_a_common_divisor_keep_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_budget, "_MAX_UNITS", 100)
    sizes = [10_007, 20_011, 30_013, 40_009]
    choice = choose_layers(sizes, [1.0, 2.0, 3.0, 4.0], 70_100)
    assert sum(size for size, is_chosen in zip(sizes, choice, strict=True) if is_chosen) <= 70_100
    assert choice == [False, False, True, True] or sum(choice) == 3


@pytest.mark.parametrize(("bits", "names"), [(4.2, set()), (5.2, {"b"}), (6.2, {"a"}), (8.2, {"a", "b", "c"})])
def test_the_budget_is_of_all_layers(bits: float, names: set[str]) -> None:
    base_format = MixedBits("bfloat16", bits)
    with_choice = base_format.choose({"a": 640, "b": 320, "c": 320}, {"a": 5.0, "b": 3.0, "c": 1.0})
    assert with_choice.layers_in_8_bits == names
    share = sum({"a": 0.5, "b": 0.25, "c": 0.25}[name] for name in names)
    assert with_choice.bits_per_weight == pytest.approx(4.126953 + 4 * share)
    assert with_choice.bits_per_weight <= bits
    # config.json brings the choice back.
    assert MixedBits.from_settings(with_choice.quantization()) == with_choice
