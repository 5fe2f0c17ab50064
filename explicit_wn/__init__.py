"""Weight normalization for PyTorch as an object you call."""

from . import functional
from .torchscript import script
from .weight_norm import WeightNorm

__all__ = ["WeightNorm", "functional", "script"]
