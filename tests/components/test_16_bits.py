"""A base in 16 bits, and a model all of whose weights trained, in the steps after training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.evaluate import intruders
from components.evaluate.contestants import ContestantFolders, load_contestants
from components.merge_adapter import choice, exports, serving_warnings
from components.merge_adapter.merge import merge
from components.publish import contents
from components.quantize_model.step import run as quantize
from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.config.sections import MergeConfig, QuantizeConfig
from qlora_retrain.core.errors import Diverged
from qlora_retrain.lm import base_formats, loading
from qlora_retrain.storage.artifact import Manifest, list_files

IDS = torch.tensor([[1, 5, 9, 200, 2]])


@pytest.fixture(scope="module")
def sixteen_bits(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base_nf4")
    quantize(QuantizeConfig(format="none"), tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def trained(tiny_model: Path, sixteen_bits: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train.method: full` makes: here the base with the tiny adapter in its weights."""
    folder = tmp_path_factory.mktemp("trained")
    merge(tiny_model, sixteen_bits, tiny_adapter, folder, dequantized=False, max_shard_gib=5.0)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    return folder


def test_both_candidates_over_16_bits_are_the_same_so_one_is_built(
    tiny_model: Path, sixteen_bits: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    for name, is_dequantized in (("original", False), ("dequantized", True)):
        (tmp_path / name).mkdir()
        stats = merge(
            tiny_model, sixteen_bits, tiny_adapter, tmp_path / name, dequantized=is_dequantized, max_shard_gib=5.0
        )
        assert (stats.modules, stats.dequantized) == (14, 0)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("original", "dequantized")]
    assert files[0] == files[1]
    for base in ("auto", "measured", "dequantized", "original"):
        config, reason = choice.resolve_base(MergeConfig(base=base), [], is_packed=False)  # type: ignore[arg-type]
        assert config.base == "original"
        assert "over its 16-bit weights" in reason


def test_trained_weights_are_the_candidate_as_they_are(
    tiny_model: Path, sixteen_bits: Path, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "merged").mkdir()
    merge(tiny_model, sixteen_bits, trained, tmp_path / "merged", dequantized=False, max_shard_gib=5.0)
    expected, merged = load_file(trained / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert expected.keys() == merged.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "merged/tokenizer.json").is_file()
    assert serving_warnings.read_warnings(trained) == []
    _, reason = choice.resolve_base(MergeConfig(), [], is_packed=False, is_adapter=False)
    assert "nothing was merged" in reason

    broken = Path(shutil.copytree(trained, tmp_path / "broken"))
    expected["model.norm.weight"][0] = float("inf")
    save_file(expected, broken / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "refused").mkdir()
    with pytest.raises(Diverged, match=r"model\.norm\.weight holds numbers that are not finite"):
        merge(tiny_model, sixteen_bits, broken, tmp_path / "refused", dequantized=False, max_shard_gib=5.0)


def test_the_contestants_of_full_training_are_the_base_and_the_trained_model(
    tiny_model: Path, sixteen_bits: Path, trained: Path
) -> None:
    config = EvaluateConfig(device="cpu", precision="float32")
    folders = ContestantFolders(tiny_model, sixteen_bits, trained, None, None)
    logits = {}
    for contestant in load_contestants(config, folders):
        with contestant.scoring_context(), torch.no_grad():
            logits[contestant.name] = contestant.model(IDS).logits
        del contestant
    assert list(logits) == ["base", "base_nf4", "challenger"]
    assert torch.equal(logits["base"], logits["base_nf4"])
    assert torch.equal(logits["challenger"], loading.load_base(trained, dtype="float32")(IDS).logits)


def test_intruders_of_trained_weights_are_those_of_the_adapter_that_is_in_them(
    sixteen_bits: Path, tiny_adapter: Path, trained: Path
) -> None:
    with_adapter = loading.attach_adapter(loading.load_nf4(sixteen_bits), tiny_adapter)
    expected = intruders.count_intruders(with_adapter, top_k=5, epsilon=0.5)
    model = loading.load_trained(sixteen_bits, trained)
    layers = intruders.count_intruders(model, top_k=5, epsilon=0.5, base_nf4=sixteen_bits)
    assert [layer.name for layer in layers] == [layer.name for layer in expected]
    assert [layer.least_similarity for layer in layers] == pytest.approx(
        [layer.least_similarity for layer in expected], abs=0.02
    )
    assert sum(layer.intruders for layer in layers) > 0
    base = loading.load_nf4(sixteen_bits)
    assert not any(x.intruders for x in intruders.count_intruders(base, top_k=5, epsilon=0.5, base_nf4=sixteen_bits))


def test_a_4_bit_export_over_16_bits_has_the_default_settings(
    tiny_model: Path, sixteen_bits: Path, tmp_path: Path
) -> None:
    exports._quantize(tiny_model, tiny_model, sixteen_bits, tmp_path / "nf4", 5.0)
    assert base_formats.from_folder(tmp_path / "nf4") == exports.DEFAULT_4_BITS
    assert loading.load_nf4(tmp_path / "nf4", dtype="bfloat16").dtype == torch.bfloat16


def test_a_version_has_trained_weights_once(trained: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    for folder, expected in ((trained, set()), (tiny_adapter, {"adapter/adapter_model.safetensors"})):
        copy = Path(shutil.copytree(folder, tmp_path / folder.name))
        (copy / "training.json").write_text(json.dumps({}))
        manifest = Manifest.model_construct(files=tuple(list_files(copy)))
        targets = {copy.target for copy in contents.choose({"adapter": manifest}, ["adapter"])}
        assert {target for target in targets if target.endswith(".safetensors")} == expected
        assert "training/training.json" in targets
