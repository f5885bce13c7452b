"""Answers as a tree of their tokens: what several begin with is there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Trie:
    """Answers with their common beginnings shared. Node 0 is the prompt's end; an answer's last token is no node.

    Attributes:
        tokens: The token of each node (of node 0: unused); a parent comes before its children.
        parents: Of each node.
        edges: Every judged token as (the node that it follows, the token).
        out: The edges that leave each node.
        paths: The nodes of each answer, node 0 first.
        uses: (answers, edges): 1.0 where an answer has that edge.
    """

    tokens: list[int]
    parents: list[int]
    edges: list[tuple[int, int]]
    out: list[list[int]]
    paths: list[list[int]]
    uses: np.ndarray[Any, Any]

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]]) -> Trie:
        """The trie of these answers, each a list of tokens with its end token."""
        import numpy as np

        nodes: dict[tuple[int, ...], int] = {(): 0}
        tokens, parents, paths = [-1], [-1], []
        edges: dict[tuple[int, int], int] = {}
        for ids in answers:
            for depth in range(1, len(ids)):
                here = tuple(ids[:depth])
                if here not in nodes:
                    nodes[here] = len(nodes)
                    tokens.append(ids[depth - 1])
                    parents.append(nodes[here[:-1]])
            paths.append([nodes[tuple(ids[:depth])] for depth in range(len(ids))])
            for node, token in zip(paths[-1], ids, strict=True):
                edges.setdefault((node, token), len(edges))
        out: list[list[int]] = [[] for _ in nodes]
        for (node, _), edge in edges.items():
            out[node].append(edge)
        uses = np.zeros((len(answers), len(edges)))
        for answer, ids in enumerate(answers):
            uses[answer, [edges[pair] for pair in zip(paths[answer], ids, strict=True)]] = 1.0
        return cls(tokens, parents, list(edges), out, paths, uses)
