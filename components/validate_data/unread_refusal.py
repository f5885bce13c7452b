"""Say why columns that nothing reads refuse the data, and which setting reads them or leaves them out."""

from __future__ import annotations

from collections.abc import Container, Sequence

from components.validate_data.field_leaves import quoted
from components.validate_data.layouts import Layout
from components.validate_data.setting_words import prompt_template, template_setting
from components.validate_data.unread import UnreadColumns
from components.validate_data.values import shorten


def explain_refusal(source: str, unread: UnreadColumns, layout: Layout, names: Container[str]) -> str:
    """Return why the columns that nothing reads refuse the data, with the setting to write; empty where they do not.

    Args:
        source: The source's name.
        unread: The columns of all its files.
        layout: The layout of one of the files, for the names of the fields that are read.
        names: The names of the fields that rows have.
    """
    if refusal := unread.verdicts.explain_refusal(source):
        return refusal
    if layout.is_whole_text:
        return ""
    if answer := unread.answer(layout):
        template = prompt_template([layout.chat or ""]).replace(': "', ': "Summarize this chat:\\n\\n')
        return (
            f'{source}: nothing reads "{shorten(answer)}", which by the name is the answer to what is in '
            f'"{shorten(layout.chat)}"; set e.g. {template} and data.response_field: {quoted(answer)}, or '
            f"data.ignore_fields: [{quoted(answer)}] if the chat alone is to be learnt"
        )
    varying, parts = list(unread.varying()), unread.parts(layout.prompt_fields)
    shared = unread.shared() if layout.prompt else []
    columns = list(dict.fromkeys((*varying, *parts, *shared)))
    if not columns:
        return ""

    reason = "which by the name may belong to the prompt"
    if shared and not parts:
        reason = "and many rows share its text, as they would an instruction"
    if varying:
        repeated, total = unread.repeats()
        reason = (
            f"and the text differs among rows with one prompt: {repeated:,} of {total:,} rows have a prompt that "
            "another row has too"
        )
    setting = f"data.system_field: {quoted(columns[0])} if it belongs in front of the chat"
    if layout.prompt:
        # A field that no row has may be read where a later row has it.
        fields = [path for path in layout.prompt_fields if path in names or path not in layout.optional]
        # An instruction stands in front of what it is about.
        later = [path for path in columns if path not in shared or path in parts]
        instructions = [path for path in columns if path not in later]
        setting = template_setting((*instructions, *fields, *later), layout.response or "")
    return (
        f"{source}: nothing reads {_quote(columns)}, {reason}; set {setting}, or "
        f"data.ignore_fields: [{', '.join(map(quoted, columns))}] if the model shall not see it"
    )


def _quote(paths: Sequence[str]) -> str:
    return " and ".join(f'"{shorten(path)}"' for path in paths)
