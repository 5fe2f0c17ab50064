"""Weight norm on tensors."""

from typing import Optional, Union

import torch
from torch import Tensor

from ..contexts.capture import capturing, is_captured, is_transformed
from ..contexts.torchscript import is_scripting, is_traced, is_tracing
from . import middle_dim
from .shapes import fitting, kept_dim


def norm_except_dim(v: Tensor, pow: Union[int, float] = 2, dim: Optional[int] = 0) -> Tensor:
    """The p-norm of `v` over every dimension but `dim`, which keeps its length; the others become 1.

    Args:
        v: the tensor.
        pow: which norm, any number: 2 is Euclid's, 1 sums absolute values, `float("inf")` takes the largest.
        dim: the dimension that is **kept**. `None`, and -1 as in `torch.norm_except_dim`, mean one norm for the
            whole tensor (a 0-dimensional result). Other negative numbers count from the end.

    >>> norm_except_dim(torch.ones(5, 5, 5), 2, dim=0).flatten()
    tensor([5., 5., 5., 5., 5.])
    >>> norm_except_dim(torch.ones(5, 5, 5), 3, dim=0).flatten()
    tensor([2.9240, 2.9240, 2.9240, 2.9240, 2.9240])
    """
    power = float(pow)
    if dim is None or dim == -1:
        whole: Tensor = torch.linalg.vector_norm(v, power)
        return whole
    kept = kept_dim(v, dim)
    if power % 1.0 == 0.0 and not is_empty(v) and not _is_transformed(v):  # a whole number; infinity is none
        return torch.norm_except_dim(v, int(power), kept)
    others = list(range(v.dim() + 1))
    others.remove(kept)
    norm: Tensor = torch.linalg.vector_norm(v.unsqueeze(-1), power, others, keepdim=True)
    return norm.squeeze(-1)


def weight_norm(v: Tensor, g: Tensor, dim: Optional[int] = 0, eps: float = 0.0) -> Tensor:
    """Weight normalization: `g * v / max(‖v‖, eps)`, with the norm over every dimension but `dim`.

    Args:
        v: the direction, of the weight's shape.
        g: the magnitude, of the shape of `norm_except_dim(v, 2, dim)`.
        dim: the dimension that is kept, as in `norm_except_dim`.
        eps: the smallest norm that is divided by. At 0 a slice of zeros gives NaN, as in torch.

    At `eps=0` this is torch's own kernel, to the last bit, except in double precision and for a `dim` between the first
    and the last: where that kernel is fused, its second derivatives are wrong, and where it is not, it is slow. So a
    gradient penalty in single precision wants an eps.

    >>> v, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]])
    >>> weight_norm(v, g)
    tensor([[6., 8.]])
    """
    if not is_scripting():
        careful = capturing() or isinstance(dim, float) or _is_transformed(v)
        weight = None if careful else weight_norm_by_kernel(v, g, dim, eps)
        if weight is not None:
            return weight
    g = fitting(v, g, dim)
    if eps > 0.0:
        # in half precision eps may be 0, and the norm infinite
        if is_scripting():  # nearly without branches, of which torch.jit.freeze resolves but so many
            if v.numel() == 0:
                return v * g
            wide = torch.promote_types(v.dtype, torch.float32)
            norm = torch.norm_except_dim(v.to(wide), 2, -1 if dim is None else dim).clamp_min(eps)
            return (v.to(wide) * (g.to(wide) / norm)).to(v.dtype)
        return _formula(v, g, dim, eps)
    if dim is not None and dim > 0 and _is_for_middle_dim(v, dim):
        if is_scripting():
            return middle_dim.weight_norm(v, g, dim)
        else:
            return middle_dim.weight_norm_in_eager_mode(v, g, dim)
    if _is_empty_or_double(v) or _is_transformed(v):
        # what torch's kernel cannot do: second derivatives (they are wrong), weights without entries, and functorch
        return v * g if is_empty(v) else _formula(v, g, dim, 0.0)
    if dim is None or dim == -1:
        return _in_layout_of(v, torch._weight_norm(v, g, -1))
    return _in_layout_of(v, torch._weight_norm(v, g, dim + v.dim() if dim < 0 else dim))


def scaled_weight_norm(
    v: Tensor, g: Tensor, dim: Optional[int] = 0, eps: float = 0.0, clip: Optional[float] = None
) -> Tensor:
    """`v · min(g / max(‖v‖, eps), clip)`; without a `clip` that is `weight_norm`.

    >>> scaled_weight_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]]), clip=1.5)
    tensor([[4.5000, 6.0000]])
    """
    if clip is None:
        return weight_norm(v, g, dim, eps)
    g = fitting(v, g, dim)
    return v * (g / length_of(v, dim, eps)).clamp_max(clip)


def scaled_weight_norm_by_kernel(
    v: Tensor, g: Tensor, dim: Optional[int], eps: float, clip: Optional[float]
) -> Optional[Tensor]:
    """`scaled_weight_norm` in the ordinary case: one norm, which torch takes as it is; None in any other."""
    if clip is None:
        return weight_norm_by_kernel(v, g, dim, eps)
    if eps != 0.0 or is_traced():
        return None
    others = [other for other in range(v.dim()) if other != dim]
    norm: Tensor = torch.linalg.vector_norm(v, 2, others, dim is not None)
    if g.shape != norm.shape:
        return None
    return v * (g / norm).clamp_max(clip)


def weight_norm_by_kernel(v: Tensor, g: Tensor, dim: Optional[int], eps: float) -> Optional[Tensor]:
    """`weight_norm` in the ordinary case, which a small layer does not feel; None in any other.

    That is single precision, the first or the last dim, and nobody who records shapes.
    """
    if eps != 0.0 or dim is None or v.dtype is not torch.float32 or is_traced():
        return None
    of_v, of_g = v.shape, g.shape
    ndim, length = len(of_v), g.numel()
    if (dim != 0 and dim != ndim - 1) or ndim == 0 or len(of_g) != ndim or of_g[dim] != length:
        return None
    if of_v[dim] != length or v.numel() == 0 or (ndim >= 4 and not v.is_contiguous()):
        return None
    return torch._weight_norm(v, g, dim)


def shape_of_g(shape: tuple[int, ...], dim: Optional[int]) -> tuple[int, ...]:
    """The shape of the magnitude of a weight of that shape."""
    return () if dim is None else tuple(n if d == dim else 1 for d, n in enumerate(shape))


def _formula(v: Tensor, g: Tensor, dim: Optional[int], eps: float) -> Tensor:
    """As it stands; of half precision in single precision, whose norm it may not hold."""
    if isinstance(v, Tensor) and v.element_size() < 4:
        return (v.float() * (g.float() / length_of(v.float(), dim, eps))).to(v.dtype)
    return v * (g / length_of(v, dim, eps))


def length_of(v: Tensor, dim: Optional[int], eps: float) -> Tensor:
    """`max(‖v‖, eps)`, which at `eps=0` is ‖v‖."""
    norm = norm_except_dim(v, 2, dim)
    return norm.clamp_min(eps) if eps > 0.0 else norm


# torch.fx traces with what is no Tensor, and torch.jit.trace with a numel() that is one: neither can be branched on


def is_empty(v: Tensor) -> bool:
    """Whether `v` has no entries, where that can be asked."""
    return isinstance(v, Tensor) and not is_tracing() and v.numel() == 0


def _is_transformed(v: Tensor) -> bool:
    """Whether functorch or forward-mode AD runs, for which torch's kernel has no rule, or a slow one with a warning."""
    if not is_scripting():  # noqa: SIM102 - TorchScript leaves out a branch, and no half of a condition
        if not capturing() and isinstance(v, Tensor):
            return is_transformed()
    return False


def _is_empty_or_double(v: Tensor) -> bool:
    return isinstance(v, Tensor) and (v.dtype == torch.float64 or is_empty(v))


def _is_for_middle_dim(v: Tensor, dim: int) -> bool:
    """Whether `dim` is neither the first nor the last, and `v` is a compiler's, or large enough to gain by it."""
    if not isinstance(v, Tensor) or is_tracing() or dim >= v.dim() - 1:
        return False
    if not is_scripting():  # noqa: SIM102 - TorchScript leaves out a branch, and no half of a condition
        if is_captured(v):
            return v.numel() > 0
    return v.element_size() > 2 and v.is_contiguous() and v.numel() >= (4096 if v.is_cpu else 1)


def _in_layout_of(v: Tensor, weight: Tensor) -> Tensor:
    """`weight` with the channels last if `v` has them last: torch's kernel returns them first."""
    if isinstance(v, Tensor) and v.dim() >= 4 and not v.is_contiguous() and v.stride(1) == 1:
        return weight.movedim(1, -1).contiguous().movedim(-1, 1)
    return weight
