"""The mathematics: tensors in, tensors out. Every function here is plain Python that `torch.jit.script` compiles."""

from .spectral import as_matrix, power_iteration, spectral_norm
from .weight import norm_except_dim, weight_norm

__all__ = ["as_matrix", "norm_except_dim", "power_iteration", "spectral_norm", "weight_norm"]
