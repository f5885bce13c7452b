"""What a model writes: greedy answers, many prompts a pass, of like length together, with a key-value cache.

The decoding is transformers' `generate`. Prompts are padded on the left, so that all answers of a batch begin at once;
a batch holds as many rows as its longest prompt and the longest answer allow within the token budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_retrain.core import progress
from qlora_retrain.lm import chat, forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_tokens: int,
) -> list[str]:
    """The model's greedy answer to every prompt, without special tokens and outer white space.

    Args:
        model: In evaluation mode.
        tokenizer: The model's own; an answer ends where its template ends one.
        prompts: Tokens up to where the answer begins.
        max_new_tokens: An answer that is not ended by then is cut.
        batch_tokens: Tokens of a batch, those to be written included; a longer row goes alone.
    """
    import torch
    from transformers import GenerationConfig

    # All of it set here, because a model's own generation_config.json may ask for sampling or penalties.
    how = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        eos_token_id=chat.end_ids(tokenizer),
        pad_token_id=tokenizer.eos_token_id,
    )
    device = model.get_input_embeddings().weight.device
    found = [""] * len(prompts)
    done = 0
    for batch in forward.batches([len(prompt) + max_new_tokens for prompt in prompts], batch_tokens):
        width = len(prompts[batch[0]])
        ids = torch.full((len(batch), width), tokenizer.eos_token_id, dtype=torch.long)
        seen = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            seen[row, width - len(prompts[i]) :] = 1
        with torch.inference_mode():
            out = model.generate(input_ids=ids.to(device), attention_mask=seen.to(device), generation_config=how)
        for i, answer in zip(batch, out[:, width:].tolist(), strict=True):
            found[i] = tokenizer.decode(answer, skip_special_tokens=True).strip()
        done += len(batch)
        progress.update("writing answers", done, len(prompts))
    return found
