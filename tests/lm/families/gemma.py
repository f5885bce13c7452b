"""Imitations of Gemma's chat templates: the assistant is called model, and the system turn is refused or moved."""

from __future__ import annotations

from tests.lm.families.family import ALTERNATES, NO_REASONING_FIELD, NO_TOOLS, RAISES, Family, refused, tokens

# The assistant's role has a name of its own, every text is trimmed, roles take turns.
GEMMA = r"""
{{- bos_token -}}
{%- set lead = namespace(text='', start=0) -%}
{%- if messages[0].role == 'system' -%}SYSTEM{%- endif -%}
{%- for turn in messages[lead.start:] -%}
  {%- if (turn.role == 'user') != (loop.index0 is even) -%}
    {{- raise_exception('user and model take turns, the user first') -}}
  {%- endif -%}
  {{- '<start_of_turn>' ~ ('model' if turn.role == 'assistant' else turn.role) ~ '\n' -}}
  {%- if loop.first -%}{{- lead.text -}}{%- endif -%}
  {%- if turn.content is string -%}{{- turn.content | trim -}}
  {%- else -%}{%- for part in turn.content -%}{{- part.text | trim -}}{%- endfor -%}{%- endif -%}
  {{- '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""

GEMMA_2 = GEMMA.replace("SYSTEM", "{{- raise_exception('no system turn, please') -}}")

GEMMA_3 = GEMMA.replace("SYSTEM", "{%- set lead.text = messages[0].content ~ '\\n\\n' -%}{%- set lead.start = 1 -%}")

# A generation prompt that writes an empty block of thoughts, which no history holds.
GEMMA_4 = r"""
{{- bos_token -}}
{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{%- if start or tools -%}
  {{- '<|turn>system\n' -}}
  {%- if start -%}{{- messages[0].content | trim -}}{%- endif -%}
  {%- for tool in tools or [] -%}{{- '<|tool>declaration:' ~ (tool.function | tojson) ~ '<tool|>' -}}{%- endfor -%}
  {{- '<turn|>\n' -}}
{%- endif -%}
{%- for turn in messages[start:] -%}
  {%- if turn.role == 'tool' -%}
    {{- '<|turn>tool\n<|tool_response>' ~ turn.name ~ ': ' ~ turn.content ~ '<tool_response|><turn|>\n' -}}
  {%- else -%}
    {{- '<|turn>' ~ ('model' if turn.role == 'assistant' else turn.role) ~ '\n' ~ turn.content | trim -}}
    {%- for call in turn.tool_calls or [] -%}
      {{- '<|tool_call>call:' ~ call.function.name ~ (call.function.arguments | tojson) ~ '<tool_call|>' -}}
    {%- endfor -%}
    {{- '<turn|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|turn>model\n' -}}
  {%- if not (enable_thinking is defined and enable_thinking) -%}{{- '<|channel>thought\n<channel|>' -}}{%- endif -%}
{%- endif -%}
"""

GEMMA_FACTS = {
    "tokenizer": "gemma",
    "bos": "<bos>",
    "eos": "<eos>",
    "headers": ("<start_of_turn>model\n",),
    "role_mark": "<start_of_turn>model\n",
    "ends": ("<end_of_turn>",),
    "stops": tokens("<eos> <end_of_turn>"),
    "special": tokens("<start_of_turn> <end_of_turn>"),
}

FAMILIES = [
    Family(
        name="gemma-2",
        template=GEMMA_2,
        expected=NO_TOOLS | NO_REASONING_FIELD | ALTERNATES | refused(1, 3, by=RAISES),
        **GEMMA_FACTS,
    ),
    Family(
        name="gemma-3",
        template=GEMMA_3,
        configured=("<eos>",),
        expected=NO_TOOLS | NO_REASONING_FIELD | ALTERNATES,
        **GEMMA_FACTS,
    ),
    Family(
        name="gemma-4",
        template=GEMMA_4,
        expected=NO_REASONING_FIELD,
        kwargs={"enable_thinking": True},
        **GEMMA_FACTS
        | {
            "headers": ("<|turn>model\n",),
            "role_mark": "<|turn>model\n",
            "ends": ("<turn|>",),
            "stops": tokens("<eos> <turn|>"),
            "special": tokens(
                "<|turn> <turn|> <|channel> <channel|> <|tool> <tool|> <|tool_call> <tool_call|> "
                "<|tool_response> <tool_response|>"
            ),
        },
    ),
]
