"""Intruder dimensions against PEFT's own search for them, and where they were put by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from components.evaluate import intruders
from qlora_retrain import modeling


def test_the_counts_are_those_of_peft(tiny_nf4: Path, tiny_adapter: Path) -> None:
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model: Any = modeling.attach(modeling.load_nf4(tiny_nf4, dtype="float32"), tiny_adapter)
    found = intruders.count(model, top=10, epsilon=0.6)
    lines: list[str] = []
    reduce_intruder_dimension(model, top_k=10, threshold_epsilon=0.6, logging_sink=lines.append)
    expected = {}
    for line in lines:
        if match := re.fullmatch(r"base_model\.model\.(.*): (?:No intruders|Intruders: (\d+))", line):
            expected[match[1]] = int(match[2] or 0)
    assert {layer.name: layer.intruders for layer in found} == expected
    assert sum(expected.values()) > 0
    assert sum(intruders.by_block(found).values()) == sum(expected.values())
    assert set(intruders.by_block(found)) == {"layer 0", "layer 1"}


def test_packed_weights_give_about_the_same_as_unpacked(tiny_nf4: Path, tiny_adapter: Path) -> None:
    unpacked, packed = (
        intruders.count(modeling.attach(modeling.load_nf4(tiny_nf4, dtype=dtype), tiny_adapter), top=5, epsilon=0.5)
        for dtype in ("float32", "bfloat16")
    )
    assert [layer.name for layer in packed] == [layer.name for layer in unpacked]
    assert [layer.least_similarity for layer in packed] == pytest.approx(
        [layer.least_similarity for layer in unpacked], abs=0.05
    )


def test_a_direction_outside_of_the_base_is_found_where_it_is_strong_enough() -> None:
    import torch

    torch.manual_seed(0)
    base = torch.zeros(40, 8)
    base[:8] = torch.diag(torch.arange(8, 0, -1).float())  # its singular vectors are the first 8 axes
    new = torch.zeros(40, 8)
    new[20, 3] = 30.0  # axis 20, which the base has not
    similar = intruders.similarity(base, base + new, 8)
    # Its column is now (5 on axis 3, 30 on axis 20).
    assert float(similar[0]) == pytest.approx(5 / math.hypot(5, 30), abs=1e-4)
    assert (similar[1:] > 0.95).all()
    assert (intruders.similarity(base, base * 1.5, 8) > 0.999).all()


def test_none_are_looked_at_where_the_line_wants_none(tiny_nf4: Path, tiny_adapter: Path) -> None:
    model = modeling.attach(modeling.load_nf4(tiny_nf4, dtype="float32"), tiny_adapter)
    assert intruders.count(model, top=0, epsilon=0.5) == []
