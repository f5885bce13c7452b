"""Keep rows out of training whose prompts were evaluated before, and remember which prompts this data set evaluates.

An evaluated chat is remembered by digests: of each of its beginnings, of the chat as a whole, and of its group. No seed
enters them, so that neither another split nor another line makes them new. `pipeline/evaluation_history.py` joins those
of all data sets of a line. Memory: about 100 bytes for each digest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from components.validate_data.checks import Row
from components.validate_data.splitting import digest_beginnings, digest_greeting, digest_side
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core import graph, json_lines

REASON = "evaluated_before"
# In the place of the split's seed, so that no digest here is one of a split.
_SEED = "evaluated"
History = frozenset[str]


def read_history(folder: Path | None) -> History:
    """Return the lines of the line's evaluation history; none where nothing was evaluated before."""
    if folder is None:
        return frozenset()
    return frozenset(json_lines.split_lines((folder / graph.EVALUATED_PROMPTS).read_text(encoding="ascii")))


def write_evaluated(dataset: Path, rows: Iterable[Row], config: DataConfig) -> None:
    """Write what is to be remembered of evaluation and golden rows, in the order of the digests."""
    lines = {line for row in rows for line in _digest_lines(row, config)}
    text = "".join(f"{line}\n" for line in sorted(lines))
    (dataset / graph.EVALUATED_PROMPTS).write_text(text, encoding="ascii", newline="\n")


def keep_out_evaluated(rows: Iterable[Row], history: History, config: DataConfig, openings: Collection[str]) -> None:
    """Give the reason to every training row whose prompt was evaluated before; evaluation rows stay.

    A lab judges by training rows, so the same holds of its rows.

    A prompt is what the split takes for one: a chat with its continuations, under any system turn, or a group.
    """
    if not history:
        return
    openings = frozenset(openings)
    for row in rows:
        if row.split in ("train", "judge") and _was_evaluated(row, history, config, openings):
            row.reason, row.split = REASON, None


def _was_evaluated(row: Row, history: History, config: DataConfig, openings: Collection[str]) -> bool:
    if row.group is not None and _group_line(row, config) in history:
        return True
    # A chat may begin with a greeting that was evaluated as a whole chat.
    greeting = digest_greeting(row, _SEED)
    if greeting and f"chat {greeting[-1]}" in history:
        return True

    path = digest_beginnings(row, _SEED)
    # Every chat that is remembered has its first beginning there, so most rows end here.
    if f"beginning {path[0]}" not in history:
        return False
    # A shared opening joins no chats, so the first beginning that is none names the prompt.
    seeded = digest_beginnings(row, config.split_seed)
    depth = next((i for i, digest in enumerate(seeded) if digest not in openings), len(path) - 1)
    # An evaluated chat that is no more than such an opening is learnt by all that go on from it.
    return f"beginning {path[depth]}" in history or any(f"chat {digest}" in history for digest in path[:depth])


def _digest_lines(row: Row, config: DataConfig) -> Iterator[str]:
    path = digest_beginnings(row, _SEED)
    for digest in (*path, *digest_greeting(row, _SEED)):
        yield f"beginning {digest}"
    yield f"chat {path[-1]}"
    if row.group is not None:
        yield _group_line(row, config)


def _group_line(row: Row, config: DataConfig) -> str:
    # With the name of the field, since a user and a document may have the same number.
    return f"group {digest_side(row, f'{_SEED} {config.group_field}')[0]}"
