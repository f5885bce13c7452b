r"""Fill `data.prompt_template`, which makes a prompt of several fields: `"{question}\n\n{context}"`.

A line whose fields are all empty falls away, with one of the gaps around it. Text without fields always stays.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

Part = tuple[str, str | None]  # a text, and the path of the field that follows it


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A parsed template; each line is a sequence of texts and fields."""

    lines: tuple[tuple[Part, ...], ...]

    @classmethod
    def from_text(cls, text: str) -> PromptTemplate:
        """Parse a template whose syntax the config has checked: `{field}`, with `{{` and `}}` for braces."""
        lines: list[list[Part]] = [[]]
        for literal, name, _, _ in string.Formatter().parse(text):
            *whole_lines, last = literal.split("\n")
            for line in whole_lines:
                lines[-1] += [(line, None)] if line else []
                lines.append([])
            lines[-1] += [(last, name)] if last or name is not None else []
        return cls(tuple(tuple(line) for line in lines))

    @classmethod
    def from_fields(cls, paths: tuple[str, ...]) -> PromptTemplate:
        """Return the template that puts the fields one below the other, with an empty line between."""
        lines: list[tuple[Part, ...]] = [(("", paths[0]),)]
        for path in paths[1:]:
            lines += [(), (("", path),)]
        return cls(tuple(lines))

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the paths of the fields, each once."""
        return tuple(dict.fromkeys(name for line in self.lines for _, name in line if name is not None))

    def fill(self, text_at: Callable[[str], str]) -> str:
        """Return the prompt; `text_at` gives a field's text, empty where the row has none."""
        values = {name: text if (text := text_at(name)).strip() else "" for name in self.fields}
        # None stands for a line that falls away.
        filled = [_fill_line(line, values) for line in self.lines]

        result: list[str] = []
        runs = [(is_gap, list(run)) for is_gap, run in groupby(filled, lambda line: not (line and line.strip()))]
        for i, (is_gap, run) in enumerate(runs):
            if not is_gap or None not in run:
                result += [line for line in run if line is not None]
            elif 0 < i < len(runs) - 1:
                # Of the empty lines before, between and after what falls away, the longest stretch stays.
                stretches = [list(lines) for is_line, lines in groupby(run, lambda line: line is not None) if is_line]
                result += [""] * max(map(len, stretches), default=0)
        return "\n".join(result)


def _fill_line(line: tuple[Part, ...], values: dict[str, str]) -> str | None:
    names = [name for _, name in line if name is not None]
    if names and not any(values[name] for name in names):
        return None
    return "".join(text + (values[name] if name is not None else "") for text, name in line)
