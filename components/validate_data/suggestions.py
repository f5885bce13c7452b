"""Say which setting would read fields that are not recognised: for messages alone, nothing is decided here.

A field is a path as the settings take it: through objects, and through the first items of lists, `answers.text.0`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from components.validate_data import field_names as names
from components.validate_data.field_leaves import (
    MAX_CATEGORIES,
    are_queries,
    is_about_row,
    is_category,
    is_explanation,
    is_prose,
    leaves_of,
    quoted,
    two_values,
    type_of,
    words_of,
)
from components.validate_data.field_names import Columns, holds_text
from components.validate_data.markers import suggest_marker
from components.validate_data.row_shapes import explain_shape, nodes
from components.validate_data.setting_words import pair_setting, template_setting
from components.validate_data.turns import CONTENT_KEYS, TurnParser, turn_keys
from components.validate_data.values import RowFault, folded, near_match, shorten

_PROMPTS = (*names.PROMPTS, *names.OTHER_PROMPTS, *names.LABEL_PROMPTS, "src")
_RESPONSES = (
    "chosen",
    *names.RESPONSES,
    *"answers answerkey sql summary highlights finaldecision ideal expected expectedoutput groundtruth tgt".split(),
)
_LABELS = (*names.LABELS, *"stars rating score target".split())
# Words in names such as `question_title` and `best_answer`.
_PROMPT_WORDS = frozenset("question query prompt instruction problem subject title ctx".split())
_RESPONSE_WORDS = frozenset("answer answers response output completion reply solution target".split())
# Parts of a prompt, beside those that refuse data by their names alone.
_CHOICES = ("answer", "response", "sol", "solution", "completion")
_PARTS = (*names.PROMPT_PARTS, *"body selftext description details questionbody endings".split())
# Names that mostly say where a row comes from, and here what is to be translated.
_TEXTS = ("source", "src")
_MAX_CHOICES = 4
_MAX_TURNS = 20  # of a chat that is looked at for a message


def suggest_settings(columns: Columns, parser: TurnParser) -> str:
    """Return the settings that would read the fields, with their real names."""
    if words := explain_shape(columns):
        return words

    if chat := _foreign_chat(columns, parser):
        return f"set {chat}"

    leaves = {path: values for path, values in leaves_of(columns).items() if path in _TEXTS or not is_about_row(path)}
    if len(leaves) == 1 and is_prose(*leaves.values()):
        return _suggest_text(next(iter(leaves)), leaves)
    responses = answer_turns(columns, parser) or _responses(leaves, columns) or _whole_answers(columns)
    prompts = [*names.chat_paths(columns, parser), *_prompts(leaves)]
    prompts = [path for path in prompts if path not in responses]
    if not responses:
        # Beside another text, a query in SQL or the like is what answers it.
        responses = [
            path for path in prompts if folded(path) == "query" and (len(prompts) > 1 or are_queries(leaves[path]))
        ]
        prompts = [path for path in prompts if path not in responses]
    texts = [path for path, values in leaves.items() if is_prose(values) and path not in responses]
    categories = [path for path, values in leaves.items() if path not in prompts and is_category(values)]
    category = categories[0] if len(categories) == 1 else None
    if not responses and (pair := two_values(columns)):
        return f"set {pair_setting(pair[0], [], pair[1:])}, if that is the answer"
    if not responses and len(texts) == 1:
        return _suggest_text(texts[0], leaves)
    if not responses and len(texts) == 2 and not _has_further_texts(leaves, texts):
        if prompts and prompts[0] not in texts:
            first, second = _in_order(texts, leaves)
            return f"set {pair_setting(prompts[0], [first], [second])}"
        first, second = texts if prompts[:1] == texts[:1] else texts[::-1] if prompts else _in_order(texts, leaves)
        return f"set {pair_setting(first, [], [second])}" + _suggest_category(texts, category)
    if not responses and prompts and category:
        responses = [_item(category, leaves[category])]
    if not prompts and (len(texts) == 1 or (responses and _is_label(responses[0], leaves))):
        prompts = texts[:1]
    if not prompts or not responses:
        return f"set data.prompt_field and data.response_field to two of them{_suggest_others(columns, leaves)}"

    parts = _parts(prompts[0], responses, columns)
    # An instruction that comes again and again asks about something else.
    prompt_texts = leaves.get(prompts[0], [])
    if len(prompt_texts) >= MAX_CATEGORIES and len(set(map(str, prompt_texts))) * 2 <= len(prompt_texts):
        parts += [path for path in texts if path not in (prompts[0], *parts) and not is_explanation(path)]
    if not _is_label(responses[0], leaves):
        return f"set {pair_setting(prompts[0], parts, responses)}{_suggest_system(prompts[0], columns)}"
    # What is labelled may be in several columns, such as a title and a text.
    fields = [prompts[0], *parts]
    if prompts[0] in columns:
        fields = [path for path in columns if path in (*texts, *prompts, *parts) and not is_explanation(path)]
    setting = pair_setting(fields[0], fields[1:], responses)
    if folded(responses[0]) in names.LABELS and folded(fields[0]) in _PROMPTS and len(fields) == 1:
        return f"set data.task: labels if {shorten(responses[0])} holds categories, or {setting}"
    return f"set {setting}, and data.task: labels if these are categories"


def _is_label(path: str, leaves: Columns) -> bool:
    """Return whether a field is named as a label, and has values that come again."""
    values = leaves.get(path, [])
    is_free_text = len(values) >= MAX_CATEGORIES and len(set(map(str, values))) * 2 > len(values)
    return folded(path.rpartition(".")[2]) in _LABELS and not is_free_text


def answer_turns(columns: Columns, parser: TurnParser) -> list[str]:
    """Return the path of the assistant's turn within objects, such as those that a model's server answers with."""
    for name, values in columns.items():
        paths = [{path for path, item in nodes(name, value) if _is_answer(item, parser)} for value in values]
        common = set.intersection(*paths) - {name} if paths else set()
        if common:
            return [min(common, key=len)]
    return []


def _is_answer(value: object, parser: TurnParser) -> bool:
    try:
        return names.is_turn(value, parser) and [m["role"] for m in parser.parse([value])[0]] == ["assistant"]
    except RowFault:
        return False


def _matching(leaves: Columns, exact: Sequence[str], words: frozenset[str]) -> list[str]:
    """Return the fields with one of the names, else with one of the words in a name, else with a similar name."""
    if by_name := _matching_names(leaves, exact):
        return by_name
    by_word = [path for path in leaves if words & {word for part in path.split(".") for word in words_of(part)}]
    similar = [path for path in leaves if near_match(folded(path.rpartition(".")[2]), exact, cutoff=0.85)]
    return by_word or similar


def _matching_names(leaves: Columns, exact: Sequence[str]) -> list[str]:
    ranks = {name: i for i, name in enumerate(exact)}
    by_name = {path: ranks[name] for path in leaves if (name := folded(path.rpartition(".")[2])) in ranks}
    return sorted(by_name, key=lambda path: by_name[path])


def _prompts(leaves: Columns) -> list[str]:
    texts = {path: values for path, values in leaves.items() if holds_text(values)}
    return _matching(texts, _PROMPTS, _PROMPT_WORDS)


def _responses(leaves: Columns, columns: Columns) -> list[str]:
    """Return the answers; several only where they have similar names, so that one of them is to be chosen."""
    paths = {f"{path}.0" if type_of(values) == "a list of texts" else path: values for path, values in leaves.items()}
    names_of = {path.removesuffix(".0"): path for path in paths}
    matching = _matching({name: paths[path] for name, path in names_of.items()}, _RESPONSES, _RESPONSE_WORDS)
    texts = [name for name in matching if type_of(paths[names_of[name]]) in ("text", "a list of texts")]
    is_exact = bool(matching) and folded(matching[0].rpartition(".")[2]) in _RESPONSES
    # Numbered answers beside a label are what to choose from.
    are_choices = len(texts) > 1 and all(names.stem(name) for name in texts)
    if not matching or (are_choices and _matching_names(leaves, _LABELS)):
        labels = _matching(leaves, _LABELS, frozenset())[:1]
        return [_whole_list(path, columns) or _whole_object(path, columns) or path for path in labels]
    return [names_of[name] for name in (matching[:1] if is_exact else (texts or matching)[:_MAX_CHOICES])]


def _whole_object(path: str, columns: Columns) -> str | None:
    """Return the object that is named as an answer, if the label is only a part of it."""
    name = path.partition(".")[0]
    return name if name != path and name in columns and folded(name) in _RESPONSES else None


def _whole_answers(columns: Columns) -> list[str]:
    """Return the object that is named as an answer, such as `sql`, none of whose fields is named so."""
    objects = {name: values for name, values in columns.items() if values and isinstance(values[0], Mapping)}
    return _matching_names(objects, _RESPONSES)[:1]


def _whole_list(path: str, columns: Columns) -> str | None:
    """Return the list that holds the field, where that list as a whole is the answer: several labels, or spans."""
    head, _, tail = path.partition(".0.")
    lists = [value for value in names.values_of(columns, head) if isinstance(value, list)] if tail else []
    is_span = any({"start", "end"} <= value[0].keys() for value in lists if isinstance(value[0], Mapping))
    return head if is_span or any(len(value) > 1 for value in lists) else None


def _parts(prompt: str, responses: Sequence[str], columns: Columns) -> list[str]:
    """Return the further parts of the prompt: columns, and fields of the objects in which prompt and answer are."""
    parents = {path.rpartition(".")[0] for path in (prompt, responses[0])} - {""}
    paths = [] if "." in prompt else list(columns)
    paths += [path for path in leaves_of(columns) if path.rpartition(".")[0] in parents]
    used = {prompt, *responses, *(path.partition(".")[0] for path in responses if path not in columns)}
    # Of numbered columns one alone is half of what was asked.
    stems = {names.stem(prompt)} - {None}
    stems |= {stem for path in paths if (stem := names.stem(path)) in _CHOICES and folded(responses[0]) in _LABELS}
    return [
        path
        for path in paths
        if path not in used
        and (folded(path.rpartition(".")[2]) in _PARTS or names.is_prompt_part(path) or names.stem(path) in stems)
    ]


def _suggest_text(text: str, leaves: Columns) -> str:
    """Return the settings for a file with a single text: learnt as a whole, or classified by another field."""
    marker = suggest_marker([value for value in leaves[text] if isinstance(value, str)])
    if marker:
        return f"set data.text_field: {quoted(text)} and data.answer_after: {marker!r}"
    whole = f"data.text_field: {quoted(text)} and train.loss: all"
    others = {path: values for path, values in leaves.items() if path != text}
    # A field of an object says something about that object.
    category = next((path for path in sorted(others, key=lambda path: "." in path) if is_category(others[path])), None)
    if category:
        return (
            f"set {pair_setting(text, [], [_item(category, others[category])])}, and data.task: labels if these are "
            f"categories; or set {whole} to learn the whole text"
        )
    if any(not isinstance(values[0], str) for values in others.values()):
        return (
            f"set data.prompt_field: {quoted(text)} and data.response_field to one of the others, or set {whole} to "
            "learn the whole text"
        )
    return f"set {whole}"


def _has_further_texts(leaves: Columns, texts: Sequence[str]) -> bool:
    """Return whether other fields hold many different short texts, so that two long ones are not all there is."""
    others = (values for path, values in leaves.items() if path not in texts and holds_text(values))
    return any(len(set(map(str, values))) > min(MAX_CATEGORIES, len(values) // 2) for values in others)


def _in_order(texts: Sequence[str], leaves: Columns) -> list[str]:
    first, second = (sum(len(str(value)) for value in leaves[path]) / len(leaves[path]) for path in texts)
    # An answer stands behind its prompt, unless it is so short that it is a name of it.
    return list(reversed(texts)) if second > 5 * first else list(texts)


def _suggest_category(texts: Sequence[str], category: str | None) -> str:
    """Return the second choice where two texts stand beside a category: it may be what both are labelled with."""
    return f", or to learn {shorten(category)}, {template_setting(texts, category)}" if category else ""


def _suggest_system(prompt: str, columns: Columns) -> str:
    """Return the setting of a system turn that lies in an object beside the prompt; others are recognised."""
    parent = prompt.rpartition(".")[0]
    paths = [path for path in leaves_of(columns) if parent and path.rpartition(".")[0] == parent]
    system = next((path for path in paths if folded(path.rpartition(".")[2]) in names.SYSTEMS), None)
    return f" and data.system_field: {quoted(system)}" if system else ""


def _foreign_chat(columns: Columns, parser: TurnParser) -> str | None:
    """Return the settings of a chat with roles of its own, under a name of its own."""
    for name, values in columns.items():
        turns = [turn for value in values if isinstance(value, list) for turn in value]
        is_chat = len(turns) > len(values) and all(isinstance(v, list) and all(map(_is_turn_like, v)) for v in values)
        if is_chat and not any(names.is_turn(turn, parser) for turn in turns):
            try:
                parser.parse(turns[:_MAX_TURNS])
            except RowFault as fault:
                _, _, roles = fault.detail.partition("e.g. ")
                return f"data.messages_field: {quoted(name)}, and {roles}" if roles else None
    return None


def _is_turn_like(value: object) -> bool:
    return isinstance(value, Mapping) and None not in turn_keys(value)


def _item(path: str, values: Sequence[object]) -> str:
    return f"{path}.0" if isinstance(values[0], list) else path


def _suggest_others(columns: Columns, leaves: Columns) -> str:
    """Return how what is no text is named: an item of a list, or a chat."""
    chats = [name for name, values in columns.items() if all(_is_like_chat(value) for value in values)]
    chats = [name for name in chats if columns[name] or near_match(folded(name), names.CHATS, cutoff=0.8)]
    lists = [path for path, values in leaves.items() if isinstance(values[0], list)]
    hint = f"; a path takes one item of a list, e.g. {shorten(lists[0])}.0" if lists else ""
    return f", or data.messages_field: {shorten(chats[0])}" if chats else hint


def _is_like_chat(value: object) -> bool:
    items = value if isinstance(value, list) else []
    return bool(items) and isinstance(items[0], Mapping) and bool(set(CONTENT_KEYS) & items[0].keys())
