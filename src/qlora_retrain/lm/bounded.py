"""Render and tokenize with bounds: a chat template is a program of somebody else, and so is a tokenizer's pattern.

What goes over a bound is an error of the step and not of the row: a slower machine would have refused other rows, and
the same data must give the same data set.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.bounds import Bounds, TimeIsUp, Watchdog
from qlora_retrain.core.errors import Problem, UsageError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

# Of one chat. A long one takes milliseconds, and a few copies of its texts.
RENDER_SECONDS = 10.0
# Of all calls of a process, and for each: one that needs just less than it may, for every chat, would take days.
_FREE_SECONDS, _MEAN_SECONDS = 60.0, 0.1
_RENDER_BYTES = 1 << 30
MAX_CHARACTERS = 1 << 25
# Of one call of the tokenizer, and for each character of its texts: a slow one takes 5 us and 400 bytes.
TOKENIZE_SECONDS, _CHARACTER_SECONDS = 60.0, 50e-6
_TOKENIZE_BYTES, _CHARACTER_BYTES = 1 << 31, 512
_TEMPLATE_FAULT = "choose another data.template, or another base model"
_TOKENIZER_FAULT = (
    "the tokenizer cannot tokenize a text: a pattern of its tokenizer.json searches too long, or makes the text too "
    "long, or another entry is wrong; mend it there, or choose another base model"
)
_MAX_WORDS = 200
MAX_ADDED_CHARACTERS = 1 << 20  # of all added tokens; patterns are made of them


@dataclass
class _Budget:
    """What the calls of this process may take altogether, since each may need just less than one may take."""

    label: str
    advice: str
    number: int = 0
    seconds: float = 0.0
    allowed: float = 0.0

    def count(self, seconds: float, allowed: float = 0.0) -> None:
        """Count a call and what it may take beyond the mean; raise `UsageError` where all take too long."""
        self.number += 1
        self.seconds += seconds
        self.allowed += allowed + _MEAN_SECONDS
        if self.seconds > _FREE_SECONDS + self.allowed:
            raise UsageError(
                f"the {self.label} took {self.seconds:,.0f} s for {self.number:,} calls, and {_MEAN_SECONDS:g} s for "
                f"each are the most; {self.advice}"
            )


_rendering = _Budget("chat template", _TEMPLATE_FAULT)
_tokenizing = _Budget("tokenizer", "look at its tokenizer.json, or choose another base model")


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], **settings: Any) -> str:
    """Return the chat as the template writes it; raise whatever the template raises.

    Raises:
        UsageError: If the template takes too long, too much memory, or writes too much.
    """
    began = time.thread_time()
    try:
        with Bounds(_RENDER_BYTES, RENDER_SECONDS):
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, **settings)
    except (TimeIsUp, MemoryError) as error:
        raise UsageError(
            f"the chat template needs more than {RENDER_SECONDS:g} s or {_RENDER_BYTES >> 20:,} MiB to render one "
            f"chat; {_TEMPLATE_FAULT}"
        ) from error
    finally:
        _rendering.count(time.thread_time() - began)
    assert isinstance(text, str)
    if len(text) > MAX_CHARACTERS:
        raise UsageError(
            f"the chat template writes {len(text):,} characters for one chat, and {MAX_CHARACTERS:,} are the most; "
            f"{_TEMPLATE_FAULT}"
        )
    return text


@contextlib.contextmanager
def tokenizer_bounds(num_characters: int = 0) -> Iterator[None]:
    """Bound what a tokenizer's native code does with a text of so many characters.

    Raises:
        UsageError: If it gives up. Where it does not come to an end, the process ends with the same reason.
    """
    began = time.process_time()
    try:
        seconds = TOKENIZE_SECONDS + num_characters * _CHARACTER_SECONDS
        with Watchdog(_TOKENIZE_BYTES + num_characters * _CHARACTER_BYTES, seconds, _TOKENIZER_FAULT):
            yield
        _tokenizing.count(time.process_time() - began, num_characters * _CHARACTER_SECONDS)
    except BaseException as error:
        # Rust's panic is no Exception; a regular expression that searches too long ends so.
        if type(error).__name__ != "PanicException":
            raise
        raise UsageError(f"{_TOKENIZER_FAULT} ({_words(error)})") from error


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:_MAX_WORDS]


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool = False
) -> list[tuple[list[int], Encoding | None]]:
    """Return the tokens of each text, and their places in it where the tokenizer says them (a fast one does).

    Raises:
        UsageError: As `tokenizer_bounds` does, and where the tokenizer fails on a text.
    """
    # A tokenizer refuses an empty batch.
    if not texts:
        return []
    try:
        with tokenizer_bounds(sum(map(len, texts))):
            batch = tokenizer(texts, add_special_tokens=add_special_tokens)
    except (Problem, MemoryError):
        raise
    # The native library raises a plain Exception, e.g. where an unknown word has no token.
    except Exception as error:
        raise UsageError(f"{_TOKENIZER_FAULT} ({_words(error)})") from error
    token_ids: list[list[int]] = batch["input_ids"]
    return list(zip(token_ids, batch.encodings or [None] * len(texts), strict=True))


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Return the tokens of each text; raise as `tokenizer_bounds` does."""
    return [ids for ids, _ in encode(tokenizer, texts, add_special_tokens=add_special_tokens)]


def refuse_unusable(tokenizer: Any) -> None:
    """Raise `UsageError` for a tokenizer of several parts, or one of other settings than a model's has."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not isinstance(tokenizer.model_max_length, int | float):
        raise UsageError(
            f"base_model: its tokenizer is a {type(tokenizer).__name__} that is none of a language model: look at "
            "tokenizer_class and model_max_length in tokenizer_config.json, or choose another base model"
        )
    num_characters = sum(len(token.content) for token in tokenizer.added_tokens_decoder.values())
    if num_characters > MAX_ADDED_CHARACTERS:
        raise UsageError(f"base_model: {too_long_tokens(num_characters)}")


def too_long_tokens(num_characters: int) -> str:
    """Return what is wrong with added tokens of so many characters."""
    return (
        f"its added tokens have {num_characters:,} characters, and {MAX_ADDED_CHARACTERS:,} are the most; no model "
        "needs so many: choose another one"
    )
