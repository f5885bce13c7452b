"""Propose pairs of sets that may be similar, in time and memory that are linear in the number of sets (MinHash, LSH).

Each of 256 hash functions keeps the smallest hash of a set; two sets have the same smallest hash with a probability
that is their Jaccard similarity (Broder 1997). The hashes are cut into bands. Sets that are equal in a whole band are
candidates. A pair whose similarity is the threshold is missed less than once in a hundred times, a nearer one less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

NUM_HASHES = 256
MAX_BANDS = 48  # each takes 4 bytes a set
MIN_RECALL = 0.99  # of two sets whose similarity is the threshold itself
# A set that shares a band with many others is compared with so many before and behind it, in a fixed order.
NEIGHBOURS = 8
# So many are hashed at a time, so that they stay in the processor's cache.
BATCH_HASHES = 100_000
BATCH_SETS = 5000
BATCH_PAIRS = 100_000

Indices: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
Hashes: TypeAlias = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Signatures:
    """What is kept of the sets: at most 233 bytes each.

    Attributes:
        bands: (bands, N) A hash of the smallest hashes of each band.
        sketches: (N, 4) One bit of each of the 256 smallest hashes (Li and König 2010).
        digests: (N,) Equal for equal sets.
        is_empty: (N,) An empty set is similar to none.
    """

    bands: Hashes
    sketches: NDArray[np.uint64]
    digests: NDArray[np.uint64]
    is_empty: Mask


def sign(sets: Iterable[Hashes], num_sets: int, threshold: float) -> Signatures:
    """Return the signatures of sets of 32-bit hashes, with bands as the threshold needs them."""
    band_size = _choose_band_size(threshold)
    signatures = Signatures(
        np.zeros((_num_bands(band_size), num_sets), np.uint32),
        np.zeros((num_sets, NUM_HASHES // 64), np.uint64),
        np.zeros(num_sets, np.uint64),
        np.ones(num_sets, bool),
    )
    rows: list[int] = []
    batch: list[Hashes] = []
    num_hashes = 0
    for row, hashes in enumerate(sets):
        if len(hashes):
            rows.append(row)
            batch.append(hashes)
            num_hashes += len(hashes)
        if num_hashes >= BATCH_HASHES or len(rows) >= BATCH_SETS:
            _sign_batch(np.array(rows), batch, band_size, signatures)
            rows, batch, num_hashes = [], [], 0
    if rows:
        _sign_batch(np.array(rows), batch, band_size, signatures)
    return signatures


def group_equal(signatures: Signatures, is_reserved: Mask) -> Indices:
    """Return for each set the number of the set that stands for all that equal it and are reserved, or not, like it."""
    order = np.lexsort((is_reserved, signatures.digests))
    is_first: Mask = np.ones(len(order), bool)
    is_first[1:] = np.diff(signatures.digests[order]).astype(bool) | np.diff(is_reserved[order])
    leader_of: Indices = np.empty(len(order), np.int64)
    leader_of[order] = order[is_first][np.cumsum(is_first) - 1]
    return leader_of


def candidates(
    signatures: Signatures, numbers: Indices, is_reserved: Mask, threshold: float
) -> Iterator[tuple[Indices, Indices]]:
    """Yield pairs of these sets that may be as similar as the threshold, in batches; a pair may come repeatedly.

    Args:
        signatures: Of all sets, by their number.
        numbers: Those to compare: different sets that are not empty.
        is_reserved: (N,) Two reserved sets are no pair. In a pair of a reserved set and another, it is the first.
        threshold: As the signatures were made for.
    """
    # In an order that the sets alone decide, since ties keep it.
    numbers = numbers[np.lexsort((is_reserved[numbers], signatures.digests[numbers]))]
    for i, keys in enumerate(signatures.bands):
        # Sets with an equal key are sorted by another band, so that the most similar come together.
        next_keys = signatures.bands[(i + 1) % len(signatures.bands)]
        bucket_order = numbers[np.lexsort((next_keys[numbers], keys[numbers]))]
        for first_places, second_places in _pairs_in_buckets(keys[bucket_order], is_reserved[bucket_order]):
            first, second = bucket_order[first_places], bucket_order[second_places]
            is_similar = _may_be_similar(signatures.sketches[first], signatures.sketches[second], threshold)
            yield first[is_similar], second[is_similar]


def _num_bands(band_size: int) -> int:
    return min(MAX_BANDS, NUM_HASHES // band_size)


def _choose_band_size(threshold: float) -> int:
    """Return how many hashes a band has: as many as `MIN_RECALL` allows, since each makes candidates fewer."""
    sizes = range(1, NUM_HASHES // 8)
    return max(size for size in sizes if 1 - (1 - threshold**size) ** _num_bands(size) >= MIN_RECALL)


def _sign_batch(rows: Indices, batch: list[Hashes], band_size: int, signatures: Signatures) -> None:
    """Fill in the signatures of these rows."""
    hashes = np.concatenate(batch)
    starts = np.cumsum([0, *map(len, batch[:-1])])
    smallest: Hashes = np.empty((NUM_HASHES, len(rows)), np.uint32)
    for i, (factor, mask) in enumerate(_HASH_FUNCTIONS):
        smallest[i] = np.minimum.reduceat((hashes ^ mask) * factor, starts)

    for i in range(len(signatures.bands)):
        key: Hashes = np.zeros(len(rows), np.uint32)
        for values in smallest[i * band_size : (i + 1) * band_size]:
            key = (key ^ values) * _MIX
            key ^= key >> np.uint32(15)
        signatures.bands[i, rows] = key

    bits = ((smallest * _MIX) >> np.uint32(31)).astype(np.uint8)
    signatures.sketches[rows] = np.packbits(np.ascontiguousarray(bits.T), axis=1).view(np.uint64)
    mixed = (hashes.astype(np.uint64) + _MIX_64) * _MIX_64
    mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX_64
    signatures.digests[rows] = np.add.reduceat(mixed, starts)
    signatures.is_empty[rows] = False


def _pairs_in_buckets(keys: Hashes, is_reserved: Mask) -> Iterator[tuple[Indices, Indices]]:
    """Yield the places of near neighbours with an equal key: two free sets, or a reserved one and a free one.

    Args:
        keys: (N,) Sorted.
        is_reserved: (N,) In the same order.
    """
    free, reserved = np.flatnonzero(~is_reserved), np.flatnonzero(is_reserved)
    free_keys = keys[free]
    for distance in range(1, min(NEIGHBOURS, len(free) - 1) + 1):
        places = np.flatnonzero(free_keys[distance:] == free_keys[:-distance])
        if not len(places):
            break
        for part in _batches(places):
            yield free[part], free[part + distance]

    # The reserved sets before and behind each free one.
    for part in _batches(free):
        behind: Indices = np.searchsorted(reserved, part)
        for distance in range(min(NEIGHBOURS, len(reserved))):
            for nearest in (behind + distance, behind - 1 - distance):
                is_inside = (nearest >= 0) & (nearest < len(reserved))
                first, second = reserved[nearest[is_inside]], part[is_inside]
                is_equal = keys[first] == keys[second]
                yield first[is_equal], second[is_equal]


def _batches(places: Indices) -> Iterator[Indices]:
    for start in range(0, len(places), BATCH_PAIRS):
        yield places[start : start + BATCH_PAIRS]


def _may_be_similar(sketches: NDArray[np.uint64], others: NDArray[np.uint64], threshold: float) -> Mask:
    """Return whether the sketches leave it possible that two sets are as similar as the threshold."""
    num_equal = NUM_HASHES - np.bitwise_count(sketches ^ others).sum(axis=1, dtype=np.int64)
    # A bit is equal with this probability. Three standard deviations leave out one pair in 700 at the threshold itself.
    probability = (1 + threshold) / 2
    deviation = (NUM_HASHES * probability * (1 - probability)) ** 0.5
    is_possible: Mask = num_equal >= NUM_HASHES * probability - 3 * deviation
    return is_possible


def _make_hash_functions() -> list[tuple[np.uint32, np.uint32]]:
    """Return the odd factor and the mask of each function h(x) = (x ^ mask) * factor modulo 2**32."""
    numbers = np.random.Generator(np.random.PCG64(0)).integers(0, 2**32, (NUM_HASHES, 2), dtype=np.uint32)
    return [(factor | np.uint32(1), mask) for factor, mask in numbers]


_HASH_FUNCTIONS = _make_hash_functions()
_MIX, _MIX_64 = np.uint32(0x9E3779B1), np.uint64(0x9E3779B97F4A7C15)
