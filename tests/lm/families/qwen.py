"""Imitations of Qwen's chat templates: ChatML with tools, and with reasoning behind the last question alone."""

from __future__ import annotations

from tests.lm.families.family import NO_REASONING_FIELD, NO_TOOLS, RAISES, Family, refused, tokens

START = ("<|im_start|>assistant\n",)

END = ("<|im_end|>",)

THINK = tokens("<think> </think>")

TOOL_CALL = tokens("<tool_call> </tool_call>")

TOOL_RESPONSE = tokens("<tool_response> </tool_response>")

# The last turn of a chat stays open, unless the assistant is to go on.
QWEN_1_5 = r"""
{%- for turn in messages -%}
  {%- if loop.first and turn.role != 'system' -%}
    {{- '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' -}}
  {%- endif -%}
  {{- '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content -}}
  {%- if not loop.last or add_generation_prompt -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# Tools stand in the system turn, results in a user turn; neighbouring results share one.
QWEN_TOOLS = r"""
{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{%- set opening = messages[0].content if start else DEFAULT -%}
{%- if tools or opening -%}
  {{- '<|im_start|>system\n' ~ opening -}}
  {%- if tools -%}
    {{- '\n\n# Tools\n\nFunctions that may be called:\n<tools>' -}}
    {%- for tool in tools -%}{{- '\n' ~ (tool | tojson) -}}{%- endfor -%}
    {{- '\n</tools>\n\nCall one with its name and arguments as JSON.' -}}
  {%- endif -%}
  {{- '<|im_end|>\n' -}}
{%- endif -%}
"""

QWEN_CALLS = r"""
    {%- for call in turn.tool_calls or [] -%}
      {%- if not loop.first or body -%}{{- '\n' -}}{%- endif -%}
      {{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' -}}
      {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}
      {{- '}\n</tool_call>' -}}
    {%- endfor -%}
"""

QWEN_RESULT = r"""
    {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\n<tool_response>\n' ~ turn.content ~ '\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
"""

QWEN_2_5 = (
    QWEN_TOOLS.replace("DEFAULT", "'You are Qwen, a helpful assistant.'")
    + r"""
{%- for turn in messages[start:] -%}
  {%- if turn.role == 'tool' -%}"""
    + QWEN_RESULT
    + r"""
  {%- else -%}
    {%- set body = turn.content -%}
    {{- '<|im_start|>' ~ turn.role ~ '\n' ~ body -}}"""
    + QWEN_CALLS
    + r"""{{- '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
)

# Reasoning is written behind the last question alone; the very last turn has a block, even an empty one.
QWEN_3 = (
    QWEN_TOOLS.replace("DEFAULT", "''")
    + r"""
{%- set last = namespace(question=-1) -%}
{%- for turn in messages[start:] -%}
  {%- if turn.role == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for turn in messages[start:] -%}
  {%- if turn.role == 'tool' -%}"""
    + QWEN_RESULT
    + r"""
  {%- elif turn.role == 'assistant' -%}
    {%- set body = turn.content -%}
    {%- set thought = '' -%}
    {%- if turn.reasoning_content is string -%}
      {%- set thought = turn.reasoning_content -%}
    {%- elif '</think>' in body -%}
      {%- set thought = body.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
      {%- set body = body.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > last.question and (thought or loop.last) -%}
      {{- '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' -}}
      {%- set body = body.lstrip('\n') -%}
    {%- endif -%}
    {{- body -}}"""
    + QWEN_CALLS
    + r"""{{- '<|im_end|>\n' -}}
  {%- else -%}
    {{- '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content ~ '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""
)

# Trims every text, refuses a later system turn, writes calls as tags, and takes arguments as an object alone.
QWEN_3_5 = r"""
{%- set last = namespace(question=-1) -%}
{%- for turn in messages -%}
  {%- if turn.role == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}
  {{- '<|im_start|>system\n# Tools\n\n<tools>' -}}
  {%- for tool in tools -%}{{- '\n' ~ (tool | tojson) -}}{%- endfor -%}
  {{- '\n</tools>' -}}
  {%- if messages[0].role == 'system' -%}{{- '\n\n' ~ messages[0].content | trim -}}{%- endif -%}
  {{- '<|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}
  {{- '<|im_start|>system\n' ~ messages[0].content | trim ~ '<|im_end|>\n' -}}
{%- endif -%}
{%- for turn in messages -%}
  {%- set body = turn.content | trim -%}
  {%- if turn.role == 'system' -%}
    {%- if not loop.first -%}{{- raise_exception('a system turn must come first') -}}{%- endif -%}
  {%- elif turn.role == 'user' -%}
    {{- '<|im_start|>user\n' ~ body ~ '<|im_end|>\n' -}}
  {%- elif turn.role == 'assistant' -%}
    {%- set thought = turn.reasoning_content | default('') -%}
    {%- if not thought and '</think>' in body -%}
      {%- set thought = body.split('</think>')[0].split('<think>')[-1] -%}
      {%- set body = body.split('</think>')[-1] | trim -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > last.question -%}{{- '<think>\n' ~ thought | trim ~ '\n</think>\n\n' -}}{%- endif -%}
    {{- body -}}
    {%- for call in turn.tool_calls or [] -%}
      {{- ('\n\n' if body and loop.first else '') ~ '<tool_call>\n<function=' ~ call.function.name ~ '>\n' -}}
      {%- for key, value in call.function.arguments | items -%}
        {{- '<parameter=' ~ key ~ '>\n' ~ value ~ '\n</parameter>\n' -}}
      {%- endfor -%}
      {{- '</function>\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif turn.role == 'tool' -%}
    {{- '<|im_start|>user\n<tool_response>\n' ~ body ~ '\n</tool_response><|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n<think>\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""

# The assistant's turn begins with an opened block, which no plain history holds.
QWQ = (
    QWEN_TOOLS.replace("DEFAULT", "''")
    + r"""
{%- for turn in messages[start:] -%}
  {%- if turn.role == 'tool' -%}"""
    + QWEN_RESULT
    + r"""
  {%- else -%}
    {%- set body = turn.content -%}
    {%- if turn.role == 'assistant' and not loop.last and '</think>' in body -%}
      {%- set body = body.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>' ~ turn.role ~ '\n' ~ body -}}"""
    + QWEN_CALLS
    + r"""{{- '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}
"""
)

QWEN = {
    "tokenizer": "byte",
    "eos": "<|im_end|>",
    "headers": START,
    "ends": END,
    "stops": tokens("<|im_end|> <|endoftext|>"),
    "role_mark": START[0],
    "special": tokens("<|im_start|> <|im_end|> <|endoftext|>"),
}

FAMILIES = [
    Family(name="qwen1.5", template=QWEN_1_5, expected=NO_TOOLS | NO_REASONING_FIELD, **QWEN),
    Family(
        name="qwen2.5",
        template=QWEN_2_5,
        plain=TOOL_CALL,
        tool_mark="<tool_response>\n",
        expected=NO_REASONING_FIELD,
        **QWEN,
    ),
    Family(
        name="qwen3",
        template=QWEN_3,
        plain=(*TOOL_CALL, *TOOL_RESPONSE, *THINK),
        tool_mark="<tool_response>\n",
        kwargs={"enable_thinking": False},
        **QWEN,
    ),
    Family(
        name="qwen3.5",
        template=QWEN_3_5,
        plain=(*TOOL_CALL, *TOOL_RESPONSE, *THINK),
        tool_mark="<tool_response>\n",
        expected=refused(8, by=RAISES),
        kwargs={"enable_thinking": False},
        **QWEN,
    ),
    Family(
        name="qwq",
        template=QWQ,
        plain=(*TOOL_CALL, *TOOL_RESPONSE, *THINK),
        tool_mark="<tool_response>\n",
        expected=NO_REASONING_FIELD,
        **QWEN,
    ),
]
