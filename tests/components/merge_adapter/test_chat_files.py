"""The files by which a consumer with plain transformers, or with llama.cpp, renders and stops as the line does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from components.merge_adapter import gguf_file
from components.merge_adapter.chat_files import write_chat_files
from components.merge_adapter.merge import copy_tokenizer, merge
from components.merge_adapter.step import run
from qlora_retrain.config.sections import MergeConfig
from qlora_retrain.core.errors import Exit
from qlora_retrain.lm import chat, generation, loading
from qlora_retrain.lm.chat_format import ChatFormat

QUESTION = [{"role": "user", "content": "my money back of order number 1003"}]
LINE_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, without the generation config that transformers wrote beside it."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (folder / "generation_config.json").unlink()
    return folder


def publish(base: Path, folder: Path, line_format: ChatFormat | None = None) -> Path:
    """Copy a base's tokenizer files as a merge does, and complete the folder."""
    folder.mkdir()
    copy_tokenizer(base, folder)
    shutil.copyfile(base / "config.json", folder / "config.json")
    write_chat_files(folder, chat.load_tokenizer(base, line_format or ChatFormat()))
    return folder


def plain_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_a_template_of_the_base_ships_byte_by_byte(base: Path, tmp_path: Path) -> None:
    folder = publish(base, tmp_path / "model")
    for path in base.glob("*token*"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert (folder / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    assert ChatFormat.from_folder(folder) == ChatFormat()


def test_a_template_that_the_line_names_is_what_every_consumer_renders(base: Path, tmp_path: Path) -> None:
    # In a tokenizer_config.json of the older form, which would contradict a file of its own.
    (base / "chat_template.jinja").unlink()
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ 'old' }}"}))
    line_format = ChatFormat(template=LINE_TEMPLATE, template_kwargs={"a": 1}, system="Name it.", date="2026-01-31")
    folder = publish(base, tmp_path / "model", line_format)

    expected = chat.load_tokenizer(base, line_format).render(QUESTION, add_generation_prompt=True)
    assert plain_tokenizer(folder).apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True) == expected
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"

    # A published folder by itself: the same ids, and the same ends.
    alone, of_line = chat.load_tokenizer(folder), chat.load_tokenizer(base, line_format)
    assert alone.chat_format == ChatFormat(template_kwargs={"a": 1}, system="Name it.", date="2026-01-31")
    assert alone.encode([*QUESTION, {"role": "assistant", "content": "refund"}]) == of_line.encode(
        [*QUESTION, {"role": "assistant", "content": "refund"}]
    )
    assert alone.stop_ids == of_line.stop_ids


def test_a_base_without_any_template_ships_with_the_named_one(base: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").unlink()
    folder = publish(base, tmp_path / "model", ChatFormat(template="alpaca"))
    text = plain_tokenizer(folder).apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text.endswith(f"### Instruction:\n{QUESTION[0]['content']}\n\n### Response:\n")


@pytest.mark.parametrize("as_files", [True, False])
def test_other_named_templates_stay_beside_the_one_that_the_line_chose(
    base: Path, tmp_path: Path, as_files: bool
) -> None:
    named = {"default": "{{ 'd' }}", "rag": LINE_TEMPLATE, "tool_use": "{{ 't' }}", "plain": "{{ 'p' }}"}
    (base / "chat_template.jinja").unlink()
    if as_files:
        (base / "additional_chat_templates").mkdir()
        for name, text in named.items():
            path = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
            (base / path).write_text(text)
    else:
        config = json.loads((base / "tokenizer_config.json").read_text())
        templates = [{"name": name, "template": text} for name, text in named.items()]
        (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": templates}))
    assert plain_tokenizer(base).chat_template == named

    # `tool_use` would be taken for every chat with tools, and the line trained another one.
    folder = publish(base, tmp_path / "model", ChatFormat(template="rag"))
    assert plain_tokenizer(folder).chat_template == {
        "default": LINE_TEMPLATE,
        "rag": LINE_TEMPLATE,
        "plain": "{{ 'p' }}",
    }
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    rendered = plain_tokenizer(folder).apply_chat_template(QUESTION, tools=tools, tokenize=False)
    assert rendered == plain_tokenizer(base).apply_chat_template(QUESTION, chat_template=LINE_TEMPLATE, tokenize=False)


def test_a_template_in_a_file_of_the_older_kind_is_read_and_ships_as_one_that_transformers_reads(
    base: Path, tmp_path: Path
) -> None:
    text = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    assert plain_tokenizer(base).chat_template is None
    folder = publish(base, tmp_path / "model")
    assert plain_tokenizer(folder).chat_template == text
    assert not (folder / "chat_template.json").exists()


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (None, {"eos_token_id": [2, 0]}),
        ({"eos_token_id": 2, "do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}),
        ({"eos_token_id": [1], "min_new_tokens": 20, "min_length": 0, "suppress_tokens": [2, 7]},
         {"eos_token_id": [2, 1, 0], "min_length": 0, "suppress_tokens": [7]}),
    ],
)  # fmt: skip
def test_the_generation_config_lists_every_end_and_keeps_what_is_safe(
    base: Path, tmp_path: Path, document: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    if document is not None:
        (base / "generation_config.json").write_text(json.dumps(document))
    folder = publish(base, tmp_path / "model", ChatFormat(stop_tokens=("<|endoftext|>",)))
    written = json.loads((folder / "generation_config.json").read_text())
    assert expected | {"eos_token_id": expected.get("eos_token_id", [2, 0])} == {
        name: value for name, value in written.items() if document is not None or name in expected
    }
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(folder).eos_token_id == written["eos_token_id"]


@pytest.fixture
def stopping_model(base: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> tuple[Path, chat.ChatTokenizer]:
    """A merged model that ends its answers, in a line where the first token of its answer is a stop too."""
    merged = tmp_path / "merged"
    merged.mkdir()
    merge(base, tiny_nf4, tiny_adapter, merged, dequantized=True, max_shard_gib=5.0)
    plain = chat.load_tokenizer(base)
    # The first token of its answer becomes a stop: generation ends there, before the end-of-sequence token.
    model = loading.load_base(merged, dtype="float32")
    (answer,) = generation.generate_batch(model, plain, [plain.prompt_ids(QUESTION)], 12)
    assert answer.ended
    assert len(answer.ids) > 1
    name = plain.tokenizer.convert_ids_to_tokens(answer.ids[0])
    write_chat_files(merged, chat.load_tokenizer(base, ChatFormat(stop_tokens=(name,))))
    return merged, chat.load_tokenizer(merged)


def test_plain_transformers_stops_at_every_end_of_the_list(
    stopping_model: tuple[Path, chat.ChatTokenizer],
) -> None:
    from transformers import AutoModelForCausalLM, pipeline

    folder, tokenizer = stopping_model
    assert len(tokenizer.stop_ids) == 2
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.prompt_ids(QUESTION)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=12)[0, len(prompt) :].tolist()
    assert output == [tokenizer.stop_ids[1]]
    assert generation.generate_batch(model, tokenizer, [prompt], 12)[0].ids == tuple(output)

    generate = pipeline("text-generation", model=model, tokenizer=plain_tokenizer(folder))
    (answer,) = generate([QUESTION], max_new_tokens=12, return_full_text=False)[0]
    assert plain_tokenizer(folder)(answer["generated_text"], add_special_tokens=False)["input_ids"] == output


def test_a_gguf_file_names_the_ends_of_text_turn_and_message(
    base: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    merge(base, tiny_nf4, tiny_adapter, merged, dequantized=True, max_shard_gib=5.0)
    for stops, template, ends, left in (
        ((), None, {"eos": 2, "eot": 2}, None),
        (("<|endoftext|>",), None, {"eos": 2, "eot": 2, "eom": 0}, None),
        # The line's template ends a turn with another token than the tokenizer's end-of-sequence token.
        (("<|endoftext|>",), LINE_TEMPLATE, {"eos": 2, "eot": 0}, None),
        (("<|endoftext|>", "a", "b"), LINE_TEMPLATE, {"eos": 2, "eot": 0, "eom": "a"}, "b"),
    ):
        tokenizer = chat.load_tokenizer(base, ChatFormat(stop_tokens=stops, template=template))
        write_chat_files(merged, tokenizer)
        notes = gguf_file.write_gguf(merged, tmp_path / "model.gguf", "gguf-q8_0")
        fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
        named = {
            name: int(fields[f"tokenizer.ggml.{name}_token_id"].contents())
            for name in ("eos", "eot", "eom")
            if f"tokenizer.ggml.{name}_token_id" in fields
        }
        vocabulary = tokenizer.tokenizer.get_vocab()
        assert named == {name: vocabulary[end] if isinstance(end, str) else end for name, end in ends.items()}
        # On the card, where whoever runs the file reads it.
        assert any(f"stops at {left} only" in note for note in notes) is (left is not None)


def test_a_merged_form_that_repeats_itself_is_refused_though_the_unmerged_model_ended(
    inputs: dict[str, Path], rambling_adapter: Path
) -> None:
    # Limits that only a broken merge exceeds, since this one is of another adapter than the evaluation's.
    config = MergeConfig(
        device="cpu", base="dequantized", max_loss_increase_nats=1000.0, max_export_loss_increase_nats=None,
        exports=["bf16", "gguf-q8_0"],
    )  # fmt: skip
    report = run(config, **{**inputs, "adapter": rambling_adapter})
    assert report.refused is not None
    assert report.refused.exit_code == Exit.QUALITY_REFUSED
    document = json.loads((inputs["model"] / "certificate.json").read_text())
    assert [rule["name"] for rule in document["rules"] if rule["passed"] is not True] == [
        "answers_end",
        "export_gguf-q8_0_answers_end",
    ]
    assert "of 36 answers 0 ended by themselves (0 %; at least 90 %)" in str(report.refused)
    assert "gguf-q8_0: of 36 answers 0 ended by themselves" in str(report.refused)
    assert document["forms"]["certification"]["dequantized"]["answers_ended"] == 0.0
    assert document["forms"]["certification"]["live"]["answers_ended"] == 1.0
    assert document["exports"]["gguf-q8_0"]["answers_ended"] == 0.0
    assert report.numbers["answers_ended_dequantized"] == 0.0
    assert "answers that ended by themselves" in (inputs["model"] / "report.html").read_text()


def test_every_form_that_ships_has_the_lines_chat_files(inputs: dict[str, Path]) -> None:
    line_format = ChatFormat(stop_tokens=("<|endoftext|>",), template_kwargs={"a": 1})
    line_format.write(inputs["dataset"])
    run(MergeConfig(device="cpu", base="dequantized", exports=["bf16", "nf4"]), **inputs)
    for folder in (inputs["model"], inputs["model"] / "exports/nf4"):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
        assert ChatFormat.from_folder(folder) == line_format
        assert chat.load_tokenizer(folder).stop_ids == [2, 0]
    assert loading.load_nf4(inputs["model"] / "exports/nf4").generation_config.eos_token_id == [2, 0]
