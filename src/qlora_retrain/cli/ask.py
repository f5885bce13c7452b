"""Ask a model folder questions with plain transformers, as a consumer of a published version would.

Chats are rendered as in training: the version's `chat_format.json` has the system turn, the template's variables, its
date and the tokens at which an answer ends.

Command: `qlora-retrain ask FOLDER QUESTION... [--system TEXT] [--max-new-tokens 64]`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat, generation
from qlora_retrain.lm.generation import Completion


def model_folder(folder: Path) -> tuple[Path, str | None]:
    """Return the model below a pulled version, and the system turn it was trained with; a bare folder has none.

    Raises:
        UsageError: If the folder is neither.
    """
    # A published version has its settings in recipe.json, beside the folder of the model.
    recipe = folder / "recipe.json"
    if recipe.is_file():
        system = json.loads(recipe.read_text(encoding="utf-8"))["steps"][graph.producer_name("dataset")]["system"]
        return folder / "model", system
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder}: expected a pulled version (recipe.json) or a model folder (config.json), found neither"
        )
    return folder, None


def answers(folder: Path, questions: Sequence[str], system: str | None, max_new_tokens: int) -> list[Completion]:
    """Return the model's greedy answer to each question.

    Args:
        folder: A model folder.
        questions: Each is asked by itself.
        system: The system turn; None: the one that the folder's `chat_format.json` states, if any.
        max_new_tokens: A longer answer is cut after this many tokens.

    Raises:
        UsageError: If the folder is no model, or its chat template refuses a question.
    """
    from qlora_retrain.lm.loading import load_base

    tokenizer = chat.load_tokenizer(folder)
    model = load_base(folder, dtype="auto")
    system = system or tokenizer.chat_format.system
    turns = [{"role": "system", "content": system}] if system else []
    try:
        prompts = [tokenizer.prompt_ids([*turns, {"role": "user", "content": question}]) for question in questions]
    except chat.RowRefused as refusal:
        raise UsageError(f"{folder}: {refusal.detail}") from refusal

    # One question at a time: batches would need padding, which changes answers in 16 bits.
    return [generation.generate_batch(model, tokenizer, [prompt], max_new_tokens)[0] for prompt in prompts]
