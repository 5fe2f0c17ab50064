"""torch's own two spellings of a norm, the hook and the parametrization, and what it takes to make them ours.

Nothing else in the package knows how torch stores them. `find` only looks. `become_ours` keeps the Parameter objects,
so that an optimizer that holds them goes on as before, and changes one module only: the class of a parametrized module,
which its deep copies share, stays whole.

The private torch names used here, each for want of a public one: the classes `_WeightNorm` and `_SpectralNorm` of
`torch.nn.utils.parametrizations`, and the attributes in which a module keeps its hooks.
"""

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook

from .reparametrization import Reparametrization
from .spectral_norm import SpectralNorm
from .weight_norm import WeightNorm


@attrs.frozen(eq=False)
class Found:
    """A weight that torch norms."""

    name: str
    spelling: str
    """`"hook"` or `"parametrization"`."""
    norm: Reparametrization
    """The object of ours that does the same."""
    parts: dict[str, Tensor]
    """Its parts, by our names for them."""
    current: Tensor
    """The weight as the module has it now."""
    objection: str | None
    """Why it cannot become ours, and the way out."""


def find(module: nn.Module) -> Iterator[Found]:
    """The weights of `module` itself that torch norms."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, (WeightNormHook, SpectralNormHook)):
            yield _from_hook(module, hook)
    if parametrize.is_parametrized(module):
        for name, applied in dict(module.parametrizations.items()).items():  # type: ignore[operator, union-attr]
            ours = [p for p in applied if isinstance(p, (parametrizations._WeightNorm, parametrizations._SpectralNorm))]
            if ours:
                yield _from_parametrization(module, name, applied, ours[0])


def _from_hook(module: nn.Module, hook: Any) -> Found:
    name = hook.name
    norm: Reparametrization = WeightNorm(name, None if hook.dim == -1 else hook.dim)
    parts = ["g", "v"]
    if isinstance(hook, SpectralNormHook):
        norm, parts = SpectralNorm(name, hook.n_power_iterations, hook.eps, hook.dim), ["orig", "u", "v"]
    kind, objection = type(hook), None
    if kind not in (WeightNormHook, SpectralNormHook):
        objection = f"its hook is a {kind.__module__}.{kind.__qualname__}, not torch's; remove that hook its own way"
    found = {part: getattr(module, f"{name}_{part}") for part in parts}
    return Found(name, "hook", norm, found, getattr(module, name), objection)


def _from_parametrization(module: nn.Module, name: str, applied: Any, one: Any) -> Found:
    norm: Reparametrization
    if isinstance(one, parametrizations._WeightNorm):
        norm = WeightNorm(name, None if one.dim == -1 else one.dim)
        parts = {"g": applied.original0, "v": applied.original1} if len(applied) == 1 else {}
    else:
        iterations = getattr(one, "n_power_iterations", 1)  # a vector's has none
        norm = SpectralNorm(name, iterations, one.eps, one.dim, first="u")
        parts = {"orig": applied.original} | {
            part: one.get_buffer(f"_{part}") for part in "uv" if f"_{part}" in one._buffers
        }
    objection = None
    if len(applied) > 1 or type(one) not in (parametrizations._WeightNorm, parametrizations._SpectralNorm):
        kinds = ", ".join(type(p).__name__ for p in applied)
        objection = (
            f"it is parametrized by {kinds}, of which torch's norm is only one; end the others first, with "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        )
    return Found(name, "parametrization", norm, parts, getattr(module, name), objection)


def become_ours(module: nn.Module, found: Found) -> None:
    """Replaces one norm of torch's by ours, inlined, with the same parts. The caller holds `all_or_nothing`."""
    (_remove_hook if found.spelling == "hook" else _remove_parametrization)(module, found.name)
    found.norm.adopt(module, found.parts)


def is_stale(module: nn.Module, found: Found) -> bool:
    """Whether a hook's weight is not what its parts make; a parametrization computes it at every access."""
    if found.spelling == "parametrization":
        return False
    arguments = {**found.parts, **{key: value for key, value in vars(found.norm).items() if key in ("dim", "eps")}}
    with torch.no_grad():
        return not torch.equal(found.norm.formula(**arguments), found.current)


def class_of(module: nn.Module) -> type:
    """The class that `module` was written as."""
    return parametrize.type_before_parametrizations(module)


def touched(module: nn.Module) -> list[nn.Module]:
    """The modules that `become_ours` changes."""
    return [module, *([module.parametrizations] if parametrize.is_parametrized(module) else [])]  # type: ignore[list-item]


def _remove_hook(module: nn.Module, name: str) -> None:
    module.__dict__.pop(name, None)
    hooks: Any
    for hooks in (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            hook = getattr(hook, "hook", hook)  # torch wraps some hooks
            hook = getattr(hook, "fn", hook)  # and the state-dict hooks of SpectralNorm hold the hook itself
            if isinstance(hook, (WeightNormHook, SpectralNormHook)) and hook.name == name:
                del hooks[key]
    for part in ("g", "v", "orig", "u"):
        module._parameters.pop(f"{name}_{part}", None)
        module._buffers.pop(f"{name}_{part}", None)


def _remove_parametrization(module: nn.Module, name: str) -> None:
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        hook = getattr(hook, "hook", hook)
        names = (
            dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True))
            if hasattr(hook, "__code__")
            else {}
        )
        if getattr(hook, "__module__", "") == parametrizations.__name__ and names["name"].cell_contents == name:
            del module._load_state_dict_pre_hooks[key]
    base, remaining = class_of(module), module.parametrizations
    del remaining[name]  # type: ignore[operator, union-attr]
    if len(remaining) == 0:  # type: ignore[arg-type]
        del module._modules["parametrizations"]
        module.__class__ = base
