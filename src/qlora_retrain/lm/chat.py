"""Chats as text and tokens: one rendering, one mask, used by the data gate, training and scoring alike.

A chat is a list of `{"role": ..., "content": ...}` turns. The answer's tokens are found by prefix difference (the
rendering up to the turn against the rendering through it), because stock templates rarely mark them themselves.
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
class Encoded:
    """A chat as tokens; `supervised[i]` says whether token i is one that the model must learn to produce."""

    input_ids: list[int]
    supervised: list[bool]

    @property
    def supervised_tokens(self) -> int:
        """How many tokens carry a label."""
        return sum(self.supervised)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, offline, without remote code.

    Raises:
        UsageError: If there is none, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"base_model: no tokenizer that can be loaded: {error}") from error
    if not tokenizer.chat_template:
        raise UsageError("base_model: its tokenizer has no chat template; choose an instruction-tuned model or add one")
    if tokenizer.eos_token_id is None:
        raise UsageError("base_model: its tokenizer has no end-of-sequence token, so answers could not end")
    found: PreTrainedTokenizerBase = tokenizer
    return found


def render(tokenizer: PreTrainedTokenizerBase, chat: Chat, *, ask: bool = False) -> str:
    """The chat as the model's template writes it; with `ask`, ending where the assistant begins to speak.

    Raises:
        UsageError: If the template refuses the chat, as some do with a system turn.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        raise UsageError(f"base_model: its chat template refuses this chat: {error}") from error
    assert isinstance(text, str)
    return text


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: Chat, answer: str) -> str:
    """What the template adds to the rendered prompt when the assistant says `answer`.

    Raises:
        UsageError: If the template rewrites earlier turns, so that no mask can be computed.
    """
    asked = render(tokenizer, prompt, ask=True)
    return _grown(render(tokenizer, [*prompt, {"role": "assistant", "content": answer}]), asked)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Chat) -> list[int]:
    """The tokens that a model is given before it answers."""
    return _ids(tokenizer, [render(tokenizer, prompt, ask=True)])[0]


def answer_ids(tokenizer: PreTrainedTokenizerBase, prompt: Chat, answer: str) -> list[int]:
    """The tokens that a model must produce to answer so, its end-of-sequence token included."""
    return _ids(tokenizer, [_ended(tokenizer, answer_text(tokenizer, prompt, answer))])[0]


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the end-of-sequence token, and the special one that the template writes in its place."""
    one, other = (answer_ids(tokenizer, [{"role": "user", "content": "a"}], text) for text in ("a", "b"))
    after = [
        i for i, _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False))
    ]
    special = [i for i in reversed(after) if getattr(tokenizer.added_tokens_decoder.get(i), "special", False)]
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *special[:1]]))


def encode(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Encoded:
    """Tokens and mask of a chat: every assistant turn is supervised, up to its end-of-sequence token.

    Prompt and answer are tokenized apart, as they are when the model generates; nothing follows the last answer.

    Raises:
        UsageError: If the template rewrites earlier turns, so that no mask can be computed.
    """
    return encode_pieces(tokenizer, [pieces(tokenizer, chat)])[0]


def pieces(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[str]:
    """The rendered chat cut where the mask changes: a prompt's text, its answer's, the next prompt's, and so on."""
    found: list[str] = []
    done = ""
    for i, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        asked = render(tokenizer, chat[:i], ask=True)
        answer = _ended(tokenizer, _grown(render(tokenizer, chat[: i + 1]), asked))
        # What the template writes after an answer's end token (often a line break) belongs to the next prompt.
        found += [_grown(asked, done), answer]
        done = asked + answer
    return found


def encode_pieces(tokenizer: PreTrainedTokenizerBase, chats: Sequence[list[str]]) -> list[Encoded]:
    """Many chats' `pieces` as tokens in one call: the tokenizer's start-up costs more than a short text does."""
    tokens = iter(_ids(tokenizer, [piece for found in chats for piece in found]))
    encoded = []
    for found in chats:
        chat = Encoded([], [])
        for i in range(len(found)):
            ids = next(tokens)
            chat.input_ids.extend(ids)
            chat.supervised.extend([i % 2 == 1] * len(ids))
        encoded.append(chat)
    return encoded


def prompt_of(chat: Chat) -> list[Message]:
    """Everything before the last assistant turn."""
    last = max(i for i, turn in enumerate(chat) if turn["role"] == "assistant")
    return list(chat[:last])


def answer_of(chat: Chat) -> str:
    """What the last assistant turn says."""
    return next(turn["content"] for turn in reversed(chat) if turn["role"] == "assistant")


def canonical(chat: Chat) -> str:
    """The text by which two chats count as equal: NFKC, case folded, white space collapsed."""
    turns = (
        f"{t['role']}: {' '.join(unicodedata.normalize('NFKC', t['content']).casefold().split())}"
        for t in chat
        if t["role"] != "system"
    )
    return "\n".join(turns)


def row_id(chat: Chat) -> str:
    """16 hex that name a row by its canonical prompt, the same in every data set."""
    return hashlib.sha256(canonical(prompt_of(chat)).encode()).hexdigest()[:16]


def _grown(text: str, start: str) -> str:
    """What `text` adds to `start`, which it must begin with."""
    if not text.startswith(start):
        raise UsageError(
            "base_model: its chat template changes earlier turns when one is added, so the answer's tokens cannot "
            "be told from the prompt's; use a template whose rendering only grows"
        )
    return text[len(start) :]


def _ended(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """The rendered answer up to its end-of-sequence token; all of it where the template writes none."""
    end = str(tokenizer.eos_token)
    return answer[: answer.rindex(end) + len(end)] if end in answer else answer


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return [[int(i) for i in ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
