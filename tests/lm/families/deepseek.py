"""Imitations of DeepSeek's chat templates: roles are added tokens that are not special, and thoughts are dropped."""

from __future__ import annotations

from tests.lm.families.family import DROPS, NO_REASONING_FIELD, NO_TOOLS, Family, refused, tokens

# Roles in plain text.
DEEPSEEK_2 = r"""
{{- bos_token -}}
{%- for turn in messages -%}
  {%- if turn.role == 'user' -%}{{- 'User: ' ~ turn.content ~ '\n\n' -}}
  {%- elif turn.role == 'assistant' -%}{{- 'Assistant: ' ~ turn.content ~ eos_token -}}
  {%- elif turn.role == 'system' -%}{{- turn.content ~ '\n\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

# Every system turn goes to the front; thoughts in an answer are dropped; after a result no mark opens the answer;
# arguments are joined as a string, so an object raises a TypeError of Python's.
DEEPSEEK_3 = r"""
{{- bos_token -}}
{%- for turn in messages if turn.role == 'system' -%}
  {{- turn.content if loop.first else '\n\n' ~ turn.content -}}
{%- endfor -%}
TOOLS
{%- set at = namespace(results=false) -%}
{%- for turn in messages if turn.role != 'system' -%}
  {%- if at.results and turn.role != 'tool' -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
  {%- if turn.role == 'user' -%}{{- '<｜User｜>' ~ turn.content -}}
  {%- elif turn.role == 'assistant' -%}
    {%- if not at.results -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
    {{- turn.content.split('</think>')[-1] -}}
    {%- if turn.tool_calls -%}
      {{- '<｜tool▁calls▁begin｜>' -}}
      {%- for call in turn.tool_calls -%}
        {{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments -}}
        {{- '<｜tool▁call▁end｜>' -}}
      {%- endfor -%}
      {{- '<｜tool▁calls▁end｜>' -}}
    {%- endif -%}
    {{- eos_token -}}
  {%- elif turn.role == 'tool' -%}
    {%- if not at.results -%}{{- '<｜tool▁outputs▁begin｜>' -}}{%- endif -%}
    {{- '<｜tool▁output▁begin｜>' ~ turn.content ~ '<｜tool▁output▁end｜>' -}}
  {%- endif -%}
  {%- set at.results = turn.role == 'tool' -%}
{%- endfor -%}
{%- if at.results -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
{%- if add_generation_prompt and not at.results -%}{{- '<｜Assistant｜>PROMPT' -}}{%- endif -%}
"""

WITH_TOOLS = r"""
{%- for tool in tools or [] -%}
  {{- '\n\n### ' + tool.function.name + '\n' + tool.function.description + '\n' + (tool.function | tojson) -}}
{%- endfor -%}
"""

DEEPSEEK_V3 = DEEPSEEK_3.replace("TOOLS", WITH_TOOLS).replace("PROMPT", "<think>\\n")

DEEPSEEK_R1 = DEEPSEEK_3.replace("TOOLS", "").replace("PROMPT", "")

R1_DISTILL = DEEPSEEK_3.replace("TOOLS", "").replace("PROMPT", "<think>\\n")

# The generation prompt closes the thoughts, and every history does too.
DEEPSEEK_V3_1 = (
    DEEPSEEK_3.replace("TOOLS", WITH_TOOLS)
    .replace("PROMPT", "</think>")
    .replace("{{- '<｜Assistant｜>' -}}", "{{- '<｜Assistant｜></think>' -}}")
)

SEQUENCE_END = "<｜end▁of▁sentence｜>"

DEEPSEEK_PLAIN = tokens(
    "<｜User｜> <｜Assistant｜> <think> </think> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> "
    "<｜tool▁call▁end｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁sep｜>"
)

DEEPSEEK = {
    "tokenizer": "byte",
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": SEQUENCE_END,
    "headers": ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
    "role_mark": "<｜Assistant｜>",
    "ends": (SEQUENCE_END,),
    "stops": (SEQUENCE_END,),
    "plain": DEEPSEEK_PLAIN,
    "expected": NO_TOOLS | NO_REASONING_FIELD | refused(5, by=DROPS),
}

FAMILIES = [
    Family(
        name="deepseek-v2",
        template=DEEPSEEK_2,
        **DEEPSEEK
        | {
            "headers": ("Assistant:",),
            "role_mark": "Assistant:",
            "plain": (),
            "expected": NO_TOOLS | NO_REASONING_FIELD,
        },
    ),
    Family(
        name="deepseek-v3",
        template=DEEPSEEK_V3,
        tool_mark="<｜tool▁outputs▁begin｜>",
        **DEEPSEEK | {"expected": NO_REASONING_FIELD | refused(5, by=DROPS)},
    ),
    Family(name="deepseek-r1", template=DEEPSEEK_R1, **DEEPSEEK),
    Family(name="r1-distill-llama", template=R1_DISTILL, **DEEPSEEK),
    Family(
        name="deepseek-v3.1",
        template=DEEPSEEK_V3_1,
        **DEEPSEEK | {"expected": NO_REASONING_FIELD | refused(5, by=DROPS)},
    ),
]
