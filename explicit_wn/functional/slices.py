"""Norms whose slices have a length or a spread that is given: nothing is learned but the direction."""

from typing import Optional

import torch
from torch import Tensor

from .weight import norm_except_dim, weight_norm


def unit_norm(v: Tensor, dim: Optional[int] = 0, eps: float = 0.0) -> Tensor:
    """`v / max(‖v‖, eps)`, with the norm over every dimension but `dim`: each slice has the length 1.

    >>> unit_norm(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    return forced_weight_norm(v, dim, eps)


def forced_weight_norm(v: Tensor, dim: Optional[int] = 0, eps: float = 0.0, gain: float = 1.0) -> Tensor:
    """`gain · v / max(‖v‖, eps)`, with the norm over every dimension but `dim`: each slice has the length `gain`.

    >>> forced_weight_norm(torch.tensor([[3.0, 4.0]]), gain=2.0)
    tensor([[1.2000, 1.6000]])
    """
    v = _kept(v)
    return v * (gain / norm_except_dim(v, 2, dim).clamp_min(eps))


def renorm(v: Tensor, dim: Optional[int] = 0, eps: float = 0.0) -> None:
    """Gives each slice of `v` the length 1, in place.

    >>> v = torch.tensor([[3.0, 4.0]])
    >>> renorm(v)
    >>> v
    tensor([[0.6000, 0.8000]])
    """
    v = v.detach()  # and not no_grad, which torch.jit.trace and torch.fx do not record
    v.mul_(1.0 / norm_except_dim(v, 2, dim).clamp_min(eps))


def force_norm(v: Tensor, dim: Optional[int] = 0, eps: float = 0.0) -> None:
    """Gives each slice of `v` the length √n, in place, where n is how many numbers it has: their mean square is 1.

    >>> v = torch.tensor([[3.0, 4.0]])
    >>> force_norm(v)
    >>> v.square().mean()
    tensor(1.0000)
    """
    v = v.detach()
    norm = norm_except_dim(v, 2, dim).clamp_min(eps)
    v.mul_((v.numel() / norm.numel()) ** 0.5 / norm)


def weight_standardization(v: Tensor, gain: Tensor, dim: int = 0, eps: float = 0.0) -> Tensor:
    """`gain · (v - μ) / σ`, with the mean μ and the standard deviation σ over every dimension but `dim`.

    >>> weight_standardization(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0]]))
    tensor([[-2.,  2.]])
    """
    rows = v.movedim(dim, 0).flatten(1)
    centered = v - rows.mean(1).view_as(gain)
    return weight_norm(centered, gain * (v.numel() / gain.numel()) ** 0.5, dim, eps)


def _kept(v: Tensor) -> Tensor:
    """A copy of `v` where a gradient may be taken after the next renorm has changed it in place."""
    return v.clone() if torch.is_grad_enabled() else v
