"""Count prompts: sum rows by their prompt, and compute how much less the rows of one prompt tell than independent rows.

Rows of one prompt are a cluster: a model that fails one of them mostly fails the others. So the unit of every interval
is the prompt, and not the row. With one row a prompt nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Number = TypeVar("Number", int, float)


def prompt_numbers(prompts: Sequence[str]) -> list[int]:
    """Return the number of each row's prompt, counted from 0 in the order in which the prompts first occur."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]


def sum_by_prompt(values: Sequence[Number], prompts: Sequence[str] | None) -> list[Number]:
    """Sum the values of the rows of each prompt, in the order in which the prompts first occur.

    Args:
        values: One number per row.
        prompts: The prompt of each row; None: each row has its own.
    """
    if prompts is None:
        return list(values)
    sums: dict[str, Number] = {}
    for value, prompt in zip(values, prompts, strict=True):
        sums[prompt] = sums[prompt] + value if prompt in sums else value
    return list(sums.values())


def mean_prompt_rows(prompts: Sequence[str] | None) -> float:
    """Return the number of rows that the prompt of the average row has, sum(n^2) / sum(n) for prompts of n rows.

    The number of rows divided by it is the number of equally large prompts that tell as much, if the rows of a prompt
    are all alike (Kish, Survey Sampling, 1965, section 11.7).
    """
    return 1.0 if prompts is None else mean_squared_size(prompts) * len(set(prompts)) / len(prompts)


def mean_squared_size(prompts: Sequence[str] | None) -> float:
    """Return the mean over prompts of their squared number of rows; 1 where each row has its own prompt."""
    if prompts is None:
        return 1.0
    sizes = sum_by_prompt([1] * len(prompts), prompts)
    return sum(size * size for size in sizes) / len(sizes)


def design_effect(values: Sequence[float], prompts: Sequence[str] | None, *, extremes: tuple[float, float]) -> float:
    """Return how many times larger the variance of the mean is than that of as many independent rows; at least 1.

    It is sum over prompts (t - n m)^2 / sum over rows (x - m)^2, for a prompt of n rows with the sum t, and the mean m
    of all rows x (Rao and Scott, Biometrics 48, 1992, 577-585; Obuchowski, Statistics in Medicine 17, 1998,
    1495-1507, has the same numerator for pairs). Few rows that differ say little about their correlation, and none
    says nothing. So one average prompt at each extreme is added, with rows that are all alike.

    Args:
        values: One number per row.
        prompts: The prompt of each row; None: each row has its own.
        extremes: The smallest and the largest number that a row can have.
    """
    squared_size = mean_squared_size(prompts)
    # Exactly 1, so that rounding changes no interval of rows that are all independent.
    if prompts is None or squared_size == 1.0:
        return 1.0
    mean, size = sum(values) / len(values), len(prompts) / len(set(prompts))
    residuals = [value - mean for value in values]
    added = sum((extreme - mean) ** 2 for extreme in extremes)
    between = sum(total * total for total in sum_by_prompt(residuals, prompts)) + squared_size * added
    return max(1.0, between / (sum(x * x for x in residuals) + size * added))
