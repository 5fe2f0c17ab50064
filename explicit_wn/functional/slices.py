"""Norms whose slices have a length or a spread that is given: nothing is learned but the direction."""

from typing import Optional

import torch
from torch import Tensor

from ..contexts.capture import capturing, is_captured, kept_copy
from ..contexts.torchscript import is_scripting, is_traced, is_tracing
from .shapes import fitting
from .weight import is_empty, length_of, shape_of_g, weight_norm


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
    v = kept(v)
    return v * (gain / length_of(v, dim, eps))


def unit_norm_by_kernel(v: Tensor, dim: Optional[int], eps: float) -> Optional[Tensor]:
    """`unit_norm`, as below."""
    return forced_weight_norm_by_kernel(v, dim, eps, 1.0)


def forced_weight_norm_by_kernel(v: Tensor, dim: Optional[int], eps: float, gain: float) -> Optional[Tensor]:
    """`forced_weight_norm` as the weight norm of a g that is the gain, whose gradient takes one pass over the weight.

    None where `torch.jit.trace` records shapes.
    """
    if is_traced():
        return None
    shape = list(shape_of_g(v.shape, dim))
    return weight_norm(kept(v), v.new_full(shape, gain), dim, eps)


def renorm(v: Tensor, dim: Optional[int] = 0, eps: float = 0.0) -> None:
    """Gives each slice of `v` the length 1, in place.

    >>> v = torch.tensor([[3.0, 4.0]])
    >>> renorm(v)
    >>> v
    tensor([[0.6000, 0.8000]])
    """
    v = v.detach()
    _multiply(v, 1.0 / length_of(v, dim, eps))


def force_norm(v: Tensor, dim: Optional[int] = 0, eps: float = 0.0) -> None:
    """Gives each slice of `v` the length √n, in place, where n is how many numbers it has: their mean square is 1.

    >>> v = torch.tensor([[3.0, 4.0]])
    >>> force_norm(v)
    >>> v
    tensor([[0.8485, 1.1314]])
    """
    v = v.detach()
    if is_empty(v):
        return
    norm = length_of(v, dim, eps)
    _multiply(v, (v.numel() / norm.numel()) ** 0.5 / norm)


def weight_standardization(v: Tensor, gain: Tensor, dim: int = 0, eps: float = 0.0) -> Tensor:
    """`gain · (v - μ) / σ`, with the mean μ and the standard deviation σ over every dimension but `dim`.

    >>> weight_standardization(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0]]))
    tensor([[-2.,  2.]])
    """
    gain = fitting(v, gain, dim, "gain")
    if is_empty(v):
        return v * gain
    rows = v.movedim(dim, 0).flatten(1)
    centered = v - rows.mean(1).view_as(gain)
    return weight_norm(centered, gain * (v.numel() / gain.numel()) ** 0.5, dim, eps)


def _multiply(v: Tensor, factor: Tensor) -> None:
    """`v`, which is detached, times `factor`, in place.

    torch.compile does less work where that is under no_grad as well, and torch.export could then not save its graph.
    """
    if not is_scripting():  # noqa: SIM102 - TorchScript leaves out a branch, and no half of a condition
        if capturing() and not torch.compiler.is_exporting():
            with torch.no_grad():
                v.mul_(factor)
            return
    v.mul_(factor)


def kept(v: Tensor) -> Tensor:
    """A copy of `v` where a gradient may be taken after `v` was changed in place, as by the next renorm.

    The formula of a norm whose `advance` changes a parameter computes with the copy.
    """
    if not is_scripting() and isinstance(v, Tensor):
        if is_captured(v):
            exact = torch.is_grad_enabled() and not torch.compiler.is_exporting()
            return kept_copy()(v) if exact else v
        if is_tracing():
            return v.clone()  # a trace is used in both modes
    return v.clone() if torch.is_grad_enabled() else v
