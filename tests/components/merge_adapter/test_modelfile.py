"""An Ollama Modelfile: its template renders as the model's own, or is left out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from components.merge_adapter import modelfile
from qlora_retrain.lm import chat
from tests.components.merge_adapter.sentencepiece import write_sentencepiece

CHAT = [("user", "where is it?"), ("assistant", "on its way"), ("user", "thanks\n\nbye")]


def read(folder: Path) -> tuple[str | None, list[str]]:
    """Write the Modelfile of a model, and return its template and its stops."""
    modelfile.write_modelfile(folder, folder / "model-q8_0.gguf")
    text = (folder / "Modelfile").read_text()
    assert text.startswith("FROM ./model-q8_0.gguf\n")
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
    return template and template[1], re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)


def render(template: str, turns: Sequence[tuple[str, str]]) -> str:
    """Render as Go does, for the few constructions that the Modelfile has."""
    system = next((text for role, text in turns if role == "system"), "")
    opening, loop, body = template.partition("{{ range .Messages }}")
    assert loop
    if match := re.fullmatch(r"\{\{ if \.System \}\}(.*)\{\{ else \}\}(.*)\{\{ end \}\}", opening, re.DOTALL):
        opening = match[1].replace("{{ .System }}", system) if system else match[2]
    user, answer = re.fullmatch(
        r'\{\{ if eq \.Role "user" \}\}(.*)\{\{ else if eq \.Role "assistant" \}\}(.*)\{\{ end \}\}\{\{ end \}\}',
        body,
        re.DOTALL,
    ).groups()  # type: ignore[union-attr]
    forms = {"user": user, "assistant": answer, "system": ""}
    return opening + "".join(forms[role].replace("{{ .Content }}", text) for role, text in turns)


def expected(folder: Path, turns: Sequence[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    return chat.load_tokenizer(folder).render(messages, add_generation_prompt=True)


def test_a_chatml_template_is_written_with_its_system_turn(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    template, stops = read(folder)
    assert template is not None
    for turns in (CHAT, CHAT[:1], [("system", "be brief"), *CHAT]):
        assert render(template, turns) == expected(folder, turns)
    assert "<|im_end|>" in stops


@pytest.mark.parametrize("prefix", ["always", "never"])
def test_a_template_that_begins_with_bos_leaves_it_to_ollama_where_the_tokenizer_adds_it(
    tmp_path: Path, prefix: Any
) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    write_sentencepiece(tmp_path, prefix)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    template, _ = read(tmp_path)
    assert template is not None
    assert "<s>" + render(template, CHAT) == expected(tmp_path, CHAT)


INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[S]{{ m.content }}[/S]\n"
    "{% elif m.role == 'user' %}[I] {{ m.content }} [/I]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
# As Gemma has it: a system turn is the beginning of the first user's.
MERGED = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{{ messages[0].content + '\n\n' if loop.first and messages[0].role == 'system' else '' }}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("chat_template", [INSTRUCTIONS, MERGED])
def test_a_system_turn_is_in_the_template_wherever_the_model_has_it_and_that_of_the_training_is_the_default(
    tiny_model: Path, tmp_path: Path, chat_template: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(chat_template)
    (folder / "chat_format.json").write_text(json.dumps({"system": 'Name the "intent".', "stop_tokens": []}))
    template, _ = read(folder)
    assert template is not None
    for turns in (CHAT, CHAT[:1], [("system", "be brief"), *CHAT]):
        assert render(template, turns) == expected(folder, turns)
    assert 'SYSTEM """Name the "intent"."""\n' in (folder / "Modelfile").read_text()


def test_what_a_modelfile_cannot_hold_is_left_out_and_told(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_format.json").write_text(json.dumps({"system": 'Quote as """.', "stop_tokens": []}))
    assert read(folder)[0] is not None
    text = (folder / "Modelfile").read_text()
    assert "\nSYSTEM" not in text
    assert "# The system turn of the training has three quotes in a row" in text

    # Go reads the first two of three braces as its mark.
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }} {{ '{' }}{{ m.content }}}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {{ '{' }}{% endif %}"
    )
    assert read(folder)[0] is None


def test_a_template_whose_system_turn_has_no_form_is_left_out_where_the_training_had_one(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    # Before the last user's turn, as some of Mistral's do.
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[I]"
        "{{ messages[0].content + '\n' if loop.last and messages[0].role == 'system' else '' }}{{ m.content }}[/I]"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    template, _ = read(folder)
    assert template is not None
    assert "# A system turn has no place in this template" in (folder / "Modelfile").read_text()
    (folder / "chat_format.json").write_text(json.dumps({"system": "Name the intent.", "stop_tokens": []}))
    assert read(folder)[0] is None
    assert 'SYSTEM """Name the intent."""' in (folder / "Modelfile").read_text()


def test_a_template_that_counts_turns_is_left_out_and_told(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.index }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template, stops = read(folder)
    assert template is None
    assert stops
    assert "the chat template does more than to put text around turns" in capsys.readouterr().out
