"""Weight normalization for PyTorch as an object you call."""

from . import checkpoint, functional
from .contexts.torchscript import script
from .models import apply_all, cached, convert, fold, normed, recompute_all, report
from .norms import SpectralNorm, WeightNorm
from .reparametrization import Reparametrization
from .teaching import data_dependent_init, detect_stale, steps

__all__ = [
    "Reparametrization",
    "SpectralNorm",
    "WeightNorm",
    "apply_all",
    "cached",
    "checkpoint",
    "convert",
    "data_dependent_init",
    "detect_stale",
    "fold",
    "functional",
    "normed",
    "recompute_all",
    "report",
    "script",
    "steps",
]
