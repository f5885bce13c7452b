"""The forms of GGUF that llama.cpp's own quantizer writes, which an optional package holds."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from qlora_retrain.core.errors import UsageError

PACKAGE = "xllamacpp"
EXPORTS = ("gguf-q4_k_m", "gguf-q5_k_m")


def refuse_without_quantizer(export_types: Iterable[str]) -> None:
    """Raise `UsageError` where a form needs llama.cpp's quantizer, and this environment does not have it."""
    for export_type in export_types:
        if export_type in EXPORTS and find_spec(PACKAGE) is None:
            raise UsageError(
                f"merge.exports: {export_type} is written by llama.cpp's own quantizer, and {PACKAGE} is not installed "
                "where the step runs; install it (pip install 'qlora-retrain[gguf-k]'), or export gguf-q8_0 or "
                "gguf-q4_0"
            )
