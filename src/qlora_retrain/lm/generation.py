"""Generate greedy answers to many prompts, in batches of similar length, with a key-value cache.

The decoding is transformers' `generate`. Prompts are padded on the left, so that all answers of a batch begin at the
same position. A batch holds as many rows as fit into the token budget with its longest prompt and the longest allowed
answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_retrain.core import progress
from qlora_retrain.lm import forward
from qlora_retrain.lm.chat import ChatTokenizer
from qlora_retrain.lm.virtual_tokens import prefix_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Completion:
    """A generated answer.

    Attributes:
        ids: The generated tokens; the last one is the token that ended the answer, where one did.
        text: The answer without special tokens and outer white space.
        marked_text: The same with the special tokens, such as the marks around a tool call.
        ended: Whether the model ended the answer itself; otherwise it was cut at the limit of new tokens.
    """

    ids: tuple[int, ...]
    text: str
    marked_text: str
    ended: bool

    @classmethod
    def from_ids(cls, ids: Sequence[int], tokenizer: ChatTokenizer) -> Completion:
        """Take the tokens up to the first one at which generation stops; after it there is only padding."""
        stop = next((i for i, token in enumerate(ids) if token in tokenizer.stop_ids), None)
        content = ids if stop is None else ids[:stop]
        return cls(
            ids=tuple(ids if stop is None else ids[: stop + 1]),
            text=tokenizer.decode(content, skip_special_tokens=True).strip(),
            marked_text=tokenizer.decode(content).strip(),
            ended=stop is not None,
        )


def generate_answers(
    model: PreTrainedModel,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_tokens: int,
    *,
    description: str = "generating answers",
) -> list[Completion]:
    """Return the model's greedy answer to every prompt.

    Args:
        model: In evaluation mode.
        tokenizer: The model's own; an answer ends at any of its `stop_ids`.
        prompts: Tokens up to where the answer begins.
        max_new_tokens: A longer answer is cut after this many tokens.
        batch_tokens: The tokens of a batch, generated ones included; a longer row forms a batch of its own.
        description: The name of the work in the progress line.
    """
    completions: dict[int, Completion] = {}
    for batch in forward.length_grouped_batches([len(prompt) + max_new_tokens for prompt in prompts], batch_tokens):
        answers = generate_batch(model, tokenizer, [prompts[i] for i in batch], max_new_tokens)
        completions |= dict(zip(batch, answers, strict=True))
        progress.update(description, len(completions), len(prompts))
    return [completions[i] for i in range(len(prompts))]


def generate_batch(
    model: PreTrainedModel, tokenizer: ChatTokenizer, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[Completion]:
    """Return the greedy answers to the prompts of one batch."""
    import torch
    from transformers import GenerationConfig

    # A row that asks nothing, a text alone, begins after the end of another text.
    prompts = [[*prefix_ids(model), *(prompt or tokenizer.stop_ids[:1])] for prompt in prompts]
    pad_token_id = tokenizer.pad_token_id
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
        eos_token_id=tokenizer.stop_ids,
        pad_token_id=pad_token_id,
    )

    device = model.get_input_embeddings().weight.device
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)  # (B, T)
    attention_mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1

    with torch.inference_mode():
        output_ids = model.generate(
            input_ids=ids.to(device), attention_mask=attention_mask.to(device), generation_config=generation_config
        )
    return [Completion.from_ids(answer, tokenizer) for answer in output_ids[:, width:].tolist()]
