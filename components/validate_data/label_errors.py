"""Find rows whose label is probably wrong: a classifier that has not seen the row finds the label very unlikely.

The classifier is multinomial naive Bayes over the TF-IDF weights of words, pairs of words and parts of words, with a
uniform prior: it is fitted in one pass and gives the same on every machine. Each fifth of the rows is predicted from
the other four. How sure it may be is fitted too: of every row's label, a fraction `epsilon` is taken to be drawn at
random, and the rest to follow its probabilities at one temperature. Both numbers maximise the likelihood of the labels.
So a row's label is wrong with the probability

    (epsilon / labels) / ((1 - epsilon) p(label | text) + epsilon / labels)

which is zero for all rows where nothing suggests that labels are wrong, however hard they are to predict. The rows with
the highest probabilities are reported, as many as keep the false alarms below about one in a hundred rows. To judge
labels by out-of-sample probabilities is the idea of confident learning (Northcutt, Jiang and Chuang 2021).
"""

from __future__ import annotations

import itertools
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from components.validate_data.text_words import split_words

MAX_ROWS = 100_000  # more rows are sampled
MAX_LABELS = 1000
MIN_ROWS_PER_LABEL = 5  # to say anything about the rows of a label, or to suggest it
MAX_CHARACTERS = 2000  # are read of a text
MAX_FEATURES = 128  # are taken of a text
MAX_TABLE = 2**23  # entries of the table of labels and features
NUM_FOLDS = 5
MAX_FALSE_ALARMS_FRACTION = 0.008  # of the rows, by the probabilities, which are a little too sure
SMOOTHING = 0.1
# The grids over which the likelihood is maximised, on as many rows.
TEMPERATURES = tuple(2.0 ** (i / 4) for i in range(-12, 21))
EPSILONS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4)
MAX_CALIBRATION_ROWS = 20_000

Floats: TypeAlias = NDArray[np.float32]
Indices: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LabelError:
    """One row whose label is probably wrong.

    Attributes:
        row: Its number among the texts.
        suggestion: The label that the classifier finds most likely.
        probability: That the label is wrong, 0 to 1.
    """

    row: int
    suggestion: str
    probability: float


@dataclass(frozen=True, slots=True)
class LabelErrors:
    """What was found.

    Attributes:
        errors: By row.
        num_rows: How many rows were judged; the others have a rare label, or are beyond the sample.
        error_fraction: The fraction of labels that are taken to be drawn at random.
    """

    errors: list[LabelError]
    num_rows: int
    error_fraction: float


def find_label_errors(texts: Sequence[str], labels: Sequence[str], threshold: float) -> LabelErrors:
    """Find the rows whose label is wrong with at least this probability.

    It does not depend on the order of the rows. More than `MAX_LABELS` labels are answers rather than labels, and
    nothing is said about them.
    """
    counts = Counter(labels)
    names = sorted(label for label, count in counts.items() if count >= MIN_ROWS_PER_LABEL)
    if not 2 <= len(names) <= MAX_LABELS:
        return LabelErrors([], 0, 0.0)

    numbers = {name: i for i, name in enumerate(names)}
    rows, hashes = _sample(texts, [label in numbers for label in labels])
    targets = np.array([numbers[labels[row]] for row in rows])
    logits = _predict(_features([texts[row] for row in rows], len(names)), targets, hashes, len(names))
    temperature, epsilon = _calibrate(logits, targets, hashes)

    random_part = epsilon / len(names)
    wrong = random_part / np.maximum((1 - epsilon) * _probabilities(logits, targets, temperature) + random_part, 1e-30)
    suggestions = logits.argmax(axis=1)
    is_error = (wrong >= threshold) & (wrong > _limit_false_alarms(wrong)) & (suggestions != targets)
    errors = [LabelError(int(rows[i]), names[suggestions[i]], float(wrong[i])) for i in np.flatnonzero(is_error)]
    return LabelErrors(errors, len(rows), epsilon)


def _limit_false_alarms(wrong: NDArray[np.float64]) -> float:
    """Return the probability above which the rows hold no more false alarms than allowed, as expected from them."""
    ordered = np.sort(wrong)[::-1]
    beyond = np.flatnonzero(np.cumsum(1 - ordered) > MAX_FALSE_ALARMS_FRACTION * len(wrong))
    return float(ordered[beyond[0]]) if len(beyond) else 0.0


def _sample(texts: Sequence[str], is_judged: Sequence[bool]) -> tuple[Indices, Indices]:
    """Return the rows to judge and the hashes of their texts: those with the smallest hashes where they are many."""
    rows: Indices = np.flatnonzero(is_judged)
    hashes: Indices = np.array([zlib.crc32(texts[row][:MAX_CHARACTERS].encode(errors="replace")) for row in rows])
    if len(rows) > MAX_ROWS:
        smallest = np.sort(np.argsort(hashes, kind="stable")[:MAX_ROWS])
        rows, hashes = rows[smallest], hashes[smallest]
    return rows, hashes


def _features(texts: Sequence[str], num_labels: int) -> sparse.csr_matrix:
    """Return the TF-IDF weights of the texts as rows of length 1, (N, features)."""
    num_bits = min(16, (MAX_TABLE // num_labels).bit_length() - 1)
    indices, counts, starts = array("i"), array("i"), [0]
    for text in texts:
        hashes = np.fromiter(map(zlib.crc32, _parts(text)), np.uint32)
        numbers, occurrences = np.unique(hashes * np.uint32(0x9E3779B1) >> np.uint32(32 - num_bits), return_counts=True)
        # Those with the smallest hashes, which are the same parts in every text.
        indices.frombytes(numbers[:MAX_FEATURES].astype(np.int32).tobytes())
        counts.frombytes(occurrences[:MAX_FEATURES].astype(np.int32).tobytes())
        starts.append(len(indices))

    columns = np.frombuffer(indices, np.int32)
    inverse_frequency = np.log((1 + len(texts)) / (1 + np.bincount(columns, minlength=2**num_bits))) + 1
    weights = 1 + np.log(np.frombuffer(counts, np.int32), dtype=np.float32)
    weights *= inverse_frequency.astype(np.float32)[columns]
    lengths = np.sqrt(np.add.reduceat(np.square(weights), starts[:-1]))
    weights /= np.repeat(lengths, np.diff(starts))
    return sparse.csr_matrix((weights, columns, starts), (len(texts), 2**num_bits))


def _parts(text: str) -> list[bytes]:
    """Return the words of a text, the pairs of neighbours, and the parts of four characters of each word."""
    words = split_words(text[:MAX_CHARACTERS]) or [b""]
    parts = words + [b"%b %b" % pair for pair in itertools.pairwise(words)]
    for word in words:
        if word.isascii():
            padded = b" %b " % word
            parts += [b"#" + padded[i : i + 4] for i in range(max(1, len(padded) - 3))]
        else:
            characters = f" {word.decode()} "
            parts += [b"#" + characters[i : i + 4].encode() for i in range(max(1, len(characters) - 3))]
    return parts


def _predict(features: sparse.csr_matrix, targets: Indices, hashes: Indices, num_labels: int) -> Floats:
    """Return the out-of-sample log-probabilities of the labels, but for a constant of each row, (N, labels)."""
    # Each label's rows are dealt to the folds in turn, in an order that the texts decide.
    folds: Indices = np.empty(len(targets), np.int64)
    folds[np.lexsort((hashes, targets))] = np.arange(len(targets)) % NUM_FOLDS

    total = _sum_by_label(features, targets, num_labels)
    logits: Floats = np.empty((len(targets), num_labels), np.float32)
    for fold in range(NUM_FOLDS):
        is_in_fold = folds == fold
        # Subtraction leaves rounding errors below zero.
        sums = np.maximum(total - _sum_by_label(features[is_in_fold], targets[is_in_fold], num_labels), 0) + SMOOTHING
        log_weights = np.log(sums) - np.log(sums.sum(axis=1, keepdims=True))
        logits[is_in_fold] = features[is_in_fold] @ np.ascontiguousarray(log_weights.T)
    return logits


def _sum_by_label(features: sparse.csr_matrix, targets: Indices, num_labels: int) -> Floats:
    one_hot = sparse.csr_matrix(
        (np.ones(len(targets), np.float32), (targets, np.arange(len(targets)))), (num_labels, len(targets))
    )
    sums: Floats = (one_hot @ features).toarray()
    return sums


def _calibrate(logits: Floats, targets: Indices, hashes: Indices) -> tuple[float, float]:
    """Return the temperature and the fraction of random labels that make the labels most likely."""
    sample = np.lexsort((targets, hashes))[:MAX_CALIBRATION_ROWS]
    sample_logits, sample_targets = logits[sample], targets[sample]
    best = (-np.inf, 1.0, 0.0)
    for temperature in TEMPERATURES:
        probabilities = _probabilities(sample_logits, sample_targets, temperature)
        for epsilon in EPSILONS:
            mixed = (1 - epsilon) * probabilities + epsilon / logits.shape[1]
            # Rounded, so that equal likelihoods do not depend on the order of a sum.
            likelihood = round(float(np.log(np.maximum(mixed, 1e-30)).mean()), 9)
            best = max(best, (likelihood, temperature, -epsilon))
    return best[1], -best[2]


def _probabilities(logits: Floats, targets: Indices, temperature: float) -> NDArray[np.float64]:
    """Return the probability of each row's own label."""
    scaled = (logits - logits.max(axis=1, keepdims=True)) * np.float32(temperature)
    own = scaled[np.arange(len(targets)), targets].astype(np.float64)
    probabilities: NDArray[np.float64] = np.exp(own) / np.exp(scaled, out=scaled).sum(axis=1, dtype=np.float64)
    return probabilities
