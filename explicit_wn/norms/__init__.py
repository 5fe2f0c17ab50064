"""The norms, each a formula with its settings, in the protocol of `Reparametrization`."""

from .forced_weight_norm import ForcedWeightNorm
from .scaled_weight_norm import ScaledWeightNorm
from .sigma_reparam import SigmaReparam
from .spectral_norm import SpectralNorm
from .unit_norm import UnitNorm
from .weight_norm import WeightNorm
from .weight_standardization import WeightStandardization

__all__ = [
    "ForcedWeightNorm",
    "ScaledWeightNorm",
    "SigmaReparam",
    "SpectralNorm",
    "UnitNorm",
    "WeightNorm",
    "WeightStandardization",
]
