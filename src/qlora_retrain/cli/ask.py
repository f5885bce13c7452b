"""Ask a model folder questions, with plain transformers: what a consumer of a published version does.

Command: `qlora-retrain ask FOLDER QUESTION... [--system TEXT]`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat

_MAX_NEW_TOKENS = 64


def model_folder(folder: Path) -> tuple[Path, str | None]:
    """The model below a pulled version, and the system turn it was trained with; a bare model folder has none."""
    recipe = folder / "recipe.json"
    if recipe.is_file():
        system = json.loads(recipe.read_text())["steps"]["validate_data"]["system"]
        return folder / "model", system
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: neither a pulled version nor a model folder")
    return folder, None


def answers(folder: Path, questions: Sequence[str], system: str | None) -> list[str]:
    """The model's greedy answer to each question, without special tokens."""
    import torch

    from qlora_retrain.lm.loading import load_base

    tokenizer = chat.load_tokenizer(folder)
    model = load_base(folder, dtype="auto")
    turns = [{"role": "system", "content": system}] if system else []
    found = []
    for question in questions:
        ids = torch.tensor([chat.prompt_ids(tokenizer, [*turns, {"role": "user", "content": question}])])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        found.append(str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip())
    return found
