"""The mathematics: tensors in, tensors out. Every function here is plain Python that `torch.jit.script` compiles."""

from .slices import force_norm, forced_weight_norm, kept, renorm, unit_norm, weight_standardization
from .spectral import as_matrix, power_iteration, sigma_reparam, spectral_norm
from .weight import norm_except_dim, scaled_weight_norm, weight_norm

__all__ = [
    "as_matrix",
    "force_norm",
    "forced_weight_norm",
    "kept",
    "norm_except_dim",
    "power_iteration",
    "renorm",
    "scaled_weight_norm",
    "sigma_reparam",
    "spectral_norm",
    "unit_norm",
    "weight_norm",
    "weight_standardization",
]
