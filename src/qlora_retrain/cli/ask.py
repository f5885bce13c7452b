"""Ask a model questions with plain transformers, as a consumer of a published version would.

Chats are rendered as in training: the version's `chat_format.json` has the system turn, the template's variables, its
date and the tokens at which an answer ends. A version that is an adapter alone is asked over its base. With
`--adapter`, the folder is a base, and every adapter answers every question over it.

Command: `qlora-retrain ask FOLDER QUESTION... [--base FOLDER] [--adapter NAME=VERSION]... [--system TEXT]`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.cli.ask_adapters import Adapter, answer_over_base
from qlora_retrain.cli.ask_base import load_version
from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat, generation
from qlora_retrain.lm.context_length import max_context_tokens
from qlora_retrain.lm.generation import Completion
from qlora_retrain.storage.pulled_folder import RECORD
from qlora_retrain.storage.version_parts import MODEL

if TYPE_CHECKING:
    from qlora_retrain.lm.chat import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked.

    Attributes:
        texts: Each is asked by itself.
        system: The system turn; None: the one of the model's training, if any.
        max_new_tokens: A longer answer is cut after this many tokens.
    """

    texts: Sequence[str]
    system: str | None
    max_new_tokens: int

    def answers(self, model: Any, tokenizer: ChatTokenizer, system: str | None, label: str) -> list[Completion]:
        """Return the model's greedy answer to each question.

        Args:
            model: In evaluation mode.
            tokenizer: The model's own.
            system: The system turn of its training.
            label: What the model is, for messages.

        Raises:
            UsageError: If a question is no text, too long, or one that the chat template refuses.
        """
        for text in (self.system or "", *self.texts):
            # An argument of a command line that is no UTF-8 has such characters in their place.
            if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
                raise UsageError(f"{ascii(text)[:80]}: expected text in UTF-8, found other bytes")
        system = self.system or system or tokenizer.chat_format.system
        turns = [{"role": "system", "content": system}] if system else []
        try:
            prompts = [tokenizer.prompt_ids([*turns, {"role": "user", "content": text}]) for text in self.texts]
        except chat.RowRefused as refusal:
            raise UsageError(f"{label}: {refusal.detail}") from refusal
        limit = max_context_tokens(model.config.to_dict())
        for number, prompt in enumerate(prompts, start=1):
            if limit is not None and len(prompt) > limit:
                raise UsageError(
                    f"{label}: question {number} has {len(prompt)} tokens with its chat, and the model reads at most "
                    f"{limit}; shorten it"
                )
        # One question at a time: batches would need padding, which changes answers in 16 bits.
        return [generation.generate_batch(model, tokenizer, [prompt], self.max_new_tokens)[0] for prompt in prompts]


def answers(folder: Path, questions: Questions, base: Path | None = None, root: str | None = None) -> list[Completion]:
    """Return a model's answer to each question.

    Args:
        folder: A pulled version, or a model folder.
        questions: What is asked.
        base: The base of a version that is an adapter alone.
        root: The store's URI, where that base may be.

    Raises:
        UsageError: If the folder is no model, or the base is missing or another one.
    """
    model, tokenizer, system = load(folder, base, root)
    return questions.answers(model, tokenizer, system, str(folder))


def load(folder: Path, base: Path | None = None, root: str | None = None) -> tuple[Any, ChatTokenizer, str | None]:
    """Load a pulled version or a model folder: the model, its tokenizer, and the system turn of its training.

    Args:
        folder: A pulled version, or a model folder.
        base: The base of a version that is an adapter alone.
        root: The store's URI, where that base may be.

    Raises:
        UsageError: If the folder is no model, or the base is missing or another one.
    """
    model_folder, system = find_model(folder)
    _refuse_parts_without_model(folder)
    if base is not None and model_folder == folder:
        raise UsageError(
            f"--base: {folder} is a model folder, and needs no base; for adapters over it, give each with --adapter"
        )
    tokenizer = chat.load_tokenizer(model_folder)
    return load_version(folder, base, root), tokenizer, system or tokenizer.chat_format.system


def answers_of_adapters(base: Path, adapters: Sequence[Adapter], questions: Questions) -> dict[str, list[Completion]]:
    """Return the answers of each adapter by its name; the base is loaded once.

    Raises:
        UsageError: If the folder is no base model, or an adapter is one of another base.
    """

    def ask(model: Any, adapter: Adapter) -> list[Completion]:
        tokenizer = chat.load_tokenizer(adapter.chat_folder or base)
        return questions.answers(model, tokenizer, adapter.system, adapter.name)

    return answer_over_base(base, adapters, ask)


def find_model(folder: Path) -> tuple[Path, str | None]:
    """Return the model below a pulled version, and the system turn it was trained with; a bare folder has none.

    Raises:
        UsageError: If the folder is neither.
    """
    # A published version has its settings in recipe.json, beside the folder of the model.
    recipe = folder / "recipe.json"
    if recipe.is_file():
        return folder / "model", system_turn(recipe)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder}: expected a pulled version (recipe.json) or a model folder (config.json), found neither"
        )
    return folder, None


def _refuse_parts_without_model(folder: Path) -> None:
    """Refuse a version of which only parts were pulled that are no model by themselves."""
    record = folder / RECORD
    parts = json.loads(record.read_text(encoding="utf-8")).get("parts") if record.is_file() else None
    if parts and MODEL not in parts and not (folder / graph.BASE_REFERENCE).is_file():
        raise UsageError(
            f"{folder}: holds only the parts {', '.join(parts)} of its version; pull it again without --parts or with "
            "--parts model, or ask its adapter over the base: ask BASE --adapter FOLDER"
        )


def system_turn(recipe: Path) -> str | None:
    """Return the system turn of a version's training.

    Raises:
        UsageError: If the file is no recipe of this project: other tools write files of that name too.
    """
    try:
        steps = json.loads(recipe.read_text(encoding="utf-8"))["steps"]
        system: str | None = steps[graph.producer_name("dataset")]["system"]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{recipe}: expected the recipe of a pulled version, found something else; pull the version again, or give "
            "the folder that has the model's config.json"
        ) from error
    return system
