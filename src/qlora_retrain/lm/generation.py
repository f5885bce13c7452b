"""Generate greedy answers to many prompts, in batches of similar length, with a key-value cache.

The decoding is transformers' `generate`. Prompts are padded on the left, so that all answers of a batch begin at the
same position. A batch holds as many rows as fit into the token budget with its longest prompt and the longest allowed
answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_retrain.core import progress
from qlora_retrain.lm import chat, forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_tokens: int,
) -> list[str]:
    """Return the model's greedy answer to every prompt, without special tokens and outer white space.

    Args:
        model: In evaluation mode.
        tokenizer: The model's own; an answer ends where its template ends one.
        prompts: Tokens up to where the answer begins.
        max_new_tokens: A longer answer is cut after this many tokens.
        batch_tokens: The tokens of a batch, generated ones included; a longer row forms a batch of its own.
    """
    import torch
    from transformers import GenerationConfig

    # Every setting is given, because a model's own generation_config.json may ask for sampling or penalties.
    generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        eos_token_id=chat.stop_token_ids(tokenizer),
        pad_token_id=tokenizer.eos_token_id,
    )

    device = model.get_input_embeddings().weight.device
    answers = [""] * len(prompts)
    num_done = 0
    for batch in forward.length_grouped_batches([len(prompt) + max_new_tokens for prompt in prompts], batch_tokens):
        # The longest prompt is the first of its batch, and sets the width.
        width = len(prompts[batch[0]])
        ids = torch.full((len(batch), width), tokenizer.eos_token_id, dtype=torch.long)  # (B, T)
        attention_mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            attention_mask[row, width - len(prompts[i]) :] = 1

        with torch.inference_mode():
            output_ids = model.generate(
                input_ids=ids.to(device), attention_mask=attention_mask.to(device), generation_config=generation_config
            )
        for i, answer in zip(batch, output_ids[:, width:].tolist(), strict=True):
            answers[i] = tokenizer.decode(answer, skip_special_tokens=True).strip()
        num_done += len(batch)
        progress.update("generating answers", num_done, len(prompts))
    return answers
