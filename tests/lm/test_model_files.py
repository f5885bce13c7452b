"""Which files of a folder are the model: one answer, or a refusal that says how to get one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import loading, model_files
from qlora_retrain.lm.model_files import INDEX, SINGLE_FILE, weight_files
from qlora_retrain.lm.weight_files import SafetensorsFolder
from qlora_retrain.storage.globs import matches_any

SHARDS = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
SETTINGS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def index_of(*files: str) -> dict[str, object]:
    return {"metadata": {}, "weight_map": {f"layer.{i}": name for i, name in enumerate(files)}}


def reader(**documents: object) -> Callable[[str], object]:
    """The index and config.json as a test has them; any other file is not asked for."""
    contents = {INDEX: documents.get("index", index_of(*SHARDS)), "config.json": documents.get("config", {})}
    return contents.__getitem__


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([SINGLE_FILE], (SINGLE_FILE,)),
        ([INDEX, *SHARDS], tuple(SHARDS)),
        # What no reader of safetensors takes for the weights.
        ([SINGLE_FILE, "model.gguf", "tf_model.h5", "model.onnx", "README.md", "original/params.json"], (SINGLE_FILE,)),
    ],
)
def test_the_weights_are_one_file_or_those_of_the_index(names: list[str], expected: tuple[str, ...]) -> None:
    assert weight_files([*SETTINGS, *names], reader()) == expected


def test_an_index_of_the_single_file_leaves_no_choice() -> None:
    assert weight_files([SINGLE_FILE, INDEX], reader(index=index_of(SINGLE_FILE))) == (SINGLE_FILE,)


def test_an_index_may_name_a_folder_below() -> None:
    assert weight_files([INDEX, "shards/a.safetensors"], reader(index=index_of("shards/a.safetensors")))


AMBIGUOUS = {
    "single and index": [SINGLE_FILE, INDEX, *SHARDS],
    "single and an index without its shards": [SINGLE_FILE, INDEX],
    "consolidated beside shards": [INDEX, *SHARDS, "consolidated.safetensors"],
    "a variant": [SINGLE_FILE, "model.fp16.safetensors"],
    "a variant in shards": [
        INDEX,
        *SHARDS,
        "model.fp16.safetensors.index.json",
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16-00002-of-00002.safetensors",
    ],
    "shards of another run": [INDEX, *SHARDS, *(f"model-{n:05d}-of-00030.safetensors" for n in range(1, 31))],
    "a shard too many of the same series": [INDEX, SHARDS[0], SHARDS[1], "model-00003-of-00002.safetensors"],
    "a folder with another model": [SINGLE_FILE, "checkpoint-500/model.safetensors", "checkpoint-500/config.json"],
    "the original of a converted one": [INDEX, *SHARDS, "original/consolidated.safetensors", "original/params.json"],
    "an adapter": [SINGLE_FILE, "adapter_config.json", "adapter_model.safetensors"],
    "an adapter's settings alone": [SINGLE_FILE, "adapter_config.json"],
    "an adapter's weights alone": [INDEX, *SHARDS, "adapter_model.safetensors"],
    "an adapter and two candidates": [SINGLE_FILE, INDEX, *SHARDS, "adapter_config.json", "adapter_model.safetensors"],
    "a LoRA of another library": [SINGLE_FILE, "pytorch_lora_weights.safetensors"],
    "a file with a glob's letters": [SINGLE_FILE, "model[1].safetensors", "it's.safetensors"],
}


@pytest.mark.parametrize("names", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_more_than_one_candidate_is_refused_and_each_way_out_picks_exactly_one(names: list[str]) -> None:
    paths = sorted([*SETTINGS, *names])
    with pytest.raises(UsageError) as caught:
        weight_files(paths, reader(), "sources.base_model")
    message = str(caught.value)
    unwanted = [name for name in names if name not in (SINGLE_FILE, INDEX, *SHARDS)]
    assert all(name in message for name in unwanted[:1]), message

    ways = re.findall(r"sources\.base_model\.files: (\[.*?'\]) keeps (\S+)", message)
    assert ways, message
    for patterns, head in ways:
        # As the line's YAML would have it, and with the matcher of the plan.
        included = [path for path in paths if matches_any(path, yaml.safe_load(patterns))]
        weights = weight_files(included, reader(), "sources.base_model")
        assert weights == ((SINGLE_FILE,) if head == SINGLE_FILE else tuple(SHARDS))
        assert set(SETTINGS) <= set(included)


@pytest.mark.parametrize(
    ("names", "documents", "message"),
    [
        ([], {}, "has no weights; expected model.safetensors, or model.safetensors.index.json"),
        (["model-q4_k_m.gguf"], {}, "has only GGUF weights"),
        (["adapter_config.json", "adapter_model.safetensors"], {}, "is an adapter and no model"),
        (["weights.safetensors"], {}, "the weights are weights.safetensors, and transformers reads model.safetensors"),
        (["model.fp16.safetensors"], {}, "the weights are model.fp16.safetensors"),
        (SHARDS, {}, r"has the shards model-*-of-00002.safetensors and no model.safetensors.index.json"),
        (["snapshots/abc/model.safetensors"], {}, "has weights only in snapshots/abc/; give that folder"),
        ([INDEX, SHARDS[0]], {}, f"names {SHARDS[1]}, which is not there"),
        ([SINGLE_FILE], {"config": {"transformers_weights": "other.safetensors"}}, '"transformers_weights": \'other'),
        (["a.safetensors", "b.safetensors"], {}, "more than one model: a.safetensors; b.safetensors. Keep one set"),
    ],
)
def test_a_folder_without_one_model_is_refused_by_name(
    names: list[str], documents: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        weight_files(["config.json", *names], reader(**documents))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (index_of("../elsewhere/model.safetensors"), "not below its folder"),
        (index_of("/etc/model.safetensors"), "not below its folder"),
        (index_of("a/../../model.safetensors"), "not below its folder"),
        (index_of("..\\model.safetensors"), "not below its folder"),
        (index_of("pytorch_model-00001.bin"), "no safetensors file"),
        ({"weight_map": {}}, 'has no "weight_map"'),
        ({"weight_map": ["a"]}, 'has no "weight_map"'),
        ({"weight_map": {"a": 1}}, 'has no "weight_map"'),
        ([], 'has no "weight_map"'),
    ],
)
def test_an_index_that_leads_elsewhere_or_is_none_is_refused(index: object, message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        weight_files([INDEX, *SHARDS], reader(index=index))


@pytest.fixture
def two_candidates(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, and beside it shards in which every weight is one."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "two"))
    tensors = load_file(folder / SINGLE_FILE)
    save_file({name: torch.ones_like(t) for name, t in tensors.items()}, folder / SHARDS[0], metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARDS[0])}))
    return folder


def test_training_and_merging_cannot_read_different_weights(two_candidates: Path) -> None:
    with pytest.raises(UsageError, match="more than one model"):
        loading.load_base(two_candidates)
    with pytest.raises(UsageError, match="more than one model"), SafetensorsFolder(two_candidates):
        pass

    # With one candidate, both read the same numbers.
    (two_candidates / SINGLE_FILE).unlink()
    assert [path.name for path in model_files.weight_paths(two_candidates)] == [SHARDS[0]]
    with SafetensorsFolder(two_candidates) as folder:
        assert folder.tensor("model.norm.weight").unique().tolist() == [1.0]
    assert loading.load_base(two_candidates).model.norm.weight.unique().tolist() == [1.0]


def test_an_adapter_beside_the_weights_is_not_loaded_in_silence(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"an adapter lies beside the weights \(adapter_config\.json\)"):
        loading.load_base(base)
