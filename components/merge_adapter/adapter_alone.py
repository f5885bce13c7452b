"""Write the form of an adapter that cannot be merged: which base it is served over, and that base's tokenizer."""

from __future__ import annotations

from pathlib import Path

from components.merge_adapter.merge import MergeStats
from qlora_retrain.lm import served_model
from qlora_retrain.lm.adapter_kind import WEIGHTS_FILE
from qlora_retrain.lm.served_model import BaseReference
from qlora_retrain.lm.tokenizer_files import TOKENIZER_FILES, copy_files


def write(base_model: Path, base_nf4: Path, adapter: Path, model: Path, *, dequantized: bool) -> MergeStats:
    """Write the form to an empty folder; the adapter itself stays where it is.

    Args:
        base_model: The original base.
        base_nf4: The base that the adapter was trained over.
        adapter: The adapter.
        model: An empty folder, for the result.
        dequantized: Serve it over the values of the packed weights instead of the original ones.
    """
    copy_files(base_model, model, TOKENIZER_FILES)
    form = served_model.DEQUANTIZED if dequantized else served_model.ORIGINAL
    BaseReference.from_folders(form, base_model, base_nf4).write(model)
    return MergeStats(0, 0, 0, (adapter / WEIGHTS_FILE).stat().st_size)
