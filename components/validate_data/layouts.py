"""Where the rows of a file have what a chat is made of: the `Layout`, and the one that the config names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from components.validate_data.field_names import Columns
from components.validate_data.prompt_template import PromptTemplate
from components.validate_data.rendered import AnyStyle
from components.validate_data.values import folded, shorten
from qlora_retrain.config.data import DataConfig


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of one file have what a chat is made of; each field is a path.

    Attributes:
        description: What was taken, for the log and the report.
        chat: The field of the whole chat.
        prompt: The fields of the prompt; one field may hold the prompt's turns.
        response: The field of the answer: a text, a value, an assistant turn or several turns.
        text: The field of a whole text.
        optional: Fields of the prompt that no row needs to have.
        system: Fields that may hold the system turn; the first that a row has counts.
        tools: Fields that may hold the tools.
        history: The field of the earlier exchanges.
        reasoning: The field of the reasoning before the answer.
        left_out: Fields that are no text of the chat, such as the answer that was rejected.
        style: How the chat is written, where its field, or prompt and answer together, were rendered for a model.
        has_json_turns: Whether each prompt is the JSON text of turns, as an export of a chat log has them in CSV.
    """

    description: str
    chat: str | None = None
    prompt: PromptTemplate | None = None
    response: str | None = None
    text: str | None = None
    optional: tuple[str, ...] = ()
    system: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    history: str | None = None
    reasoning: str | None = None
    left_out: tuple[str, ...] = ()
    style: AnyStyle | None = None
    has_json_turns: bool = False

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """Return the fields of the prompt."""
        return self.prompt.fields if self.prompt else ()

    @property
    def is_plain_prompt(self) -> bool:
        """Return whether the prompt is its fields alone, without words around them."""
        return self.prompt is not None and self.prompt == PromptTemplate.from_fields(self.prompt_fields)

    @property
    def is_whole_text(self) -> bool:
        """Return whether a row is one text."""
        return self.text is not None

    @property
    def required(self) -> tuple[str, ...]:
        """Return the fields of which a row must have a value; of several fields of a prompt, one is enough."""
        single = self.prompt_fields if len(self.prompt_fields) == 1 else ()
        return tuple(field for field in (self.chat, self.text, *single, self.response) if field)

    @property
    def read(self) -> tuple[str, ...]:
        """Return every field that may become part of the chat."""
        fields = (
            self.chat, self.text, *self.prompt_fields, self.response, *self.system, *self.tools, self.history,
            self.reasoning,
        )  # fmt: skip
        return tuple(field for field in fields if field)

    @property
    def words(self) -> str:
        """Return the names of the fields for a message about a row."""
        fields = dict.fromkeys(field for field in (self.chat, self.text, *self.prompt_fields, self.response) if field)
        return " and ".join(f'"{shorten(field)}"' for field in fields if field not in self.optional)


def configured_layout(columns: Columns, config: DataConfig) -> Layout | None:
    """Return the layout that the config names, or None where the fields are to be recognised."""
    if config.messages_field:
        return Layout(f'chats in "{config.messages_field}"', chat=config.messages_field)
    if config.response_field:
        template = config.prompt_template
        prompt = (
            PromptTemplate.from_text(template) if template else PromptTemplate.from_fields((str(config.prompt_field),))
        )
        description = f'{quote_fields(prompt.fields)} as the prompt, "{config.response_field}" as the answer'
        return Layout(description, prompt=prompt, response=config.response_field, left_out=rejected_fields(columns))
    if config.text_field:
        after = f" with the answer after {config.answer_after!r}" if config.answer_after else ", learnt as it is"
        return Layout(f'whole texts in "{config.text_field}"{after}', text=config.text_field)
    return None


def rejected_fields(columns: Columns) -> tuple[str, ...]:
    """Return the fields of the rejected answers and of what is said about them."""
    return tuple(
        name
        for name in columns
        if "rejected" in folded(name) or folded(name).startswith(("nonpreferred", "dispreferred"))
    )


def quote_fields(fields: Sequence[str]) -> str:
    """Return the names for a message."""
    return " and ".join(f'"{shorten(field)}"' for field in fields)
