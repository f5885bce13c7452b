"""Imitations of further families whose marks are plain text, and of templates that change texts."""

from __future__ import annotations

from typing import Any

from tests.lm.families.family import DROPS, NO_REASONING_FIELD, NO_TOOLS, REWRITES, SP, Family, refused

PLAIN_CHAT = NO_TOOLS | NO_REASONING_FIELD

# Long marks of plain text, with a token behind every turn; a role that it does not know is an undefined value.
OPENCHAT = r"""
{{- bos_token -}}
{%- set names = {'user': 'GPT4 Correct User: ', 'assistant': 'GPT4 Correct Assistant: '} -%}
{%- for turn in messages -%}
  {%- if turn.role == 'system' -%}{{- turn.content ~ '<|end_of_turn|>' -}}
  {%- else -%}{{- names[turn.role] + turn.content + '<|end_of_turn|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'GPT4 Correct Assistant:' -}}{%- endif -%}
"""

# Marks of plain text within a line.
VICUNA = r"""
{{- bos_token -}}
{%- for turn in messages -%}
  {%- if turn.role == 'system' -%}{{- turn.content ~ ' ' -}}
  {%- elif turn.role == 'user' -%}{{- 'USER: ' ~ turn.content ~ ' ' -}}
  {%- elif turn.role == 'assistant' -%}{{- 'ASSISTANT: ' ~ turn.content ~ eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

ALPACA = r"""
{{- bos_token -}}
{%- if messages[0].role != 'system' -%}{{- 'Below is an instruction. Write a fitting response.\n\n' -}}{%- endif -%}
{%- for turn in messages -%}
  {%- if turn.role == 'system' -%}{{- turn.content ~ '\n\n' -}}
  {%- elif turn.role == 'user' -%}{{- '### Instruction:\n' ~ turn.content ~ '\n\n' -}}
  {%- elif turn.role == 'assistant' -%}{{- '### Response:\n' ~ turn.content ~ eos_token ~ '\n\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}
"""

SOLAR = r"""
{%- for turn in messages if turn.role in ['system', 'user', 'assistant'] -%}
  {{- '### ' ~ turn.role.title() ~ ':\n' ~ turn.content -}}
  {{- (eos_token ~ '\n\n') if turn.role == 'assistant' else '\n\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\n' -}}{%- endif -%}
"""

# Roles without an end of line, lower case, and a stop that every turn has.
SAIGA = r"""
{%- for turn in messages -%}
  {{- bos_token ~ ('bot' if turn.role == 'assistant' else turn.role) ~ '\n' ~ turn.content ~ eos_token ~ '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- bos_token ~ 'bot\n' -}}{%- endif -%}
"""

# Leaves a system turn out, in silence.
ORION = r"""
{%- for turn in messages -%}
  {%- if loop.first -%}{{- bos_token -}}{%- endif -%}
  {%- if turn.role == 'user' -%}{{- 'Human: ' ~ turn.content ~ '\n\nAssistant: ' ~ eos_token -}}
  {%- elif turn.role == 'assistant' -%}{{- turn.content ~ eos_token -}}{%- endif -%}
{%- endfor -%}
"""

# The assistant's mark ends with a space, which the answer's first token takes with it.
GUANACO = r"""
{%- for turn in messages if turn.role in ['system', 'user', 'assistant'] -%}
  {{- '### ' ~ {'system': 'System', 'user': 'Human', 'assistant': 'Assistant'}[turn.role] ~ ': ' ~ turn.content -}}
  {{- (eos_token ~ '\n') if turn.role == 'assistant' else '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant: ' -}}{%- endif -%}
"""

# An answer that begins with a line break changes how the tokenizer cuts the mark in front of it.
CODER = r"""
{%- if messages[0].role != 'system' -%}{{- 'You help with code.\n' -}}{%- endif -%}
{%- for turn in messages if turn.role in ['system', 'user', 'assistant'] -%}
  {%- if turn.role == 'system' -%}{{- turn.content ~ '\n' -}}
  {%- elif turn.role == 'user' -%}{{- '### Question:\n' ~ turn.content ~ '\n' -}}
  {%- else -%}{{- '### Answer:\n' ~ turn.content ~ '\n' ~ eos_token ~ '\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Answer:\n' -}}{%- endif -%}
"""

TURNS_AND_MARKS = r"""
{%- for turn in MESSAGES if turn.role in ['system', 'user', 'assistant'] -%}
  {{- '<|' ~ turn.role ~ '|>\n' ~ (TEXT) ~ eos_token ~ '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
"""

# Rewrites what it is given: one line of every text; letters that HTML escapes; the last three turns alone.
ONE_LINE = TURNS_AND_MARKS.replace("TEXT", "turn.content.split() | join(' ')").replace("MESSAGES", "messages")

ESCAPING = TURNS_AND_MARKS.replace("TEXT", "turn.content | e").replace("MESSAGES", "messages")

SHORT_MEMORY = TURNS_AND_MARKS.replace("TEXT", "turn.content").replace("MESSAGES", "messages[-3:]")


def plain_marks(name: str, template: str, header: str, **facts: object) -> Family:
    """Return a family whose answers begin behind plain text and end with `</s>`."""
    defaults: dict[str, Any] = {"headers": (header,), "role_mark": header, "expected": PLAIN_CHAT}
    return Family(name=name, template=template, **SP | defaults | facts)


FAMILIES = [
    plain_marks(
        "openchat",
        OPENCHAT,
        "GPT4 Correct Assistant:",
        ends=("<|end_of_turn|>",),
        eos="<|end_of_turn|>",
        stops=("<|end_of_turn|>",),
    ),
    plain_marks("vicuna", VICUNA, "ASSISTANT:"),
    plain_marks("alpaca", ALPACA, "### Response:\n", tokenizer="spaced"),
    plain_marks("solar", SOLAR, "### Assistant:\n", tokenizer="metaspace"),
    plain_marks("saiga", SAIGA, "<s>bot\n"),
    plain_marks("orion", ORION, "Assistant: </s>", expected=PLAIN_CHAT | refused(1, 3, 8, by=DROPS)),
    plain_marks("guanaco", GUANACO, "### Assistant: ", tokenizer="gpt2", bos="<|endoftext|>"),
    plain_marks(
        "coder",
        CODER,
        "### Answer:\n",
        tokenizer="byte",
        bos=None,
        eos="<|EOT|>",
        ends=("<|EOT|>",),
        stops=("<|EOT|>",),
    ),
    plain_marks("one-line", ONE_LINE, "<|assistant|>\n", expected=PLAIN_CHAT | refused(4, 5, by=REWRITES)),
    plain_marks("escaping", ESCAPING, "<|assistant|>\n", expected=PLAIN_CHAT | refused(4, 5, by=(REWRITES, DROPS))),
    plain_marks(
        "short-memory", SHORT_MEMORY, "<|assistant|>\n", expected=PLAIN_CHAT | refused(3, 5, 8, 10, 14, by=DROPS)
    ),
]
