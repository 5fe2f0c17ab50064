"""The norms, each a formula with its settings, in the protocol of `Reparametrization`."""

from .spectral_norm import SpectralNorm
from .weight_norm import WeightNorm

__all__ = ["SpectralNorm", "WeightNorm"]
