"""Look at the answers of a file's first rows: whether the prompt shows them, and whether they are answers at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from components.validate_data.field_names import Columns, is_turn, is_turns, values_of
from components.validate_data.layouts import Layout
from components.validate_data.markers import suggest_marker
from components.validate_data.setting_words import pair_setting
from components.validate_data.suggestions import answer_turns
from components.validate_data.turns import TurnParser
from components.validate_data.values import folded, shorten
from qlora_retrain.core.errors import UsageError

MIN_VISIBLE_CHARACTERS = 20  # of an answer; a shorter one, such as a label, may end a prompt that lists all of them
MIN_ROWS = 3  # fewer may be alike by chance
_SAMPLES = 50
# An object with one of the first and, besides, nothing but some of the second is a text with what is said about it.
_TEXT_KEYS = frozenset("text value content answer response output body message".split())
_ABOUT_KEYS = frozenset(
    "id uuid userid user author status rank score rating model modelname answerstart answerend start offset date "
    "created createdat timestamp type source index votes upvotes accepted isaccepted".split()
)
_VERDICTS = frozenset("accept reject ignore accepted rejected ignored".split())


def refuse_visible_answer(file: str, layout: Layout, columns: Columns) -> None:
    """Refuse a prompt that ends with its answer, as a text does that was rendered for training.

    Raises:
        UsageError: It names the fields, and the marker after which the answer begins.
    """
    # Of several fields one may be the text in which the answer is to be found, and so it may be where words say so.
    fields = [path for path in layout.prompt_fields if values_of(columns, path)]
    if layout.response is None or not layout.is_plain_prompt or len(fields) != 1:
        return
    path = fields[0]
    if is_visible(columns, path, [layout.response]):
        texts = [text for text in values_of(columns, path) if isinstance(text, str)]
        marker = suggest_marker(texts)
        after = f"{marker!r}" if marker else "the words before the answer"
        raise UsageError(
            f'{file}: "{shorten(path)}" ends with the text of "{shorten(layout.response)}", so that the model would be '
            f"shown the answer; name another field in data.prompt_field, or set data.text_field: {path} and "
            f"data.answer_after: {after}; where the answer is to be found in the text, say so in data.prompt_template"
        )


def is_visible(columns: Columns, prompt: str, responses: Sequence[str]) -> bool:
    """Return whether most of the prompts end with an answer."""
    answers = {text for path in responses for text in _texts(columns, path) if len(text) >= MIN_VISIBLE_CHARACTERS}
    prompts = _texts(columns, prompt)[:_SAMPLES]
    # A prompt that is the answer asks to repeat it.
    flags = [text not in answers and text.endswith(tuple(answers)) for text in prompts]
    return len(flags) >= MIN_ROWS and sum(flags) * 5 > len(flags) * 4


def is_within(columns: Columns, part: str, whole: str) -> bool:
    """Return whether most of the texts of one field hold a text of another."""
    parts = [text for text in _texts(columns, part)[:_SAMPLES] if len(text) >= MIN_VISIBLE_CHARACTERS]
    wholes = list(_texts(columns, whole))
    return bool(parts) and sum(any(text in candidate for candidate in wholes) for text in parts) * 5 > len(parts) * 4


def are_verdicts(values: Sequence[object]) -> bool:
    """Return whether the values say that something else is accepted or not."""
    return bool(values) and all(isinstance(value, str) and value.strip().casefold() in _VERDICTS for value in values)


def refuse_wrapped_answer(file: str, prompt: str, response: str, columns: Columns, parser: TurnParser) -> None:
    """Refuse answers that are objects or lists around a single text, of which a path takes that text.

    Raises:
        UsageError: It names the path, and the setting that learns the answers as JSON all the same.
    """
    values = columns.get(response, [])
    if not values or any(is_turns(value, parser) or is_turn(value, parser) for value in values):
        return
    turns = answer_turns({response: values}, parser)
    path = turns[0] if turns else _path_of_text(response, values)
    if path:
        raise UsageError(
            f'{file}: the answers in "{shorten(response)}" are not texts but hold one each; set '
            f"{pair_setting(prompt, [], [path])}, or data.response_field: {response} to learn them as JSON"
        )


def _path_of_text(response: str, values: Sequence[object]) -> str | None:
    """Return the path of the text in each value; None where the values hold more than one."""
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) == len(values) and all(len(value) == 1 for value in lists):
        items = [value[0] for value in lists]
        inner = _path_of_text(f"{response}.0", items) if all(isinstance(item, Mapping) for item in items) else None
        is_scalar = all(isinstance(item, str | int | float) for item in items)
        return inner or (f"{response}.0" if is_scalar else None)
    if not all(isinstance(value, Mapping) for value in values):
        return None

    keys = {key: folded(str(key)) for value in values if isinstance(value, Mapping) for key in value}
    texts = [key for key, name in keys.items() if name in _TEXT_KEYS]
    others = [key for key, name in keys.items() if name not in _TEXT_KEYS]
    if len(texts) != 1 or not others or not all(keys[key] in _ABOUT_KEYS for key in others):
        return None
    inner_values = [value.get(texts[0]) for value in values if isinstance(value, Mapping)]
    is_list = any(isinstance(value, list) for value in inner_values)
    return f"{response}.{texts[0]}.0" if is_list else f"{response}.{texts[0]}"


def _texts(columns: Columns, path: str) -> list[str]:
    return [value.strip() for value in values_of(columns, path) if isinstance(value, str)]
