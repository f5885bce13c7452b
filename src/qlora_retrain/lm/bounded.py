"""Render and tokenize with bounds: a chat template is a program of somebody else, and so is a tokenizer's pattern.

What goes over a bound is an error of the step and not of the row: a slower machine would have refused other rows, and
the same data must give the same data set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.bounds import Bounds, TimeIsUp, Watchdog
from qlora_retrain.core.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of one chat. A long one takes milliseconds, and a few copies of its texts.
RENDER_SECONDS = 20.0
_RENDER_BYTES = 1 << 30
MAX_CHARACTERS = 1 << 25
# Of one call of the tokenizer, for about a thousand rows. They take seconds, and less than a GiB.
TOKENIZE_SECONDS = 900.0
_TOKENIZE_BYTES = 1 << 33
_TEMPLATE_FAULT = "choose another data.template, or another base model"
_TOKENIZER_FAULT = (
    "the tokenizer cannot tokenize a text: a pattern of its tokenizer.json searches too long, or makes the text too "
    "long; mend it there, or choose another base model"
)
_MAX_WORDS = 200


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], **settings: Any) -> str:
    """Return the chat as the template writes it; raise whatever the template raises.

    Raises:
        UsageError: If the template takes too long, too much memory, or writes too much.
    """
    try:
        with Bounds(_RENDER_BYTES, RENDER_SECONDS):
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, **settings)
    except (TimeIsUp, MemoryError) as error:
        raise UsageError(
            f"the chat template needs more than {RENDER_SECONDS:g} s or {_RENDER_BYTES >> 20:,} MiB to render one "
            f"chat; {_TEMPLATE_FAULT}"
        ) from error
    assert isinstance(text, str)
    if len(text) > MAX_CHARACTERS:
        raise UsageError(
            f"the chat template writes {len(text):,} characters for one chat, and {MAX_CHARACTERS:,} are the most; "
            f"{_TEMPLATE_FAULT}"
        )
    return text


@contextlib.contextmanager
def tokenizer_bounds() -> Iterator[None]:
    """Bound what a tokenizer's native code does.

    Raises:
        UsageError: If it gives up. Where it does not come to an end, the process ends with the same reason.
    """
    try:
        with Watchdog(_TOKENIZE_BYTES, TOKENIZE_SECONDS, _TOKENIZER_FAULT):
            yield
    except BaseException as error:
        # Rust's panic is no Exception; a regular expression that searches too long ends so.
        if type(error).__name__ != "PanicException":
            raise
        raise UsageError(f"{_TOKENIZER_FAULT} ({' '.join(str(error).split())[:_MAX_WORDS]})") from error


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Return the tokens of each text; raise as `tokenizer_bounds` does."""
    # A tokenizer refuses an empty batch.
    if not texts:
        return []
    with tokenizer_bounds():
        batch = tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    return [[int(i) for i in ids] for ids in batch]
