"""torch's own four functions, under their names and with their signatures, for code that was written for them."""

from typing import TypeVar

from torch import nn

from .. import carrier, refusals
from ..carrier import all_or_nothing
from ..norms import SpectralNorm, WeightNorm
from ..reparametrization import Reparametrization
from . import spellings
from .spellings import Found

Module = TypeVar("Module", bound=nn.Module)


def weight_norm(module: Module, name: str = "weight", dim: int | None = 0) -> Module:
    """`torch.nn.utils.weight_norm`, and no hook: `WeightNorm(name, dim).inline(module)`.

    Args:
        module: the module, changed in place and returned.
        name: the parameter to norm.
        dim: the dimension that is kept. `None` means one norm for the whole tensor, and here -1 does so too.

    >>> layer = weight_norm(nn.Conv1d(1, 8, 3))
    >>> layer
    Conv1d(1, 8, kernel_size=(3,), stride=(1,), weight=WeightNorm(dim=0))
    >>> remove_weight_norm(layer)
    Conv1d(1, 8, kernel_size=(3,), stride=(1,))
    """
    return WeightNorm(name, None if dim == -1 else dim).inline(module)


def spectral_norm(
    module: Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> Module:
    """`torch.nn.utils.spectral_norm`, and no hook: `SpectralNorm(name, ..., warmup=0).inline(module)`.

    Without a warm-up, from one seed, every forward gives what torch's gives. So let the model run in training mode
    before you trust its σ, or take `SpectralNorm` itself.

    Args:
        module: the module, changed in place and returned.
        name: the parameter to norm.
        n_power_iterations: how many iterations each forward in training mode makes.
        eps: the smallest length that is divided by.
        dim: the rows of the matrix; `None` means the layer's output dimension: 0, and 1 for a ConvTranspose.

    >>> remove_spectral_norm(spectral_norm(nn.Linear(2, 3)))
    Linear(in_features=2, out_features=3, bias=True)
    """
    eps = spellings.SMALLEST if eps == 0 else eps
    return SpectralNorm(name, n_power_iterations, eps, dim, warmup=0).inline(module)


def remove_weight_norm(module: Module, name: str = "weight") -> Module:
    """`torch.nn.utils.remove_weight_norm`, for all three spellings: ours, torch's hook and its parametrization.

    It bakes the weight into an ordinary Parameter and returns `module`. Like torch's it raises a ValueError where there
    is nothing to remove. A `forward` that calls `recompute` needs its norm; for such a model use `fold`.

    >>> remove_weight_norm(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    Linear(in_features=2, out_features=3, bias=True)
    """
    return _remove(module, name, WeightNorm, "remove_weight_norm")


def remove_spectral_norm(module: Module, name: str = "weight") -> Module:
    """`torch.nn.utils.remove_spectral_norm`, for all three spellings, as `remove_weight_norm` does it.

    >>> remove_spectral_norm(nn.utils.spectral_norm(nn.Linear(2, 3)))
    Linear(in_features=2, out_features=3, bias=True)
    """
    return _remove(module, name, SpectralNorm, "remove_spectral_norm")


def _remove(module: Module, name: str, kind: type[Reparametrization], verb: str) -> Module:
    """Ends the norm of this weight, if it is of this kind."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{verb} wants the module first, an nn.Module, and got {refusals.kind_of(module)}.")
    foreign = next((found for found in spellings.find(module) if found.name == name and found.is_norm), None)
    norm = foreign.norm if foreign else _norm_of(module, name)
    reason = _why_not(foreign, norm, kind)
    if reason:
        of_class = spellings.class_of(module).__name__
        raise ValueError(f"{verb} finds no {kind.__name__} to remove from {name!r} of this {of_class}: {reason}.")
    assert norm is not None, "or there was a reason"
    with all_or_nothing(*spellings.touched(module)):
        if foreign:
            spellings.become_ours(module, [foreign])
        return norm.remove(module, name)


def _norm_of(module: nn.Module, name: str) -> Reparametrization | None:
    return {recipe.name: recipe.norm for recipe in carrier.recipes_of(module)}.get(name)


def _why_not(foreign: Found | None, norm: Reparametrization | None, kind: type[Reparametrization]) -> str | None:
    """Why there is nothing that can be removed, and the way out; None if there is."""
    if foreign and foreign.why_not:
        return foreign.why_not
    if norm is None:
        return "neither we nor torch norm it; explicit_wn.report(model) shows what is normed"
    if not isinstance(norm, kind):
        return f"{norm!r} norms it; remove that, or end every norm with explicit_wn.fold(model)"
    return None
