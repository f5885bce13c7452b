"""Which files of a model are read, and what makes one that asks for code refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core import safety
from qlora_retrain.core.errors import IntegrityError

MODEL_FILES = (
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "tokenizer.model.v3", "spiece.model", "qwen.tiktoken", "source.spm", "vocab.bpe"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja", "LICENSE", "NOTICE.txt"),
    *("LICENSE.md", "Licence", "original/params.json", "adapter_config.json"),
)
OTHER_FILES = (
    *("modeling_x.py", "x.pyc", "__pycache__/x.cpython-311.pyc", "lib.so", "x.dll", "run.sh", "setup.cfg", "Makefile"),
    *("pytorch_model.bin", "x.pt", "x.PTH", "x.pkl", "x.ckpt", "x.joblib", "x.npz", "x.npy", "x.h5", "x.msgpack"),
    *("model.onnx", "onnx/model.onnx_data", "model.gguf", "model.mlmodel", "x.zip", "x.tar.gz", "photo.png", "x.exe"),
    *("README.md", "USE.md", ".gitattributes", ".cache/huggingface/download/x.json", ".hidden.json", "x.html"),
    *("LICENSE.py", "NOTICE.pkl", "tokenizer.json.py", "x.json.bin", "x.safetensors.exe", "x", "x\n.json", "x.jinja2"),
    *("events.out.tfevents.0.train", "model.sig", "x.jsonl"),
)


@pytest.mark.parametrize("path", MODEL_FILES)
def test_a_file_that_a_model_is_loaded_from_is_taken(path: str) -> None:
    assert safety.is_model_file(path)
    safety.refuse_foreign([path], "a version")


@pytest.mark.parametrize("path", OTHER_FILES)
def test_any_other_file_is_left_where_it_is(path: str) -> None:
    assert not safety.is_model_file(path)


OWN_FILES = {"README.md", "x.html", "x.jsonl", "model.gguf", "events.out.tfevents.0.train", "model.sig"}


@pytest.mark.parametrize("path", OTHER_FILES)
def test_in_a_folder_of_ours_a_file_that_we_do_not_write_is_refused(path: str, tmp_path: Path) -> None:
    if path in OWN_FILES:
        safety.refuse_foreign([path], "a version")
        return
    with pytest.raises(IntegrityError, match="no file that this project writes"):
        safety.refuse_foreign(["model/config.json", path], "a version")
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("{}")
    with pytest.raises(IntegrityError, match="no file that this project writes"):
        safety.refuse_unsafe(tmp_path)


CODE: dict[str, Any] = {
    "auto_map": {"AutoModel": "modeling_x.X"},
    "the older form of a tokenizer": {"auto_map": ["tokenization_x.X", None]},
    "of another repository": {"auto_map": {"AutoConfig": "owner/name--x.X"}},
    "without a class": {"auto_map": None},
    "nested": {"text_config": {"auto_map": {"AutoConfig": "x.X"}}},
    "nested in a list": {"layers": [[{"a": [{"auto_map": "x.X"}]}]]},
    "a processor in a processor": {"image_processor": {"auto_map": {"AutoImageProcessor": "x.X"}}},
    "a pipeline": {"custom_pipelines": {"pair": {"impl": "pair.Pipeline"}}},
    "generation": {"custom_generate": "owner/name"},
    "a module that PEFT imports": {"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}},
    "another one": {"megatron_core": "evil", "megatron_config": {"a": 1}},
    "a class in a file": {"tokenizer_class": "tokenization_x.Tokenizer"},
    "a class in a repository": {"sub": {"processor_class": "owner/name--x.Processor"}},
    "a kernel of a repository": {"attn_implementation": "owner/kernel"},
    "a kernel of a part": {"_attn_implementation": {"text_config": "owner/kernel:forward"}},
}
CODE["auto_map"] = {"auto_map": CODE["auto_map"]}
JSON_FILES = (
    *("config.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json", "Config.JSON"),
    *("processor_config.json", "video_preprocessor_config.json", "chat_template.json", "special_tokens_map.json"),
    *("adapter_config.json", "config.4.0.0.json", "sub/config.json", "tokenizer.json", "tokenizer.4.0.0.json"),
)


@pytest.mark.parametrize("document", CODE.values(), ids=CODE)
def test_a_document_that_asks_for_code_is_refused(document: Any) -> None:
    with pytest.raises(IntegrityError, match="would run code"):
        safety.parse_json("config.json", json.dumps(document).encode(), "base_model")
    # However its letters are written.
    escaped = json.dumps(document).replace("auto_map", "auto\\u005fmap").encode()
    with pytest.raises(IntegrityError, match="would run code"):
        safety.parse_json("config.json", escaped, "base_model")


@pytest.mark.parametrize("path", JSON_FILES)
def test_every_json_file_of_a_model_is_looked_at(path: str, tmp_path: Path) -> None:
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(json.dumps(CODE["nested"]))
    with pytest.raises(IntegrityError, match=r'has "auto_map"'):
        safety.refuse_unsafe(tmp_path)


@pytest.mark.parametrize(
    "document",
    [
        {"model": {"vocab": {"auto_map": 0, "custom_generate": 1, "tokenizer_class": 2, "x": 3}}},
        {"auto_mapping": None, "megatron_config": None, "megatron_core": "megatron.core", "custom_pipelines": {}},
        {"tokenizer_class": "LlamaTokenizerFast", "processor_class": None, "attn_implementation": "flash_attention_2"},
        {"chat_template": "{{ auto_map }} a/b", "_name_or_path": "owner/name", "note": "auto_map"},
        ["auto_map"],
        7,
    ],
)
def test_what_only_looks_like_code_is_read(document: Any) -> None:
    assert safety.parse_json("tokenizer.json", json.dumps(document).encode(), "base_model") == document


@pytest.mark.parametrize("levels", [65, 500, 5_000, 200_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_a_document_that_is_nested_too_deeply_is_refused(levels: int, opening: str, closing: str) -> None:
    text = opening * levels + "0" + closing * levels
    with pytest.raises(IntegrityError, match="more than 64 levels deep"):
        safety.parse_json("config.json", text.encode(), "base_model")
    within = opening * 64 + "0" + closing * 64
    safety.parse_json("config.json", within.encode(), "base_model")


@pytest.mark.parametrize(
    ("path", "limit_mib"),
    [("config.json", 8), ("tokenizer_config.json", 8), ("chat_template.jinja", 8), ("tokenizer.json", 64),
     ("vocab.json", 64), ("merges.txt", 64), ("model.safetensors.index.json", 64), ("sub/generation_config.json", 8)],
)  # fmt: skip
def test_a_file_that_is_far_too_large_is_refused_before_it_is_read(path: str, limit_mib: int, tmp_path: Path) -> None:
    (tmp_path / path).parent.mkdir(exist_ok=True)
    with (tmp_path / path).open("wb") as file:
        file.truncate(limit_mib * 2**20 + 1)
    with pytest.raises(IntegrityError, match=f"of at most {limit_mib} MiB"):
        safety.refuse_unsafe(tmp_path)
    if path.endswith(".json"):
        with pytest.raises(IntegrityError, match=f"of at most {limit_mib} MiB"):
            safety.read_json(tmp_path / path, "base")


@pytest.mark.parametrize("value", [b"0,", b"[],", b'{"a":0},'])
def test_a_document_of_too_many_values_is_refused_before_it_is_parsed(value: bytes) -> None:
    data = b"[" + value * (8_000_001 // sum(value.count(sign) for sign in (b",", b"[", b"{"))) + b"0]"
    with pytest.raises(IntegrityError, match="more than 8,000,000 values"):
        safety.parse_json("tokenizer.json", data, "base_model")


def test_weights_and_what_no_library_reads_may_be_as_it_is(tmp_path: Path) -> None:
    names = ("model.safetensors", "model.gguf", "certificate.json", "loss.jsonl", "report.html", "trainer_state.json")
    for name in (*names, "corpus.txt"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(65 * 2**20)
    # A label of the data may have any name, and other people's results any form.
    (tmp_path / "evaluation.json").write_text(json.dumps({"labels": {"auto_map": {"accuracy": 0.9}}}))
    (tmp_path / "all_results.json").write_text('{"a": 1}\n{"a": 2}\n')
    safety.refuse_unsafe(tmp_path)


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(IntegrityError, match=r"config\.json is a link to nothing"):
        safety.refuse_unsafe(tmp_path)


def test_what_is_no_json_is_refused() -> None:
    for data in (b"{", b"", b"\xff\xfe\xfd", b"\x80\x04.", b"9" * 5_000):
        with pytest.raises(IntegrityError, match=r"config\.json is not valid JSON"):
            safety.parse_json("config.json", data, "base_model")
