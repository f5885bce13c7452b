"""Render and tokenize chats, with one template and one loss mask for the data gate, training, scoring and generation.

Command: none; `load_tokenizer` gives the `ChatTokenizer` that every step uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.lm import bounded, declared_size
from qlora_retrain.lm.answers import Answer, cut_answer
from qlora_retrain.lm.chat_format import ChatFormat
from qlora_retrain.lm.content_spans import Chat as Chat
from qlora_retrain.lm.content_spans import Message as Message
from qlora_retrain.lm.example_tokens import EncodedChat as EncodedChat
from qlora_retrain.lm.example_tokens import Example, ExampleTokenizer, decode
from qlora_retrain.lm.named_templates import choose_template, missing_marks, older_template
from qlora_retrain.lm.rendering import Renderer, Tools
from qlora_retrain.lm.rendering import RowRefused as RowRefused
from qlora_retrain.lm.stop_tokens import end_of_sequence, find_stop_ids
from qlora_retrain.lm.tool_calls import fit_calls
from qlora_retrain.lm.turn_marks import TurnMarks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")
Row = tuple[Chat, Tools]


class ChatTokenizer:
    """A model's tokenizer with the line's chat format.

    Attributes:
        tokenizer: The model's, from transformers; its `chat_template` is the one in use.
        chat_format: The settings of chats.
        stop_ids: The tokens that end a generation, the one that is appended first.
        notes: Sentences about the template in use that a person should read.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat, folder: Path, notes: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.chat_format, self.notes = tokenizer, chat_format, tuple(notes)
        self._renderer = Renderer(tokenizer, chat_format)
        self.stop_ids = find_stop_ids(tokenizer, self._renderer, folder)
        self._stops = [str(tokenizer.convert_ids_to_tokens(i)) for i in self.stop_ids]
        self._example_tokenizer = ExampleTokenizer(tokenizer, dict(zip(self._stops, self.stop_ids, strict=True)))
        # Reasoning may follow an answer's mark, and a call is no end.
        self._added_tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]

    @property
    def pad_token_id(self) -> int:
        """A token for padding; any will do, since an attention mask hides it."""
        token_id = self.tokenizer.pad_token_id
        return self.stop_ids[0] if token_id is None else int(token_id)

    def encode(self, chat: Chat, tools: Tools = None) -> list[EncodedChat]:
        """Tokenize a chat and mask it: every assistant turn is supervised, up to the token that ends it.

        Returns:
            One example; or, where the template writes an earlier answer in another way than it was generated, one
            example for each assistant turn. No token is supervised twice.

        Raises:
            RowRefused: If the template does not carry the chat.
        """
        return self._example_tokenizer.encode([self._examples(chat, tools)])[0]

    def encode_many(self, rows: Sequence[Row], max_tokens: int | None = None) -> list[list[EncodedChat] | RowRefused]:
        """Tokenize many chats in one call, which costs less than one by one; a refused row has its refusal.

        Args:
            rows: The chats, each with its tools.
            max_tokens: A row that is many times as long is refused (`too_long`), since tokenizing it takes a thousand
                times the memory of its text; None: no row is.
        """
        examples: list[list[Example] | RowRefused] = []
        for chat, tools in rows:
            try:
                row_examples = self._examples(chat, tools)
                if max_tokens is not None:
                    self._refuse_far_longer(row_examples, max_tokens)
                examples.append(row_examples)
            except RowRefused as refusal:
                examples.append(refusal)

        encoded = iter(self._example_tokenizer.encode([e for e in examples if not isinstance(e, RowRefused)]))
        return [e if isinstance(e, RowRefused) else next(encoded) for e in examples]

    def _refuse_far_longer(self, examples: Sequence[Example], max_tokens: int) -> None:
        text = max((example.text for example in examples), key=len, default="")
        if self._example_tokenizer.is_far_longer(text, max_tokens):
            num_tokens = self._example_tokenizer.estimate_length(text)
            raise RowRefused("too_long", f"about {num_tokens:,} tokens", num_tokens)

    def prompt_ids(self, prompt: Chat, tools: Tools = None, answer: Message | str | None = None) -> list[int]:
        """Return the tokens that the model reads before it answers.

        Args:
            prompt: The turns before the answer.
            tools: What may be called.
            answer: The row's own answer, if it has one; a prompt may end otherwise before another kind of answer.
        """
        if answer is None and self.chat_format.answer_start == "history":
            answer = "a"
        if answer is None:
            return bounded.tokenize(self.tokenizer, [self.render(prompt, tools, add_generation_prompt=True)])[0]
        return self.split(prompt, answer, tools)[0]

    def answer_ids(self, prompt: Chat, answer: Message | str, tools: Tools = None) -> list[int]:
        """Return the tokens that the model must produce for this answer, the one that ends it included."""
        return self.split(prompt, answer, tools)[1]

    def render(self, chat: Chat, tools: Tools = None, *, add_generation_prompt: bool = False) -> str:
        """Return the chat as the template writes it.

        Raises:
            RowRefused: If the template raises.
        """
        chat = fit_calls(self._renderer, chat, tools)
        return self._renderer.render(chat, tools, add_generation_prompt=add_generation_prompt)

    def find_mark(self, text: str, role: str = "user") -> str | None:
        """Return a mark in the text with which the template begins or ends turns; None where there is none."""
        return self.marks.find(text, role)

    @property
    def stop_texts(self) -> list[str]:
        """The tokens of `stop_ids` as text."""
        return list(self._stops)

    @cached_property
    def marks(self) -> TurnMarks:
        """The marks of turns, learnt from the template."""
        return TurnMarks(self.tokenizer, self._renderer)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the tokens as text, with no white space cleaned away."""
        return decode(self.tokenizer, ids, skip_special_tokens=skip_special_tokens)

    def _examples(self, chat: Chat, tools: Tools) -> list[Example]:
        turns = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
        if not turns:
            raise RowRefused("no_assistant_turn", "there is no assistant turn")
        warnings = ("turns_after_the_last_answer",) if turns[-1] != len(chat) - 1 else ()
        chat = fit_calls(self._renderer, chat[: turns[-1] + 1], tools)
        answers = [
            cut_answer(self._renderer, chat[: i + 1], tools, self._stops, self._added_tokens, chat[i + 1 : i + 2])
            for i in turns
        ]
        supervised = [chat[i].get("weight", 1) != 0 for i in turns]
        warnings = tuple(dict.fromkeys([*warnings, *(code for answer in answers for code in answer.warnings)]))

        # One example, where the whole chat has every answer as the model would generate it.
        if _grows(answers):
            spans = tuple(
                (a.start, len(a.with_end) if a is not answers[-1] else len(a.text))
                for a, is_supervised in zip(answers, supervised, strict=True)
                if is_supervised
            )
            appended = answers[-1].appended if supervised[-1] else None
            return [Example(answers[-1].text, spans, appended, warnings, answers[-1].spaces)]
        return [
            Example(a.text, ((a.start, len(a.text)),), a.appended, warnings, a.spaces)
            for a, is_supervised in zip(answers, supervised, strict=True)
            if is_supervised
        ]

    def split(self, prompt: Chat, answer: Message | str, tools: Tools = None) -> tuple[list[int], list[int]]:
        """Return `prompt_ids` and `answer_ids` of a row, which costs half of asking for each."""
        turn = {"role": "assistant", "content": answer} if isinstance(answer, str) else {**answer, "weight": 1}
        chat = fit_calls(self._renderer, [*prompt, turn], tools)
        cut = cut_answer(self._renderer, chat, tools, self._stops, self._added_tokens, ())
        example = Example(cut.text, ((cut.start, len(cut.text)),), cut.appended, ())
        encoded = self._example_tokenizer.encode([[example]])[0][0]
        num_prompt = encoded.supervised.index(True) if True in encoded.supervised else len(encoded.input_ids)
        return encoded.input_ids[:num_prompt], encoded.input_ids[num_prompt:]


def load_tokenizer(folder: Path, chat_format: ChatFormat | None = None) -> ChatTokenizer:
    """Load the tokenizer of a model folder with the line's chat format, offline and without remote code.

    Args:
        folder: The model's.
        chat_format: The line's; None: the one that the folder states, as a published version does.

    Raises:
        UsageError: If there is none, or it has no chat template and the line names none, or no answer could end.
    """
    from transformers import AutoTokenizer

    chat_format = ChatFormat.from_folder(folder) if chat_format is None else chat_format
    try:
        # transformers reads config.json first, whatever it declares.
        with contextlib.suppress(OSError, ValueError):
            declared_size.read_config(folder, "base_model")
        with bounded.tokenizer_bounds():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Problem:
        raise
    # The native library raises a plain Exception for a pattern that it cannot read.
    except Exception as error:
        raise UsageError(f"base_model: no tokenizer that can be loaded: {str(error)[:1000]}") from error
    bounded.refuse_unusable(tokenizer)
    tokenizer.eos_token = end_of_sequence(tokenizer, chat_format.stop_tokens, folder)
    tokenizer.chat_template = tokenizer.chat_template or older_template(folder)
    tokenizer.chat_template = choose_template(tokenizer, chat_format.template)
    return ChatTokenizer(tokenizer, chat_format, folder, missing_marks(chat_format.template, tokenizer))


def _grows(answers: Sequence[Answer]) -> bool:
    """Return whether the whole chat contains every earlier answer as it was generated."""
    whole = answers[-1]
    return all(
        whole.text.startswith(a.with_end) and (a.appended is None or a.continues) and len(a.with_end) <= whole.start
        for a in answers[:-1]
    )
