"""llama.cpp in a test: its server over a file, and what it computes beside what transformers computes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.llama_server import LlamaServer


def require() -> None:
    """Skip the test where llama.cpp is not installed, and fail it in CI."""
    if find_spec("xllamacpp") is None:
        missing = "llama.cpp is not installed: make gguf-setup"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)


def start_server(path: Path, **options: Any) -> LlamaServer:
    """Load a GGUF file."""
    require()
    return LlamaServer(path, **{"context_tokens": 256} | options)


def log_probabilities(
    llama: LlamaServer, ids: Sequence[int], lengths: Sequence[int], vocabulary: int, any_token: int = 70
) -> torch.Tensor:
    """Return what llama.cpp computes after so many of the tokens (lengths, vocab)."""
    rows = [llama.log_probabilities(list(ids[:n]), vocabulary=vocabulary, any_token=any_token) for n in lengths]
    return torch.tensor(rows)


def compare(llama: LlamaServer, logits: torch.Tensor, ids: Sequence[int], lengths: Sequence[int]) -> float:
    """Return the mean difference of log probabilities after so many tokens, in standard deviations of the logits.

    The likeliest token must be the same everywhere.

    Args:
        llama: The server.
        logits: What transformers computes for the tokens (T, vocab).
        ids: The tokens.
        lengths: After how many of them to compare.
    """
    ours = torch.stack([logits[length - 1] for length in lengths]).log_softmax(-1)
    theirs = log_probabilities(llama, ids, lengths, logits.shape[-1])
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    return float((ours - theirs).abs().mean() / logits.std())
