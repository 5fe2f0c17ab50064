"""Weight normalization for PyTorch as an object you call."""

from . import functional
from .model import apply_all, cached, convert, fold, normed, recompute_all, report
from .spectral_norm import SpectralNorm
from .torchscript import script
from .weight_norm import WeightNorm

__all__ = [
    "SpectralNorm",
    "WeightNorm",
    "apply_all",
    "cached",
    "convert",
    "fold",
    "functional",
    "normed",
    "recompute_all",
    "report",
    "script",
]
