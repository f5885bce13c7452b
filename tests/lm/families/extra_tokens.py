"""Imitations of further families whose marks are tokens, each with a trait that no other imitation has."""

from __future__ import annotations

from tests.lm.families.chatml import CHATML
from tests.lm.families.extra_plain import PLAIN_CHAT, plain_marks
from tests.lm.families.family import DROPS, NO_REASONING_FIELD, NO_TOOLS, RAISES, SP, Family, refused, tokens
from tests.lm.families.gemma import GEMMA_FACTS
from tests.lm.families.mistral import BRACKETS, MISTRAL_LARGE, MISTRAL_MARKS
from tests.lm.families.plain_text import PHI_3, PHI_3_5

# The system turn ends with the same token, a user's turn with a line break alone.
EXAONE = r"""
{%- for turn in messages -%}
  {%- if loop.first and turn.role != 'system' -%}{{- '[|system|][|endofturn|]\n' -}}{%- endif -%}
  {{- '[|' ~ turn.role ~ '|]' ~ turn.content -}}
  {{- '\n' if turn.role == 'user' else '[|endofturn|]\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}
"""

# A space before every text; calls as JSON lines between tags.
JAMBA = r"""
{{- bos_token -}}
{%- if tools -%}
  {{- '<|bom|><|system|> Tools: ' ~ (tools | tojson) ~ '<|eom|>' -}}
{%- endif -%}
{%- for turn in messages -%}
  {{- '<|bom|><|' ~ turn.role ~ '|> ' ~ turn.content -}}
  {%- if turn.tool_calls -%}
    {{- '<tool_calls>[\n' -}}
    {%- for call in turn.tool_calls -%}
      {{- '{"name": "' ~ call.function.name ~ '", "arguments": ' ~ call.function.arguments ~ '}\n' -}}
    {%- endfor -%}
    {{- ']</tool_calls>' -}}
  {%- endif -%}
  {{- '<|eom|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|bom|><|assistant|>' -}}{%- endif -%}
"""

# Begins every turn with the beginning of the sequence.
SEED_OSS = r"""
{%- if tools -%}{{- bos_token ~ 'system\nTools: ' ~ (tools | tojson) ~ eos_token -}}{%- endif -%}
{%- for turn in messages -%}
  {{- bos_token ~ turn.role ~ '\n' -}}
  {%- if turn.reasoning_content -%}
    {{- '<seed:think>' ~ turn.reasoning_content ~ '</seed:think>' -}}
  {%- endif -%}
  {{- turn.content -}}
  {%- for call in turn.tool_calls or [] -%}
    {{- '<seed:tool_call>\n<function=' ~ call.function.name ~ '>\n' -}}
    {%- for key, value in call.function.arguments.items() -%}
      {{- '<parameter=' ~ key ~ '>' ~ value ~ '</parameter>\n' -}}
    {%- endfor -%}
    {{- '</function>\n</seed:tool_call>' -}}
  {%- endfor -%}
  {{- eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- bos_token ~ 'assistant\n' -}}{%- endif -%}
"""

# A mark before the user's turn, and one behind it that opens the answer.
HUNYUAN = r"""
{{- bos_token -}}
{%- for turn in messages -%}
  {%- if turn.role == 'system' -%}{{- turn.content ~ '<｜hy_place▁holder▁no▁3｜>' -}}
  {%- elif turn.role == 'user' -%}{{- '<｜hy_User｜>' ~ turn.content -}}
  {%- elif turn.role == 'assistant' -%}{{- '<｜hy_Assistant｜>' ~ turn.content ~ eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜hy_Assistant｜>' -}}
{%- else -%}{{- '<｜hy_place▁holder▁no▁8｜>' -}}{%- endif -%}
"""

# Marks that close each turn by role, so that a user's turn ends with another token than an answer.
APERTUS = r"""
{{- bos_token -}}
{%- for turn in messages if turn.role in ['system', 'user', 'assistant'] -%}
  {{- '<|' ~ turn.role ~ '_start|>' -}}
  {%- if turn.content is string -%}{{- turn.content -}}
  {%- else -%}{%- for part in turn.content -%}{{- part.text -}}{%- endfor -%}{%- endif -%}
  {{- '<|' ~ turn.role ~ '_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""

# A mark on both sides of the answer's text.
COMMAND_A = r"""
{{- bos_token -}}
{%- set names = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'} -%}
{%- for turn in messages if turn.role in names -%}
  {{- '<|START_OF_TURN_TOKEN|><|' ~ names[turn.role] ~ '_TOKEN|>' -}}
  {{- '<|START_RESPONSE|>' if turn.role == 'assistant' else '' -}}
  {{- turn.content -}}
  {{- '<|END_RESPONSE|>' if turn.role == 'assistant' else '' -}}
  {{- '<|END_OF_TURN_TOKEN|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- endif -%}
"""

# A system turn of its own that opens with how to think, and calls whose text is made with Python's operators.
MAGISTRAL = r"""
{{- bos_token -}}
{%- if messages[0].role != 'system' -%}{{- '[SYSTEM_PROMPT]Think first.[/SYSTEM_PROMPT]' -}}{%- endif -%}
{%- for turn in messages -%}
  {%- if turn.role == 'system' -%}{{- '[SYSTEM_PROMPT]' ~ turn.content ~ '[/SYSTEM_PROMPT]' -}}
  {%- elif turn.role == 'user' -%}{{- '[INST]' + turn.content + '[/INST]' -}}
  {%- elif turn.role == 'assistant' -%}
    {%- if turn.reasoning_content -%}{{- '[THINK]' ~ turn.reasoning_content ~ '[/THINK]' -}}{%- endif -%}
    {{- turn.content ~ eos_token -}}
  {%- else -%}{{- 'Unknown role ' + 3 -}}{%- endif -%}
{%- endfor -%}
"""

GEMMA_LINES = r"""
{{- bos_token -}}
{%- for turn in messages -%}
  {%- set role = 'model' if turn.role == 'assistant' else turn.role -%}
  {{- '<start_of_turn>' ~ role ~ '\n' ~ turn.content ~ '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""

# Reads contents as lists of parts, and turns a string into nothing.
PARTS = r"""
{%- for turn in messages if turn.role in ['system', 'user', 'assistant'] -%}
  {{- turn.role.title() ~ ': ' -}}
  {%- for part in turn.content -%}
    {%- if part.type == 'text' -%}{{- part.text -}}{%- elif part.type == 'image' -%}{{- '<image>' -}}{%- endif -%}
  {%- endfor -%}
  {{- '<end_of_utterance>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

# Every text ends with the mark of the next answer, whether it is asked for or not.
EDGE = r"""
{%- for turn in messages if turn.role in ['system', 'user', 'assistant'] -%}
  {{- '<|' ~ turn.role ~ '|>\n' ~ turn.content -}}
{%- endfor -%}
{{- '<|assistant|>' -}}
"""

FAMILIES = [
    Family(
        name="glm-edge",
        tokenizer="byte",
        template=EDGE,
        eos="<|endoftext|>",
        headers=("<|assistant|>\n", "<|assistant|>"),
        next_turns=tokens("<|user|> <|system|> <|assistant|>"),
        stops=tokens("<|endoftext|> <|user|> <|observation|>"),
        special=tokens("<|system|> <|assistant|>"),
        role_mark="<|assistant|>",
        expected=PLAIN_CHAT,
    ),
    plain_marks(
        "internlm2",
        "{{- bos_token -}}" + CHATML,
        "<|im_start|>assistant\n",
        ends=("<|im_end|>",),
        configured=("</s>",),
        stops=tokens("</s> <|im_end|>"),
        special=tokens("<|im_start|> <|im_end|>"),
    ),
    plain_marks(
        "exaone-3.5",
        EXAONE,
        "[|assistant|]",
        tokenizer="byte",
        bos="[BOS]",
        eos="[|endofturn|]",
        ends=("[|endofturn|]",),
        stops=("[|endofturn|]",),
        special=tokens("[|system|] [|user|] [|assistant|]"),
    ),
    plain_marks(
        "jamba",
        JAMBA,
        "<|bom|><|assistant|>",
        bos="<|startoftext|>",
        eos="<|endoftext|>",
        ends=("<|eom|>",),
        stops=tokens("<|endoftext|> <|eom|>"),
        special=tokens("<|bom|> <|system|> <|user|> <|assistant|> <|tool|>"),
        expected=NO_REASONING_FIELD,
    ),
    plain_marks(
        "seed-oss",
        SEED_OSS,
        "<seed:bos>assistant\n",
        tokenizer="byte",
        bos="<seed:bos>",
        eos="<seed:eos>",
        ends=("<seed:eos>",),
        stops=("<seed:eos>",),
        special=tokens("<seed:think> </seed:think>"),
        expected={},
    ),
    plain_marks(
        "hunyuan",
        HUNYUAN,
        "<｜hy_Assistant｜>",
        tokenizer="byte",
        bos="<｜hy_begin▁of▁sentence｜>",
        eos="<｜hy_place▁holder▁no▁2｜>",
        ends=("<｜hy_place▁holder▁no▁2｜>",),
        stops=("<｜hy_place▁holder▁no▁2｜>",),
        special=tokens("<｜hy_User｜> <｜hy_Assistant｜> <｜hy_place▁holder▁no▁3｜> <｜hy_place▁holder▁no▁8｜>"),
    ),
    plain_marks(
        "apertus",
        APERTUS,
        "<|assistant_start|>",
        tokenizer="byte",
        eos="<|assistant_end|>",
        ends=("<|assistant_end|>",),
        stops=tokens("</s> <|assistant_end|>"),
        special=tokens("<|system_start|> <|system_end|> <|user_start|> <|user_end|> <|assistant_start|>"),
    ),
    plain_marks(
        "command-a",
        COMMAND_A,
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        tokenizer="gpt2",
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        ends=("<|END_OF_TURN_TOKEN|>",),
        stops=("<|END_OF_TURN_TOKEN|>",),
        special=tokens(
            "<|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
            "<|START_RESPONSE|> <|END_RESPONSE|>"
        ),
    ),
    plain_marks(
        "magistral",
        MAGISTRAL,
        "[/INST]",
        tokenizer="byte",
        role_mark="[/INST]",
        special=(*MISTRAL_MARKS, *tokens("[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [THINK] [/THINK]")),
        expected=NO_TOOLS | refused(13, by=RAISES),
    ),
    Family(
        name="mistral-large",
        template=MISTRAL_LARGE,
        special=MISTRAL_MARKS,
        expected=NO_REASONING_FIELD | refused(7, 8, by=RAISES) | refused(6, by=DROPS),
        **SP | BRACKETS,
    ),
    Family(
        name="phi-3-mini",
        template=PHI_3_5,
        marks_strip="right",
        expected=PLAIN_CHAT,
        **PHI_3,
    ),
    plain_marks(
        "parts",
        PARTS,
        "Assistant:",
        ends=("<end_of_utterance>",),
        eos="<end_of_utterance>",
        stops=("<end_of_utterance>",),
        tokenizer="byte",
        takes_parts=True,
    ),
    # Line breaks are added tokens, as in Gemma's vocabulary, and no marks.
    Family(
        name="gemma-with-lines",
        template=GEMMA_LINES,
        plain=("\n", "\n\n", "\n\n\n"),
        expected=PLAIN_CHAT,
        **GEMMA_FACTS,
    ),
]
