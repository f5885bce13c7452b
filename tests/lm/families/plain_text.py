"""Imitations of families with marks of plain text, with an end of the whole chat, or with no end at all."""

from __future__ import annotations

from tests.lm.families.family import (
    DROPS,
    NO_REASONING_FIELD,
    NO_STOP,
    NO_TOOLS,
    RAISES,
    SP,
    TOOLS,
    Family,
    refused,
    tokens,
)

TULU_3 = r"""
{%- for turn in messages -%}
  {%- if turn.role in ['system', 'user'] -%}
    {{- '<|' ~ turn.role ~ '|>\n' ~ turn.content ~ '\n' -}}
  {%- elif turn.role == 'assistant' -%}
    {{- '<|assistant|>\n' ~ turn.content ~ eos_token -}}
    {%- if not loop.last -%}{{- '\n' -}}{%- endif -%}
  {%- endif -%}
  {%- if loop.last and add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
{%- endfor -%}
"""
# The end of the sequence stands after every turn, the user's too.
ZEPHYR = r"""
{%- for turn in messages -%}
  {%- if turn.role in ['system', 'user', 'assistant'] -%}
    {{- '<|' ~ turn.role ~ '|>\n' ~ turn.content ~ eos_token ~ '\n' -}}
  {%- endif -%}
  {%- if loop.last and add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
{%- endfor -%}
"""
# Nothing ends an answer, nor is any mark a token.
FALCON_CHAT = r"""
{%- set names = {'system': 'System: ', 'user': 'User: ', 'assistant': 'Falcon: '} -%}
{%- for turn in messages if turn.role in names -%}
  {{- ('' if loop.first else '\n') ~ names[turn.role] ~ turn.content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\nFalcon:' -}}{%- endif -%}
"""
# The whole chat ends with a mark that no earlier turn has.
PHI_3_5 = r"""
{%- for turn in messages if turn.role in ['system', 'user', 'assistant'] -%}
  {{- '<|' ~ turn.role ~ '|>\n' ~ turn.content ~ '<|end|>\n' -}}
{%- endfor -%}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token -}}
"""
# A system turn is left out in silence; the assistant's mark is written behind every question.
PHI_3_MEDIUM = r"""
{{- bos_token -}}
{%- for turn in messages -%}
  {%- if turn.role == 'user' -%}{{- '<|user|>\n' ~ turn.content ~ '<|end|>\n<|assistant|>\n' -}}
  {%- elif turn.role == 'assistant' -%}{{- turn.content ~ '<|end|>\n' -}}{%- endif -%}
{%- endfor -%}
"""
ERNIE_4_5 = r"""
{{- '<|begin_of_sentence|>' -}}
{%- for turn in messages -%}
  {%- if turn.role == 'system' -%}{{- turn.content ~ '\n' -}}
  {%- elif turn.role == 'user' -%}{{- 'User: ' ~ turn.content ~ '\n' -}}
  {%- elif turn.role == 'assistant' -%}{{- 'Assistant: ' ~ turn.content ~ '<|end_of_sentence|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}
"""
# A system turn with today's date where the row has none; the list of tools is written, a call is not.
GRANITE_3 = r"""
{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{{- '<|start_of_role|>system<|end_of_role|>' -}}
{%- if start -%}{{- messages[0].content -}}
{%- else -%}{{- "You are a model of words. Today's Date: " ~ strftime_now('%B %d, %Y') ~ '.' -}}{%- endif -%}
{{- '<|end_of_text|>\n' -}}
{%- if tools -%}
  {{- '<|start_of_role|>available_tools<|end_of_role|>' ~ (tools | tojson(indent=4)) ~ '<|end_of_text|>\n' -}}
{%- endif -%}
{%- for turn in messages[start:] -%}
  {{- '<|start_of_role|>' ~ turn.role ~ '<|end_of_role|>' ~ turn.content ~ '<|end_of_text|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}
"""
# Two templates by name; both trim, and the plain one wants the roles to take turns.
COMMAND_TURN = r"""
{%- macro mark(role) -%}{{- '<|START_OF_TURN_TOKEN|><|' ~ role ~ '_TOKEN|>' -}}{%- endmacro -%}
{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{{- bos_token -}}
"""
COMMAND_R = (
    COMMAND_TURN
    + r"""
{%- if start -%}{{- mark('SYSTEM') ~ messages[0].content ~ '<|END_OF_TURN_TOKEN|>' -}}{%- endif -%}
{%- for turn in messages[start:] -%}
  {%- if (turn.role == 'user') != (loop.index0 is even) -%}
    {{- raise_exception('roles must alternate') -}}
  {%- endif -%}
  {{- mark('USER' if turn.role == 'user' else 'CHATBOT') ~ turn.content.strip() ~ '<|END_OF_TURN_TOKEN|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- mark('CHATBOT') -}}{%- endif -%}
"""
)
COMMAND_R_TOOLS = (
    COMMAND_TURN
    + r"""
{{- mark('SYSTEM') -}}
{%- if start -%}{{- messages[0].content.strip() ~ '\n' -}}{%- endif -%}
{%- for tool in tools -%}
  {{- 'def ' ~ tool.function.name ~ '(' -}}
  {%- for name in tool.function.parameters.properties -%}{{- name ~ ', ' -}}{%- endfor -%}
  {{- '):  # ' ~ tool.function.description ~ '\n' -}}
{%- endfor -%}
{{- '<|END_OF_TURN_TOKEN|>' -}}
{%- for turn in messages[start:] -%}
  {%- if turn.role == 'tool' -%}
    {{- mark('SYSTEM') ~ '<results>\n' ~ turn.content ~ '\n</results><|END_OF_TURN_TOKEN|>' -}}
  {%- else -%}
    {{- mark('USER' if turn.role == 'user' else 'CHATBOT') ~ turn.content.strip() -}}
    {%- if turn.tool_calls -%}
      {{- '\nAction: ```json\n[' -}}
      {%- for call in turn.tool_calls -%}
        {{- '{"tool_name": "' ~ call.function.name ~ '", "parameters": ' ~ (call.function.arguments | tojson) ~ '}' -}}
      {%- endfor -%}
      {{- ']```' -}}
    {%- endif -%}
    {{- '<|END_OF_TURN_TOKEN|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- mark('CHATBOT') -}}{%- endif -%}
"""
)

PHI_3 = SP | {
    "eos": "<|endoftext|>",
    "headers": ("<|assistant|>\n",),
    "role_mark": "<|assistant|>\n",
    "ends": ("<|end|>",),
    "stops": tokens("<|endoftext|> <|assistant|> <|end|>"),
    "special": tokens("<|user|> <|system|>"),
    "plain": ("</s>",),
}
CHATBOT = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
FAMILIES = [
    Family(name="phi-3.5-mini", template=PHI_3_5, expected=NO_TOOLS | NO_REASONING_FIELD, **PHI_3),
    Family(
        name="phi-3-medium",
        template=PHI_3_MEDIUM,
        expected=NO_TOOLS | NO_REASONING_FIELD | refused(1, 3, 8, by=DROPS),
        **PHI_3,
    ),
    Family(
        name="granite-3.3",
        tokenizer="gpt2",
        template=GRANITE_3,
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        headers=("<|start_of_role|>assistant<|end_of_role|>",),
        role_mark="<|start_of_role|>assistant<|end_of_role|>",
        ends=("<|end_of_text|>",),
        stops=("<|end_of_text|>",),
        special=tokens("<|start_of_role|> <|end_of_role|> <|tool_call|>"),
        expected=NO_TOOLS | NO_REASONING_FIELD,
    ),
    Family(
        name="tulu3",
        tokenizer="byte",
        template=TULU_3,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        headers=("<|assistant|>\n",),
        role_mark="<|assistant|>\n",
        ends=("<|end_of_text|>",),
        stops=("<|end_of_text|>",),
        expected=NO_TOOLS | NO_REASONING_FIELD,
    ),
    Family(
        name="falcon-180b-chat",
        tokenizer="gpt2",
        template=FALCON_CHAT,
        eos="<|endoftext|>",
        headers=("Falcon:",),
        role_mark="Falcon:",
        next_turns=("\nUser: ", "\nFalcon: ", "\nSystem: "),
        stops=("<|endoftext|>",),
        expected=NO_TOOLS | NO_REASONING_FIELD,
    ),
    Family(
        name="zephyr",
        template=ZEPHYR,
        headers=("<|assistant|>\n",),
        role_mark="<|assistant|>\n",
        expected=NO_TOOLS | NO_REASONING_FIELD,
        **SP,
    ),
    Family(
        name="command-r",
        tokenizer="gpt2",
        template={"default": COMMAND_R, "tool_use": COMMAND_R_TOOLS},
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        headers=(CHATBOT,),
        role_mark=CHATBOT,
        ends=("<|END_OF_TURN_TOKEN|>",),
        stops=("<|END_OF_TURN_TOKEN|>",),
        special=tokens("<|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>"),
        expected=NO_REASONING_FIELD | refused(7, 8, by=RAISES),
    ),
    Family(
        name="ernie-4.5",
        template=ERNIE_4_5,
        headers=("Assistant: ",),
        role_mark="Assistant:",
        special=tokens("<|begin_of_sentence|> <|end_of_sentence|>"),
        expected=refused(1, 2, 3, 4, 5, 7, 8, 9, 10, 13, 14, by=(NO_STOP, DROPS))
        | refused(6, 11, by=(NO_STOP, TOOLS, DROPS)),
        **SP | {"ends": ("<|end_of_sentence|>",)},
    ),
]
