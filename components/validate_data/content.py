"""The content of a turn as text: a text, text parts, or a value that JSON can write; media are refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from components.validate_data.tool_parts import CALLS, RESULTS
from components.validate_data.values import RowFault, is_empty, shorten, text_of

TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
REASONING_PARTS = {"thinking": "thinking", "reasoning": "reasoning"}  # the type, and the key of its text
# Also Gemini's and Bedrock's names, whose parts have no type.
MEDIA = frozenset(
    "image image_url image_file input_image video video_url audio audio_url input_audio file file_url document "
    "inlineData inline_data fileData file_data".split()
)
# What `tool_parts` has not taken out of a content.
CALL_PARTS = frozenset((*CALLS, *RESULTS, "server_tool_use"))
REFUSED_PARTS = CALL_PARTS | {"refusal", "redacted_thinking"}
# Fields of a row that hold media, and how a text refers to them.
MEDIA_FIELDS = frozenset(
    "image images image_path image_paths image_url img video videos video_path audio audios audio_path".split()
)
_MEDIA_FILE = re.compile(
    r"(?!\w+://)\S.*\.(jpe?g|png|gif|webp|bmp|tiff?|wav|mp3|flac|ogg|m4a|mp4|avi|mov|webm|mkv)", re.IGNORECASE
)
PLACEHOLDERS = ("<image>", "<video>", "<audio>", "<|image|>", "<img>")


def parse_content(content: object) -> tuple[str, str]:
    """Return a turn's text, and the reasoning among its parts; parts are joined with nothing between.

    Raises:
        RowFault: For a part that is no text, and for null.
    """
    # Gemini writes parts within an object, and some write one part without a list.
    if isinstance(content, Mapping) and isinstance(content.get("parts"), list):
        content = content["parts"]
    elif isinstance(content, Mapping) and isinstance(content.get("text"), str) and set(content) <= {"type", "text"}:
        content = [content]
    if content is None:
        raise RowFault("bad_content_type", "the content is null")
    if not isinstance(content, list) or not _are_parts(content):
        return text_of(content), ""

    texts, reasoning = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type")
        if kind in REASONING_PARTS:
            reasoning.append(text_of(part.get(REASONING_PARTS[kind]) or part.get("text") or ""))
        elif isinstance(part.get("text"), str) and (kind is None or kind in TEXT_PARTS):
            texts.append(part["text"])
        else:
            raise _part_fault(part)
    return "".join(texts), "".join(reasoning)


def refuse_media(fields: Mapping[str, object], texts: list[str], ignored: frozenset[str]) -> None:
    """Refuse a row with an image, a video or a sound.

    A text in such a field counts if it is the path of a file, or if the row's texts refer to it; an address may be one
    that nothing refers to.

    Raises:
        RowFault: It names the field, and the setting for a medium that the texts do not need.
    """
    has_placeholder = any(mark in text for text in texts for mark in PLACEHOLDERS)
    for name in sorted(MEDIA_FIELDS.intersection(fields) - ignored):
        value = fields[name]
        if is_medium(value) or (has_placeholder and not is_empty(value)):
            is_file = isinstance(value, str) and not has_placeholder
            hint = f"; if the texts do not need it, set data.ignore_fields: [{name}]" if is_file else ""
            raise RowFault("image_content", f'the field "{name}"{hint}')


def is_medium(value: object) -> bool:
    """Return whether the value of such a field is a medium, or the path of its file."""
    return not is_empty(value) and (not isinstance(value, str) or _MEDIA_FILE.fullmatch(value.strip()) is not None)


def _are_parts(content: list[object]) -> bool:
    """Return whether the list is one of parts, and not a list that is itself the answer, such as entities of a text."""
    has_part = any(isinstance(item, Mapping) and _is_part(item) for item in content)
    return bool(content) and (has_part or all(isinstance(item, str) for item in content))


def _is_part(item: Mapping[str, object]) -> bool:
    kind = item.get("type")
    if kind is not None:
        return isinstance(kind, str) and (
            kind in TEXT_PARTS or kind in REASONING_PARTS or kind in MEDIA | REFUSED_PARTS
        )
    keys = {key for key, value in item.items() if value is not None}
    return keys == {"text"} or bool(keys & (MEDIA | REFUSED_PARTS))


def _part_fault(part: Mapping[str, object]) -> RowFault:
    # Parquet gives every part the keys of all others.
    keys = [key for key, value in part.items() if value is not None]
    kind = part.get("type") or next((key for key in keys if key in MEDIA | REFUSED_PARTS), None)
    if kind in MEDIA:
        return RowFault("image_content", f'a part of type "{kind}"')
    if kind in CALL_PARTS:
        return RowFault(
            "bad_content_type",
            f'a part of type "{kind}"; write calls as tool_calls of the turn, and results as turns of the role tool',
        )
    words = f'a part of type "{shorten(kind)}"' if kind else f"a part with the keys {', '.join(map(shorten, keys[:5]))}"
    return RowFault("bad_content_type", words)
