"""Imitations of families with channels, opened thoughts or sections: MiniMax, Nemotron, gpt-oss, Kimi."""

from __future__ import annotations

from tests.lm.families.family import DROPS, INSIDE, NO_REASONING_FIELD, TOOLS, Family, refused, tokens

# A system turn of its own; the generation prompt opens thoughts that a plain history lacks.
MINIMAX_2 = r"""
{{- bos_token ~ ']~b]system\n' -}}
{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{{- messages[0].content if start else 'You are a helpful assistant.' -}}
{%- if tools -%}
  {{- '\n\n# Tools\n' -}}
  {%- for tool in tools -%}{{- '<tool>' ~ (tool.function | tojson) ~ '</tool>\n' -}}{%- endfor -%}
{%- endif -%}
{{- '[e~[\n' -}}
{%- for turn in messages[start:] -%}
  {%- if turn.role == 'assistant' -%}
    {{- ']~b]ai\n' -}}
    {%- if turn.reasoning_content -%}{{- '<think>\n' ~ turn.reasoning_content ~ '\n</think>\n\n' -}}{%- endif -%}
    {{- turn.content -}}
    {%- for call in turn.tool_calls or [] -%}
      {{- '\n<invoke name="' ~ call.function.name ~ '">' -}}
      {%- for key, value in call.function.arguments.items() -%}
        {{- '<parameter name="' ~ key ~ '">' ~ value ~ '</parameter>' -}}
      {%- endfor -%}
      {{- '</invoke>' -}}
    {%- endfor -%}
    {{- '[e~[\n' -}}
  {%- elif turn.role == 'tool' -%}{{- ']~b]tool\n<response>' ~ turn.content ~ '</response>[e~[\n' -}}
  {%- else -%}{{- ']~b]' ~ turn.role ~ '\n' ~ turn.content ~ '[e~[\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ']~b]ai\n<think>\n' -}}{%- endif -%}
"""

# The last turn stands inside opened thoughts, which nothing closes for a plain answer; earlier thoughts are dropped.
NEMOTRON_2 = r"""
{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{%- set think = enable_thinking is not defined or enable_thinking -%}
{{- '<SPECIAL_10>System\n' -}}
{%- if start -%}{{- messages[0].content.strip() -}}{%- endif -%}
{%- for tool in tools or [] -%}{{- '\n<TOOL>' ~ (tool.function | tojson) ~ '</TOOL>' -}}{%- endfor -%}
{{- '\n' -}}
{%- for turn in messages[start:] -%}
  {%- if turn.role == 'assistant' -%}
    {{- '<SPECIAL_11>Assistant\n' ~ (('<think>\n' if think else '<think></think>') if loop.last else '') -}}
    {{- (turn.content if loop.last else turn.content.split('</think>')[-1]).strip() -}}
    {%- for call in turn.tool_calls or [] -%}
      {{- '<TOOLCALL>' ~ (call.function | tojson) ~ '</TOOLCALL>' -}}
    {%- endfor -%}
    {{- '\n<SPECIAL_12>\n' -}}
  {%- elif turn.role == 'user' -%}{{- '<SPECIAL_11>User\n' ~ turn.content.strip() ~ '\n' -}}
  {%- elif turn.role == 'tool' -%}{{- '<SPECIAL_11>User\n<RESPONSE>' ~ turn.content ~ '</RESPONSE>\n' -}}
  {%- else -%}{{- '<SPECIAL_10>System\n' ~ turn.content.strip() ~ '\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<SPECIAL_11>Assistant\n' ~ ('<think>\n' if think else '<think></think>') -}}
{%- endif -%}
"""

# Channels, today's date, one mark for the end of the whole chat and another for every earlier turn.
GPT_OSS = r"""
{{- '<|start|>system<|message|>You are a model of words.\nCurrent date: ' ~ strftime_now('%Y-%m-%d') ~ '<|end|>' -}}
{%- set start = 1 if messages[0].role in ['system', 'developer'] else 0 -%}
{%- if start or tools -%}
  {{- '<|start|>developer<|message|>' -}}
  {%- if start -%}{{- '# Instructions\n\n' ~ messages[0].content -}}{%- endif -%}
  {%- for tool in tools or [] -%}
    {{- '\n// ' ~ tool.function.description ~ '\ntype ' ~ tool.function.name ~ ' = (_: {' -}}
    {%- for key, value in tool.function.parameters.properties.items() -%}
      {{- key ~ ': ' ~ value.type ~ ', ' -}}
    {%- endfor -%}
    {{- '}) => any;' -}}
  {%- endfor -%}
  {{- '<|end|>' -}}
{%- endif -%}
{%- for turn in messages[start:] -%}
  {%- if turn.role == 'user' -%}{{- '<|start|>user<|message|>' ~ turn.content ~ '<|end|>' -}}
  {%- elif turn.tool_calls -%}
    {%- if turn.content -%}
      {{- '<|start|>assistant<|channel|>analysis<|message|>' ~ turn.content ~ '<|end|>' -}}
    {%- endif -%}
    {%- set call = turn.tool_calls[0].function -%}
    {{- '<|start|>assistant to=functions.' ~ call.name ~ '<|channel|>commentary json<|message|>' -}}
    {{- (call.arguments | tojson) ~ '<|call|>' -}}
  {%- elif turn.role == 'assistant' -%}
    {%- if turn.thinking and loop.last -%}
      {{- '<|start|>assistant<|channel|>analysis<|message|>' ~ turn.thinking ~ '<|end|>' -}}
    {%- endif -%}
    {{- '<|start|>assistant<|channel|>final<|message|>' ~ turn.content -}}
    {%- if loop.last and not add_generation_prompt -%}{{- '<|return|>' -}}{%- else -%}{{- '<|end|>' -}}{%- endif -%}
  {%- elif turn.role == 'tool' -%}
    {{- '<|start|>functions.' ~ turn.name ~ ' to=assistant<|channel|>commentary<|message|>' -}}
    {{- (turn.content | tojson) ~ '<|end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""

# A call is named by its id alone, so a name that the id lacks is lost.
KIMI_2 = r"""
{%- if tools -%}{{- '<|im_system|>tool_declare<|im_middle|>' ~ (tools | tojson) ~ '<|im_end|>' -}}{%- endif -%}
{%- for turn in messages -%}
  {%- if loop.first and turn.role != 'system' -%}
    {{- '<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>' -}}
  {%- endif -%}
  {%- if turn.role == 'user' -%}{{- '<|im_user|>user<|im_middle|>' ~ turn.content -}}
  {%- elif turn.role == 'assistant' -%}
    {{- '<|im_assistant|>assistant<|im_middle|>' ~ turn.content -}}
    {%- if turn.tool_calls -%}
      {{- '<|tool_calls_section_begin|>' -}}
      {%- for call in turn.tool_calls -%}
        {{- '<|tool_call_begin|>' ~ call.id ~ '<|tool_call_argument_begin|>' -}}
        {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}
        {{- '<|tool_call_end|>' -}}
      {%- endfor -%}
      {{- '<|tool_calls_section_end|>' -}}
    {%- endif -%}
  {%- elif turn.role == 'tool' -%}
    {{- '<|im_system|>tool<|im_middle|>## Return of ' ~ turn.tool_call_id ~ '\n' ~ turn.content -}}
  {%- else -%}{{- '<|im_system|>system<|im_middle|>' ~ turn.content -}}{%- endif -%}
  {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- endif -%}
"""

FAMILIES = [
    Family(
        name="minimax-m2",
        tokenizer="byte",
        template=MINIMAX_2,
        bos="]~!b[",
        eos="[e~[",
        headers=("]~b]ai\n",),
        role_mark="]~b]ai\n",
        ends=("[e~[",),
        stops=("[e~[",),
        special=("]~b]",),
        plain=tokens("<think> </think>"),
    ),
    Family(
        name="nemotron-nano-v2",
        tokenizer="byte",
        template=NEMOTRON_2,
        bos="<s>",
        eos="<SPECIAL_12>",
        headers=("<SPECIAL_11>Assistant\n",),
        role_mark="<SPECIAL_11>Assistant\n",
        ends=("<SPECIAL_12>",),
        stops=tokens("</s> <SPECIAL_11> <SPECIAL_12>"),
        special=("<SPECIAL_10>",),
        plain=tokens("<think> </think>"),
        expected=refused(1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 14, by=INSIDE) | refused(5, 13, by=(INSIDE, DROPS)),
        kwargs={"enable_thinking": False},
    ),
    Family(
        name="gpt-oss",
        tokenizer="byte",
        template=GPT_OSS,
        bos="<|startoftext|>",
        eos="<|return|>",
        headers=("<|start|>assistant",),
        role_mark="<|start|>assistant<|channel|>final<|message|>",
        ends=tokens("<|return|> <|call|> <|end|>"),
        stops=tokens("<|return|> <|endoftext|> <|call|>"),
        special=tokens("<|start|> <|message|> <|channel|> <|end|> <|constrain|>"),
        expected=refused(8, by=DROPS) | refused(6, 13, by=(DROPS, TOOLS)),
    ),
    Family(
        name="kimi-k2",
        tokenizer="byte",
        template=KIMI_2,
        bos="[BOS]",
        eos="[EOS]",
        headers=("<|im_assistant|>assistant<|im_middle|>",),
        role_mark="<|im_assistant|>assistant<|im_middle|>",
        ends=("<|im_end|>",),
        stops=tokens("<|im_end|> [EOS]"),
        special=tokens("<|im_system|> <|im_user|> <|im_assistant|> <|im_middle|>"),
        plain=tokens("<|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_end|>"),
        expected=NO_REASONING_FIELD | refused(6, 11, by=DROPS),
    ),
]
