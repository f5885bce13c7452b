"""Find rows that nearly equal another row: those whose words have a Jaccard similarity above a threshold.

`minhash` proposes pairs of rows, and each is compared word by word. So no hash makes two rows near-duplicates; hashing
can only miss a pair. The result does not depend on the order of the rows. Time and memory are linear in the rows:
about 300 bytes a row beyond the texts. Where very many rows share most of their words, each is compared with some of
them; it is still joined with all to which a chain of near-duplicates leads.
"""

from __future__ import annotations

import itertools
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from components.validate_data.minhash import Indices, Mask, candidates, group_equal, sign
from components.validate_data.text_words import cut_words, hash_words, similarity

# Fewer rows than the first show no template; about as many as the second are looked at.
MIN_TEMPLATE_ROWS = 50
MAX_TEMPLATE_SAMPLE = 5000


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Which rows nearly equal which.

    Attributes:
        first_rows: (N,) For each row the first row of its cluster, itself where it is alone. Rows are in one cluster
            where a chain of near-duplicates leads from one to the other. A reserved row is always alone.
        reserved_rows: (N,) For each row a reserved row that it nearly equals, or -1; -1 for a reserved row.
    """

    first_rows: Indices
    reserved_rows: Indices


def find_near_duplicates(
    texts: Sequence[str],
    threshold: float,
    is_reserved: Sequence[bool] | None = None,
    reserved_threshold: float | None = None,
    ignored_words: frozenset[bytes] = frozenset(),
) -> NearDuplicates:
    """Find the texts whose words have at least this Jaccard similarity.

    Args:
        texts: (N,) They are read in order twice, and again where they are candidates; a sequence that makes each text
            when it is asked for saves memory.
        threshold: The similarity from which on two texts are near-duplicates, 0.5 to 1.
        is_reserved: (N,) Whether no near-duplicate of the row may be trained on. Without it no row is reserved.
        reserved_threshold: The similarity to a reserved row; None for the same.
        ignored_words: Words that do not count, unless a text has no others.

    Raises:
        ValueError: For another threshold.
    """
    reserved_threshold = threshold if reserved_threshold is None else reserved_threshold
    for value in (threshold, reserved_threshold):
        if not 0.5 <= value <= 1:
            raise ValueError(f"the threshold is {value}; expected 0.5 to 1")
    lower_threshold = min(threshold, reserved_threshold)
    reserved = np.zeros(len(texts), bool) if is_reserved is None else np.asarray(is_reserved, bool)
    template_words = _find_template_words(texts) | ignored_words

    def cut(text: str) -> set[bytes]:
        words = cut_words(text)
        return words - template_words or words

    signatures = sign((hash_words(cut(text)) for text in texts), len(texts), lower_threshold)
    clusters = _Clusters(lambda row: cut(texts[row]), threshold, reserved_threshold, reserved)

    # Rows with the same words share all bands. One stands for all of them, so that they do not crowd out the others.
    leader_of = group_equal(signatures, reserved)
    is_leader = leader_of == np.arange(len(texts))
    copies = np.flatnonzero(~is_leader & ~reserved & ~signatures.is_empty)
    clusters.compare(leader_of[copies], copies)
    leaders = np.flatnonzero(is_leader & ~signatures.is_empty)
    for first, second in candidates(signatures, leaders, reserved, lower_threshold):
        clusters.compare(first, second)

    matches = clusters.reserved_rows
    return NearDuplicates(clusters.first_rows(), np.where(reserved, -1, matches[leader_of]))


def _find_template_words(texts: Sequence[str]) -> set[bytes]:
    """Return the words of a template that most rows share, such as an instruction before each question; else none.

    They are those that more than half of the rows have, where they make up more than half of a typical row. All rows
    would be near-duplicates of each other otherwise.
    """
    if len(texts) < MIN_TEMPLATE_ROWS:
        return set()
    # A sample that does not depend on the order of the rows.
    step = -(-len(texts) // MAX_TEMPLATE_SAMPLE)
    sample = [cut_words(text) for text in texts if step == 1 or _text_hash(text) % step == 0]

    counts = Counter(itertools.chain.from_iterable(sample))
    common = {word for word, count in counts.items() if count > len(sample) / 2}
    fractions = [len(words & common) / len(words) for words in sample if words]
    return common if fractions and np.median(fractions) > 0.5 else set()


def _text_hash(text: str) -> int:
    return zlib.crc32(f"{len(text)} {text[:1000]} {text[-1000:]}".encode(errors="replace"))


class _Clusters:
    """Compare candidates word by word, and join those that are near-duplicates."""

    def __init__(
        self,
        cut_row: Callable[[int], set[bytes]],
        threshold: float,
        reserved_threshold: float,
        is_reserved: Mask,
    ) -> None:
        self._cut_row = lru_cache(64)(cut_row)
        self._threshold = threshold
        self._reserved_threshold = reserved_threshold
        self._is_reserved = is_reserved
        self._parents = array("q", range(len(is_reserved)))
        self.reserved_rows: Indices = np.full(len(is_reserved), -1)

    def compare(self, first: Indices, second: Indices) -> None:
        """Compare pairs of rows, of which only the first may be reserved."""
        is_reserved = self._is_reserved[first]
        is_open = is_reserved & (self.reserved_rows[second] < 0)
        for reserved_row, row in zip(first[is_open].tolist(), second[is_open].tolist(), strict=True):
            if self.reserved_rows[row] < 0 and self._similarity(row, reserved_row) >= self._reserved_threshold:
                self.reserved_rows[row] = reserved_row

        # Rows of one cluster need no comparison, which keeps many near-copies of one text cheap.
        parents = np.frombuffer(self._parents, np.int64) if len(self._parents) else np.empty(0, np.int64)
        is_open = ~is_reserved & (parents[first] != parents[second])
        for row, other_row in zip(first[is_open].tolist(), second[is_open].tolist(), strict=True):
            root, other_root = self._root(row), self._root(other_row)
            if root != other_root and self._similarity(row, other_row) >= self._threshold:
                # The smallest number is the root, and so the first row.
                self._parents[max(root, other_root)] = min(root, other_root)

    def first_rows(self) -> Indices:
        """Return for each row the first row of its cluster."""
        return np.fromiter(map(self._root, range(len(self._parents))), np.int64, len(self._parents))

    def _root(self, row: int) -> int:
        parents = self._parents
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    def _similarity(self, row: int, other_row: int) -> float:
        return similarity(self._cut_row(row), self._cut_row(other_row))
