"""Weight normalization: a weight as a magnitude times a direction."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from .. import settings
from ..functional import norm_except_dim, weight_norm
from ..functional.weight import length_of, weight_norm_by_kernel
from ..reparametrization import Reparametrization


def weight_norm_steps(
    v: Tensor, g: Tensor, name: str, dim: int | None, eps: float
) -> Iterator[tuple[str, str, str, Tensor]]:
    """The formula step by step: each step's symbol, what it is, its expression and its value."""
    yield "v", "the direction, of any length", f"parameter {name}_v", v
    norm = norm_except_dim(v, 2, dim)
    yield "‖v‖", "the length of v", f"norm_except_dim(v, 2, dim={dim})", norm
    if eps > 0:
        norm = norm.clamp_min(eps)
        yield "n", "the length that is divided by", f"max(‖v‖, {eps})", norm
    length = "n" if eps > 0 else "‖v‖"
    direction = v / norm
    yield f"v/{length}", "the direction, of length 1", f"v / {length}", direction
    yield "g", "the magnitude", f"parameter {name}_g", g
    yield "w", "the weight", f"g · v/{length}", g * direction


@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
class WeightNorm(Reparametrization):
    """w = g · v / ‖v‖

    A weight `w` is split into its magnitude `g` and its direction `v`, both trainable. The norm ‖v‖ is taken over every
    dimension but `dim`, so that each output of a layer has a magnitude of its own (Salimans and Kingma, 2016,
    https://arxiv.org/abs/1602.07868).

    `apply` replaces the parameter `weight` of a module by the parameters `weight_g` and `weight_v`. From then on the
    weight is what `recompute` makes of them. Nothing recomputes it behind your back: you call `recompute` where you
    want it fresh, usually at the top of `forward`. The other verbs are those of every `Reparametrization`.

    Args:
        name: the parameter to norm.
        dim: the dimension that is kept. `None` and `"whole"` mean one norm for the whole tensor; `"out"` the layer's
            output dimension, which is 0, and 1 for a ConvTranspose.
        eps: the smallest norm that is divided by; at 0 `apply` refuses a weight with a slice of zeros.

    >>> wn = WeightNorm("weight", dim=0)
    >>> fc = wn.apply(torch.nn.Linear(20, 40))
    >>> fc.weight_g.shape, fc.weight_v.shape
    (torch.Size([40, 1]), torch.Size([40, 20]))
    >>> _ = torch.nn.init.ones_(fc.weight_g)  # the stored weight is stale now ...
    >>> wn.recompute(fc)                      # ... and fresh again: every row has length 1
    >>> torch.allclose(fc.weight.norm(dim=1), torch.ones(40))
    True
    """

    name: str = "weight"
    dim: settings.Dim = 0
    eps: float = attrs.field(default=0.0, validator=settings.eps)

    formula = staticmethod(weight_norm)
    quick = staticmethod(weight_norm_by_kernel)
    steps = staticmethod(weight_norm_steps)
    spellings = {"g": "original0", "v": "original1"}

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """The magnitude and the direction of `weight`; the direction need not have length 1, so it is `weight`."""
        return {"g": self._norm(weight), "v": weight}

    def objection(self, weight: Tensor) -> str | None:
        """Refuses slices that have no direction."""
        if weight.is_meta or weight.numel() == 0:
            return None
        g = self._norm(weight.detach()).flatten()
        if g.isinf().any() and weight.isfinite().all():
            return f"{self._where(g.isinf())} too large: {weight.dtype} cannot hold the norm; scale the weight down"
        if not (g == 0).any():
            return None
        eps = 1e-6 if weight.dtype == torch.float16 else 1e-12
        why = "zero, which has no direction and would give NaN"
        return f"{self._where(g == 0)} {why}; initialize it, or set eps ({eps}, say)"

    def _norm(self, weight: Tensor) -> Tensor:
        return length_of(weight, self.dim, self.eps)  # type: ignore[arg-type]

    def _where(self, found: Tensor) -> str:
        """The slices that were found, as the beginning of a sentence."""
        indices = found.nonzero().flatten().tolist()
        return "all of it is" if self.dim is None else f"along dim {self.dim}, the slices {_some(indices)} are"

    @classmethod
    def from_r(cls, name: str, dim: int | None) -> "WeightNorm":
        """`nn_utils_weight_norm$new(name, dim)` of R's torch, whose dimensions count from 1.

        There, `NULL` and -1 mean one norm for the whole tensor.

        >>> WeightNorm.from_r("weight", 2)
        WeightNorm('weight', dim=1)
        """
        if dim is not None and not settings.is_int(dim):
            raise TypeError(f"from_r({name!r}, {dim!r}): R's dim is an int, or NULL, which is None here.")
        if dim == 0:
            raise ValueError(
                f"from_r({name!r}, 0): R counts dimensions from 1, and its apply refuses 0; the first one is 1."
            )
        in_python = None if dim is None or dim == -1 else dim - 1 if dim > 0 else dim
        norm = cls(name, dim=in_python)
        norm._counts_from = 1
        return norm


def _some(indices: list[int]) -> str:
    shown = ", ".join(str(index) for index in indices[:5])
    return f"{shown} and {len(indices) - 5} more" if len(indices) > 5 else shown
