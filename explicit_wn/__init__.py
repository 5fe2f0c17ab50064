"""Weight normalization for PyTorch as an object you call."""

from . import functional
from .spectral_norm import SpectralNorm
from .torchscript import script
from .weight_norm import WeightNorm

__all__ = ["SpectralNorm", "WeightNorm", "functional", "script"]
