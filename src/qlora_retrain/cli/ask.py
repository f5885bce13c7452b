"""Ask a model folder questions with plain transformers, as a consumer of a published version would.

Command: `qlora-retrain ask FOLDER QUESTION... [--system TEXT]`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat

_MAX_NEW_TOKENS = 64


def model_folder(folder: Path) -> tuple[Path, str | None]:
    """Return the model below a pulled version, and the system turn it was trained with; a bare folder has none.

    Raises:
        UsageError: If the folder is neither.
    """
    # A published version has its settings in recipe.json, beside the folder of the model.
    recipe = folder / "recipe.json"
    if recipe.is_file():
        system = json.loads(recipe.read_text())["steps"][graph.producer_name("dataset")]["system"]
        return folder / "model", system
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder}: expected a pulled version (recipe.json) or a model folder (config.json), found neither"
        )
    return folder, None


def answers(folder: Path, questions: Sequence[str], system: str | None) -> list[str]:
    """Return the model's greedy answer to each question, without special tokens."""
    import torch

    from qlora_retrain.lm.loading import load_base

    tokenizer = chat.load_tokenizer(folder)
    model = load_base(folder, dtype="auto")
    turns = [{"role": "system", "content": system}] if system else []
    answers = []

    # One question at a time: batches would need padding, which changes answers in 16 bits.
    for question in questions:
        ids = torch.tensor([chat.prompt_ids(tokenizer, [*turns, {"role": "user", "content": question}])])
        # Greedy and without sampling, so that asking twice gives the same answer.
        with torch.inference_mode():
            output_ids = model.generate(  # (1, T)
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        answers.append(str(tokenizer.decode(output_ids[0, ids.shape[1] :], skip_special_tokens=True)).strip())
    return answers
