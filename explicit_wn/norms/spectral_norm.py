"""Spectral normalization: a weight divided by its largest singular value."""

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from .. import functional, settings
from ..reparametrization import Reparametrization


def spectral_norm_steps(
    orig: Tensor, name: str, dim: int, eps: float, u: Tensor | None = None, v: Tensor | None = None
) -> Iterator[tuple[str, str, str, Tensor]]:
    """The formula step by step: each step's symbol, what it is, its expression and its value."""
    yield "w₀", "the weight before the norm", f"parameter {name}_orig", orig
    if u is None or v is None:
        sigma = orig.norm().clamp_min(eps)
        yield "σ", "the length of w₀", f"max(‖w₀‖, {eps})", sigma
    else:
        matrix = functional.as_matrix(orig, dim)
        yield "W", "w₀ as a matrix", f"as_matrix(w₀, dim={dim})", matrix
        yield "u", "nearly the first left singular vector", f"buffer {name}_u", u
        yield "v", "nearly the first right singular vector", f"buffer {name}_v", v
        sigma = torch.dot(u, torch.mv(matrix, v))
        yield "σ", "nearly the largest singular value of W", "uᵀ · W · v", sigma
    yield "w", "the weight", "w₀ / σ", orig / sigma


@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
class SpectralNorm(Reparametrization):
    """w = w₀ / σ(w₀)

    σ is the largest singular value of the weight seen as a matrix (Miyato et al., 2018,
    https://arxiv.org/abs/1802.05957). It is estimated as uᵀ·w₀·v, with two vectors that power iterations bring nearer
    to the singular vectors: `n_power_iterations` at every `recompute` in training mode, none in eval mode.

    So the largest singular value becomes 1, as nearly as σ is known, and a Linear layer stretches no distance. A
    convolution may: its matrix is the kernel reshaped, as in torch and in the paper, and the layer applies that at
    places that overlap. With zeros for padding it stretches distances by at most the square root of the number of the
    kernel's positions, 3 for a kernel of 3×3; a padding mode that repeats entries may stretch further.

    `apply` replaces the parameter `weight` by the parameter `weight_orig` and the buffers `weight_u`, `weight_v`. A
    parameter of one dimension has neither buffer: it is divided by its length. The verbs are those of every
    `Reparametrization`.

    Args:
        name: the parameter to norm.
        n_power_iterations: how many iterations a `recompute` makes in training mode.
        eps: the smallest length that is divided by.
        dim: the rows of the matrix; `None` and `"out"` mean the layer's output dimension: 0, and 1 for a ConvTranspose.
        warmup: how many iterations `apply` makes. 15, as torch's parametrization makes, is the default, since the first
            forward then sees a good σ already; torch's hook makes none.
        first: the vector that an iteration renews first: "v" as torch's hook does, "u" as its parametrization does.
            The numbers of a training step differ a little; both converge to the same.

    >>> sn = SpectralNorm()
    >>> fc = sn.apply(torch.nn.Linear(20, 40))
    >>> for _ in range(200):  # in training mode
    ...     sn.recompute(fc)
    >>> round(torch.linalg.matrix_norm(fc.weight, 2).item(), 2)
    1.0
    """

    name: str = "weight"
    n_power_iterations: int = attrs.field(default=1, validator=settings.at_least(1))
    eps: float = attrs.field(default=1e-12, validator=settings.positive_eps)
    dim: settings.Dim = None
    warmup: int = attrs.field(default=15, kw_only=True, validator=settings.at_least(0))
    first: str = attrs.field(default="v", kw_only=True, validator=settings.one_of("u", "v"))

    formula = staticmethod(functional.spectral_norm)
    steps = staticmethod(spectral_norm_steps)
    advance = staticmethod(functional.power_iteration)
    buffer_parts = ("u", "v")
    spellings = {"orig": "original", "u": "0._u", "v": "0._v"}
    default_dim = "out"

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """The weight itself, and u and v after the warm-up from random vectors."""
        if weight.dim() == 1:
            return {"orig": weight}
        rows, columns = self._matrix(weight).shape
        parts = {"orig": weight, "u": self._random_unit(weight, rows), "v": self._random_unit(weight, columns)}
        functional.power_iteration(
            **parts, dim=self._rows(), n_power_iterations=self.warmup, eps=self.eps, first=self.first
        )
        return parts

    def inverse(self, weight: Tensor) -> dict[str, Tensor]:
        """The weight itself, whose σ is 1, and its exact singular vectors."""
        if weight.dim() == 1:
            return {"orig": weight}
        u, _, v = torch.linalg.svd(self._matrix(weight).double(), full_matrices=False)
        return {"orig": weight, "u": u[:, 0].to(weight), "v": v[0].to(weight)}

    def objection(self, weight: Tensor) -> str | None:
        """Refuses a weight of zeros, and one that is too large."""
        if weight.numel() == 0:
            return "it is empty, which leaves nothing to divide"
        if weight.is_meta or weight.dim() == 1:
            return None
        length = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).norm()
        if length == 0:
            return "it is zero, which has no singular vectors and would give NaN; initialize it"
        if length.isinf() and weight.isfinite().all():
            return f"it is too large: {weight.dtype} cannot hold its norm; scale the weight down"
        return None

    def no_inverse(self, weight: Tensor) -> str | None:
        """Refuses what no σ-normed weight can be: a weight whose σ is not 1."""
        if not weight.isfinite().all():
            return "not all of its entries are finite"
        sigma = torch.linalg.matrix_norm(self._matrix(weight).double(), 2)
        if abs(sigma.item() - 1) <= 16 * torch.finfo(weight.dtype).eps:
            return None
        return f"its largest singular value is {sigma.item():.9g}, and that of a normed weight is 1; divide it by that"

    def _respell(self, state_dict: dict[str, Any], prefix: str, parts: tuple[str, ...]) -> None:
        """Also reads what torch's hook wrote before 1.0, the weight instead of v, and its u and v of a vector."""
        super()._respell(state_dict, prefix, parts)
        key = prefix + self.name
        if "v" not in parts:
            for part in self.buffer_parts:
                state_dict.pop(f"{key}_{part}", None)
        elif f"{key}_v" not in state_dict and {key, f"{key}_orig", f"{key}_u"} <= set(state_dict):
            orig, u, weight = (state_dict[k] for k in (f"{key}_orig", f"{key}_u", key))
            if orig.shape == weight.shape and u.shape == orig.shape[self._rows() : self._rows() + 1]:
                state_dict[f"{key}_v"] = self._solve_v(orig, u, state_dict.pop(key))

    def _rows(self) -> int:
        assert isinstance(self.dim, int), "resolved by apply"
        return self.dim

    def _matrix(self, weight: Tensor) -> Tensor:
        return functional.as_matrix(weight.detach(), self._rows())

    def _random_unit(self, weight: Tensor, length: int) -> Tensor:
        return torch.nn.functional.normalize(weight.detach().new_empty(length).normal_(), dim=0, eps=self.eps)

    def _solve_v(self, orig: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        """The v for which u ∝ W·v and uᵀ·W·v = σ, where σ is what `orig` was divided by to give `weight`."""
        matrix = self._matrix(orig)
        v: Tensor = torch.linalg.pinv(matrix) @ u
        sigma = (orig * weight).sum() / (weight * weight).sum()
        return v * (sigma / torch.dot(u, matrix @ v))
