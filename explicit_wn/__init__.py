"""Weight normalization for PyTorch as an object you call."""

from . import functional
from .model import apply_all, cached, convert, fold, normed, recompute_all, report
from .reparametrization import Reparametrization
from .spectral_norm import SpectralNorm
from .teaching import data_dependent_init, detect_stale, steps
from .torchscript import script
from .weight_norm import WeightNorm

__all__ = [
    "Reparametrization",
    "SpectralNorm",
    "WeightNorm",
    "apply_all",
    "cached",
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
