"""Write an Ollama Modelfile beside a GGUF file: the file, the chat template, the system turn, and what ends an answer.

Ollama renders chats by a template of Go's language and not by the model's own, which is Jinja. The parts of a turn are
read off the model's rendering. A template that does more than to put text around turns has no such parts; then the
Modelfile has no TEMPLATE, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_retrain.core import progress
from qlora_retrain.lm import chat
from qlora_retrain.lm.chat import ChatTokenizer, RowRefused

NAME = "Modelfile"
# Texts that no template changes or holds.
_SYSTEM, _USER, _ANSWER, _NEXT = ("\ue001s", "\ue001u", "\ue001a", "\ue001n")


@dataclass(frozen=True, slots=True)
class TurnTexts:
    """The texts around the turns of a chat.

    Attributes:
        opening: Before the first turn, where there is no system turn.
        system: Before and after the text of a system turn; None where the template takes none.
        user: Before and after a user's text; what is after it begins the answer.
        answer: Before and after an answer that is part of the history.
    """

    opening: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    answer: tuple[str, str]

    @classmethod
    def from_tokenizer(cls, tokenizer: ChatTokenizer, bos: str) -> TurnTexts | None:
        """Read them off the chat template; None where it does more than to put text around turns.

        Args:
            tokenizer: The tokenizer with the template.
            bos: The token that the tokenizer puts before every text, which is part of no turn; or nothing.
        """
        turns = [("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)]
        parts = _split(_render(tokenizer, turns), [_USER, _ANSWER, _NEXT])
        if parts is None or not parts[1].startswith(parts[3]):
            return None
        system_parts = _split(_render(tokenizer, [("system", _SYSTEM), ("user", _USER)]), [_SYSTEM, _USER])
        texts = cls._from_parts(parts, system_parts, bos)
        if texts._renders_as(tokenizer):
            return texts
        # Without its system turn a model that was trained with one answers worse, and nothing would say so.
        texts = cls._from_parts(parts, None, bos)
        return texts if tokenizer.chat_format.system is None and texts._renders_as(tokenizer) else None

    @classmethod
    def _from_parts(cls, parts: Sequence[str], system_parts: Sequence[str] | None, bos: str) -> TurnTexts:
        """Return the texts of a chat of three turns, and of one that begins with a system turn; None: there is none."""
        # What stands before a user's text at the beginning, after an answer, and after a system turn.
        before_user = _common_end(parts[0].removeprefix(bos), parts[2])
        system = None
        if system_parts:
            before_user = _common_end(before_user, system_parts[1])
            system = system_parts[0], system_parts[1].removesuffix(before_user)
        answer = parts[1].removeprefix(parts[3]), parts[2].removesuffix(before_user)
        return cls(parts[0].removesuffix(before_user), system, (before_user, parts[3]), answer)

    def render(self, turns: Sequence[tuple[str, str]]) -> str:
        """Return a chat as the Modelfile's template renders it, by the role and the text of every turn."""
        system = [text for role, text in turns if role == "system"]
        rendered = f"{self.system[0]}{system[0]}{self.system[1]}" if system and self.system else self.opening
        for role, text in turns:
            if role == "user":
                rendered += f"{self.user[0]}{text}{self.user[1]}"
            elif role == "assistant":
                rendered += f"{self.answer[0]}{text}{self.answer[1]}"
        return rendered

    def template(self, bos: str) -> str | None:
        """Return the template in Go's language; None where a text has a mark of that language.

        Args:
            bos: The token that Ollama puts first by itself, which no text of the template repeats.
        """
        opening, system = self.opening.removeprefix(bos), self.system
        if system:
            opening = (
                f"{{{{ if .System }}}}{system[0].removeprefix(bos)}{{{{ .System }}}}{system[1]}"
                f"{{{{ else }}}}{opening}{{{{ end }}}}"
            )
        user, answer = (f"{before}{{{{ .Content }}}}{after}" for before, after in (self.user, self.answer))
        texts = (self.opening, *(system or ()), *self.user, *self.answer)
        # A brace at a text's end would be the first of three, of which Go takes the wrong two for its mark.
        if any(mark in f"{text}{{" for text in texts for mark in ("{{", "}}", '"""')):
            return None
        return (
            f'{opening}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}'
        )

    def _renders_as(self, tokenizer: ChatTokenizer) -> bool:
        """Try longer chats, since a template may treat a second answer or a long text in another way."""
        turns = [("user", "one"), ("assistant", "two\n2"), ("user", "three 3"), ("assistant", "four"), ("user", "5")]
        chats = [turns, turns[:1]]
        if self.system:
            chats.append([("system", "be brief"), *turns])
        return all(_render(tokenizer, chat_turns) == self.render(chat_turns) for chat_turns in chats)


def write_modelfile(model: Path, gguf_path: Path) -> None:
    """Write the Modelfile beside the GGUF file of a model."""
    tokenizer = chat.load_tokenizer(model)
    inner = tokenizer.tokenizer
    has_bos = inner.bos_token_id is not None and inner("a")["input_ids"][0] == inner.bos_token_id
    bos = str(inner.bos_token) if has_bos else ""
    texts = TurnTexts.from_tokenizer(tokenizer, bos)
    template = texts.template(bos) if texts else None

    lines = [f"FROM ./{gguf_path.name}"]
    if template is None:
        progress.say(f"{NAME}: the chat template does more than to put text around turns, so it is left out")
        lines.append("# The model's chat template has no equal in Ollama's language; Ollama may know it by itself.")
    else:
        lines.append(f'TEMPLATE """{template}"""')
    system = tokenizer.chat_format.system
    if template is not None and texts is not None and texts.system is None:
        lines.append("# A system turn has no place in this template, and is left out.")
    # Only three quotes in a row would end a text.
    elif system and '"""' in f'{system}"':
        lines.append(
            "# The system turn of the training has three quotes in a row, and no place here: send it with each chat."
        )
    elif system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{text}"' for text in tokenizer.stop_texts if '"""' not in f'"{text}"']
    (gguf_path.parent / NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _render(tokenizer: ChatTokenizer, turns: Sequence[tuple[str, str]]) -> str:
    """Return the model's own rendering of a chat, with what begins the answer; nothing where it refuses the chat."""
    try:
        return tokenizer.render([{"role": r, "content": text} for r, text in turns], add_generation_prompt=True)
    except RowRefused:
        return ""


def _split(text: str, marks: Sequence[str]) -> list[str] | None:
    """Split a text at the marks; None where one of them is not in it exactly once, in this order."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]


def _common_end(a: str, b: str) -> str:
    """Return the longest text with which both end."""
    length = 0
    while length < min(len(a), len(b)) and a[-length - 1] == b[-length - 1]:
        length += 1
    return a[len(a) - length :]
