"""The best approximation of a matrix by a small rank (Eckart and Young 1936), without its whole decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_FP64_ROWS = 1024  # rows of a matrix in fp64 at a time


def top_singular_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, rank), the singular values (rank,) and V^T (rank, in) of the largest ones, in fp32.

    The vectors are eigenvectors of the smaller of M M^T and M^T M, computed in fp64 without the others; this squares
    the condition number and leaves half of fp64's 16 digits, which is what fp32 has.
    """
    import torch

    is_wide = matrix.shape[0] <= matrix.shape[1]
    tall = matrix.T if is_wide else matrix  # so that the Gram matrix is the smaller one
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in tall.split(_FP64_ROWS):
        gram.addmm_(rows.double().T, rows.double())

    vectors = _top_eigenvectors(gram, rank).float()  # (smaller side, rank), orthonormal
    products = tall.float() @ vectors  # (larger side, rank): the other vectors times the singular values
    values = torch.linalg.vector_norm(products, dim=0)
    others = products / values.clamp_min(torch.finfo(torch.float32).tiny)
    return (vectors, values, others.T) if is_wide else (others, values, vectors.T)


def _top_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    import torch

    if gram.is_cuda:
        return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    from scipy.linalg import eigh

    size = len(gram)
    # eigh sorts in ascending order, so the largest are the last.
    _, vectors = eigh(gram.numpy(), subset_by_index=[max(0, size - rank), size - 1], driver="evr", overwrite_a=True)
    return torch.from_numpy(vectors[:, ::-1].copy())
