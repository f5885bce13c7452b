"""Store token sequences as a trie, in which a prefix that several sequences share is stored once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Trie:
    """A trie of token sequences. Node 0 is the root, which is the end of the prompt.

    A node is a token that the model reads, an edge is a token whose probability counts. The last token of a sequence is
    an edge and no node: nothing follows it, so the model need not read it.

    Attributes:
        tokens: The token of each node (unused for node 0); a parent comes before its children.
        parents: The parent of each node.
        edges: Every token to score, as (node that it follows, token).
        out_edges: The edges that leave each node.
        paths: The nodes of each sequence, node 0 first.
        incidence: (sequences, edges): 1.0 where the sequence has that edge.
    """

    tokens: list[int]
    parents: list[int]
    edges: list[tuple[int, int]]
    out_edges: list[list[int]]
    paths: list[list[int]]
    incidence: np.ndarray[Any, Any]

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]]) -> Trie:
        """Build the trie of these sequences, each a list of tokens with its end token."""
        import numpy as np

        nodes: dict[tuple[int, ...], int] = {(): 0}  # the number of the node that each prefix ends at
        tokens, parents, paths = [-1], [-1], []
        edges: dict[tuple[int, int], int] = {}
        for ids in sequences:
            # The last token is left out of the nodes, so the range ends one before the whole sequence.
            for depth in range(1, len(ids)):
                prefix = tuple(ids[:depth])
                if prefix not in nodes:
                    nodes[prefix] = len(nodes)
                    tokens.append(ids[depth - 1])
                    parents.append(nodes[prefix[:-1]])
            paths.append([nodes[tuple(ids[:depth])] for depth in range(len(ids))])
            for node, token in zip(paths[-1], ids, strict=True):
                edges.setdefault((node, token), len(edges))

        out_edges: list[list[int]] = [[] for _ in nodes]
        for (node, _), edge in edges.items():
            out_edges[node].append(edge)

        # With this matrix the log-likelihoods of all sequences are one product with the edges' log-probabilities.
        incidence = np.zeros((len(sequences), len(edges)))
        for i, ids in enumerate(sequences):
            incidence[i, [edges[pair] for pair in zip(paths[i], ids, strict=True)]] = 1.0
        return cls(tokens, parents, list(edges), out_edges, paths, incidence)
