"""The plan refuses a GGUF export from the base's files alone, and only where these are sure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import gguf_names
from qlora_retrain.pipeline import make_plan

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
GPT2 = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
STRANGE = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Metaspace"}}
UNIGRAM = {"model": {"type": "Unigram"}, "pre_tokenizer": {"type": "Metaspace"}}


@pytest.mark.parametrize(
    ("tokenizer", "kind", "refused"),
    [
        (GPT2, "PreTrainedTokenizerFast", False),
        (STRANGE, "PreTrainedTokenizerFast", True),
        (STRANGE, "Qwen2Tokenizer", False),  # the family's class may put its own cut in the place of the file's
        (STRANGE, None, False),
        (UNIGRAM, "LlamaTokenizer", True),
        (UNIGRAM, None, True),
        (None, None, False),
    ],
)
def test_a_tokenizer_is_refused_only_where_its_file_is_what_will_be_loaded(
    tokenizer: dict[str, Any] | None, kind: str | None, refused: bool
) -> None:
    files: dict[str, Any] = {"config.json": LLAMA}
    if tokenizer:
        files["tokenizer.json"] = tokenizer
    if kind:
        files["tokenizer_config.json"] = {"tokenizer_class": kind}
    if refused:
        with pytest.raises(UsageError, match="byte-level BPE with one of the pre-tokenizers"):
            gguf_names.refuse_unsupported(files)
    else:
        gguf_names.refuse_unsupported(files)


def test_a_tokenizer_that_changes_text_is_refused_unless_llama_cpp_can_be_given_the_changed_text() -> None:
    files = {"config.json": LLAMA, "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    small = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    with pytest.raises(UsageError, match=r"changes text before it cuts it \(Lowercase\)"):
        gguf_names.refuse_unsupported({**files, "tokenizer.json": {**GPT2, "normalizer": small}})
    # Qwen's; whoever uses the file is told.
    composed = {**GPT2, "normalizer": {"type": "NFC"}}
    gguf_names.refuse_unsupported({**files, "tokenizer.json": composed})
    (text,) = gguf_names.reading_differences(composed)
    assert "does not compose characters" in text
    assert gguf_names.reading_differences(GPT2) == []


def test_added_tokens_beside_which_llama_cpp_reads_white_space_otherwise_are_told() -> None:
    tokens = [{"content": f"<{i}>", "rstrip": True} for i in range(7)]
    (text,) = gguf_names.reading_differences({**GPT2, "added_tokens": tokens})
    assert "beside <0>, <1>, <2>, <3>, <4> and 2 others in another way" in text
    assert gguf_names.model_name({**GPT2, "added_tokens": tokens}) is None
    for token in ({"lstrip": True}, {"single_word": True}):
        assert gguf_names.reading_differences({**GPT2, "added_tokens": [{"content": "<t>", **token}]})

    # With the tokens of Phi-3 the file gets the name by which llama.cpp knows them.
    names = {"<unk>": False, "<s>": False, "<|endoftext|>": False, "</s>": True, "<|user|>": True}
    phi_3 = {**GPT2, "added_tokens": [{"content": token, "rstrip": strips} for token, strips in names.items()]}
    assert "phi-3" in str(gguf_names.model_name(phi_3)).lower()
    assert gguf_names.reading_differences(phi_3) == []
    phi_3["added_tokens"].append({"content": "<|tool|>", "rstrip": False})
    (text,) = gguf_names.reading_differences(phi_3)
    assert "beside <|tool|> in another way" in text


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
    ],
    ids=str,
)
def test_a_setting_that_gguf_has_no_place_for_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"merge.exports: GGUF has no place for {list(fields)[-1]}"):
        gguf_names.refuse_unsupported({"config.json": {**LLAMA, **fields}})
    gguf_names.refuse_unsupported({"config.json": {**LLAMA, "hidden_act": "silu", "attention_bias": False}})


def test_a_base_whose_files_the_plan_does_not_know_is_left_to_the_step() -> None:
    gguf_names.refuse_unsupported({})


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_tokenizer_that_is_no_json_object_is_damaged_and_not_a_bug(line: Path, root_uri: str, text: str) -> None:
    base = line.parent / "base"
    (base / "config.json").write_text(json.dumps(LLAMA))
    (base / "tokenizer.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json is not"):
        make_plan.make_plan(line, root_uri, overrides=["merge.exports=[bf16, gguf-f16]"])


def test_the_command_refuses_with_12_and_without_torch(line: Path, root_uri: str) -> None:
    # None in sys.modules makes an import fail as if the package were not installed.
    (line.parent / "base" / "config.json").write_text(json.dumps({"architectures": ["GPTNeoXForCausalLM"]}))
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['gguf'] = None\n"
        "from qlora_retrain.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        program,
        "plan",
        str(line),
        "--root",
        root_uri,
        "--set",
        "merge.exports=[bf16,gguf-f16]",
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert process.returncode == 12, process.stderr
    assert "the base is GPTNeoXForCausalLM" in process.stderr


# As they stand in the models' own tokenizer.json.
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
NEMO = (
    f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PHI_4_MINI = (
    rf"{_WORD}{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|{_WORD}{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("regex", "ignores_merges", "name"),
    [
        (NEMO, True, "tekken"),
        (PHI_4_MINI, False, "gpt-4o"),
        (LLAMA_3, True, "llama-bpe"),
        (LLAMA_3, False, "dbrx"),  # Phi-4: the same cut, and words are always merged
    ],
)
def test_a_cut_has_the_name_of_llama_cpp(regex: str, ignores_merges: bool, name: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    cut = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]}
    model = {"type": "BPE", "ignore_merges": ignores_merges}
    assert gguf_names.pre_tokenizer_name({"model": model, "pre_tokenizer": cut}) == name


MARK = "\u2581"
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
PREPEND = {"type": "Prepend", "prepend": MARK}
METASPACE = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [
        ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None, "always"),
        (None, METASPACE, "first"),
        (None, METASPACE | {"split": True}, None),  # two spaces are one token, and would be cut
        (REPLACE, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}, "never"),
        ({"type": "NFKC"}, METASPACE, None),
    ],
)
def test_a_sentencepiece_tokenizer_says_where_it_puts_a_space(
    normalizer: Any, pre_tokenizer: Any, prefix: str | None
) -> None:
    model = {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0, MARK * 2: 1}}
    tokenizer = {"model": model, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    assert gguf_names.sentencepiece_prefix(tokenizer) == prefix
