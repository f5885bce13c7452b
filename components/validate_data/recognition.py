"""Decide the layout of a file once, from its first records: as the config says, or by the fields' names and shapes.

Recognised: a chat in one field; a prompt, of one or several fields, and its answer; preference data, whose chosen
answer is learnt; texts into which chats were rendered; and, with `data.task: labels`, a text and its label. Where
several fit, a chat comes first. What is truly ambiguous is refused, with the settings for each choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from components.validate_data import field_names as names
from components.validate_data.answer_checks import (
    are_verdicts,
    is_visible,
    is_within,
    refuse_visible_answer,
    refuse_wrapped_answer,
)
from components.validate_data.field_leaves import describe_fields, is_about_row, is_prose, leaves_of, words_of
from components.validate_data.field_names import Columns, named, values_of
from components.validate_data.layouts import Layout, configured_layout, quote_fields, rejected_fields
from components.validate_data.prompt_template import PromptTemplate
from components.validate_data.redaction import redact
from components.validate_data.rendered import SpeakerLines, style_of
from components.validate_data.setting_words import prompt_template
from components.validate_data.suggestions import suggest_settings
from components.validate_data.turns import TurnParser
from components.validate_data.values import folded, parsed
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

_PREFERENCE = " (preference data: the rejected answer is not used)"


def choose_layout(file: str, columns: Columns, config: DataConfig, parser: TurnParser) -> Layout:
    """Return the layout of a file's rows.

    Raises:
        UsageError: If no layout is set or recognised, or several fit.
    """
    layout = configured_layout(columns, config) or _recognise(file, columns, config, parser)
    refuse_visible_answer(file, layout, columns)
    if layout.is_plain_prompt and names.are_json_turns(values_of(columns, layout.prompt_fields[0]), parser):
        layout = replace(layout, has_json_turns=True, description=f"the turns in {layout.description}")
    layout = _rendered_pair(layout, columns)
    system = (config.system_field,) if config.system_field else tuple(named(columns, names.SYSTEMS))
    tools = (config.tools_field,) if config.tools_field else _tools_fields(layout)
    used = set(layout.read)
    layout = replace(layout, system=tuple(f for f in system if f not in used), tools=tools)

    # A path into the history that the config names takes one of its turns, so the others are left out.
    is_taken = any(path.partition(".")[0] == names.HISTORY for path in layout.read)
    if not (layout.chat or layout.text or is_taken) and _holds_exchanges(columns.get(names.HISTORY, [])):
        layout = replace(layout, history=names.HISTORY)
    reasoning = [field for field in named(columns, [names.REASONING]) if field not in config.ignore_fields]
    if layout.response and reasoning and reasoning[0] not in layout.read:
        layout = replace(layout, reasoning=reasoning[0])
    return replace(layout, description=redact(layout.description + _describe_extras(layout, columns)))


def _recognise(file: str, columns: Columns, config: DataConfig, parser: TurnParser) -> Layout:
    preferred = _chosen_field(columns, parser)
    rejected = rejected_fields(columns) if preferred else ()
    # A prompt of turns may have a system turn that the chosen chat lacks.
    has_turns = any(
        names.is_turns(values[0], parser) for values in map(columns.get, named(columns, names.PROMPTS)) if values
    )
    if preferred and not has_turns and _has_user_turns(columns[preferred], parser):
        # The chosen answer stands behind its prompt.
        left_out = (*rejected, *named(columns, names.PROMPTS))
        return Layout(f'chats in "{preferred}"{_PREFERENCE}', chat=preferred, left_out=left_out)
    if preferred and (rendered := _rendered_chat(columns, preferred)):
        return replace(rendered, left_out=(*rejected, *named(columns, names.PROMPTS)))

    chats = [path for path in names.chat_paths(columns, parser) if path not in rejected]
    # The history of an instruction and the turns of an answer are no chats of their own.
    parts = {preferred, names.HISTORY, *named(columns, names.RESPONSES)}
    whole = [path for path in chats if path not in parts and names.end_with_answers(values_of(columns, path), parser)]
    if not whole or preferred:
        pair = _pair(file, columns, config, parser, preferred, chats)
        if pair:
            return pair

    candidates = {name: values for name, values in columns.items() if name not in rejected}
    if len(chats) == 1 and not whole and _has_text_beside(candidates, chats[0]):
        raise UsageError(
            f'{file}: the chats in "{chats[0]}" have no answer; the fields are: {describe_fields(columns)}; '
            f"{suggest_settings(candidates, parser)}"
        )
    layout = _one_chat(file, columns, whole or chats)
    if layout is None and (rendered := _rendered_chat(candidates)):
        return rendered
    # By the name alone: each row's own message says what is wrong with its value.
    if layout is None and (by_name := named(columns, names.CHATS[:2])):
        return Layout(f'chats in "{by_name[0]}"', chat=by_name[0])
    if layout is None:
        hint = suggest_settings(candidates, parser)
        if any(redact(name) != name for name in columns):
            hint = "the first line looks like a row; write a line with the names of the fields above it"
        raise UsageError(
            f"{file}: no field is recognised as a chat, or as a prompt with its answer; the fields are: "
            f"{describe_fields(columns)}; {hint}"
        )
    return layout


def _rendered_chat(columns: Columns, preferred: str | None = None) -> Layout | None:
    """Return the layout of texts into which chats were written for a model."""
    fields = [preferred] if preferred else list(columns)
    styles = {field: style_of(columns[field]) for field in fields}
    written = [field for field in fields if styles[field]]
    if len(written) != 1:
        return None
    style, note = styles[written[0]], _PREFERENCE if preferred else ""
    # A conversation beside a label may be what is labelled.
    if isinstance(style, SpeakerLines) and named(columns, names.LABELS):
        return None
    name = style.name if style else ""
    return Layout(f'chats that are written as {name} in "{written[0]}"{note}', chat=written[0], style=style)


def _rendered_pair(layout: Layout, columns: Columns) -> Layout:
    """Return the layout of a pair whose prompt and answer together are a text that was rendered for a model."""
    fields = tuple(path for path in layout.prompt_fields if values_of(columns, path))
    if layout.response is None or not layout.is_plain_prompt or len(fields) != 1:
        return layout
    prompts, answers = values_of(columns, fields[0]), values_of(columns, layout.response)
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=False) if isinstance(p, str) and isinstance(a, str)]
    style = style_of([prompt + answer for prompt, answer in pairs])
    # Names of speakers may be the prompt's own way of writing.
    if style is None or isinstance(style, SpeakerLines) or len(prompts) != len(answers):
        return layout
    prompt = PromptTemplate.from_fields(fields)
    return replace(layout, prompt=prompt, style=style, description=f"{layout.description}, written as {style.name}")


def _one_chat(file: str, columns: Columns, paths: Sequence[str]) -> Layout | None:
    by_name = [path for path in paths if folded(path) in names.CHATS[:2]]
    candidates = by_name if len(by_name) == 1 else paths
    if len(candidates) > 1:
        choices = " or ".join(f"data.messages_field: {path}" for path in candidates)
        raise UsageError(f"{file}: the fields {quote_fields(candidates)} each hold a chat; set {choices}")
    if not candidates:
        return None

    field = candidates[0]
    others = [*named(columns, names.PROMPTS), *named(columns, names.RESPONSES), *named(columns, names.TEXTS)]
    others = [name for name in others if name != field]
    return Layout(f'chats in "{field}"{f", and not {quote_fields(others)}" if others else ""}', chat=field)


def _pair(
    file: str, columns: Columns, config: DataConfig, parser: TurnParser, preferred: str | None, chats: Sequence[str]
) -> Layout | None:
    """Return the layout of a prompt and an answer, or None; the answer may be the chosen one of preference data."""
    responses = [preferred] if preferred else named(columns, names.RESPONSES)
    # xLAM's rows have calls as their answers.
    if not responses and named(columns, names.TOOLS):
        responses = named(columns, ["answers"])
    labels = named(columns, names.LABELS) if config.task == "labels" else []
    # What an annotator has said about the label is no answer, e.g. Prodigy's `answer: accept`.
    if not responses or (labels and all(are_verdicts(columns[name]) for name in responses)):
        responses = labels
    # A chat that ends with the user, beside the answer.
    open_chats = [
        path
        for path in chats
        if path not in (*responses, names.HISTORY) and not names.end_with_answers(values_of(columns, path), parser)
    ]
    prompts = [(path,) for path in open_chats] or _prompt_choices(columns, config)
    if len(prompts) > 1:
        prompts = [fields for fields in prompts if not is_visible(columns, fields[0], responses)] or prompts
    if not prompts or not responses:
        return None
    if len(prompts) > 1 or len(responses) > 1:
        raise _ambiguous(file, prompts, responses, columns)

    fields, response = prompts[0], responses[0]
    refuse_wrapped_answer(file, fields[0], response, columns, parser)
    left_out = rejected_fields(columns) if preferred else ()
    filled = [field for field in fields if columns.get(field) or "." in field]
    return Layout(
        f'{quote_fields(filled)} as the prompt, "{response}" as the answer{_PREFERENCE if left_out else ""}',
        prompt=PromptTemplate.from_fields(fields),
        response=response,
        optional=fields[1:],
        left_out=left_out,
    )


def _prompt_choices(columns: Columns, config: DataConfig) -> list[tuple[str, ...]]:
    """Return each choice of the prompt's fields; `input` and `context` are further parts of another field's prompt."""
    texts = {name: values for name, values in columns.items() if names.holds_text(values)}
    firsts, others = named(texts, names.PROMPTS), named(texts, names.OTHER_PROMPTS)
    parts = [name for name in others if folded(name) in names.FURTHER_PARTS]
    if firsts:
        # A file may have its first input after many rows without one.
        empty = [name for name, values in columns.items() if folded(name) in names.FURTHER_PARTS and not values]
        parts += empty if any(folded(name) == "input" for name in columns) else ["input", *empty]
        # A prompt may be written out already, with its context in it.
        return [(first, *(part for part in parts if not is_within(columns, part, first))) for first in firsts]
    if not others and config.task == "labels":
        others = named(texts, names.LABEL_PROMPTS)
    return [tuple(parts)] if parts else [(name,) for name in others]


def _has_text_beside(columns: Columns, chat: str) -> bool:
    """Return whether a text that is not in the chat may be its answer."""
    return any(
        not path.startswith(f"{chat}.") and not is_about_row(path) and (is_prose(values) or "answer" in words_of(path))
        for path, values in leaves_of(columns).items()
    )


def _ambiguous(file: str, prompts: Sequence[tuple[str, ...]], responses: Sequence[str], columns: Columns) -> UsageError:
    used = {*(path for fields in prompts for path in fields), *responses}
    parts = [name for name, values in columns.items() if values and name not in used and names.is_prompt_part(name)]
    filled = [
        [
            fields[0],
            *(path for path in fields[1:] if columns.get(path)),
            *(part for part in parts if not is_within(columns, part, fields[0])),
        ]
        for fields in prompts
    ]
    prompt_words = " or ".join(
        prompt_template(fields) if len(fields) > 1 else f"data.prompt_field: {fields[0]}" for fields in filled
    )
    response_words = " or ".join(f"data.response_field: {field}" for field in responses)
    hint = f", or for both {prompt_template([fields[0] for fields in filled])}" if len(prompts) > 1 else ""
    return UsageError(
        f"{file}: {quote_fields([*(fields[0] for fields in prompts), *responses])} fit more than one way; set "
        f"{prompt_words}{hint}, and {response_words}"
    )


def _chosen_field(columns: Columns, parser: TurnParser) -> str | None:
    """Return the field of the preferred answer, if there is one of the rejected answer too."""
    rejected = {folded(name) for name in rejected_fields(columns)}
    fields = []
    for name, values in columns.items():
        counterparts = {folded(name).replace("chosen", "rejected").replace("preferred", "rejected")}
        counterparts |= {f"non{folded(name)}", f"dis{folded(name)}"}
        is_answer = names.holds_text(values) or all(
            names.is_turns(v, parser) or names.is_turn(v, parser) for v in values
        )
        if values and is_answer and folded(name) not in rejected and counterparts & rejected:
            fields.append(name)
    # Others say something about the answers, such as the models that wrote them.
    return min(fields, key=lambda name: (not _names_answer(name), -_size(columns[name])), default=None)


def _names_answer(preferred: str) -> bool:
    name = folded(preferred).replace("chosen", "").replace("preferred", "")
    return not name or name in names.RESPONSES


def _size(values: Sequence[object]) -> int:
    return sum(len(str(value)) for value in values)


def _has_user_turns(values: Sequence[object], parser: TurnParser) -> bool:
    chats = [parsed(value) for value in values]
    return all(names.is_turns(chat, parser) for chat in chats) and all(
        any(turn["role"] == "user" for turn in parser.parse(chat)[0]) for chat in chats
    )


def _tools_fields(layout: Layout) -> tuple[str, ...]:
    """Return the fields that may hold tools; beside a chat within an object they are in that object."""
    parents = {field.rpartition(".")[0] for field in (layout.chat, *layout.prompt_fields) if field and "." in field}
    return (*names.TOOLS, *(f"{parent}.{name}" for parent in sorted(parents) for name in names.TOOLS))


def _holds_exchanges(values: Sequence[object]) -> bool:
    lists = [parsed(value) for value in values]
    return bool(lists) and all(isinstance(value, list) for value in lists)


def _describe_extras(layout: Layout, columns: Columns) -> str:
    """Return what is read beside the chat, for the log."""
    extras = [
        ("the system turn", layout.system),
        ("tools", layout.tools),
        ("earlier turns", (layout.history or "",)),
        ("the reasoning", (layout.reasoning or "",)),
    ]
    parts = [f'{words} in "{field}"' for words, fields in extras for field in fields if columns.get(field)]
    return f"; {', '.join(parts)}" if parts else ""
