"""Compare tool calls that a model generated with the right ones, as the chat template writes both.

Every family writes calls in a form of its own. In most of them the arguments, or a whole call, are JSON. So both texts
are cut into JSON values and the text between them: the values must be equal as JSON, the text up to white space. Where
a family writes no JSON, the texts must be equal up to white space.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qlora_retrain.core import json_depth

_ARGUMENTS = ("arguments", "parameters")
_CALL_ID = "id"  # servers choose a call's id, so it is no part of what a model must generate


@dataclass(frozen=True, slots=True)
class RenderedCalls:
    """A right answer that calls tools, and a completion, both with the marks of the template.

    Attributes:
        answer: The right answer.
        completion: What the model generated.
        spoken_text: What the right answer says beside its calls; mostly nothing.
    """

    answer: str
    completion: str
    spoken_text: str = ""

    def is_exact(self) -> bool:
        """Return whether the completion says and calls the same, arguments compared as JSON."""
        return _parts(self.answer) == _parts(self.completion)

    def has_same_calls(self) -> bool:
        """Return whether the completion makes the same calls in the same order, whatever it says before them."""
        texts, values = _parts(self.answer)
        other_texts, other_values = _parts(self.completion)
        spoken_text = " ".join(self.spoken_text.split())
        if values != other_values or texts[1:] != other_texts[1:] or not spoken_text:
            return (texts, values) == (other_texts, other_values)
        # What the answer says stands before the mark of its first call.
        return other_texts[0].endswith(texts[0].rpartition(spoken_text)[2].strip())


def _parts(text: str) -> tuple[list[str], list[Any]]:
    """Return the texts around the JSON objects and lists, with single spaces, and the values themselves."""
    decoder = json.JSONDecoder()
    texts, values, start, position = [], [], 0, 0
    while position < len(text):
        if text[position] in "{[":
            try:
                value, end = decoder.raw_decode(text, position)
                json_depth.refuse_deep(value)
            # A model may generate thousands of opening brackets.
            except (ValueError, RecursionError):
                position += 1
                continue
            texts.append(" ".join(text[start:position].split()))
            values.append(_canonical(value))
            start = position = end
        else:
            position += 1
    return [*texts, " ".join(text[start:].split())], values


def _canonical(value: Any) -> Any:
    """Return a JSON value in which a call's arguments are an object, and its id is left out."""
    if isinstance(value, dict):
        is_call = "name" in value and any(name in value for name in _ARGUMENTS)
        return {
            k: _canonical(_parsed(v) if is_call and k in _ARGUMENTS else v)
            for k, v in value.items()
            if not (is_call and k == _CALL_ID)
        }
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    # In Python True equals 1, and in JSON it does not.
    return ("bool", value) if isinstance(value, bool) else value


def _parsed(value: Any) -> Any:
    """Return the arguments of a call that a template writes as JSON text inside of JSON."""
    try:
        return json_depth.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
