"""Tokenize rendered chats, and mark the tokens that a model must learn to produce.

Whole texts are tokenized, since what stands beside a border may change how both sides of it are cut into tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from qlora_retrain.lm import bounded
from qlora_retrain.lm.answers import common_length

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

_PART_CHARACTERS = 1 << 16


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A tokenized chat; `supervised[i]` says whether the model must learn to produce token i.

    Attributes:
        warnings: Codes of what the template or the tokenizer did to the row, e.g. `trimmed_ends`.
    """

    input_ids: list[int]
    supervised: list[bool]
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def supervised_tokens(self) -> int:
        """Return how many tokens carry a label."""
        return sum(self.supervised)


@dataclass(frozen=True, slots=True)
class Example:
    """The text of one example, and where its supervised parts begin and end, in characters."""

    text: str
    answers: tuple[tuple[int, int], ...]
    appended: str | None
    warnings: tuple[str, ...]
    spaces: tuple[tuple[int, int], ...] = ()


class ExampleTokenizer:
    """Tokenize examples with one tokenizer.

    Args:
        tokenizer: The model's.
        stop_ids: The tokens that end a generation, by their text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Mapping[str, int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids

    def encode(self, rows: Sequence[Sequence[Example]]) -> list[list[EncodedChat]]:
        """Tokenize whole texts, and find the tokens at which the mask changes."""
        examples = [example for examples in rows for example in examples]
        encodings = bounded.encode(self._tokenizer, [example.text for example in examples])
        positions = [
            {border: _token_at(encoding, border) for border in _borders(example)}
            for example, (_, encoding) in zip(examples, encodings, strict=True)
        ]

        # Where no token begins at a border, the text in front of it is tokenized apart.
        unclear = [(i, border) for i, places in enumerate(positions) for border in places if places[border] is None]
        beginnings = bounded.tokenize(self._tokenizer, [examples[i].text[:border] for i, border in unclear])
        for (i, border), beginning in zip(unclear, beginnings, strict=True):
            positions[i][border] = self._border_position(encodings[i][0], beginning)

        encoded = iter(
            self._masked(example, ids, borders)
            for example, (ids, _), borders in zip(examples, encodings, positions, strict=True)
        )
        return [[next(encoded) for _ in examples] for examples in rows]

    def is_far_longer(self, text: str, max_tokens: int) -> bool:
        """Return whether a text has more tokens than this, however few of them it may have."""
        # Normal forms of a text may be shorter than the text.
        return len(text) > 4 * max_tokens * self._longest_token

    def estimate_length(self, text: str) -> int:
        """Return about how many tokens a long text has, rather too many; it is cut in parts."""
        parts = range(0, len(text), _PART_CHARACTERS)
        return sum(len(bounded.tokenize(self._tokenizer, [text[i : i + _PART_CHARACTERS]])[0]) for i in parts)

    @cached_property
    def _longest_token(self) -> int:
        """The characters of the longest token, at most."""
        return max(map(len, self._tokenizer.get_vocab()))

    def _masked(self, example: Example, ids: list[int], borders: Mapping[int, int | None]) -> EncodedChat:
        positions = {0: 0, **borders, len(example.text): len(ids)}
        mask = [False] * len(ids)
        for start, end in example.answers:
            first, last = positions[start] or 0, positions[end] or 0
            mask[first:last] = [True] * (last - first)
        if example.appended is not None:
            ids = [*ids, self._stop_ids[example.appended]]
            mask.append(True)
        warnings = example.warnings
        if self._greedy_marks and any(self._is_taken(example.text, place) for place in example.spaces):
            warnings = tuple(dict.fromkeys([*warnings, "trimmed_ends"]))
        return EncodedChat(ids, mask, warnings)

    def _border_position(self, ids: list[int], beginning: list[int]) -> int:
        """Return how many tokens of a text lie in its beginning, which was tokenized apart.

        A token that spans the border belongs to what follows, since nothing of an answer may be lost.
        """
        start = position = common_length(ids, beginning)
        # What follows may change how the beginning's last characters are cut.
        tail = decode(self._tokenizer, beginning[start:])
        while tail and position < len(ids) and tail.startswith(decode(self._tokenizer, ids[start : position + 1])):
            position += 1
        return position

    def _is_taken(self, text: str, place: tuple[int, int]) -> bool:
        """Return whether white space at the end of a content makes no difference to the tokens."""
        shorter = text[: place[0]] + text[place[1] :]
        tokens, tokens_of_shorter = bounded.tokenize(self._tokenizer, [text, shorter])
        return tokens == tokens_of_shorter

    @cached_property
    def _greedy_marks(self) -> bool:
        """Whether marks take the white space beside them, as Phi-4's do."""
        return any(token.lstrip or token.rstrip for token in self._tokenizer.added_tokens_decoder.values())


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """Return the tokens as text, with no white space cleaned away."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))


def _token_at(encoding: Encoding | None, border: int) -> int | None:
    """Return the token that begins at a character; None where none does, since one spans it or it has no token."""
    if encoding is None:
        return None
    token = encoding.char_to_token(border)
    span = None if token is None else encoding.token_to_chars(token)
    return token if span is not None and span[0] == border else None


def _borders(example: Example) -> list[int]:
    """Return the characters at which the mask changes, other than the text's own ends."""
    borders = {border for span in example.answers for border in span}
    return sorted(border for border in borders if 0 < border < len(example.text))
