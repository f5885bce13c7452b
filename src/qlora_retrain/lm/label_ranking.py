"""Which of a closed set of labels a model finds likeliest, without reading every label to its end.

The labels' tokens form a trie. A row's prompt is read once into the key-value cache (what all prompts of a batch begin
with, once for all), then nodes of the trie are read after it, each under a mask that shows it the prompt and its own
ancestors only. A label's likelihood can only fall with every further token, so what is known of it so far is an upper
bound: labels that can no longer win are left alone. The result is exactly that of reading all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_retrain.lm.forward import batches, logprobs
from qlora_retrain.lm.trie import Trie

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

_FIRST_NODES = 8  # about two answers of a few tokens


@dataclass(slots=True)
class _Row:
    """What is known of one row: edges' log-probabilities, and where its nodes stand in the cache."""

    index: int
    prompt: list[int]
    wanted: int | None  # an answer whose likelihood is asked for, whether it can win or not
    known: np.ndarray[Any, Any]  # per edge: its log-probability, 0 before it is read
    read: np.ndarray[Any, Any]  # per edge: whether it is; what a broken model says of it may not be a number
    columns: dict[int, int]


def rank(
    model: PreTrainedModel,
    trie: Trie,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[int | None],
    batch_tokens: int,
    tick: Callable[[int], None],
) -> list[tuple[int, float | None]]:
    """For every prompt the likeliest answer, the first of equals, and the log-likelihood of the wanted one.

    Args:
        model: In evaluation mode, with eager or sdpa attention.
        trie: Of the answers.
        prompts: Tokens up to where the answer begins.
        wanted: For each prompt the answer whose log-likelihood is returned.
        batch_tokens: Tokens of a forward pass, padding included: of the prompts, then of the nodes, each of which has
            logits over the whole vocabulary.
        tick: Told how many more rows are done, after each batch.

    Returns:
        The answer's number and the log-likelihood, which is not finite where the model says what is no number.
    """
    import numpy as np
    import torch

    found: list[tuple[int, float | None]] = [(0, None)] * len(prompts)
    for batch in batches([len(p) for p in prompts], batch_tokens):
        edges = len(trie.edges)
        rows = [_Row(i, list(prompts[i]), wanted[i], np.zeros(edges), np.zeros(edges, dtype=bool), {}) for i in batch]
        with torch.inference_mode():
            _read(model, trie, rows, batch_tokens)
        for row in rows:
            sums, complete = _sums(trie, row)
            best = int(np.argmax(np.where(complete, sums, -np.inf)))
            found[row.index] = best, None if row.wanted is None else float(sums[row.wanted])
        tick(len(batch))
    return found


def _read(model: PreTrainedModel, trie: Trie, rows: list[_Row], batch_tokens: int) -> None:
    """Read prompts, then nodes, until no answer that is still unknown could win; fills `known`."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    shared = _common(rows)
    if shared:
        inputs = {"input_ids": torch.tensor([rows[0].prompt[:shared]]), "past_key_values": cache, "use_cache": True}
        logprobs(model, inputs, [(0, 0)], [(0, 0)])
        cache.batch_repeat_interleave(len(rows))
    # Which of the cached columns are a row's own prompt: (rows, columns)
    visible = torch.ones(len(rows), shared, dtype=torch.bool)
    visible = _extend(model, cache, trie, rows, visible, None)
    active, least = rows, _FIRST_NODES
    while True:
        most = max(1, batch_tokens // len(active))
        plans = [_next(trie, row, least, most) for row in active]
        left = [i for i, nodes in enumerate(plans) if nodes]
        if not left:
            return
        if len(left) < len(active):
            active, plans = [active[i] for i in left], [plans[i] for i in left]
            keep = torch.tensor(left)
            visible = visible[keep]
            cache.batch_select_indices(keep.to(model.get_input_embeddings().weight.device))
        visible = _extend(model, cache, trie, active, visible, plans)
        least *= 2  # few rounds for what is hard, few nodes for what is easy


def _extend(
    model: PreTrainedModel,
    cache: Any,
    trie: Trie,
    rows: Sequence[_Row],
    visible: torch.Tensor,
    plans: Sequence[Sequence[int]] | None,
) -> torch.Tensor:
    """Read one block of tokens a row into the cache, and note the edges that leave the nodes among them.

    Args:
        model: The model.
        cache: Holds as many columns as `visible` has.
        trie: The answers.
        rows: One for each row of the cache.
        visible: (rows, columns): the columns that belong to each row's prompt.
        plans: The nodes to read of each row; None: what is left of the prompts, whose last token is node 0.

    Returns:
        `visible` with the new columns.
    """
    import torch

    past = visible.shape[1]
    length = max(map(len, plans)) if plans else max(len(row.prompt) for row in rows) - past
    dtype = model.get_input_embeddings().weight.dtype
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    seen = torch.zeros(len(rows), length, past + length, dtype=torch.bool)
    seen[:, :, :past] = visible[:, None]
    fresh = torch.zeros(len(rows), length, dtype=torch.bool)
    at: list[tuple[int, int]] = []
    targets: list[tuple[int, int]] = []
    owners: list[tuple[_Row, int]] = []
    for i, row in enumerate(rows):
        if plans is None:
            block, nodes = row.prompt[past:], {len(row.prompt) - past - 1: 0}
            places = list(range(past, len(row.prompt)))
            seen[i, :, past:] = torch.ones(length, length, dtype=torch.bool).tril()
            fresh[i, : len(block)] = True
        else:
            block, nodes = [trie.tokens[node] for node in plans[i]], dict(enumerate(plans[i]))
            row.columns |= {node: past + place for place, node in nodes.items()}
            lines = [_line(trie, node) for node in plans[i]]
            places = [len(row.prompt) + len(line) - 1 for line in lines]
            for place, line in enumerate(lines):
                seen[i, place, [row.columns[node] for node in line]] = True
        ids[i, : len(block)] = torch.tensor(block)
        positions[i, : len(block)] = torch.tensor(places)
        for place, node in nodes.items():
            targets += [(len(at), trie.edges[edge][1]) for edge in trie.out[node]]
            owners += [(row, edge) for edge in trie.out[node]]
            at.append((i, place))
    # Added to the attention's scores. A padded token may see nothing at all: its softmax is even, and nobody reads it.
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    values = logprobs(model, {**inputs, "past_key_values": cache, "use_cache": True}, at, targets)
    for (row, edge), value in zip(owners, values, strict=True):
        row.known[edge], row.read[edge] = value, True
    return torch.cat([visible, fresh], dim=1)


def _next(trie: Trie, row: _Row, least: int, most: int) -> list[int]:
    """The nodes to read next: the wanted answer's, then those of the likeliest that could still win, `least` or more.

    Counting nodes, and not answers, keeps the rows of a batch at one length, so that little of it is padding. Of more
    than `most` the first are read: a node's number is above its parent's, so none is read before what it follows.
    """
    import numpy as np

    sums, complete = _sums(trie, row)
    best = float(np.max(sums, where=complete, initial=-np.inf))
    rivals = np.flatnonzero(~complete & (sums >= best))
    chosen = [int(answer) for answer in rivals[np.argsort(-sums[rivals], kind="stable")]]
    if row.wanted is not None and not complete[row.wanted]:
        chosen.insert(0, row.wanted)
    nodes: set[int] = set()
    for answer in chosen:
        if len(nodes) >= least:
            break
        nodes |= {node for node in trie.paths[answer] if node and node not in row.columns}
    return sorted(nodes)[:most]


def _sums(trie: Trie, row: _Row) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of each answer, the log-likelihood as far as it is known, and whether that is all of it."""
    return trie.uses @ row.known, trie.uses @ ~row.read == 0


def _common(rows: Sequence[_Row]) -> int:
    """How many tokens all prompts begin with; at least one of each is left over."""
    first, last = min(row.prompt for row in rows), max(row.prompt for row in rows)
    most = min(len(row.prompt) for row in rows) - 1
    return next((i for i in range(most) if first[i] != last[i]), most) if len(rows) > 1 else 0


def _line(trie: Trie, node: int) -> list[int]:
    """The node and its ancestors below the prompt."""
    line = [node]
    while (node := trie.parents[node]) > 0:
        line.append(node)
    return line
