"""Imitations of Mistral's chat templates: roles take turns, and tools stand before the last question."""

from __future__ import annotations

from tests.lm.families.family import (
    ALTERNATES,
    DROPS,
    NO_REASONING_FIELD,
    NO_TOOLS,
    RAISES,
    SP,
    Family,
    refused,
    tokens,
)

BRACKETS = {"headers": ("[/INST]", "[/TOOL_RESULTS]"), "role_mark": "[/INST]"}

MISTRAL_MARKS = tokens(
    "[INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
)

# Brackets in plain text; takes no system turn.
MISTRAL_1 = r"""
{{- bos_token -}}
{%- for turn in messages -%}
  {%- if (turn.role == 'user') != (loop.index0 is even) -%}
    {{- raise_exception('roles must alternate: user, assistant, user, ...') -}}
  {%- endif -%}
  {%- if turn.role == 'user' -%}{{- '[INST] ' ~ turn.content ~ ' [/INST]' -}}
  {%- elif turn.role == 'assistant' -%}{{- turn.content ~ eos_token -}}
  {%- else -%}{{- raise_exception('only user and assistant') -}}{%- endif -%}
{%- endfor -%}
"""

# Tools stand before the last question, a call drops the turn's text, ids have nine characters.
MISTRAL_CALLS = r"""
{%- macro write_calls(calls) -%}
  {{- '[TOOL_CALLS] [' -}}
  {%- for call in calls -%}
    {%- if call.id is not defined or call.id | length != 9 -%}
      {{- raise_exception('an id of a call has nine letters and digits') -}}
    {%- endif -%}
    {{- '' if loop.first else ', ' -}}
    {{- (call.function | tojson)[:-1] ~ ', "id": "' ~ call.id ~ '"}' -}}
  {%- endfor -%}
  {{- ']' ~ eos_token -}}
{%- endmacro -%}
{%- macro write_result(turn) -%}
  {{- '[TOOL_RESULTS] {"content": ' ~ turn.content -}}
  {{- ', "call_id": "' ~ turn.tool_call_id ~ '"}[/TOOL_RESULTS]' -}}
{%- endmacro -%}
{%- set questions = messages | selectattr('role', 'equalto', 'user') | list -%}
{%- set order = namespace(next='user') -%}
"""

MISTRAL_LOOP = (
    MISTRAL_CALLS
    + r"""
{{- bos_token -}}
{%- for turn in messages[START:] -%}
  {%- if turn.role in ['user', 'assistant'] and not turn.tool_calls -%}
    {%- if turn.role != order.next -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
    {%- set order.next = 'assistant' if turn.role == 'user' else 'user' -%}
  {%- endif -%}
  {%- if turn.role == 'user' -%}
    {%- if tools and turn == questions[-1] -%}
      {{- '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' -}}
    {%- endif -%}
    {{- '[INST]SPACE' ~ SYSTEM ~ turn.content ~ '[/INST]' -}}
  {%- elif turn.tool_calls -%}
    {{- write_calls(turn.tool_calls) -}}
  {%- elif turn.role == 'assistant' -%}
    {{- 'SPACE' ~ turn.content ~ eos_token -}}
  {%- elif turn.role == 'tool' -%}
    {{- write_result(turn) -}}
  {%- else -%}
    {{- raise_exception('a role that is not known') -}}
  {%- endif -%}
{%- endfor -%}
"""
)

SKIP_SYSTEM = "(1 if messages[0].role == 'system' else 0)"

OWN_SYSTEM_AT_THE_END = "((messages[0].content ~ '\\n\\n') if loop.last and messages[0].role == 'system' else '')"

OWN_SYSTEM_IN_LAST_QUESTION = (
    "((messages[0].content ~ '\\n\\n') if turn == questions[-1] and messages[0].role == 'system' else '')"
)

MISTRAL_3 = MISTRAL_LOOP.replace("START", SKIP_SYSTEM).replace("SPACE", " ").replace("SYSTEM", "''")

MISTRAL_NEMO = MISTRAL_LOOP.replace("START", SKIP_SYSTEM).replace("SPACE", "").replace("SYSTEM", OWN_SYSTEM_AT_THE_END)

# The system turn moves with the last question, also where answers follow it.
MISTRAL_LARGE = (
    MISTRAL_LOOP.replace("START", SKIP_SYSTEM).replace("SPACE", " ").replace("SYSTEM", OWN_SYSTEM_IN_LAST_QUESTION)
)

# A system turn with today's date where the row has none; text and calls share a turn.
MISTRAL_SMALL = r"""
{{- bos_token -}}
{%- if messages[0].role != 'system' -%}
  {{- '[SYSTEM_PROMPT]You are a small model. Today is ' ~ strftime_now('%Y-%m-%d') ~ '.[/SYSTEM_PROMPT]' -}}
{%- endif -%}
{%- if tools -%}{{- '[AVAILABLE_TOOLS]' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
{%- set order = namespace(next='user') -%}
{%- for turn in messages -%}
  {%- if turn.role in ['user', 'assistant'] and not turn.tool_calls -%}
    {%- if turn.role != order.next -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
    {%- set order.next = 'assistant' if turn.role == 'user' else 'user' -%}
  {%- endif -%}
  {%- if turn.role == 'system' -%}{{- '[SYSTEM_PROMPT]' ~ turn.content ~ '[/SYSTEM_PROMPT]' -}}
  {%- elif turn.role == 'user' -%}
    {%- if turn.content is string -%}{{- '[INST]' ~ turn.content ~ '[/INST]' -}}
    {%- else -%}
      {{- '[INST]' -}}
      {%- for part in turn.content -%}{{- part.text -}}{%- endfor -%}
      {{- '[/INST]' -}}
    {%- endif -%}
  {%- elif turn.role == 'assistant' -%}
    {%- if turn.content is string -%}{{- turn.content -}}{%- else -%}{{- turn.content[0].text -}}{%- endif -%}
    {%- for call in turn.tool_calls or [] -%}
      {{- '[TOOL_CALLS]' ~ call.function.name ~ '[ARGS]' ~ (call.function.arguments | tojson) -}}
    {%- endfor -%}
    {{- eos_token -}}
  {%- elif turn.role == 'tool' -%}{{- '[TOOL_RESULTS]' ~ turn.content ~ '[/TOOL_RESULTS]' -}}
  {%- endif -%}
{%- endfor -%}
"""

FAMILIES = [
    Family(
        name="mistral-7b-v0.1",
        template=MISTRAL_1,
        expected=NO_TOOLS | NO_REASONING_FIELD | ALTERNATES | refused(1, 3, by=RAISES),
        **SP | BRACKETS,
    ),
    Family(
        name="mistral-7b-v0.3",
        template=MISTRAL_3,
        special=MISTRAL_MARKS,
        expected=NO_REASONING_FIELD | ALTERNATES | refused(1, 3, 6, by=DROPS),
        **SP | BRACKETS,
    ),
    Family(
        name="mistral-nemo",
        template=MISTRAL_NEMO,
        special=MISTRAL_MARKS,
        expected=NO_REASONING_FIELD | ALTERNATES | refused(1, 3, 6, by=DROPS),
        **SP | BRACKETS | {"tokenizer": "byte"},
    ),
    Family(
        name="mistral-small-3.2",
        template=MISTRAL_SMALL,
        special=(*MISTRAL_MARKS, *tokens("[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [ARGS]")),
        expected=NO_REASONING_FIELD | refused(7, by=RAISES),
        **SP | BRACKETS | {"tokenizer": "byte"},
    ),
]
