"""σReparam: a weight of a learned largest singular value."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from .. import functional
from .spectral_norm import SpectralNorm, spectral_norm_steps


def sigma_reparam_steps(
    orig: Tensor, g: Tensor, name: str, dim: int, eps: float, u: Tensor | None = None, v: Tensor | None = None
) -> Iterator[tuple[str, str, str, Tensor]]:
    """The formula step by step: each step's symbol, what it is, its expression and its value."""
    *before, (_, _, _, quotient) = spectral_norm_steps(orig, name, dim, eps, u, v)
    yield from before
    yield "γ", "the largest singular value of w", f"parameter {name}_g", g
    yield "w", "the weight", "γ · w₀ / σ", g * quotient


@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
class SigmaReparam(SpectralNorm):
    """w = γ · w₀ / σ(w₀)

    A weight divided by its largest singular value, times a number γ that is learned and begins as 1 (Zhai et al.,
    2023, https://arxiv.org/abs/2303.06296). So γ is the largest singular value of the weight, which the rest of it no
    longer changes; the paper finds that the attention of a transformer then does not collapse to single entries.

    σ is estimated as `SpectralNorm` does it, and the settings are that norm's. `apply` replaces the parameter `weight`
    by the parameters `weight_orig` and `weight_g`, which is γ, and the buffers `weight_u` and `weight_v`.

    >>> sigma = SigmaReparam()
    >>> fc = sigma.apply(torch.nn.Linear(20, 40))
    >>> for _ in range(200):  # in training mode
    ...     sigma.recompute(fc)
    >>> round(torch.linalg.matrix_norm(fc.weight, 2).item(), 2)
    1.0
    >>> _ = sigma.assign(fc, 3 * torch.eye(40, 20))
    >>> fc.weight_g
    Parameter containing:
    tensor([3.], requires_grad=True)
    """

    formula = staticmethod(functional.sigma_reparam)  # type: ignore[assignment]
    steps = staticmethod(sigma_reparam_steps)  # type: ignore[assignment]
    spellings = {}

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """What `SpectralNorm` makes of it, and a γ of 1."""
        return {
            **super().split(weight),
            "g": weight.detach().new_ones(1),
        }  # fully_shard takes no parameter without a dim

    def inverse(self, weight: Tensor) -> dict[str, Tensor]:
        """The weight itself, its exact singular vectors, and its largest singular value."""
        sigma = torch.linalg.matrix_norm(self._matrix(weight).double(), 2)
        return {**super().inverse(weight), "g": sigma.to(weight.dtype).reshape(1)}

    def no_inverse(self, weight: Tensor) -> str | None:
        """Refuses a weight that is not finite; γ can be the largest singular value of any other."""
        return None if weight.isfinite().all() else "not all of its entries are finite"
