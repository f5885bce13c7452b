"""Write the files beside the tokenizer by which every consumer renders chats as training did, and stops where it did.

They are `chat_format.json`, the chat template where it is not the tokenizer's own, and `generation_config.json`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_retrain.lm.chat import ChatTokenizer

_GENERATION_CONFIG = "generation_config.json"
_MORE_TEMPLATES = "additional_chat_templates"
# transformers picks this one by itself where a consumer gives tools.
_TOOL_TEMPLATE = "tool_use"
# Settings of a base that would keep the model from ending a short answer.
_KEEP_FROM_ENDING = ("min_length", "min_new_tokens")
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


def write_chat_files(folder: Path, tokenizer: ChatTokenizer) -> None:
    """Complete a model folder that has the base's tokenizer files.

    Args:
        folder: The model's.
        tokenizer: The line's.
    """
    replace(tokenizer.chat_format, template=None).write(folder)
    _write_template(folder, tokenizer.tokenizer.chat_template)
    _write_generation_config(folder, tokenizer.stop_ids)


def _write_template(folder: Path, template: str | dict[str, str]) -> None:
    """Make the line's template the one that the folder's tokenizer uses; files that say so already stay as they are."""
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    own = loaded.chat_template
    if own == template:
        return

    templates = dict(template) if isinstance(template, dict) else {"default": template}
    if isinstance(own, Mapping):
        # The base's other named templates stay, but for the one that would silently replace the line's.
        templates |= {name: text for name, text in own.items() if name not in (*templates, _TOOL_TEMPLATE)}

    # One place has the template, so that no reader can take another one.
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / _MORE_TEMPLATES, ignore_errors=True)
    config_path = folder / "tokenizer_config.json"
    if config_path.is_file():
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if config.pop("chat_template", None) is not None:
            _write_json(config_path, config)

    for name, text in templates.items():
        path = folder / ("chat_template.jinja" if name == "default" else f"{_MORE_TEMPLATES}/{name}.jinja")
        # The name comes from a file of the base, and must not lead out of the folder.
        if re.fullmatch(r"[\w-]+", name):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")


def _write_generation_config(folder: Path, stop_ids: Sequence[int]) -> None:
    """Name every token that ends an answer; keep the base's other settings, but for those that prevent an end."""
    path = folder / _GENERATION_CONFIG
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else _settings_of_model_config(folder)
    changed = {k: v for k, v in document.items() if not (k in _KEEP_FROM_ENDING and v)}
    changed["eos_token_id"] = list(stop_ids)
    for name in _SUPPRESSED:
        if changed.get(name):
            changed[name] = [token for token in changed[name] if token not in stop_ids]
    if changed != document or not path.is_file():
        _write_json(path, changed)


def _settings_of_model_config(folder: Path) -> dict[str, Any]:
    """Return what transformers takes from config.json where a folder has no generation config."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    settings: dict[str, Any] = GenerationConfig.from_model_config(config).to_diff_dict()
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
