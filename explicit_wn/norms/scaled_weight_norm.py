"""Weight normalization with a magnitude that is given, fixed or clipped."""

import attrs
import torch
from torch import Tensor

from .. import settings
from ..functional import scaled_weight_norm
from ..functional.weight import scaled_weight_norm_by_kernel
from .weight_norm import WeightNorm


@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
class ScaledWeightNorm(WeightNorm):
    """w = v · min(g / ‖v‖, clip)

    `WeightNorm` with the options that torchdeq (https://github.com/locuslab/torchdeq) gives it, and the same numbers.

    Args:
        name: the parameter to norm.
        dim: the dimension that is kept, as in `WeightNorm`.
        eps: the smallest norm that is divided by, as in `WeightNorm`.
        learn_scale: whether g is trained. If not, it is a buffer: every slice keeps its norm.
        target_norm: the norm that every slice begins with; by default its own.
        clip: the most that v is multiplied by; by default there is no limit. So ‖w‖ is at most clip · ‖v‖.

    >>> wn = ScaledWeightNorm(learn_scale=False, target_norm=2.0)
    >>> fc = wn.apply(torch.nn.Linear(20, 40))
    >>> torch.allclose(fc.weight.norm(dim=1), torch.full((40,), 2.0))
    True
    >>> [name for name, _ in fc.named_parameters()]
    ['bias', 'weight_v']
    """

    learn_scale: bool = attrs.field(default=True, kw_only=True, validator=settings.a_bool)
    target_norm: float | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(settings.positive)
    )
    clip: float | None = attrs.field(default=None, kw_only=True, validator=attrs.validators.optional(settings.positive))

    formula = staticmethod(scaled_weight_norm)
    quick = staticmethod(scaled_weight_norm_by_kernel)  # type: ignore[assignment]

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.buffer_parts = () if self.learn_scale else ("g",)

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts of `WeightNorm`, g with the target norm."""
        norm = self._norm(weight)
        return {"g": norm if self.target_norm is None else torch.full_like(norm, self.target_norm), "v": weight}

    def inverse(self, weight: Tensor) -> dict[str, Tensor]:
        """Its own norms, and a direction that is long enough to reach them with no more than `clip`."""
        return {"g": self._norm(weight), "v": weight if self.clip is None or self.clip >= 1 else weight / self.clip}
