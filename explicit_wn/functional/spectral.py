"""Spectral norm on tensors."""

from typing import Optional

import torch
from torch import Tensor

from .shapes import check_vectors, number


def as_matrix(weight: Tensor, dim: int = 0) -> Tensor:
    """`weight` with `dim` as its rows and everything else as its columns.

    >>> as_matrix(torch.ones(2, 3, 4), dim=1).shape
    torch.Size([3, 8])
    """
    rows = weight if dim == 0 else weight.movedim(dim, 0)
    return rows.reshape(rows.size(0), -1)


def power_iteration(
    orig: Tensor, u: Tensor, v: Tensor, dim: int = 0, n_power_iterations: int = 1, eps: float = 1e-12, first: str = "v"
) -> None:
    """Brings `u` and `v`, in place, nearer to the first left and right singular vectors of `orig` as a matrix.

    Args:
        orig: the weight.
        u: a unit vector with an entry for each row.
        v: a unit vector with an entry for each column.
        dim: which dimension of `orig` are the rows.
        n_power_iterations: how often to multiply by the matrix and its transpose.
        eps: the smallest length that is divided by.
        first: which vector an iteration renews first: `"v"` from u, as torch's hook does, or `"u"` from v, as its
            parametrization does.

    >>> W, u, v = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0.6, 0.8]), torch.tensor([0.6, 0.8])
    >>> power_iteration(W, u, v, n_power_iterations=20)
    >>> u, spectral_norm(W, u, v)[0, 0]
    (tensor([1.0000e+00, 1.0967e-19]), tensor(1.))
    """
    with torch.no_grad():
        # detached as well, since torch.jit.trace does not record no_grad
        matrix = as_matrix(orig.detach(), dim).to(u.dtype)
        check_vectors(matrix, u, v)
        for _ in range(n_power_iterations):
            if first == "u":
                torch.nn.functional.normalize(torch.mv(matrix, v), dim=0, eps=eps, out=u)
            torch.nn.functional.normalize(torch.mv(matrix.t(), u), dim=0, eps=eps, out=v)
            if first == "v":
                torch.nn.functional.normalize(torch.mv(matrix, v), dim=0, eps=eps, out=u)


def spectral_norm(
    orig: Tensor, u: Optional[Tensor] = None, v: Optional[Tensor] = None, dim: int = 0, eps: float = 1e-12
) -> Tensor:
    """Spectral normalization: `orig / σ`, where σ = uᵀ·W·v and W is `orig` as a matrix.

    A vector has no u and v: it is divided by its length, which is at least `eps`.

    >>> spectral_norm(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    tensor([[1.0000, 0.0000],
            [0.0000, 0.3333]])
    """
    if u is None or v is None:
        return torch.nn.functional.normalize(orig, dim=0, eps=eps)
    return orig / _sigma(orig, u, v, dim)


def sigma_reparam(
    orig: Tensor, g: Tensor, u: Optional[Tensor] = None, v: Optional[Tensor] = None, dim: int = 0, eps: float = 1e-12
) -> Tensor:
    """σReparam: `g · orig / σ`, where σ is that of `spectral_norm`.

    >>> W, u = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0])
    >>> sigma_reparam(W, torch.tensor(6.0), u, u)
    tensor([[6., 0.],
            [0., 2.]])
    """
    g = number(orig, g)
    if u is None or v is None:
        return g * torch.nn.functional.normalize(orig, dim=0, eps=eps)
    return orig * (g / _sigma(orig, u, v, dim))


def _sigma(orig: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """uᵀ·W·v, where W is `orig` as a matrix."""
    # the next power iteration changes u and v in place, perhaps before the gradient of this is taken: hence the copies
    u, v = u.clone(), v.clone()
    matrix = as_matrix(orig, dim).to(u.dtype)  # FSDP2 computes in half precision while buffers stay in single
    check_vectors(matrix, u, v)
    return torch.dot(u, torch.mv(matrix, v))
