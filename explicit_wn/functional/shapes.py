"""Whether the parts of a weight belong together: where they do not, torch broadcasts them, or reads past their end.

Every check is one comparison of shapes, in eager mode, in TorchScript and for a tracer.
"""

from typing import Optional

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..contexts.capture import capturing, is_transformed
from ..contexts.torchscript import is_scripting, is_traced, is_tracing, shape_of


def kept_dim(v: Tensor, dim: int) -> int:
    """`dim`, one of the dimensions of `v`, counted from the first."""
    if not is_scripting():  # noqa: SIM102 - TorchScript leaves out a branch, and no half of a condition
        if isinstance(dim, (float, str)):
            raise TypeError(f"dim is an int or None, not {dim}")
    kept = dim + v.dim() if dim < 0 else dim
    if not is_scripting():  # noqa: SIM102
        if isinstance(v, Tensor) and (kept < 0 or kept >= v.dim()):
            raise IndexError(f"dim={dim} is out of range for a weight of the shape {_shape(v)}")
    return kept


def fitting(v: Tensor, g: Tensor, dim: Optional[int], part: str = "g") -> Tensor:
    """`g`, if it has a number for each slice of `v` along `dim`. A traced or exported graph asks once more, as it runs.

    torch's kernel does not look, and reads past the end of g.
    """
    if not isinstance(v, Tensor):  # a proxy of torch.fx
        return g
    if not is_scripting():  # noqa: SIM102
        if not capturing() and not is_traced() and _fits(v, g, dim):
            return g
    of_v, of_g = _shape(v), _shape(g)
    wanted = [1] * 0
    if dim is not None and dim != -1:
        kept = kept_dim(v, dim)
        wanted = [1] * kept + [of_v[kept]] + [1] * (len(of_v) - kept - 1)
    if of_g != wanted and (len(wanted) > 0 or of_g != [1] * len(of_g) or len(of_g) > len(of_v)):
        raise ValueError(
            f"a weight of the shape {of_v} with dim={dim} wants a {part} of the shape {wanted}, not {of_g}"
        )
    if not is_scripting():  # noqa: SIM102 - as above
        if _is_recorded():
            return g.view([v.size(index) if length != 1 else 1 for index, length in enumerate(wanted)])
    return g


def number(weight: Tensor, g: Tensor) -> Tensor:
    """`g`, if it is one number; a graph asks once more, as above."""
    if not isinstance(weight, Tensor):
        return g
    of_g = _shape(g)
    if of_g != [1] * len(of_g) or len(of_g) > weight.dim():
        raise ValueError(f"a weight of the shape {_shape(weight)} wants a g of one number, not of the shape {of_g}")
    if not is_scripting():  # noqa: SIM102 - as above
        if _is_recorded():
            return g.view(of_g)
    return g


def _fits(v: Tensor, g: Tensor, dim: Optional[int]) -> bool:
    """Whether g is the ordinary one, asked in a moment; False where that is to be asked with care."""
    if type(dim) is not int or not 0 <= dim < v.dim() == g.dim():
        return False
    length = g.numel()
    return length > 0 and g.size(dim) == length == v.size(dim)


def check_vectors(matrix: Tensor, u: Tensor, v: Tensor) -> None:
    """Refuses a `u` that is not a number for each row of `matrix`, and a `v` that is not one for each column.

    In a graph of TorchScript or Dynamo torch itself refuses to multiply them, in words of its own.
    """
    if not is_scripting():
        if is_dynamo_compiling() or not isinstance(matrix, Tensor) or is_traced():
            return
        if u.shape + v.shape != matrix.shape:
            raise ValueError(
                f"a weight that is the matrix of the shape {_shape(matrix)} wants a u and a v of its lengths, not of "
                f"the shapes {_shape(u)} and {_shape(v)}"
            )


def _is_recorded() -> bool:
    """Not under vmap, whose tensors have no size that a trace could record."""
    return (is_tracing() and not is_transformed()) or torch.compiler.is_exporting()


def _shape(tensor: Tensor) -> list[int]:
    if is_scripting():
        return list(tensor.size())
    else:
        return shape_of(tensor)
