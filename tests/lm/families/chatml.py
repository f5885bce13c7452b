"""Imitations of families that write ChatML, with traits of their own."""

from __future__ import annotations

from tests.lm.families.family import DROPS, NO_REASONING_FIELD, NO_TOOLS, Family, refused, tokens
from tests.lm.families.qwen import END, QWEN, QWEN_CALLS, QWEN_TOOLS, THINK, TOOL_CALL, TOOL_RESPONSE

CHATML = r"""
{%- for turn in messages -%}
  {{- '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

CHATML_WITH_DEFAULT = (
    r"""
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\nYou are a small and helpful model.<|im_end|>\n' -}}
{%- endif -%}
"""
    + CHATML
)

# Two templates by name: the second is the one with tools.
HERMES_TOOLS = (
    "{{- bos_token -}}"
    + QWEN_TOOLS.replace("DEFAULT", "'You call functions.'")
    + r"""
{%- for turn in messages[start:] -%}
  {%- set body = turn.content -%}
  {{- '<|im_start|>' ~ turn.role ~ '\n' -}}
  {%- if turn.role == 'tool' -%}
    {{- '<tool_response>\n' ~ body ~ '\n</tool_response>' -}}
  {%- else -%}{{- body -}}{%- endif -%}"""
    + QWEN_CALLS
    + r"""{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
)

# Writes a system turn of its own in any case, around the row's; later system turns fall away.
SMOLLM_3 = r"""
{{- '<|im_start|>system\n## Metadata\n\nReasoning Mode: /no_think\n\n## Instructions\n\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content -}}{%- else -%}{{- 'You are SmolLM.' -}}{%- endif -%}
{%- if tools -%}
  {{- '\n\n### Tools\n' -}}
  {%- for tool in tools -%}{{- '\n' ~ (tool | tojson) -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- for turn in messages -%}
  {%- if turn.role == 'user' -%}
    {{- '<|im_start|>user\n' ~ turn.content ~ '<|im_end|>\n' -}}
  {%- elif turn.role == 'assistant' -%}
    {{- '<|im_start|>assistant\n' ~ turn.content -}}
    {%- for call in turn.tool_calls or [] -%}
      {{- '<tool_call>' ~ (call.function | tojson) ~ '</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif turn.role == 'tool' -%}
    {{- '<|im_start|>user\n<tool_response>' ~ turn.content ~ '</tool_response><|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# Ends every answer with the end mark, but the chat's last turn with the end of the sequence.
OLMO_3 = r"""
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\nYou are Olmo, and you help.' -}}
  {%- if tools -%}{{- '\n<functions>' ~ (tools | tojson) ~ '</functions>' -}}{%- endif -%}
  {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for turn in messages -%}
  {%- set role = 'environment' if turn.role == 'tool' else turn.role -%}
  {{- '<|im_start|>' ~ role ~ '\n' ~ turn.content -}}
  {%- if turn.role == 'system' and loop.first and tools -%}
    {{- '\n<functions>' ~ (tools | tojson) ~ '</functions>' -}}
  {%- endif -%}
  {%- for call in turn.tool_calls or [] -%}
    {{- '<function_calls>' ~ call.function.name ~ '(' ~ (call.function.arguments | tojson) ~ ')</function_calls>' -}}
  {%- endfor -%}
  {%- if turn.role == 'assistant' and loop.last -%}{{- eos_token -}}{%- else -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# A separator in place of the line break, and nothing between the turns.
PHI_4 = r"""
{%- for turn in messages if turn.role in ['system', 'user', 'assistant'] -%}
  {{- '<|im_start|>' ~ turn.role ~ '<|im_sep|>' ~ turn.content ~ '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}
"""

FAMILIES = [
    Family(
        name="hermes-2-pro",
        template={"default": "{{- bos_token -}}" + CHATML, "tool_use": HERMES_TOOLS},
        plain=TOOL_CALL,
        bos="<|begin_of_text|>",
        expected=NO_REASONING_FIELD,
        **QWEN | {"stops": END},
    ),
    Family(
        name="smollm2",
        template=CHATML_WITH_DEFAULT,
        bos="<|im_start|>",
        expected=NO_TOOLS | NO_REASONING_FIELD,
        **QWEN | {"tokenizer": "gpt2", "stops": END},
    ),
    Family(
        name="smollm3",
        template=SMOLLM_3,
        plain=(*TOOL_RESPONSE, *THINK),
        expected=NO_REASONING_FIELD | refused(8, by=DROPS),
        **QWEN | {"stops": END},
    ),
    Family(
        name="yi-chat",
        template=CHATML,
        bos="<s>",
        expected=NO_TOOLS | NO_REASONING_FIELD,
        **QWEN | {"tokenizer": "gemma", "eos": "<|endoftext|>", "stops": tokens("<|endoftext|> <|im_end|>")},
    ),
    Family(
        name="olmo-3",
        template=OLMO_3,
        expected=NO_REASONING_FIELD,
        **QWEN
        | {
            "eos": "<|endoftext|>",
            "ends": tokens("<|im_end|> <|endoftext|>"),
            "stops": tokens("<|endoftext|> <|im_end|>"),
        },
    ),
    Family(
        name="phi-4",
        template=PHI_4,
        bos="<|endoftext|>",
        marks_strip="both",
        expected=NO_TOOLS | NO_REASONING_FIELD,
        **QWEN
        | {
            "headers": ("<|im_start|>assistant<|im_sep|>",),
            "role_mark": "<|im_start|>assistant<|im_sep|>",
            "special": tokens("<|im_start|> <|im_sep|> <|im_end|> <|endoftext|>"),
        },
    ),
]
