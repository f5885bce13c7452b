"""Render and tokenize chats, with one template and one loss mask for the data gate, training and scoring.

A chat is a list of `{"role": ..., "content": ...}` turns. Few chat templates mark the answer's tokens. So they are
found by difference: the rendering up to a turn is compared with the rendering that includes it.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Chat = Sequence[Message]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A tokenized chat; `supervised[i]` says whether the model must learn to produce token i."""

    input_ids: list[int]
    supervised: list[bool]

    @property
    def supervised_tokens(self) -> int:
        """Return how many tokens carry a label."""
        return sum(self.supervised)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, offline and without remote code.

    Raises:
        UsageError: If there is none, or it has no chat template or no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"base_model: no tokenizer that can be loaded: {error}") from error

    # Refused here, before data is read or time on a GPU is paid for.
    if not tokenizer.chat_template:
        raise UsageError(
            "base_model: its tokenizer has no chat template; choose an instruction-tuned model, or add a template"
        )
    if tokenizer.eos_token_id is None:
        raise UsageError("base_model: its tokenizer has no end-of-sequence token, so answers could not end")
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def render(tokenizer: PreTrainedTokenizerBase, chat: Chat, *, add_generation_prompt: bool = False) -> str:
    """Render the chat by the model's template.

    Args:
        tokenizer: With a chat template.
        chat: The turns.
        add_generation_prompt: Whether the text ends where the assistant's next turn begins, as in transformers.

    Raises:
        UsageError: If the template refuses the chat, as some do with a system turn.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise UsageError(f"base_model: its chat template refuses this chat: {error}") from error
    assert isinstance(text, str)
    return text


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: Chat, answer: str) -> str:
    """Return what the template adds to the rendered prompt when the assistant answers `answer`.

    Raises:
        UsageError: If the template rewrites earlier turns, so that no mask can be computed.
    """
    rendered_prompt = render(tokenizer, prompt, add_generation_prompt=True)
    return _added_text(render(tokenizer, [*prompt, {"role": "assistant", "content": answer}]), rendered_prompt)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Chat) -> list[int]:
    """Return the tokens that the model reads before it answers."""
    return _tokenize(tokenizer, [render(tokenizer, prompt, add_generation_prompt=True)])[0]


def answer_ids(tokenizer: PreTrainedTokenizerBase, prompt: Chat, answer: str) -> list[int]:
    """Return the tokens that the model must produce for this answer, its end-of-sequence token included."""
    return _tokenize(tokenizer, [_until_eos(tokenizer, answer_text(tokenizer, prompt, answer))])[0]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer.

    These are the end-of-sequence token and the special token that the template writes in its place, if there is one.
    """
    # Two different answers of one character: the ending that both renderings share comes from the template.
    first, second = (answer_ids(tokenizer, [{"role": "user", "content": "a"}], text) for text in ("a", "b"))
    reversed_suffix = [
        i for i, _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(first), reversed(second), strict=False))
    ]

    # Only a special token ends an answer, since a plain one, such as a full stop, may also occur inside it.
    special = [i for i in reversed(reversed_suffix) if getattr(tokenizer.added_tokens_decoder.get(i), "special", False)]
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *special[:1]]))


def encode(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> EncodedChat:
    """Tokenize a chat and mask it: every assistant turn is supervised, up to its end-of-sequence token.

    Prompt and answer are tokenized apart, as they are when the model generates. Nothing follows the last answer.

    Raises:
        UsageError: If the template rewrites earlier turns, so that no mask can be computed.
    """
    return encode_segments(tokenizer, [segments(tokenizer, chat)])[0]


def segments(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[str]:
    """Cut the rendered chat where the mask changes: prompt, answer, next prompt, next answer, and so on."""
    texts: list[str] = []
    previous_text = ""
    for i, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        rendered_prompt = render(tokenizer, chat[:i], add_generation_prompt=True)
        answer = _until_eos(tokenizer, _added_text(render(tokenizer, chat[: i + 1]), rendered_prompt))

        # The text after an answer's end token, often a line break, belongs to the next prompt.
        texts += [_added_text(rendered_prompt, previous_text), answer]
        previous_text = rendered_prompt + answer
    return texts


def encode_segments(tokenizer: PreTrainedTokenizerBase, chats: Sequence[list[str]]) -> list[EncodedChat]:
    """Tokenize the `segments` of many chats in one call."""
    # One call for all chats, since a call costs more than tokenizing a short text.
    token_ids = iter(_tokenize(tokenizer, [segment for texts in chats for segment in texts]))

    encoded = []
    for texts in chats:
        chat = EncodedChat([], [])
        # Segments alternate between prompt and answer, so the odd ones are supervised.
        for i in range(len(texts)):
            ids = next(token_ids)
            chat.input_ids.extend(ids)
            chat.supervised.extend([i % 2 == 1] * len(ids))
        encoded.append(chat)
    return encoded


def prompt_of(chat: Chat) -> list[Message]:
    """Return everything before the last assistant turn."""
    # Turns after the last answer are left out too, since no answer follows them.
    last = max(i for i, turn in enumerate(chat) if turn["role"] == "assistant")
    return list(chat[:last])


def answer_of(chat: Chat) -> str:
    """Return the content of the last assistant turn."""
    return next(turn["content"] for turn in reversed(chat) if turn["role"] == "assistant")


def normalized_text(chat: Chat) -> str:
    """Return the text by which two chats count as equal: NFKC, case folded, white space collapsed.

    System turns are left out, so the same question under another instruction counts as the same question.
    """
    turns = (
        f"{t['role']}: {' '.join(unicodedata.normalize('NFKC', t['content']).casefold().split())}"
        for t in chat
        if t["role"] != "system"
    )
    return "\n".join(turns)


def row_id(chat: Chat) -> str:
    """Return 16 hex digits that name a row by its normalized prompt; they are the same in every data set."""
    return hashlib.sha256(normalized_text(prompt_of(chat)).encode()).hexdigest()[:16]


def _added_text(text: str, prefix: str) -> str:
    """Return what `text` adds to `prefix`, which it must begin with."""
    if not text.startswith(prefix):
        raise UsageError(
            "base_model: its chat template changes earlier turns when one is added, so the answer's tokens cannot "
            "be told from the prompt's; use a template that only appends text when a turn is added"
        )
    return text[len(prefix) :]


def _until_eos(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """Cut the rendered answer after its end-of-sequence token; return all of it where the template writes none."""
    end = str(tokenizer.eos_token)
    return answer[: answer.rindex(end) + len(end)] if end in answer else answer


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # A tokenizer refuses an empty batch.
    if not texts:
        return []

    # The template has already written all special tokens. A BOS before every segment would break the chat.
    return [[int(i) for i in ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
