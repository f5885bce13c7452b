"""An Ollama Modelfile: its template renders as the model's own, or is left out."""

from __future__ import annotations

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
