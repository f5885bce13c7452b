"""All imitated families: the 41 of the table of facts, and further ones with traits of their own.

Every template is of our own wording; what it does is what the family's does, as far as a chat of text and tools goes.
"""

from __future__ import annotations

from tests.lm.families import (
    channels,
    chatml,
    deepseek,
    extra_plain,
    extra_tokens,
    gemma,
    glm,
    llama,
    mistral,
    plain_text,
    qwen,
)
from tests.lm.families.family import Family

MODULES = (llama, mistral, gemma, qwen, chatml, deepseek, glm, channels, plain_text, extra_plain, extra_tokens)
FURTHER = ("deepseek-v3.1",)
BY_NAME: dict[str, Family] = {family.name: family for module in MODULES for family in module.FAMILIES}
EXTRAS = [f for m in (extra_plain, extra_tokens) for f in m.FAMILIES] + [BY_NAME[name] for name in FURTHER]
FAMILIES = [family for family in BY_NAME.values() if family not in EXTRAS]
