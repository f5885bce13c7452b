"""The chat templates that a line can choose by name, for a base without one; each states how an answer ends.

A mark that is no token of the vocabulary is written as text. An answer then ends with the tokenizer's end-of-sequence
token, because no other single token could stop the generation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_retrain.core.errors import IntegrityError, UsageError


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """How each role's turn begins and ends.

    Attributes:
        turns: By role, the texts before and after a content. A role that is missing is refused by the template.
        end: The mark after an answer; None: the end-of-sequence token.
        after_end: The text between an answer's end and the next turn.
        default_system: The text at the start where a chat has no system turn.
        system_in_user: The texts before and after a system turn's content, which then opens the user turn behind it;
            None: it is a turn of its own.
    """

    turns: dict[str, tuple[str, str]]
    end: str | None = None
    after_end: str = ""
    default_system: str = ""
    system_in_user: tuple[str, str] | None = None


NAMED_TEMPLATES = {
    "chatml": NamedTemplate(
        {
            "system": ("<|im_start|>system\n", "<|im_end|>\n"),
            "user": ("<|im_start|>user\n", "<|im_end|>\n"),
            "tool": ("<|im_start|>tool\n", "<|im_end|>\n"),
            "assistant": ("<|im_start|>assistant\n", ""),
        },
        end="<|im_end|>",
        after_end="\n",
    ),
    "alpaca": NamedTemplate(
        {
            "system": ("", "\n\n"),
            "user": ("### Instruction:\n", "\n\n"),
            "assistant": ("### Response:\n", ""),
        },
        after_end="\n\n",
        default_system=(
            "Below is an instruction that describes a task. Write a response that completes it as it asks.\n\n"
        ),
    ),
    "vicuna": NamedTemplate(
        {"system": ("", "\n\n"), "user": ("USER: ", "\n"), "assistant": ("ASSISTANT: ", "")},
        after_end="\n",
    ),
    "zephyr": NamedTemplate(
        {
            "system": ("<|system|>\n", "{eos}\n"),
            "user": ("<|user|>\n", "{eos}\n"),
            "assistant": ("<|assistant|>\n", ""),
        },
        after_end="\n",
    ),
    "llama-3": NamedTemplate(
        {
            "system": ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
            "user": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
            "tool": ("<|start_header_id|>ipython<|end_header_id|>\n\n", "<|eot_id|>"),
            "assistant": ("<|start_header_id|>assistant<|end_header_id|>\n\n", ""),
        },
        end="<|eot_id|>",
    ),
    "gemma": NamedTemplate(
        {
            "user": ("<start_of_turn>user\n", "<end_of_turn>\n"),
            "assistant": ("<start_of_turn>model\n", ""),
        },
        end="<end_of_turn>",
        after_end="\n",
        system_in_user=("", "\n\n"),
    ),
    # Each exchange begins with the first token of a text.
    "llama-2": NamedTemplate(
        {"user": ("{bos}[INST] ", " [/INST]"), "assistant": (" ", " ")},
        system_in_user=("<<SYS>>\n", "\n<</SYS>>\n\n"),
    ),
    "phi-3": NamedTemplate(
        {
            "system": ("<|system|>\n", "<|end|>\n"),
            "user": ("<|user|>\n", "<|end|>\n"),
            "assistant": ("<|assistant|>\n", ""),
        },
        end="<|end|>",
        after_end="\n",
    ),
    # A whole text without turns, or a prompt and its answer that bring their own marks.
    "plain": NamedTemplate({"system": ("", ""), "user": ("", ""), "assistant": ("", "")}),
}
NAMES = tuple(NAMED_TEMPLATES)


def older_template(folder: Path) -> Any:
    """Return the template of a `chat_template.json`, which transformers reads for processors alone; None without one.

    Raises:
        IntegrityError: If the file is damaged.
    """
    path = folder / "chat_template.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"base_model: {path.name} is damaged: {error!r}") from error


def choose_template(tokenizer: Any, name: str | None) -> Any:
    """Return the template in use: a named one, one of the tokenizer's own, Jinja text, or the tokenizer's default.

    Raises:
        UsageError: If the name is none of these, or the tokenizer has no default and the line names none.
    """
    own = tokenizer.chat_template
    if name is None:
        # Refused here, before data is read or time on a GPU is paid for.
        if not own:
            raise UsageError(
                "base_model: its tokenizer has no chat template; name one in data.template "
                f"({', '.join(NAMES)}, or a Jinja file), or choose an instruction-tuned model"
            )
        if isinstance(own, dict) and "default" not in own:
            raise UsageError(
                f"base_model: its tokenizer has several chat templates and no default; set data.template to one of "
                f"{', '.join(sorted(own))}"
            )
        return own

    if isinstance(own, dict) and name in own:
        return own[name]
    if name in NAMES:
        if tokenizer.eos_token is None:
            raise UsageError(
                f"data.template: {name} needs an end-of-sequence token, and neither the tokenizer nor "
                "generation_config.json of the base model names one; name it in data.stop_tokens"
            )
        return jinja_text(name, tokenizer)
    if "{%" in name or "{{" in name:
        return name
    names = [*NAMES, *(own if isinstance(own, dict) else ())]
    raise UsageError(
        f"data.template: there is no template {name!r}; expected a Jinja file or one of {', '.join(names)}"
    )


def jinja_text(name: str, tokenizer: Any) -> str:
    """Return the template of `NAMES` as Jinja text for a tokenizer."""
    template = NAMED_TEMPLATES[name]
    # The first token of a text, where the tokenizer writes one by itself; a model that was trained so needs it.
    bos = tokenizer.bos_token if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else None
    # Written as text, a mark of several tokens stops nothing; the end-of-sequence token always does.
    end = template.end if template.end is not None and template.end in tokenizer.get_vocab() else tokenizer.eos_token

    def quoted(text: str) -> str:
        escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        # The end as text, since the tokenizer itself may name none.
        text = escaped.replace("{eos}", tokenizer.eos_token)
        variables = text.replace("{bos}", "' + bos_token + '" if bos else "")
        return f"'{variables}'"

    begins = any("{bos}" in before for before, _ in template.turns.values())
    parts = ["{{ bos_token }}"] if bos and not begins else []
    if template.default_system:
        parts.append("{% if messages[0]['role'] != 'system' %}{{ " + quoted(template.default_system) + " }}{% endif %}")

    branches, opening, opened = [], "", ""
    if template.system_in_user:
        before, after = map(quoted, template.system_in_user)
        parts.append("{% set opening = namespace(system='') %}")
        text = f"opening.system + {before} + m['content'] + {after}"
        branches.append(f"if m['role'] == 'system' %}}{{% set opening.system = {text} %}}")
        opening, opened = "opening.system + ", "{% set opening.system = '' %}"
    for role, (before, after) in template.turns.items():
        after_text = quoted(after + end + template.after_end if role == "assistant" else after)
        is_user = role == "user"
        text = f"{quoted(before)} + {opening if is_user else ''}m['content'] + {after_text}"
        branches.append(f"if m['role'] == '{role}' %}}{{{{ {text} }}}}{opened if is_user else ''}")
    refusal = f"{{% else %}}{{{{ raise_exception('{name} has no turns of the role ' + m['role']) }}}}{{% endif %}}"
    parts.append("{% for m in messages %}{% " + "{% el".join(branches) + refusal + "{% endfor %}")

    # An answer begins after the mark; a space at its end would be another token than in a whole chat.
    start = template.turns["assistant"][0].rstrip(" ")
    parts.append("{% if add_generation_prompt %}{{ " + quoted(start) + " }}{% endif %}" if start else "")
    return "".join(parts)


def missing_marks(name: str | None, tokenizer: Any) -> list[str]:
    """Return a sentence where the end mark of a named template is no token of the vocabulary."""
    end = NAMED_TEMPLATES[name].end if name in NAMED_TEMPLATES else None
    if end is None or end in tokenizer.get_vocab():
        return []
    return [
        f"data.template: {name}: {end} is no token of the base model's vocabulary, so an answer ends with "
        f"{tokenizer.eos_token}, and the other marks are written as text"
    ]
