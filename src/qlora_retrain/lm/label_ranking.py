"""Find the likeliest of a closed set of labels, without reading every label to its end.

The labels' tokens form a trie. A row's prompt is read once into the key-value cache; the prefix that all prompts of a
batch share is read once for all rows. Then trie nodes are read after it, each under a mask in which it attends only to
the prompt and its own ancestors.

A label's log-likelihood can only fall with every further token, so its partial sum is an upper bound. A label whose
bound is below the value of a complete label is not read further: this is branch and bound. The result is exactly that
of reading all labels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_retrain.lm import learnt_prefix
from qlora_retrain.lm.forward import length_grouped_batches, target_logprobs
from qlora_retrain.lm.trie import Trie
from qlora_retrain.lm.virtual_tokens import prefix_ids

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

_FIRST_NODES = 8  # about two labels of a few tokens
_PLACEHOLDER = -1  # is never read: the cache has its keys and values


@dataclass(slots=True)
class _RowState:
    """The state of one row's search.

    Attributes:
        index: The row's index among the prompts.
        prompt: The tokens of its prompt, after a placeholder for each column that a learnt prefix has in the cache.
        target: A label whose log-likelihood is needed, whether it can win or not.
        edge_logprobs: (edges,), the log-probability of each edge; 0 before the edge is scored.
        is_scored: (edges,), whether the edge is scored. It is a mask of its own, since a broken model may score NaN.
        cache_columns: By node, its column in the key-value cache; only nodes that were read have one.
    """

    index: int
    prompt: list[int]
    target: int | None
    edge_logprobs: np.ndarray[Any, Any]
    is_scored: np.ndarray[Any, Any]
    cache_columns: dict[int, int]


def rank_labels(
    model: PreTrainedModel,
    trie: Trie,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[int | None],
    batch_tokens: int,
    on_progress: Callable[[int], None],
) -> list[tuple[int, float | None]]:
    """Find the likeliest label for every prompt, the first of equals, and the log-likelihood of the target label.

    Args:
        model: In evaluation mode, with eager or sdpa attention.
        trie: The trie of the labels' tokens.
        prompts: The tokens up to where the answer begins.
        targets: For each prompt the label whose log-likelihood is returned.
        batch_tokens: The limit on the tokens of a forward pass, padding included. It limits the prompts' tokens, and
            then the nodes, each of which has logits over the whole vocabulary.
        on_progress: Called after each batch with its number of rows.

    Returns:
        For each prompt the index of its likeliest label and the target's log-likelihood. The latter is not finite where
        the model's logits are not.
    """
    import numpy as np
    import torch

    results: list[tuple[int, float | None]] = [(0, None)] * len(prompts)
    with torch.inference_mode():
        reader, start = learnt_prefix.split(model)
    before = [_PLACEHOLDER] * start.get_seq_length() + prefix_ids(model)
    prompts = [[*before, *prompt] for prompt in prompts]
    for batch in length_grouped_batches([len(p) for p in prompts], batch_tokens):
        edges = len(trie.edges)
        rows = [
            _RowState(i, list(prompts[i]), targets[i], np.zeros(edges), np.zeros(edges, dtype=bool), {}) for i in batch
        ]
        with torch.inference_mode():
            _search(reader, trie, rows, batch_tokens, copy.deepcopy(start))

        for row in rows:
            bounds, is_complete = _logprob_bounds(trie, row)
            best = int(np.argmax(np.where(is_complete, bounds, -np.inf)))
            results[row.index] = best, None if row.target is None else float(bounds[row.target])
        on_progress(len(batch))
    return results


def _search(model: PreTrainedModel, trie: Trie, rows: list[_RowState], batch_tokens: int, cache: Any) -> None:
    """Read prompts into the cache, then nodes, until no incomplete label of any row could win."""
    import torch

    # The shared prefix is read as a batch of one, and its cache then copied to every row.
    learnt_len = cache.get_seq_length()
    prefix_len = max(learnt_len, _shared_prefix_len(rows))
    if prefix_len > learnt_len:
        ids = torch.tensor([rows[0].prompt[learnt_len:prefix_len]])
        target_logprobs(model, {"input_ids": ids, "past_key_values": cache, "use_cache": True}, [(0, 0)], [(0, 0)])
    if prefix_len:
        cache.batch_repeat_interleave(len(rows))

    # Which of the cached columns belong to a row's own prompt. The others are padding or trie nodes.
    is_prompt = torch.ones(len(rows), prefix_len, dtype=torch.bool)  # (rows, columns)
    is_prompt = _extend_cache(model, cache, trie, rows, is_prompt, None)

    active, min_nodes = rows, _FIRST_NODES
    while True:
        max_nodes = max(1, batch_tokens // len(active))
        nodes_by_row = [_select_nodes(trie, row, min_nodes, max_nodes) for row in active]
        unfinished = [i for i, nodes in enumerate(nodes_by_row) if nodes]
        if not unfinished:
            return

        # Rows whose winner is certain leave the batch and the cache.
        if len(unfinished) < len(active):
            active, nodes_by_row = [active[i] for i in unfinished], [nodes_by_row[i] for i in unfinished]
            row_index = torch.tensor(unfinished)
            is_prompt = is_prompt[row_index]
            cache.batch_select_indices(row_index.to(model.get_input_embeddings().weight.device))
        is_prompt = _extend_cache(model, cache, trie, active, is_prompt, nodes_by_row)

        # Doubled each round, so that hard rows need few rounds and easy rows read few nodes.
        min_nodes *= 2


def _extend_cache(
    model: PreTrainedModel,
    cache: Any,
    trie: Trie,
    rows: Sequence[_RowState],
    is_prompt: torch.Tensor,
    nodes_by_row: Sequence[Sequence[int]] | None,
) -> torch.Tensor:
    """Read one block of tokens per row into the cache, and score the edges that leave the nodes among them.

    Args:
        model: The model.
        cache: The key-value cache, with as many columns as `is_prompt`.
        trie: The trie of the labels' tokens.
        rows: One for each row of the cache.
        is_prompt: (rows, columns), the columns that belong to each row's prompt.
        nodes_by_row: The nodes to read for each row; None: read the rest of the prompts, whose last token is node 0.

    Returns:
        `is_prompt` with the new columns.
    """
    import torch

    past_len = is_prompt.shape[1]
    length = max(map(len, nodes_by_row)) if nodes_by_row else max(len(row.prompt) for row in rows) - past_len
    ids = torch.zeros(len(rows), length, dtype=torch.long)  # (B, T)
    position_ids = torch.zeros(len(rows), length, dtype=torch.long)  # (B, T)
    can_attend = torch.zeros(len(rows), length, past_len + length, dtype=torch.bool)  # (B, T, past + T)
    can_attend[:, :, :past_len] = is_prompt[:, None]
    is_new_prompt = torch.zeros(len(rows), length, dtype=torch.bool)  # (B, T)

    # For each logit that is needed: its position, the tokens to score there, and the edge of each of these tokens.
    logit_positions: list[tuple[int, int]] = []
    targets: list[tuple[int, int]] = []
    owners: list[tuple[_RowState, int]] = []
    for i, row in enumerate(rows):
        if nodes_by_row is None:
            block, block_positions, nodes = _prompt_block(row, past_len, can_attend[i])
            is_new_prompt[i, : len(block)] = True
        else:
            block, block_positions, nodes = _node_block(trie, row, nodes_by_row[i], past_len, can_attend[i])

        ids[i, : len(block)] = torch.tensor(block)
        position_ids[i, : len(block)] = torch.tensor(block_positions)
        for index, node in nodes.items():
            targets += [(len(logit_positions), trie.edges[edge][1]) for edge in trie.out_edges[node]]
            owners += [(row, edge) for edge in trie.out_edges[node]]
            logit_positions.append((i, index))

    # Added to the attention scores. A padded token may attend to nothing: its softmax is uniform, and nothing reads it.
    dtype = model.get_input_embeddings().weight.dtype
    mask = torch.zeros(can_attend.shape, dtype=dtype).masked_fill_(~can_attend, torch.finfo(dtype).min).unsqueeze(1)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}  # mask: (B, 1, T, past + T)
    values = target_logprobs(model, {**inputs, "past_key_values": cache, "use_cache": True}, logit_positions, targets)
    for (row, edge), value in zip(owners, values, strict=True):
        row.edge_logprobs[edge], row.is_scored[edge] = value, True
    return torch.cat([is_prompt, is_new_prompt], dim=1)


def _prompt_block(
    row: _RowState, past_len: int, can_attend: torch.Tensor
) -> tuple[list[int], list[int], dict[int, int]]:
    """Prepare to read the remainder of a row's prompt, and fill in its part of the mask.

    Args:
        row: The row.
        past_len: The number of columns in the cache.
        can_attend: (T, past + T), the row's part of the mask; changed in place.

    Returns:
        The tokens, their position ids, and by index the trie node that a token stands for.
    """
    import torch

    length = len(can_attend)
    # Plain causal attention. The prompt's last token is the root of the trie.
    can_attend[:, past_len:] = torch.ones(length, length, dtype=torch.bool).tril()
    return row.prompt[past_len:], list(range(past_len, len(row.prompt))), {len(row.prompt) - past_len - 1: 0}


def _node_block(
    trie: Trie, row: _RowState, row_nodes: Sequence[int], past_len: int, can_attend: torch.Tensor
) -> tuple[list[int], list[int], dict[int, int]]:
    """Prepare to read trie nodes after a row's prompt, and fill in its part of the mask; as `_prompt_block`."""
    nodes = dict(enumerate(row_nodes))
    row.cache_columns |= {node: past_len + index for index, node in nodes.items()}

    # Siblings stand side by side in the cache, but each has the position that it has in its own label.
    paths = [_path_to_root(trie, node) for node in row_nodes]
    for index, path in enumerate(paths):
        can_attend[index, [row.cache_columns[node] for node in path]] = True
    return [trie.tokens[node] for node in row_nodes], [len(row.prompt) + len(path) - 1 for path in paths], nodes


def _select_nodes(trie: Trie, row: _RowState, min_nodes: int, max_nodes: int) -> list[int]:
    """Choose the nodes to read next: the target's, then those of the likeliest labels that could still win.

    Labels are added until there are `min_nodes` nodes. Counting nodes, and not labels, keeps the rows of a batch at
    one length, so that little of it is padding.
    """
    import numpy as np

    bounds, is_complete = _logprob_bounds(trie, row)
    best = float(np.max(bounds, where=is_complete, initial=-np.inf))

    # An incomplete label whose upper bound is below the best complete one cannot win.
    contenders = np.flatnonzero(~is_complete & (bounds >= best))
    labels = [int(label) for label in contenders[np.argsort(-bounds[contenders], kind="stable")]]
    if row.target is not None and not is_complete[row.target]:
        labels.insert(0, row.target)

    nodes: set[int] = set()
    for label in labels:
        if len(nodes) >= min_nodes:
            break
        nodes |= {node for node in trie.paths[label] if node and node not in row.cache_columns}

    # A node's number is above its parent's, so a cut never keeps a node without the one that it follows.
    return sorted(nodes)[:max_nodes]


def _logprob_bounds(trie: Trie, row: _RowState) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return each label's log-likelihood over its scored edges, and whether these are all of its edges."""
    return trie.incidence @ row.edge_logprobs, trie.incidence @ ~row.is_scored == 0


def _shared_prefix_len(rows: Sequence[_RowState]) -> int:
    """Return the length of the prefix that all prompts share; at least one token of each prompt remains after it."""
    # In sorted order the first and the last prompt share the shortest prefix, so comparing these two is enough.
    first, last = min(row.prompt for row in rows), max(row.prompt for row in rows)
    longest = min(len(row.prompt) for row in rows) - 1
    return next((i for i in range(longest) if first[i] != last[i]), longest) if len(rows) > 1 else 0


def _path_to_root(trie: Trie, node: int) -> list[int]:
    """Return the node and its ancestors below the root."""
    path = [node]
    while (node := trie.parents[node]) > 0:
        path.append(node)
    return path
