"""Every norm once more: its formula and its gradient's, written out here in float64."""

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from explicit_wn import (
    ForcedWeightNorm,
    ScaledWeightNorm,
    SigmaReparam,
    SpectralNorm,
    UnitNorm,
    WeightNorm,
    WeightStandardization,
)

Dim = int | None


def others(v: Tensor, dim: Dim) -> list[int]:
    return [index for index in range(v.dim()) if index != dim]


def length(v: Tensor, dim: Dim) -> Tensor:
    return v.square().sum(others(v, dim), keepdim=dim is not None).sqrt()


def standardized(v: Tensor, gain: Tensor, dim: int) -> Tensor:
    centered = v - v.mean(others(v, dim), keepdim=True)
    return gain * centered / centered.square().mean(others(v, dim), keepdim=True).sqrt()


def sigma(orig: Tensor, u: Tensor, v: Tensor, dim: Dim) -> Tensor:
    return torch.einsum("i,ij,j", u, orig.movedim(dim or 0, 0).flatten(1), v)


@attrs.frozen
class ByHand:
    """A norm, by the name and the dim, and its weight from the parts and the dim."""

    make: Callable[..., Any]
    weight: Callable[..., Tensor]
    parts: tuple[str, ...]
    buffers: tuple[str, ...] = ()

    def of(self, parts: dict[str, Tensor], dim: Dim = 0) -> Tensor:
        """The weight, computed in float64."""
        wide = {name: part.double() for name, part in parts.items()}
        return self.weight(**wide, dim=dim).to(next(iter(parts.values())).dtype)


NORMS: dict[str, ByHand] = {
    "WeightNorm": ByHand(WeightNorm, lambda g, v, dim: g * v / length(v, dim), ("g", "v")),
    "ScaledWeightNorm": ByHand(
        lambda name="weight", dim=0: ScaledWeightNorm(name, dim, clip=0.8),
        lambda g, v, dim: v * torch.minimum(g / length(v, dim), torch.tensor(0.8, dtype=g.dtype)),
        ("g", "v"),
    ),
    "ScaledWeightNorm, fixed": ByHand(
        lambda name="weight", dim=0: ScaledWeightNorm(name, dim, learn_scale=False, target_norm=2.0),
        lambda g, v, dim: g * v / length(v, dim),
        ("g", "v"),
        buffers=("g",),
    ),
    "ForcedWeightNorm": ByHand(
        lambda name="weight", dim=0: ForcedWeightNorm(name, dim, gain=1.5),
        lambda v, dim: 1.5 * v / length(v, dim),
        ("v",),
    ),
    "UnitNorm": ByHand(UnitNorm, lambda v, dim: v / length(v, dim), ("v",)),
    "SpectralNorm": ByHand(
        lambda name="weight", dim=0: SpectralNorm(name, dim=dim),
        lambda orig, u, v, dim: orig / sigma(orig, u, v, dim),
        ("orig", "u", "v"),
        buffers=("u", "v"),
    ),
    "SigmaReparam": ByHand(
        lambda name="weight", dim=0: SigmaReparam(name, dim=dim),
        lambda orig, g, u, v, dim: g * orig / sigma(orig, u, v, dim),
        ("orig", "g", "u", "v"),
        buffers=("u", "v"),
    ),
    "WeightStandardization": ByHand(WeightStandardization, standardized, ("v", "gain")),
}
OTHERS = {name: norm for name, norm in NORMS.items() if name != "WeightNorm"}
"""Those that the tests of WeightNorm do not see."""
