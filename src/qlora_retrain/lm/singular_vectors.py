"""Find the strongest directions of a weight, and say how much they are like those of another one.

A direction of a fine-tuned weight that is like no direction of the base's is an intruder dimension (Shuttleworth et al.
2024, arXiv 2410.21228). `evaluate` counts them, and `merge_adapter` scales them down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# The number of the base's vectors that are computed first, as a multiple of `top_k`.
_BASE_VECTORS_FACTOR = 2
# Relative to the largest squared singular value. Below it, rounding dominates a vector of the Gram matrix.
_MIN_RELATIVE_SQUARE = 1e-10
_FP64_ROWS = 1024  # rows of a matrix in fp64 at a time


def max_similarities(base: Tensor, tuned: Tensor, top_k: int) -> Tensor:
    """Return the largest absolute cosine of each of the `top_k` strongest directions of `tuned` to any of `base`'s."""
    return _similarities(base, _top_left_singular_vectors(tuned, top_k))


def intruders(base: Tensor, tuned: Tensor, top_k: int, epsilon: float) -> Tensor:
    """Return the intruder dimensions among the `top_k` strongest directions of `tuned`: (out, intruders), in fp64."""
    directions = _top_left_singular_vectors(tuned, top_k)  # (out, top_k)
    return directions[:, _similarities(base, directions) < epsilon]


def _similarities(base: Tensor, directions: Tensor) -> Tensor:
    """Compare each of the orthonormal directions with all left singular vectors of `base`.

    The base's vectors are orthonormal, so the squares of a direction's cosines to all of them sum to at most 1. If
    the strongest ones leave less of that sum than the square of the largest cosine, no other vector can be nearer.
    Then the others are never computed. This is the case for almost every matrix without intruders.

    Returns:
        The largest absolute cosine of each direction: (directions,).
    """
    num_vectors = _BASE_VECTORS_FACTOR * directions.shape[1]
    base_vectors = _top_left_singular_vectors(base, num_vectors)  # (out, num_vectors)
    cosines = directions.T @ base_vectors  # (directions, num_vectors)
    largest = cosines.abs().amax(dim=1)

    # The squared cosines to all other vectors of the base sum to at most this: (directions,).
    remaining_square = 1 - cosines.square().sum(dim=1)
    if base_vectors.shape[1] < min(base.shape) and bool((largest.square() < remaining_square).any()):
        all_base_vectors = _top_left_singular_vectors(base, min(base.shape))
        largest = (directions.T @ all_base_vectors).abs().amax(dim=1)
    return largest


def _top_left_singular_vectors(matrix: Tensor, count: int) -> Tensor:
    """Compute the left singular vectors (out, count) of the largest singular values, the largest first, in fp64.

    On a CPU they are eigenvectors of the smaller of M M^T and M^T M in fp64, which can be computed without the other
    vectors. This squares the condition number and so loses half of fp64's 16 digits. The rest is still more accurate
    than an SVD in fp32. Where it is not enough, the SVD is computed.
    """
    import torch
    from scipy.linalg import eigh

    count = min(count, *matrix.shape)
    if count < min(matrix.shape) and not matrix.is_cuda:
        is_wide = matrix.shape[0] <= matrix.shape[1]
        # Rows that are as long as the Gram matrix is wide, so that it is a sum over parts of them.
        rows = (matrix.T if is_wide else matrix).split(_FP64_ROWS)
        gram = torch.zeros(rows[0].shape[1], rows[0].shape[1], dtype=torch.float64)
        for part in rows:
            values = part.double()
            gram.addmm_(values.T, values)
        # eigh sorts in ascending order, so the largest are the last.
        first = len(gram) - count
        # Transposed it is in LAPACK's order, so no copy is made.
        subset = [first, len(gram) - 1]
        squares, vectors = eigh(gram.numpy().T, subset_by_index=subset, driver="evr", overwrite_a=True)
        if squares[0] > _MIN_RELATIVE_SQUARE * squares[-1]:
            largest = torch.from_numpy(vectors[:, ::-1].copy())
            if is_wide:
                return largest
            # M^T M has the right singular vectors v; the left ones are M v / s.
            left = torch.cat([part.double() @ largest for part in rows])
            return left / torch.from_numpy(squares[::-1].copy()).sqrt()
    left_vectors, _, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left_vectors[:, :count].double()
