"""The mathematics: tensors in, tensors out. Every function here is plain Python that `torch.jit.script` compiles."""

from typing import Optional, Union

import torch
from torch import Tensor


def norm_except_dim(v: Tensor, pow: Union[int, float] = 2, dim: Optional[int] = 0) -> Tensor:
    """The p-norm of `v` over every dimension but `dim`, which keeps its length; the others become 1.

    Args:
        v: the tensor.
        pow: which norm, any number: 2 is Euclid's, 1 sums absolute values, `float("inf")` takes the largest.
        dim: the dimension that is **kept**. `None`, and -1 as in `torch.norm_except_dim`, mean one norm for the
            whole tensor (a 0-dimensional result). Other negative numbers count from the end.

    >>> norm_except_dim(torch.ones(5, 5, 5), 2, dim=0).flatten()
    tensor([5., 5., 5., 5., 5.])
    >>> norm_except_dim(torch.ones(5, 5, 5), 3, dim=None)
    tensor(5.)
    """
    if dim is None or dim == -1:
        return torch.linalg.vector_norm(v, float(pow))
    kept = dim + v.dim() if dim < 0 else dim
    if isinstance(pow, int) and v.numel() > 0:
        return torch.norm_except_dim(v, pow, kept)
    if v.dim() == 1:
        return v.abs()
    others = list(range(v.dim()))
    others.remove(kept)
    return torch.linalg.vector_norm(v, float(pow), others, keepdim=True)


def weight_norm(v: Tensor, g: Tensor, dim: Optional[int] = 0, eps: float = 0.0) -> Tensor:
    """Weight normalization: `g * v / max(‖v‖, eps)`, with the norm over every dimension but `dim`.

    Args:
        v: the direction, of the weight's shape.
        g: the magnitude, of the shape of `norm_except_dim(v, 2, dim)`.
        dim: the dimension that is kept, as in `norm_except_dim`.
        eps: the smallest norm that is divided by. At 0 a slice of zeros gives NaN, as in torch.

    >>> v, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]])
    >>> weight_norm(v, g)
    tensor([[6., 8.]])
    """
    if eps > 0.0:
        return v * (g / norm_except_dim(v, 2, dim).clamp_min(eps))
    if dim is None or dim == -1:
        return torch._weight_norm(v, g, -1)
    return torch._weight_norm(v, g, dim + v.dim() if dim < 0 else dim)
