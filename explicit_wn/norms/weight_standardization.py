"""Weight standardization: a weight of mean 0 and of a learned spread."""

import attrs
import torch
from torch import Tensor

from .. import functional, settings
from ..reparametrization import Reparametrization


@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
class WeightStandardization(Reparametrization):
    """w = gain · (v - μ) / σ

    μ and σ are the mean and the standard deviation of v for each output of a layer (Qiao et al., 2019,
    https://arxiv.org/abs/1903.10520), and the gain, one number for each output, is learned (Brock et al., 2021,
    https://arxiv.org/abs/2101.08692). It is weight norm of a direction whose mean is 0.

    `apply` replaces the parameter `weight` by the parameters `weight_v` and `weight_gain`. The gain begins as the
    standard deviation of the weight, so that `apply` takes nothing from the weight but its mean. Qiao's form has no
    gain: `torch.nn.init.ones_(layer.weight_gain).requires_grad_(False)`. The verbs are those of every
    `Reparametrization`.

    Args:
        name: the parameter to norm.
        dim: the dimension that is kept; `None` and `"out"` mean the layer's output dimension: 0, and 1 for a
            ConvTranspose.
        eps: the smallest ‖v - μ‖ that is divided by; at 0 `apply` refuses a weight with a slice of equal numbers.

    >>> ws = WeightStandardization()
    >>> conv = ws.apply(torch.nn.Conv1d(4, 8, 3))
    >>> _ = torch.nn.init.ones_(conv.weight_gain)
    >>> ws.recompute(conv)
    >>> std, mean = torch.std_mean(conv.weight, (1, 2), correction=0)
    >>> torch.allclose(std, torch.ones(8)), torch.allclose(mean, torch.zeros(8), atol=1e-6)
    (True, True)
    """

    name: str = "weight"
    dim: settings.Dim = "out"
    eps: float = attrs.field(default=0.0, validator=settings.eps)

    formula = staticmethod(functional.weight_standardization)
    default_dim = "out"

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """The weight itself, and the standard deviation of each of its slices."""
        return {"v": weight, "gain": self._std(weight)}

    def objection(self, weight: Tensor) -> str | None:
        """Refuses slices that have no spread."""
        if weight.dim() < 2:
            return "each of its slices is a single number, which has no spread; leave it as it is"
        if self.eps > 0 or weight.is_meta or weight.numel() == 0 or (self._std(weight.detach()) > 0).all():
            return None
        return f"along dim {self.dim}, a slice of it has no spread, which would give NaN; initialize it, or set eps"

    def no_inverse(self, weight: Tensor) -> str | None:
        """Refuses what the formula never gives: slices whose mean is not 0."""
        mean = weight.mean(self._others(weight), keepdim=True)
        if (mean.abs() <= 1e-3 * self._std(weight)).all():
            return None
        return "its slices have not the mean 0; subtract their means first, which the formula would do"

    def _std(self, weight: Tensor) -> Tensor:
        return torch.std(weight, self._others(weight), correction=0, keepdim=True)

    def _others(self, weight: Tensor) -> list[int]:
        return [dim for dim in range(weight.dim()) if dim != self.dim]
