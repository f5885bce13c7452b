"""Imitations of Llama's chat templates."""

from __future__ import annotations

from tests.lm.families.family import ALTERNATES, DROPS, NO_REASONING_FIELD, NO_TOOLS, SP, Family, refused, tokens
from tests.lm.families.mistral import BRACKETS

# Brackets in plain text around the user's turn, the system turn within it, every text trimmed.
LLAMA_2 = r"""
{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{%- for turn in messages[start:] -%}
  {%- if (loop.index0 % 2 == 0) != (turn.role == 'user') -%}
    {{- raise_exception('user and assistant must take turns') -}}
  {%- endif -%}
  {%- set body = turn.content | trim -%}
  {%- if turn.role == 'user' -%}
    {%- if loop.first and start -%}
      {%- set body = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' ~ body -%}
    {%- endif -%}
    {{- bos_token ~ '[INST] ' ~ body ~ ' [/INST]' -}}
  {%- else -%}
    {{- ' ' ~ body ~ ' ' ~ eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

# A system turn with dates is always written; a call takes the place of the turn's text; results become JSON.
LLAMA_3 = r"""
{{- bos_token -}}
{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{%- set today = TODAY -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' -}}
{%- if tools -%}{{- 'Tools: on\n' -}}{%- endif -%}
{{- 'Knowledge until December 2023\nToday: ' ~ today ~ '\n\n' -}}
{%- if start -%}{{- messages[0].content | trim -}}{%- endif -%}
{{- '<|eot_id|>' -}}
{%- set first = namespace(question=true) -%}
{%- for turn in messages[start:] -%}
  {%- if turn.tool_calls -%}
    {%- if turn.tool_calls | length > 1 -%}{{- raise_exception('one call at a time') -}}{%- endif -%}
    {%- set call = turn.tool_calls[0].function -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' ~ call.name ~ '", "parameters": ' -}}
    {{- (call.arguments | tojson) ~ '}<|eot_id|>' -}}
  {%- elif turn.role == 'tool' -%}
    {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' ~ (turn.content | tojson) ~ '<|eot_id|>' -}}
  {%- else -%}
    {{- '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\n\n' -}}
    {%- if tools and first.question and turn.role == 'user' -%}
      {{- 'These functions may be called, with JSON:\n\n' -}}
      {%- for tool in tools -%}{{- (tool | tojson(indent=4)) ~ '\n\n' -}}{%- endfor -%}
      {%- set first.question = false -%}
    {%- endif -%}
    {{- (turn.content | trim) ~ '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""

FIXED_DAY = "date_string if date_string is defined else '26 Jul 2024'"

CLOCK = "date_string if date_string is defined else strftime_now('%d %b %Y')"

# Writes a system turn only where there is one; a call's own text stands between marks; calls end with a mark apart.
LLAMA_4 = r"""
{{- bos_token -}}
{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{%- if start or tools -%}
  {{- '<|header_start|>system<|header_end|>\n\n' -}}
  {%- if start -%}{{- messages[0].content -}}{%- endif -%}
  {%- if tools -%}
    {{- '\nFunctions:\n' -}}
    {%- for tool in tools -%}{{- (tool | tojson) ~ '\n' -}}{%- endfor -%}
  {%- endif -%}
  {{- '<|eot|>' -}}
{%- endif -%}
{%- for turn in messages[start:] -%}
  {%- if turn.tool_calls -%}
    {{- '<|header_start|>assistant<|header_end|>\n\n' -}}
    {%- if turn.content -%}{{- '<|python_start|>' ~ turn.content ~ '<|python_end|>' -}}{%- endif -%}
    {%- for call in turn.tool_calls -%}
      {{- '{"name": "' ~ call.function.name ~ '", "parameters": ' ~ (call.function.arguments | tojson) ~ '}' -}}
    {%- endfor -%}
    {{- '<|eom|>' -}}
  {%- else -%}
    {%- set role = 'ipython' if turn.role == 'tool' else turn.role -%}
    {{- '<|header_start|>' ~ role ~ '<|header_end|>\n\n' ~ turn.content ~ '<|eot|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|header_start|>assistant<|header_end|>\n\n' -}}{%- endif -%}
"""

HEADER_3 = "<|start_header_id|>assistant<|end_header_id|>\n\n"

HEADER_4 = "<|header_start|>assistant<|header_end|>\n\n"

LLAMA_3_FACTS = {
    "tokenizer": "byte",
    "bos": "<|begin_of_text|>",
    "eos": "<|eot_id|>",
    "headers": (HEADER_3,),
    "role_mark": HEADER_3,
    "ends": ("<|eot_id|>",),
    "stops": tokens("<|end_of_text|> <|eom_id|> <|eot_id|>"),
    "special": tokens("<|start_header_id|> <|end_header_id|> <|python_tag|>"),
    # A call drops its own text, and a result is written as a JSON string.
    "expected": NO_REASONING_FIELD | refused(6, by=DROPS),
}

FAMILIES = [
    Family(
        name="llama-2",
        template=LLAMA_2,
        expected=NO_TOOLS | NO_REASONING_FIELD | ALTERNATES,
        **SP | BRACKETS,
    ),
    Family(name="llama-3.1", template=LLAMA_3.replace("TODAY", FIXED_DAY), **LLAMA_3_FACTS),
    Family(name="llama-3.2", template=LLAMA_3.replace("TODAY", CLOCK), **LLAMA_3_FACTS),
    Family(
        name="llama-4",
        template=LLAMA_4,
        **LLAMA_3_FACTS
        | {
            "eos": "<|eot|>",
            "headers": (HEADER_4,),
            "role_mark": HEADER_4,
            "ends": tokens("<|eot|> <|eom|>"),
            "stops": tokens("<|end_of_text|> <|eom|> <|eot|>"),
            "special": tokens("<|header_start|> <|header_end|> <|python_start|> <|python_end|>"),
            "expected": NO_REASONING_FIELD,
        },
    ),
]
