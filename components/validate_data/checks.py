"""Check the rows' chats, and name each fault of a row by a reason code.

A chat is a list of turns with a role (system, user, assistant, tool) and a content; at least one is the assistant's.
Their order is free as far as the chat template renders it whole. Rows are quarantined, never repaired or truncated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from components.validate_data.raw_rows import RawRow
from components.validate_data.text_file import TextFile
from qlora_retrain.config.data import DataConfig
from qlora_retrain.lm import chat, conversations

# What the checks in `data.checks` look for in the texts of a row, by name.
LOOKED_FOR = {
    "private_keys": "a private key in PEM form",
    "access_keys": "a key or token in the form of a provider, e.g. AKIA..., ghp_..., sk_live_...",
    "passwords": "a password or key behind its name, e.g. password=..., or in a URL",
    "card_numbers": "the number of a payment card (Luhn's check digit)",
    "ibans": "the number of a bank account (IBAN, by its check digits)",
    "social_security_numbers": "a US social security number, e.g. 536-90-4399",
    "emails": "an e-mail address",
    "phone_numbers": "a phone number",
    "ip_addresses": "the IP address of a machine",
    "replacement_characters": "U+FFFD, which stands for bytes that could not be read",
    "mojibake": "text read in a wrong encoding, e.g. Ã© for é",
    "control_characters": "control characters, such as NUL or an escape",
    "bidi_characters": "characters that reverse the direction in which text is shown",
    "invisible_tags": "tag characters and long runs of variation selectors, which nobody sees and models read",
    "no_visible_text": "a turn that only has characters that nobody sees",
    "prompt_injection": "a phrase that orders a model to ignore its instructions",
    "other_languages": "text in a language that fewer than one row in a hundred has",
    "repeated_headers": "the names of its fields, as where CSV files with a header each were joined",
    "label_errors": "a label that is probably wrong, by a classifier that has not seen the row",
    "misspelt_labels": "a label that differs from a more frequent one by case, punctuation or one letter",
    "personal_labels": "a label that looks like an e-mail address or a person's name",
    "unknown_golden_labels": "a golden label that is nowhere in the data",
    "near_evaluation": "nearly the words of an evaluation or golden row, so training on it would give the answer away",
    "near_duplicates": "nearly the words and the answer of another training row",
}
# The clause of a message for each reason; {field} and {limit} are filled in. What was found follows in brackets.
REASONS = {
    # The record, as its file states it.
    "not_an_object": "the row is no object with fields",
    "bad_json_line": "the line is not JSON; expected one whole object",
    "duplicate_key": "the line gives two values to one name, and the first would be lost",
    "ragged_row": "the row has more or fewer fields than the header; quote fields that hold commas or line breaks",
    "not_kept": "the row does not have the values that data.keep names",
    # The chat that its fields should hold.
    "missing_field": "{field}: a value is missing",
    "bad_json": "{field} holds text that is not JSON; expected a list of turns",
    "not_a_list": "{field} is not a list of turns",
    "not_a_turn": "{field} holds something else than a turn; expected an object with a role and a content",
    "extra_field": "{field} has a turn with a text that nothing reads",
    "branching_chat": "{field} is a tree of turns; write each path through it as a chat of its own",
    "unknown_role": "{field} holds a role that is not known; expected system, user, assistant or tool, or their like",
    "bad_content_type": "{field} holds a content that is not text",
    "image_content": "{field} goes with an image, a video or a sound; only text can be learnt",
    "bad_tools": "the row's tools cannot be read; expected a list of functions, each with a name",
    "bad_tool_call": "{field} holds a call that cannot be read; expected a name and arguments that are an object",
    "bad_weight": "{field} holds a turn with a weight that is not 0 or 1",
    "bad_rendering": "{field} holds a text that is not turns from its beginning to its end",
    "no_marker": "{field} does not hold the marker of data.answer_after",
    "text_goes_on": "{field} goes on with a further turn after the answer; split the text into turns",
    "empty_content": "{field} holds a turn without text",
    "bad_unicode": "{field} holds half of a surrogate pair, which is not valid text",
    "no_assistant_turn": "{field} has no assistant turn; a conversation needs a user turn and an assistant turn",
    # What the chat template and the tokenizer make of it.
    "too_long": "the chat is longer than data.max_length_tokens = {limit}; rows are never truncated",
    "no_supervised_tokens": "no token of the row is learnt",
    "mark_in_text": "{field} holds a special token or a mark with which the chat template begins or ends a turn, so it "
    "would forge one; data.marks_in_text: allow takes such rows",
    "template_drops_text": "the chat template leaves a part of the row out",
    "template_rewrites_text": "the chat template changes a text of the row",
    "template_refuses": "the chat template refuses the row",
    "answer_end_is_no_stop": "the answer ends with a token at which generation does not stop",
    "answer_has_no_end": "the chat template writes no end after the answer",
    "answer_inside_reasoning": "the answer would stand within the reasoning that the chat template opens",
    "tools_unsupported": "the chat template does not write the row's tools and calls whole",
    # Other rows.
    "conflicting_answer": "another row has the same prompt with another label, so neither can be trusted",
    "exact_duplicate": "an earlier row has the same prompt and the same answer",
    "in_golden_set": "the conversation is in golden_data, which is never trained on",
    "in_eval_data": "the conversation is in eval_data, which is never trained on",
    "shared_opening": "chats on both sides of the split begin with this one, so it can be on neither",
    "evaluated_before": "an earlier run of the line has evaluated its prompt, so it is never trained on",
    # What the texts say; data.checks decides about each.
    **{name: f"{{field}} holds {text}" for name, text in LOOKED_FOR.items()},
}
# Reasons that are no fault of the row itself. Such rows do not count as bad; they have a limit of their own, or none.
NOT_BAD = (
    "not_kept",
    "exact_duplicate",
    "in_golden_set",
    "in_eval_data",
    "shared_opening",
    "evaluated_before",
    "near_evaluation",
    "near_duplicates",
    "repeated_headers",
)
Split = Literal["train", "eval", "judge", "dropped"]


@dataclass(slots=True)
class _Fields:
    """What the steps of the data gate note about a row; its texts are elsewhere (`Row`).

    Attributes:
        reason: The code in `REASONS` of why the row was kept out; None for a good row.
        split: The split that the row belongs to; `dropped` is an evaluation row beyond `max_eval_rows`, `judge` a
            row that becomes an evaluation row of a lab.
        language: The language that the data states, if it states one.
        detail: Free words about the fault, for a message; never the row's text.
        warnings: Codes of what the template did to a good row, e.g. `trimmed_ends`.
        hits: The names of the checks in `data.checks` that found something in its texts.
        examples: How many training examples the row gives.
        prompt_key: Equal for rows that give the model the same tokens before the answer; empty where not measured.
        field: The names of the fields that should hold the chat, quoted, for a message.
        group: The value of `data.group_field`: rows with one value are on one side of the split.
        prompt_id: Equal for good rows that are no independent evidence: those that one hash puts on a side.
    """

    file: str
    number: int
    tokens: int = 0
    supervised_tokens: int = 0
    reason: str | None = None
    split: Split | None = None
    language: str | None = None
    detail: str = ""
    warnings: tuple[str, ...] = ()
    hits: tuple[str, ...] = ()
    examples: int = 0
    prompt_key: str = ""
    field: str = ""
    prompt_id: str = ""
    group: str | None = None

    @property
    def location(self) -> str:
        """Return the file and the row number, for a message."""
        return f"{self.file}:{self.number}"


class Row(_Fields):
    """One example as the steps of the data gate fill it in.

    Its texts are in memory until `store_texts`. From then on each access reads them anew, so that changing what was
    returned changes nothing.
    """

    __slots__ = ("_file", "_texts")

    def __init__(
        self,
        file: str,
        number: int,
        messages: list[chat.Message],
        hash: str,
        tools: list[dict[str, Any]] | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(file, number, **fields)
        self._texts: Any = (messages, tools, hash)
        self._file: TextFile | None = None

    @property
    def messages(self) -> list[chat.Message]:
        """The chat; empty where the row's structure is wrong."""
        messages: list[chat.Message] = self._content()[0]
        return messages

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """The tools that the answer may call, in the OpenAI form."""
        tools: list[dict[str, Any]] | None = self._content()[1]
        return tools

    @property
    def chat_and_tools(self) -> tuple[list[chat.Message], list[dict[str, Any]] | None]:
        """The chat and its tools, which costs half of asking for each."""
        messages, tools, _ = self._content()
        return messages, tools

    @property
    def hash(self) -> str:
        """12 hex digits of the raw value's hash, to recognise a row without showing its text."""
        return str(self._content()[2])

    def replace_texts(self, messages: list[chat.Message], tools: list[dict[str, Any]] | None) -> None:
        """Give the row another chat, and other tools."""
        self._texts = (messages, tools, self.hash)
        self._file = None

    def store_texts(self, file: TextFile) -> None:
        """Move the row's texts to a file."""
        self._texts = file.append(self._content())
        self._file = file

    def _content(self) -> Any:
        return self._texts if self._file is None else self._file.read(self._texts)


def check_row(raw: RawRow, config: DataConfig) -> Row:
    """Return the row with its chat, or with the reason why it has none."""
    row = Row(
        raw.file, raw.number, [], _hash(raw.messages), language=raw.language, tools=raw.tools,
        reason=raw.fault, detail=raw.detail, field=raw.field, group=raw.group,
        hits=(raw.fault,) if raw.fault in LOOKED_FOR else (),
    )  # fmt: skip
    if not raw.fault and isinstance(raw.messages, list):
        row.reason, row.detail = _chat_fault(raw.messages)
        if not row.reason:
            row.replace_texts(_complete(raw.messages, config), raw.tools)
    return row


def explain_fault(row: Row, config: DataConfig) -> str:
    """Return one line that says where the row is, what is wrong with it, what was expected and what was found."""
    text = REASONS[row.reason or ""].format(field=row.field or "the row", limit=config.max_length_tokens)
    return f"{row.location}: {text}{f' ({row.detail})' if row.detail else ''}"


def _hash(value: object) -> str:
    # default=str: Parquet files hold dates and decimals, which JSON does not have.
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _complete(messages: list[chat.Message], config: DataConfig) -> list[chat.Message]:
    """Return the chat with the line's system turn, and a label without the white space around it."""
    turns = [dict(turn) for turn in messages]
    # Labels are compared as text, so " refund\n" and "refund" would be two labels.
    if config.task == "labels" and (answer := conversations.answer_turn(turns)):
        answer["content"] = answer["content"].strip()
    if config.system is not None and all(turn["role"] != "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": config.system})
    return turns


def _chat_fault(messages: list[chat.Message]) -> tuple[str | None, str]:
    """Return the reason and the detail of what makes a chat unusable, whatever its template; or None."""
    for number, turn in enumerate(messages, 1):
        # The result of a tool may be empty, and a turn may hold calls alone.
        if not turn["content"].strip() and turn["role"] != "tool" and not turn.get("tool_calls"):
            return "empty_content", f"turn {number}, of the {turn['role']}"
        if _has_surrogate(turn):
            return "bad_unicode", f"turn {number}, of the {turn['role']}"

    roles = [str(turn["role"]) for turn in messages]
    if "assistant" not in roles:
        detail = f"its turns are {', '.join(roles[:8])}" if roles else "it has no turns"
        # In dialogues of tasks the system is the machine that answers.
        hint = "; if system is who answers, set data.roles: {system: assistant}" if roles.count("system") > 1 else ""
        return "no_assistant_turn", detail + hint
    return None, ""


def _has_surrogate(value: object) -> bool:
    """Return whether a text within holds half of a surrogate pair, which JSON can escape and UTF-8 cannot write."""
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, Mapping):
        return any(_has_surrogate(item) for pair in value.items() for item in pair)
    return isinstance(value, list) and any(map(_has_surrogate, value))
