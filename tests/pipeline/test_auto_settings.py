"""The choices that depend on the machine: where the plan is made, and what its processor is good at."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_retrain.config.line import load
from qlora_retrain.pipeline import auto_settings

LINE = "line: tickets\nsources: {raw_data: /srv/data, base_model: /srv/base}\n"


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("fpu sse2 avx2", "float32"),
        # It has instructions for bf16, and takes longer with them than in fp32.
        ("fpu avx2 avx512f avx512_bf16", "float32"),
        ("fpu avx512f avx512_bf16 amx_bf16 amx_tile", "bfloat16"),
        ("fp asimd bf16 i8mm", "bfloat16"),
        (None, "float32"),
    ],
)
def test_training_takes_the_type_that_the_processor_multiplies_faster(
    flags: str | None, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor: 0\nflags\t: {flags}\n")
    monkeypatch.setattr(auto_settings, "_CPU", cpuinfo)
    monkeypatch.setattr(auto_settings, "_NVIDIA", tmp_path / "none")
    sections, choices = auto_settings.resolve_auto_settings(load(LINE))
    assert (sections["train"].device, sections["train"].precision) == ("cpu", precision)  # type: ignore[attr-defined]
    # A verdict must not depend on the machine.
    assert sections["merge"].precision == "float32"  # type: ignore[attr-defined]
    (choice,) = (choice for choice in choices if choice.field == "train.precision")
    assert choice.value == precision


def test_a_gpu_computes_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "version"
    driver.touch()
    monkeypatch.setattr(auto_settings, "_NVIDIA", driver)
    sections, _ = auto_settings.resolve_auto_settings(load(LINE))
    for name in ("train", "evaluate", "merge"):
        values = sections[name].model_dump()
        assert values.get("precision", "bfloat16") == "bfloat16", name
