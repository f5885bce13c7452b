"""Find the tokens that end a generation, once: everything that trains, generates, serves or exports uses this list.

They are the tokenizer's end-of-sequence token, the tokens of the model's own `generation_config.json`, the line's
`data.stop_tokens`, and the mark that the chat template writes after an answer where its name is one that servers know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm.rendering import Renderer, RowRefused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Names at which servers stop although no configuration lists them: end of turn, of message, of an utterance.
_END_OF_TURN = re.compile(
    r"^\W*("
    r"im_end|end|eot|eot_id|eom|eom_id|"
    r"end.?of.?(turn|message|utterance|response|text)|(assistant|turn|message|role|response).?end"
    r")\W*$|^<turn\|>$",
    re.IGNORECASE,
)
_PROBE = ({"role": "user", "content": "\ue002a"}, {"role": "assistant", "content": "\ue002b"})
_NEXT = {"role": "user", "content": "\ue002c"}


def find_stop_ids(tokenizer: PreTrainedTokenizerBase, renderer: Renderer, folder: Path) -> list[int]:
    """Return the ids that end a generation, the tokenizer's end-of-sequence token first.

    Raises:
        UsageError: If there are none, or a token of `data.stop_tokens` is not in the vocabulary.
        IntegrityError: If the model's generation settings are damaged.
    """
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ids += _configured_ids(folder)
    for text in renderer.chat_format.stop_tokens:
        if (token_id := token_id_of(tokenizer, text)) is None:
            raise UsageError(f"data.stop_tokens: {text!r} is no token of the base model's vocabulary")
        ids.append(token_id)
    if (mark := template_end(tokenizer, renderer)) is not None and is_known_end(mark):
        ids.append(int(tokenizer.convert_tokens_to_ids(mark)))

    # An id beyond the vocabulary is a default of a configuration class that nobody set.
    size = len(tokenizer)
    stop_ids = [i for i in dict.fromkeys(ids) if 0 <= i < size]
    if not stop_ids:
        raise UsageError(
            "base_model: its tokenizer has no end-of-sequence token and generation_config.json names none, so answers "
            "could not end; name the token that ends one in data.stop_tokens"
        )
    return stop_ids


def end_of_sequence(tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str], folder: Path) -> str | None:
    """Return the token that ends a text: the tokenizer's, else the first that the model or the line states."""
    if tokenizer.eos_token is not None:
        return str(tokenizer.eos_token)
    ids = [*_configured_ids(folder), *(token_id_of(tokenizer, text) for text in stop_tokens)]
    token_id = next((i for i in ids if i is not None and 0 <= i < len(tokenizer)), None)
    return None if token_id is None else str(tokenizer.convert_ids_to_tokens(token_id))


def template_end(tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> str | None:
    """Return the added token that the template writes right after an answer, at a chat's end or before a next turn."""
    tokens = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    for chat in (_PROBE, (*_PROBE, _NEXT)):
        try:
            text = renderer.render(chat)
        except RowRefused:
            continue
        tail = text.rpartition(_PROBE[1]["content"])[2].lstrip()
        if mark := max((token for token in tokens if tail.startswith(token)), key=len, default=None):
            return mark
    return None


def is_known_end(token: str) -> bool:
    """Return whether servers stop at a token of this name without being told."""
    return _END_OF_TURN.match(token) is not None


def token_id_of(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Return the id of a token of the vocabulary; None where it has no such token."""
    token_id = tokenizer.get_vocab().get(text)
    return None if token_id is None else int(token_id)


def _configured_ids(folder: Path) -> Iterator[int]:
    """Yield the ids of `generation_config.json`, or of `config.json` where there is no such file."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            value = document.get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise IntegrityError(f"base_model: {name} is damaged: {error}") from error
        yield from (i for i in (value if isinstance(value, list) else [value]) if type(i) is int)
        return
