"""Compare intruder dimensions with PEFT's own search for them, and with directions that were added by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from components.evaluate import intruders
from qlora_retrain.lm import loading, singular_vectors


def test_the_counts_equal_those_of_peft(tiny_nf4: Path, tiny_adapter: Path) -> None:
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model: Any = loading.attach_adapter(loading.load_nf4(tiny_nf4, dtype="float32"), tiny_adapter)
    layers = intruders.count_intruders(model, top_k=10, epsilon=0.6)

    # PEFT reports its counts only through the logging function.
    lines: list[str] = []
    reduce_intruder_dimension(model, top_k=10, threshold_epsilon=0.6, logging_sink=lines.append)
    expected = {}
    for line in lines:
        if match := re.fullmatch(r"base_model\.model\.(.*): (?:No intruders|Intruders: (\d+))", line):
            expected[match[1]] = int(match[2] or 0)

    assert {layer.name: layer.intruders for layer in layers} == expected
    assert sum(expected.values()) > 0
    assert sum(intruders.sum_by_block(layers).values()) == sum(expected.values())
    assert set(intruders.sum_by_block(layers)) == {"layer 0", "layer 1"}


def test_packed_weights_give_about_the_same_as_unpacked(tiny_nf4: Path, tiny_adapter: Path) -> None:
    unpacked, packed = (
        intruders.count_intruders(
            loading.attach_adapter(loading.load_nf4(tiny_nf4, dtype=dtype), tiny_adapter), top_k=5, epsilon=0.5
        )
        for dtype in ("float32", "bfloat16")
    )
    assert [layer.name for layer in packed] == [layer.name for layer in unpacked]
    assert [layer.least_similarity for layer in packed] == pytest.approx(
        [layer.least_similarity for layer in unpacked], abs=0.05
    )


def test_a_strong_direction_that_the_base_does_not_have_is_an_intruder() -> None:
    import torch

    torch.manual_seed(0)
    base = torch.zeros(40, 8)
    base[:8] = torch.diag(torch.arange(8, 0, -1).float())  # its singular vectors are the first 8 axes
    new = torch.zeros(40, 8)
    new[20, 3] = 30.0  # axis 20, which the base does not have

    similarities = singular_vectors.max_similarities(base, base + new, 8)
    # The changed column is 5 on axis 3 and 30 on axis 20.
    assert float(similarities[0]) == pytest.approx(5 / math.hypot(5, 30), abs=1e-4)
    assert (similarities[1:] > 0.95).all()
    assert (singular_vectors.max_similarities(base, base * 1.5, 8) > 0.999).all()


def make_trained_like(rows: int, columns: int) -> Any:
    """Make a random matrix whose singular values fall from 3 to 0.02, like those of a trained one."""
    import torch

    u, _, v = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
    return (u * torch.linspace(3, 0.02, len(v), dtype=torch.float64)) @ v


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536)])  # SmolLM2's
@pytest.mark.parametrize("strength", [0.1, 8.0])
def test_leaving_out_weak_vectors_changes_no_cosine(
    shape: tuple[int, int], strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expected values are the definition, two full decompositions in fp64.

    The code needs none for a weak change, and one where there are intruders.
    """
    import torch

    torch.manual_seed(0)
    base = make_trained_like(*shape)
    change = torch.randn(shape[0], 3, dtype=torch.float64) @ torch.randn(3, shape[1], dtype=torch.float64)
    tuned = base + change * strength / torch.linalg.matrix_norm(change, 2)
    old, _, _ = torch.linalg.svd(base.float().double(), full_matrices=False)
    new, _, _ = torch.linalg.svd(tuned.float().double(), full_matrices=False)
    expected = (new[:, :10].T @ old).abs().amax(dim=1)

    svd_calls, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: svd_calls.append(args) or svd(*args, **kwargs))
    similarities = singular_vectors.max_similarities(base.float(), tuned.float(), 10)
    assert len(svd_calls) == (strength > 1)
    # The strong change makes intruders, so all of the base's vectors are needed, which takes the SVD.
    assert (int((expected < 0.5).sum()) > 0) is (strength > 1)
    # fp64 without the SVD; the SVD of the code is in fp32.
    assert torch.allclose(similarities, expected, atol=1e-9 if not svd_calls else 2e-4)
    assert torch.equal(similarities < 0.5, expected < 0.5)


def test_a_matrix_without_full_rank_is_decomposed_as_a_whole() -> None:
    import torch

    torch.manual_seed(0)
    base = make_trained_like(64, 48)
    base[:, 5:] = 0  # with five columns it has only five directions
    new = torch.zeros(64, 48, dtype=torch.float64)
    new[:, 20] = torch.linalg.svd(base)[0][:, 40] * 50  # a direction that the base does not have
    similarities = singular_vectors.max_similarities(base.float(), (base + new).float(), 6)
    assert similarities.shape == (6,)
    assert torch.isfinite(similarities).all()
    assert (similarities[1:] > 0.999).all()


def test_none_are_computed_where_the_line_asks_for_none(tiny_nf4: Path, tiny_adapter: Path) -> None:
    model = loading.attach_adapter(loading.load_nf4(tiny_nf4, dtype="float32"), tiny_adapter)
    assert intruders.count_intruders(model, top_k=0, epsilon=0.5) == []
