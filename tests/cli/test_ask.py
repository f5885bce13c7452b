"""`ask`: answers as a consumer of the version gets them, rendered and ended by the version's own chat format."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_retrain.cli import main
from qlora_retrain.lm import chat, loading
from qlora_retrain.lm.chat_format import ChatFormat

QUESTION = "where is order 7"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A pulled version: the tiny model, which ends no answer by itself, and a recipe without a system turn."""
    recipe = {"steps": {"validate_data": {"system": None}}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path


def ask(*arguments: object) -> int:
    """Run the verb in this process and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main.main(["ask", *map(str, arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def greedy_ids(model_folder: Path, prompt: list[int], count: int) -> list[int]:
    """Decode by definition, in the precision of the folder."""
    model: Any = loading.load_base(model_folder, dtype="auto")
    ids: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


def test_an_answer_that_was_cut_is_printed_with_a_note_beside_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = chat.load_tokenizer(folder / "model")
    prompt = tokenizer.prompt_ids([{"role": "user", "content": QUESTION}])
    for options, count in (([], 64), (["--max-new-tokens", "5"], 5)):
        assert ask(folder, *options, "--", QUESTION) == 0
        printed = capsys.readouterr()
        expected = tokenizer.decode(greedy_ids(folder / "model", prompt, count), skip_special_tokens=True).strip()
        assert printed.out == expected + "\n", "a program reads the answer alone"
        assert f"answer 1 was cut after {count} tokens" in printed.err
        assert "--max-new-tokens" in printed.err
    assert ask(folder, "--max-new-tokens", "0", "--", QUESTION) == 12


def test_the_versions_own_chat_format_renders_the_question_and_ends_the_answer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = chat.load_tokenizer(folder / "model")
    template = plain.tokenizer.chat_template + "{{ mood }}{{ strftime_now('%d %B %Y') }}"
    (folder / "model/chat_template.jinja").write_text(template)
    chat_format = ChatFormat(template_kwargs={"mood": "please"}, date="2024-02-29", system="order")
    chat_format.write(folder / "model")

    # By hand: the system turn, the variable and the day are in the prompt.
    text = f"<|im_start|>system\norder<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    prompt = plain.tokenizer(f"{text}please29 February 2024", add_special_tokens=False)["input_ids"]
    ids = greedy_ids(folder / "model", prompt, 8)
    assert ask(folder, "--max-new-tokens", "8", "--", QUESTION) == 0
    assert capsys.readouterr().out == plain.decode(ids, skip_special_tokens=True).strip() + "\n"

    # A plain token of that answer is made a stop: the answer ends there, and there is no note.
    end = next(token for token in ids[1:] if token != ids[0])
    stops = (plain.tokenizer.convert_ids_to_tokens(end),)
    replace(chat_format, stop_tokens=stops).write(folder / "model")
    assert ask(folder, "--max-new-tokens", "8", "--", QUESTION) == 0
    printed = capsys.readouterr()
    assert printed.out == plain.decode(ids[: ids.index(end)], skip_special_tokens=True).strip() + "\n"
    assert printed.err == ""


def test_an_export_in_4_bits_is_asked_as_it_lies_in_the_version(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed: Any = loading.load_base(tiny_model, quantization=settings)
    packed.save_pretrained(tmp_path)
    tokenizer = chat.load_tokenizer(tiny_model)
    tokenizer.tokenizer.save_pretrained(tmp_path)
    assert ask(tmp_path, "--max-new-tokens", "2", "--", QUESTION) == 0
    prompt = tokenizer.prompt_ids([{"role": "user", "content": QUESTION}])
    expected = packed.generate(torch.tensor([prompt]), max_new_tokens=2, do_sample=False)[0, len(prompt) :]
    assert capsys.readouterr().out == tokenizer.decode(expected.tolist(), skip_special_tokens=True).strip() + "\n"


def test_a_question_that_the_template_refuses_is_an_error_with_its_words(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model/chat_template.jinja").write_text("{{ raise_exception('ask politely') }}")
    ChatFormat().write(folder / "model")
    assert ask(folder, "--", QUESTION) == 12
    assert "ask politely" in capsys.readouterr().err


def test_a_question_that_the_model_cannot_read_is_refused_with_the_reason(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(folder, "--", QUESTION, "a " * 1500) == 12
    assert re.search(
        r"question 2 has \d{4} tokens with its chat, and the model reads at most 2048", capsys.readouterr().err
    )
    # As Python gives an argument that is no UTF-8.
    assert ask(folder, "--", b"caf\xe9".decode("utf-8", "surrogateescape")) == 12
    assert r"'caf\udce9': expected text in UTF-8" in capsys.readouterr().err


def test_a_part_that_is_no_model_is_refused_with_the_way_to_ask_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "_pulled.json").write_text(json.dumps({"parts": ["adapter"]}))
    assert ask(folder, QUESTION) == 12
    assert "pull it again without --parts" in capsys.readouterr().err
    # The base that an adapter alone is asked over is looked for as ever.
    (folder / "_pulled.json").write_text(json.dumps({"parts": ["adapter", "model"]}))
    assert ask(folder, "--max-new-tokens", "1", "--", QUESTION) == 0
