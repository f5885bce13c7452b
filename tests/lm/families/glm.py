"""Imitations of GLM's chat templates, which write no end after an answer."""

from __future__ import annotations

from tests.lm.families.family import DROPS, NO_REASONING_FIELD, NO_TOOLS, Family, refused, tokens

# No mark ends an answer: the next turn's does.
CHATGLM_3 = r"""
{{- '[gMASK]sop' -}}
{%- for turn in messages -%}
  {{- '<|' ~ ('observation' if turn.role == 'tool' else turn.role) ~ '|>\n ' ~ turn.content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

# The name of a function is the metadata of a turn, and its arguments are the turn's text.
GLM_4 = r"""
{{- '[gMASK]<sop>' -}}
{%- if tools -%}
  {{- '<|system|>\nFunctions:' -}}
  {%- for tool in tools -%}{{- '\n## ' ~ tool.function.name ~ '\n' ~ (tool | tojson) -}}{%- endfor -%}
{%- endif -%}
{%- for turn in messages -%}
  {%- if turn.tool_calls -%}
    {%- for call in turn.tool_calls -%}
      {{- '<|assistant|>' ~ call.function.name ~ '\n' ~ (call.function.arguments | tojson) -}}
    {%- endfor -%}
  {%- else -%}
    {{- '<|' ~ ('observation' if turn.role == 'tool' else turn.role) ~ '|>\n' ~ turn.content -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

# Thoughts behind the last question alone, an empty block elsewhere, every answer trimmed.
GLM_4_5 = r"""
{{- '[gMASK]<sop>' -}}
{%- if tools -%}
  {{- '<|system|>\n# Tools\n' -}}
  {%- for tool in tools -%}{{- '\n' ~ (tool | tojson) -}}{%- endfor -%}
{%- endif -%}
{%- set last = namespace(question=-1) -%}
{%- for turn in messages -%}
  {%- if turn.role == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for turn in messages -%}
  {%- if turn.role == 'user' -%}
    {{- '<|user|>\n' ~ turn.content -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '/nothink' -}}{%- endif -%}
  {%- elif turn.role == 'assistant' -%}
    {%- set body = turn.content -%}
    {%- set thought = turn.reasoning_content | default('') -%}
    {%- if not thought and '</think>' in body -%}
      {%- set thought = body.split('</think>')[0].split('<think>')[-1] -%}
      {%- set body = body.split('</think>')[-1] -%}
    {%- endif -%}
    {{- '<|assistant|>\n<think>' ~ (thought.strip() if loop.index0 > last.question else '') ~ '</think>' -}}
    {%- if body.strip() -%}{{- '\n' ~ body.strip() -}}{%- endif -%}
    {%- for call in turn.tool_calls or [] -%}
      {{- '\n<tool_call>' ~ call.function.name ~ '\n' -}}
      {%- for key, value in call.function.arguments.items() -%}
        {{- '<arg_key>' ~ key ~ '</arg_key>\n<arg_value>' -}}
        {{- (value if value is string else value | tojson) ~ '</arg_value>\n' -}}
      {%- endfor -%}
      {{- '</tool_call>' -}}
    {%- endfor -%}
  {%- elif turn.role == 'tool' -%}
    {{- '<|observation|>\n<tool_response>\n' ~ turn.content ~ '\n</tool_response>' -}}
  {%- else -%}
    {{- '<|system|>\n' ~ turn.content -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '\n<think></think>' -}}{%- endif -%}
{%- endif -%}
"""

GLM = {
    "tokenizer": "byte",
    "eos": "<|endoftext|>",
    "headers": ("<|assistant|>",),
    "role_mark": "<|assistant|>\n",
    "next_turns": tokens("<|user|> <|observation|> <|system|> <|assistant|>"),
    "stops": tokens("<|endoftext|> <|user|> <|observation|>"),
    "special": tokens("[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>"),
}

FAMILIES = [
    Family(
        name="chatglm3",
        template=CHATGLM_3,
        expected=NO_TOOLS | NO_REASONING_FIELD,
        **GLM
        | {
            "tokenizer": "llama",
            "eos": "</s>",
            "stops": tokens("</s> <|user|> <|observation|>"),
            "special": tokens("[gMASK] sop <|system|> <|user|> <|assistant|> <|observation|>"),
        },
    ),
    Family(name="glm-4", template=GLM_4, expected=NO_REASONING_FIELD | refused(6, by=DROPS), **GLM),
    Family(
        name="glm-4.5",
        template=GLM_4_5,
        plain=tokens("<think> </think> <tool_call> </tool_call>"),
        tool_mark="<|observation|>\n",
        kwargs={"enable_thinking": False},
        **GLM,
    ),
]
