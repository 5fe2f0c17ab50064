"""A weight of unit norm: a direction and nothing else."""

import attrs
import torch
from torch import Tensor

from .. import functional, settings
from ..functional.slices import unit_norm_by_kernel
from ..reparametrization import Reparametrization
from .weight_norm import WeightNorm


@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
class UnitNorm(Reparametrization):
    """w = v / ‖v‖, and v has length 1 itself

    Every slice of the weight has the length 1: the rows of a matrix for `dim=0`, its columns for `dim=1` (nGPT,
    Loshchilov et al., 2024, https://arxiv.org/abs/2410.01131). In training mode a `recompute` first gives v the length
    1 as well, in place: the renorm that nGPT makes after each step. So v does not grow, and a step turns it as far at
    the end of a training as at its beginning.

    Between two renorms nGPT takes v as it is for the weight. Here the weight is v / ‖v‖, so that it has unit norm also
    in eval mode after the last step, and its gradient has no part along v, which the next renorm would undo.

    `apply` replaces the parameter `weight` by the parameter `weight_v`. The verbs are those of every
    `Reparametrization`.

    Args:
        name: the parameter to norm.
        dim: the dimension that is kept, as in `WeightNorm`.
        eps: the smallest norm that is divided by; at 0 `apply` refuses a weight with a slice of zeros.

    >>> un = UnitNorm()
    >>> fc = un.apply(torch.nn.Linear(20, 40))
    >>> torch.allclose(fc.weight.norm(dim=1), torch.ones(40))
    True
    >>> un.recompute(fc)  # in training mode
    >>> torch.allclose(fc.weight_v.norm(dim=1), torch.ones(40))
    True
    """

    name: str = "weight"
    dim: settings.Dim = 0
    eps: float = attrs.field(default=0.0, validator=settings.eps)

    formula = staticmethod(functional.unit_norm)
    quick = staticmethod(unit_norm_by_kernel)
    advance = staticmethod(functional.renorm)

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """The weight itself, whose length the formula does not see."""
        return {"v": weight}

    def objection(self, weight: Tensor) -> str | None:
        """Refuses slices that have no direction."""
        return WeightNorm(self.name, self.dim, self.eps).objection(weight)

    def no_inverse(self, weight: Tensor) -> str | None:
        """Refuses what the formula never gives: slices of another length."""
        return other_length(weight, self.dim, 1.0)  # type: ignore[arg-type]


def other_length(weight: Tensor, dim: int | None, length: float) -> str | None:
    """Why slices of `weight` are not of that length; None if all are."""
    lengths = functional.norm_except_dim(weight.double(), 2, dim)
    if torch.allclose(lengths, torch.full_like(lengths, length), rtol=16 * torch.finfo(weight.dtype).eps, atol=0):
        return None
    found = f"{lengths.min().item():.6g} to {lengths.max().item():.6g}"
    return f"its slices have lengths from {found}, and those of a normed weight have {length:g}; scale them to that"
