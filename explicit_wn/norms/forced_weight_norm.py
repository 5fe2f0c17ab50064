"""Forced weight normalization: a weight of a fixed length, whose parameter is held to a fixed length as well."""

import attrs
from torch import Tensor

from .. import functional, settings
from ..functional.slices import forced_weight_norm_by_kernel
from .unit_norm import UnitNorm, other_length


@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
class ForcedWeightNorm(UnitNorm):
    """w = gain · v / ‖v‖, and v has length √n itself

    n is how many numbers a slice of the weight has, the layer's fan-in. So the numbers in v have the mean square 1,
    those in w have `gain² / n`, and a layer keeps the magnitude of its input (EDM2, Karras et al., 2023,
    https://arxiv.org/abs/2312.02696). In training mode a `recompute` first gives v that length, in place. In EDM2's
    words: `v = normalize(v)`, and then `w = normalize(v) · gain / √fan_in`.

    Without that v would grow, as each step is at right angles to it, and what grows turns less and less: the learning
    rate would fall unseen. EDM2 adds 1e-4 to the mean square root that it divides by, which is 1e-4 of the weight.

    `apply` replaces the parameter `weight` by the parameter `weight_v`. The verbs are those of every
    `Reparametrization`.

    Args:
        name: the parameter to norm.
        dim: the dimension that is kept, as in `WeightNorm`; `"out"`, the default, is the layer's output dimension.
        gain: the length of each slice of the weight.
        eps: the smallest norm that is divided by; at 0 `apply` refuses a weight with a slice of zeros.

    >>> import torch
    >>> fwn = ForcedWeightNorm(gain=2)
    >>> fc = fwn.apply(torch.nn.Linear(20, 40))
    >>> torch.allclose(fc.weight.norm(dim=1), torch.full((40,), 2.0))
    True
    >>> fwn.recompute(fc)  # in training mode
    >>> torch.allclose(fc.weight_v.square().mean(dim=1), torch.ones(40))
    True
    """

    name: str = "weight"
    dim: settings.Dim = "out"
    gain: float = attrs.field(default=1.0, validator=settings.positive)
    eps: float = attrs.field(default=0.0, validator=settings.eps)

    formula = staticmethod(functional.forced_weight_norm)
    quick = staticmethod(forced_weight_norm_by_kernel)  # type: ignore[assignment]
    advance = staticmethod(functional.force_norm)

    def no_inverse(self, weight: Tensor) -> str | None:
        """Refuses what the formula never gives: slices of another length."""
        return other_length(weight, self.dim, self.gain)  # type: ignore[arg-type]
