"""Weight normalization for PyTorch as an object you call."""

from . import checkpoint, functional
from .carrier.alarm import LostWriteWarning, StaleWeightWarning
from .contexts.torchscript import script
from .models import (
    ForeignNormWarning,
    apply_all,
    assign_all,
    cached,
    check,
    convert,
    fold,
    load_r,
    normed,
    recompute_all,
    remove_spectral_norm,
    remove_weight_norm,
    report,
    spectral_norm,
    weight_norm,
)
from .norms import (
    ForcedWeightNorm,
    ScaledWeightNorm,
    SigmaReparam,
    SpectralNorm,
    UnitNorm,
    WeightNorm,
    WeightStandardization,
)
from .reparametrization import Reparametrization
from .teaching import StaleWeightError, data_dependent_init, detect_stale, record, steps

__version__ = "0.1.0"

__all__ = [
    "ForcedWeightNorm",
    "ForeignNormWarning",
    "LostWriteWarning",
    "Reparametrization",
    "ScaledWeightNorm",
    "SigmaReparam",
    "SpectralNorm",
    "StaleWeightError",
    "StaleWeightWarning",
    "UnitNorm",
    "WeightNorm",
    "WeightStandardization",
    "apply_all",
    "assign_all",
    "cached",
    "check",
    "checkpoint",
    "convert",
    "data_dependent_init",
    "detect_stale",
    "fold",
    "functional",
    "load_r",
    "normed",
    "recompute_all",
    "record",
    "remove_spectral_norm",
    "remove_weight_norm",
    "report",
    "script",
    "spectral_norm",
    "steps",
    "weight_norm",
]
