"""The mathematics: tensors in, tensors out. Every function here is plain Python that `torch.jit.script` compiles."""

from typing import Optional, Union

import torch
from torch import Tensor

from . import middle_dim
from .capture import capturing, is_captured
from .torchscript import is_scripting, is_traced, is_tracing, shape_of


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
    kept = dim + v.dim() if dim < 0 else dim
    if power % 1.0 == 0.0 and not _is_empty(v):  # a whole number; infinity is none
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
        weight = None if capturing() else weight_norm_by_kernel(v, g, dim, eps)
        if weight is not None:
            return weight
    _check_magnitude(v, g, dim)
    if eps > 0.0:
        # in half precision eps may be 0, and the norm infinite
        if is_scripting():  # nearly without branches, of which torch.jit.freeze resolves but so many
            if v.numel() == 0:
                return v * g
            wide = torch.promote_types(v.dtype, torch.float32)
            norm = torch.norm_except_dim(v.to(wide), 2, -1 if dim is None else dim).clamp_min(eps)
            return (v.to(wide) * (g.to(wide) / norm)).to(v.dtype)
        elif isinstance(v, Tensor) and v.element_size() < 4:
            return _clamped(v.float(), g.float(), dim, eps).to(v.dtype)
        return _clamped(v, g, dim, eps)
    if dim is not None and dim > 0 and _is_for_middle_dim(v, dim):
        if is_scripting():
            return middle_dim.weight_norm(v, g, dim)
        else:
            return middle_dim.weight_norm_in_eager_mode(v, g, dim)
    if _is_empty_or_double(v):
        # what torch's kernel cannot do: second derivatives (they are wrong), and weights without entries (a crash)
        return v * g if _is_empty(v) else v * (g / norm_except_dim(v, 2, dim))
    if dim is None or dim == -1:
        return _in_layout_of(v, torch._weight_norm(v, g, -1))
    return _in_layout_of(v, torch._weight_norm(v, g, dim + v.dim() if dim < 0 else dim))


def weight_norm_by_kernel(v: Tensor, g: Tensor, dim: Optional[int], eps: float) -> Optional[Tensor]:
    """`weight_norm` in the ordinary case, which a small layer does not feel; None in any other.

    That is single precision, the first or the last dim, and nobody who records shapes.
    """
    if eps != 0.0 or dim is None or v.dtype is not torch.float32 or is_traced():
        return None
    of_v, of_g = v.shape, g.shape
    ndim, length = len(of_v), g.numel()
    if (dim != 0 and dim != ndim - 1) or length == 0 or ndim == 0 or len(of_g) != ndim or of_g[dim] != length:
        return None
    if of_v[dim] != length or 0 in of_v or (ndim >= 4 and not v.is_contiguous()):
        return None
    return torch._weight_norm(v, g, dim)


def _check_magnitude(v: Tensor, g: Tensor, dim: Optional[int]) -> None:
    """Refuses a g that is not of v's shape along `dim`: torch's kernel does not look, and reads past its end."""
    if is_scripting():
        of_v, of_g = list(v.size()), list(g.size())
    elif isinstance(v, Tensor):
        of_v, of_g = shape_of(v), shape_of(g)
    else:
        return  # a proxy of torch.fx
    wanted = [1] * 0
    if dim is not None and dim != -1:
        kept = dim + len(of_v) if dim < 0 else dim
        if kept < 0 or kept >= len(of_v):
            raise IndexError(f"dim={dim} is out of range for a weight of the shape {of_v}")
        wanted = [1] * kept + [of_v[kept]] + [1] * (len(of_v) - kept - 1)
    if of_g != wanted and (len(wanted) > 0 or g.numel() != 1 or len(of_g) > len(of_v)):
        raise ValueError(f"a weight of the shape {of_v} with dim={dim} wants a g of the shape {wanted}, not {of_g}")


def _clamped(v: Tensor, g: Tensor, dim: Optional[int], eps: float) -> Tensor:
    return v * (g / norm_except_dim(v, 2, dim).clamp_min(eps))


# torch.fx traces with what is no Tensor, and torch.jit.trace with a numel() that is one: neither can be branched on


def _is_empty(v: Tensor) -> bool:
    return isinstance(v, Tensor) and not is_tracing() and v.numel() == 0


def _is_empty_or_double(v: Tensor) -> bool:
    return isinstance(v, Tensor) and (v.dtype == torch.float64 or _is_empty(v))


def _is_for_middle_dim(v: Tensor, dim: int) -> bool:
    """Whether `dim` is neither the first nor the last, and `v` is a compiler's, or large enough to gain by it."""
    if not isinstance(v, Tensor) or is_tracing() or dim >= v.dim() - 1:
        return False
    if not is_scripting():  # noqa: SIM102 - TorchScript leaves out a branch, and no half of a condition
        if is_captured(v):
            return v.numel() > 0
    return v.element_size() > 2 and v.is_contiguous() and v.numel() >= 4096


def _in_layout_of(v: Tensor, weight: Tensor) -> Tensor:
    """`weight` with the channels last if `v` has them last: torch's kernel returns them first."""
    if isinstance(v, Tensor) and v.dim() >= 4 and not v.is_contiguous() and v.stride(1) == 1:
        return weight.movedim(1, -1).contiguous().movedim(-1, 1)
    return weight


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
    # the next power iteration changes u and v in place, perhaps before the gradient of this is taken: hence the copies
    u, v = u.clone(), v.clone()
    matrix = as_matrix(orig, dim).to(u.dtype)  # FSDP2 computes in half precision while buffers stay in single
    return orig / torch.dot(u, torch.mv(matrix, v))
