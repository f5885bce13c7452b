"""`ask --adapter`: several adapters of several kinds answer over one base, each as it does alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.lm import chat, generation, loading, served_model
from qlora_retrain.lm.served_model import BaseReference
from tests import hub_server
from tests.cli.test_ask import QUESTION, ask
from tests.components.train_qlora.adapted import export_random

SECOND = "my password fails"
METHODS = {"a": "lora", "b": "lora", "d": "dora", "i": "ia3", "p": "prompt", "x": "prefix", "n": "bottleneck"}


def write_version(base: Path, folder: Path, method: str, seed: int, *, system: str | None = None) -> Path:
    """Write what a pulled version has beside its reports: a random adapter of a method, and what says its base."""
    export_random(loading.load_base(base, dtype="auto"), method, folder / "adapter", size=0.3, seed=seed)
    (folder / "model").mkdir()
    tokenizer = chat.load_tokenizer(base)
    tokenizer.tokenizer.save_pretrained(folder / "model")
    tokenizer.chat_format.write(folder / "model")
    hashes = served_model.hashes(base)
    if method in ("prompt", "prefix", "bottleneck"):
        BaseReference("original", hashes).write(folder / "model")
    pins = {path: f"sha256:{sha256}" for path, sha256 in hashes.items()}
    (folder / "manifest.json").write_text(json.dumps({"base": {"files": pins}, "keys": {}}))
    (folder / "recipe.json").write_text(json.dumps({"steps": {"validate_data": {"system": system}}}))
    return folder


@pytest.fixture(scope="module")
def versions(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("versions")
    return {
        name: write_version(tiny_model, folder / name, method, seed, system="order" if name == "b" else None)
        for seed, (name, method) in enumerate(METHODS.items())
    }


def arguments(versions: dict[str, Path]) -> list[str]:
    return [word for name, folder in versions.items() for word in ("--adapter", f"{name}={folder}")]


def test_each_adapter_answers_each_question_as_it_does_alone(
    tiny_model: Path, versions: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = []
    for question in (QUESTION, SECOND):
        for name, folder in versions.items():
            model: Any = loading.attach_adapter(loading.load_base(tiny_model, dtype="auto"), folder / "adapter")
            tokenizer = chat.load_tokenizer(tiny_model)
            turns = [{"role": "system", "content": "order"}] if name == "b" else []
            prompt = tokenizer.prompt_ids([*turns, {"role": "user", "content": question}])
            (answer,) = generation.generate_batch(model, tokenizer, [prompt], 6)
            expected.append(f"{name}: {' '.join(answer.text.split())}")
    assert len(set(expected)) > 10, "the adapters must answer differently"
    assert ask(tiny_model, *arguments(versions), "--max-new-tokens", "6", "--", QUESTION, SECOND) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == expected
    assert "note: answer 2 of b was cut after 6 tokens" in printed.err
    assert "nothing says" not in printed.err


def test_an_adapter_of_another_base_is_refused(
    tiny_model: Path, versions: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_base = tmp_path / "other"
    shutil.copytree(tiny_model, changed_base)
    config = json.loads((changed_base / "config.json").read_text())
    (changed_base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    for name in ("a", "p"):
        assert ask(changed_base, "--adapter", versions[name], "--", QUESTION) == 12
        assert "another base" in capsys.readouterr().err

    # A folder without a version states no base, so it is taken, with a note.
    assert ask(changed_base, "--adapter", versions["a"] / "adapter", "--", QUESTION) == 0
    assert "nothing says over which base adapter was trained" in capsys.readouterr().err


def test_what_cannot_be_asked_is_refused_with_what_to_do(
    tiny_model: Path, versions: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, p = versions["a"], versions["p"]
    for words, message in (
        ([tiny_model, "--adapter", a, "--adapter", f"a={p}"], "two are called a"),
        ([tiny_model, "--adapter", tmp_path], "expected a pulled version (recipe.json), an adapter's folder"),
        ([tiny_model, "--adapter", a, "--base", tiny_model], "the folder itself is the base"),
        ([tiny_model, "--base", tiny_model], "is a model folder, and needs no base"),
        ([p], "is an adapter alone, and needs its base model, whose model.safetensors has the sha256"),
    ):
        assert ask(*words, "--", QUESTION) == 12
        assert message in capsys.readouterr().err
    assert ask(p, "--base", tiny_model, "--max-new-tokens", "3", "--", QUESTION) == 0


def test_adapters_over_several_forms_of_the_base_are_asked_by_themselves(
    tiny_model: Path, versions: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = write_version(tiny_model, tmp_path / "packed", "bottleneck", 9)
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    quantization |= {"quant_method": "bitsandbytes", "bnb_4bit_use_double_quant": True}
    BaseReference("dequantized", served_model.hashes(tiny_model), quantization).write(packed / "model")
    assert ask(tiny_model, "--adapter", versions["a"], "--adapter", packed, "--", QUESTION) == 12
    assert "others over a packed base" in capsys.readouterr().err
    assert ask(tiny_model, "--adapter", packed, "--max-new-tokens", "3", "--", QUESTION) == 0
    alone = capsys.readouterr().out
    assert ask(packed, "--base", tiny_model, "--max-new-tokens", "3", "--", QUESTION) == 0
    assert capsys.readouterr().out == alone


def test_a_base_with_the_other_files_of_the_hub_is_asked_and_none_is_refused_by_name(
    tiny_model: Path, versions: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    for path in (".gitattributes", "README.md", "modeling.py", "original/consolidated.00.pth", ".cache/x.metadata"):
        (base / path).parent.mkdir(exist_ok=True)
        (base / path).write_text("of the Hub")
    words = ["--max-new-tokens", "3", "--", QUESTION]
    for arguments in ([base], [base, "--adapter", versions["a"]], [versions["p"], "--base", base]):
        assert ask(*arguments, *words) == 0, capsys.readouterr().err
    for arguments in ([tmp_path / "no", "--adapter", versions["a"]], [versions["p"], "--base", tmp_path / "no"]):
        assert ask(*arguments, *words) == 12
        assert "expected the folder of a base model (config.json), found none" in capsys.readouterr().err


def test_a_base_of_the_hub_is_fetched_and_its_hashes_are_compared(
    tiny_model: Path, versions: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    version = tmp_path / "version"
    shutil.copytree(versions["p"], version)
    manifest = json.loads((version / "manifest.json").read_text())
    manifest["base"]["source"] = hub_server.URI
    (version / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(tiny_model, tmp_path / "repository")
    with hub_server.serve(tmp_path / "repository", tmp_path / "state", monkeypatch) as server:
        assert ask(version, "--max-new-tokens", "3", "--", QUESTION) == 0
        answer = capsys.readouterr().out
        assert any(path.endswith("model.safetensors") for path in server.requests)
    assert ask(version, "--base", tiny_model, "--max-new-tokens", "3", "--", QUESTION) == 0
    assert capsys.readouterr().out == answer
