"""The data gate takes time and memory in proportion to its rows, and hardly any memory for what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.validate_data import MIB, measure

FEW, MANY = 20_000, 80_000
# A million chats beside the 600 MiB of the libraries: 1.5 GiB.
MAX_BYTES_PER_ROW = 950
MAX_LONG_ROWS_MIB = 250  # for 64 million characters, whose tokens alone would take gigabytes


@pytest.mark.soak
def test_time_and_memory_are_linear_in_the_rows_and_long_rows_take_none(tiny_model: Path) -> None:
    few, many = (measure("gate", num_rows, tiny_model) for num_rows in (FEW, MANY))
    assert (many["peak"] - few["peak"]) / (MANY - FEW) < MAX_BYTES_PER_ROW, (few, many)
    # The start is in both, so that time which grows with the square of the rows would show.
    assert many["cpu"] < 1.2 * few["cpu"] * MANY / FEW, (few, many)

    with_long = measure("gate", FEW, tiny_model, long_rows=8)
    assert (with_long["peak"] - few["peak"]) / MIB < MAX_LONG_ROWS_MIB, (few, with_long)
