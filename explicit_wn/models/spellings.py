"""torch's own two spellings of a norm, the hook and the parametrization, and what it takes to make them ours.

Nothing else in the package knows how torch stores them. `find` only looks, and `find_foreign` for what is neither
torch's nor ours. `become_ours` keeps the Parameter objects, so that an optimizer that holds them goes on as before, and
changes one module only: the class of a parametrized module, which its deep copies share, stays whole.

The private torch names used here, each for want of a public one: the classes `_WeightNorm` and `_SpectralNorm` of
`torch.nn.utils.parametrizations`, and the attributes in which a module keeps its hooks.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook

from .. import carrier
from ..contexts import torchscript
from ..norms import SpectralNorm, WeightNorm
from ..reparametrization import Reparametrization


@attrs.frozen(eq=False)
class Found:
    """A weight that a norm makes."""

    name: str
    """The parameter's name in its module."""
    spelling: str
    """`"hook"`, `"parametrization"` or `"foreign"`; `"ours"` in a report."""
    norm: Reparametrization | None
    """The object of ours that does the same; None if there is none."""
    kind: str
    """What it is called."""
    parts: dict[str, Tensor]
    """Its parts, by our names for them; those of a foreign norm by their own."""
    shape: tuple[int, ...]
    """The weight's shape."""
    state: str
    """`fresh`; `stale` where the weight in the module is not what the parts make; `broken` where they make none; empty
    for a foreign norm."""
    why_not: str | None
    """Why it cannot become ours, and the way out."""

    @property
    def is_norm(self) -> bool:
        """Whether it is a weight norm or a spectral norm, perhaps among others."""
        return self.norm is not None or self.why_not is not None


def find(module: nn.Module) -> Iterator[Found]:
    """The weights of `module` itself that torch norms. Reading a parametrized one would change it, so none is read."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, (WeightNormHook, SpectralNormHook)):
            yield _from_hook(module, hook)
    if parametrize.is_parametrized(module):
        for name, applied in dict(module.parametrizations.items()).items():  # type: ignore[operator, union-attr]
            yield _from_parametrization(module, name, applied)


def _from_hook(module: nn.Module, hook: Any) -> Found:
    name, kind, names = hook.name, type(hook), ["g", "v"]
    if isinstance(hook, SpectralNormHook):
        names = ["orig", "u", "v"]
        norm, why_not = _made(SpectralNorm, name, hook.n_power_iterations, max(SMALLEST, hook.eps), hook.dim)
    else:
        norm, why_not = _made(WeightNorm, name, None if hook.dim == -1 else hook.dim)
    own: dict[str, Any] = {**module._parameters, **module._buffers}
    parts = {part: own[f"{name}_{part}"] for part in names if f"{name}_{part}" in own}
    if kind not in (WeightNormHook, SpectralNormHook):
        why_not = f"its hook is a {kind.__module__}.{kind.__qualname__}, not torch's; remove that hook its own way"
    elif len(parts) < len(names):
        why_not = "a part of it is computed by another tool (parametrize or prune); end that first"
    whole = getattr(module, f"{name}_{names[0]}" if len(names) == 3 else f"{name}_v")
    state, called, mistake = "fresh", norm._kind if norm else kind.__name__, None
    if norm and len(parts) == len(names):
        mistake = _mistake(norm, parts)
        if mistake:
            state = "broken"
        elif _differs(norm, parts, vars(module).get(name)):
            state = "stale"
    return Found(name, "hook", norm, called, parts, tuple(whole.shape), state, why_not or mistake)


SMALLEST = torch.finfo(torch.float32).tiny
"""torch's spectral norm takes an eps of 0, and ours does not; this one divides alike."""


def _made(
    kind: Callable[..., Reparametrization], *settings: Any, **more: Any
) -> tuple[Reparametrization | None, str | None]:
    """A norm of ours with the settings of one of torch's, or why there is none."""
    plain = [value.item() if hasattr(value, "item") else value for value in settings]  # numbers of NumPy among them
    try:
        return kind(*plain, **more), None
    except (TypeError, ValueError) as error:
        return None, str(error).removesuffix(".")


def _differs(norm: Any, parts: dict[str, Tensor], current: Tensor | None) -> bool:
    """Whether `current`, which `.to()` does not reach, is anything else than what the parts make."""
    with torch.no_grad():
        weight = norm.formula(**parts, dim=norm.dim, eps=norm.eps)
    if current is None or (current.dtype, current.device) != (weight.dtype, weight.device):
        return True
    return not weight.is_meta and not torch.allclose(weight, current, equal_nan=True)


_NORMS = (parametrizations._WeightNorm, parametrizations._SpectralNorm)

_Read = tuple[Reparametrization | None, dict[str, Tensor], str | None]
"""The norm of ours that does the same, its parts, and why it cannot become ours."""


def _from_parametrization(module: nn.Module, name: str, applied: Any) -> Found:
    alone, tensors = applied[0] if len(applied) == 1 else None, dict(applied.named_parameters(recurse=False))
    kinds = ", ".join(type(one).__name__.lstrip("_") for one in applied)
    read: _Read = None, tensors, None
    if isinstance(alone, _NORMS) and any(part.startswith("original") for part in applied._buffers):
        read = None, tensors, "its parts are computed by another tool (prune, say); end that first"
    elif type(alone) is _NORMS[0]:
        read = _read_weight_norm(name, alone, tensors)
    elif type(alone) is _NORMS[1]:
        read = _read_spectral_norm(name, alone, tensors)
    elif any(isinstance(one, _NORMS) for one in applied):
        rest = f"end the rest first, with torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        read = None, tensors, f"it is parametrized by {kinds}, which is more than torch's norm; {rest}"
    norm, parts, why_not = read
    whole, mistake = parts.get("orig", parts.get("v", next(iter(parts.values())))), None
    if norm:
        why_not, mistake = why_not or _beside(module), _mistake(norm, parts)
    kind, state = norm._kind if norm else kinds, "broken" if mistake else "fresh"
    return Found(name, "parametrization", norm, kind, parts, tuple(whole.shape), state, why_not or mistake)


def _read_weight_norm(name: str, torchs: Any, tensors: dict[str, Tensor]) -> _Read:
    norm, why_not = _made(WeightNorm, name, None if torchs.dim == -1 else torchs.dim)
    return norm, {"g": tensors["original0"], "v": tensors["original1"]}, why_not


def _read_spectral_norm(name: str, torchs: Any, tensors: dict[str, Tensor]) -> _Read:
    iterations = getattr(torchs, "n_power_iterations", 1)  # a vector's has none
    norm, why_not = _made(SpectralNorm, name, iterations, max(SMALLEST, torchs.eps), torchs.dim, first="u")
    vectors = {part: torchs._buffers[f"_{part}"] for part in "uv" if f"_{part}" in torchs._buffers}
    return norm, {"orig": tensors["original"], **vectors}, why_not


def _beside(module: Any) -> str | None:
    """Why no parametrization of `module` can become ours, whatever it is; None if it can."""
    others = [name for name, applied in module.parametrizations.items() if not isinstance(applied[0], _NORMS)]
    if not others or not carrier.recipes_of(module):
        return None
    return f"the module carries a norm of ours, and {others[0]!r} is parametrized otherwise; end one of them first"


def _mistake(norm: Any, parts: dict[str, Tensor]) -> str | None:
    """Why the parts make no weight, by their shapes; None if they do."""
    shapes = {part: torch.empty(value.shape, dtype=value.dtype, device="meta") for part, value in parts.items()}
    try:
        norm.formula(**shapes, dim=norm.dim, eps=norm.eps)
    except (ValueError, IndexError) as error:
        return str(error)
    return None


_SIGNS = (  # what norms of other projects call their parts: the kind, what has the weight's shape, a vector beside it
    ("SpectralNorm", "_orig", "_u"),
    ("SpectralNorm", "_bar", "_u"),
    ("SpectralNorm", "w_bar", "u"),
    ("SpectralNorm", "weight", "u0"),
    ("SpectralNorm", "weight", "u"),
    ("WeightNorm", "_v", "_g"),
)


def find_foreign(module: nn.Module) -> Iterator[Found]:
    """What looks like the parts of norms in `module` itself that are neither ours nor torch's.

    Names and shapes are all there is to go by, since every project computes its norms in its own way; for the parts
    of a `weight` that is not there, the names alone.
    """
    if _is_captured(module):
        return
    tensors = {**module._parameters, **module._buffers}
    own = {name: tensor for name, tensor in tensors.items() if tensor is not None and not is_lazy(tensor)}
    known = {recipe.name for recipe in carrier.recipes_of(module)} | {one.name for one in find(module)}
    for kind, end, vector_end in _SIGNS:
        for matrix in [name for name in own if name.endswith(end)]:
            stem = matrix.removesuffix(end)
            name, vector = stem if end.startswith("_") else matrix, stem + vector_end
            taken = known if name == matrix else {*known, *module._parameters}  # a parameter is not computed
            if name in taken or vector not in own:
                continue
            if matrix != name == "weight" or _fit(own[matrix], own[vector], trained=name != matrix):
                known.add(name)
                beside = re.compile(re.escape(vector.rstrip("0")[:-1]) + "(g|u|v|sv)[0-9]*")
                parts = {part: own[part] for part in own if part == matrix or beside.fullmatch(part)}
                yield Found(name, "foreign", None, kind, parts, tuple(own[matrix].shape), "", None)


def _is_captured(module: nn.Module) -> bool:
    """Whether `module` holds the parts for a graph that computes the weight: of TorchScript, `torch.export` or fx."""
    bare = type(module) is nn.Module
    return bare or torchscript.is_scripted(module) or isinstance(getattr(module, "graph", None), torch.fx.Graph)


def _fit(matrix: Tensor, vector: Tensor, trained: bool) -> bool:
    """Whether the vector has a number for each slice of the matrix, and, unless it may be `trained`, is not."""
    return matrix.dim() > 1 and vector.numel() in (1, *matrix.shape) and (trained or not vector.requires_grad)


def become_ours(module: nn.Module, found: list[Found]) -> None:
    """Replaces all norms of torch's in `module` by ours, inlined, with the same parts, within `all_or_nothing`."""
    carried = carrier.recipes_of(module)
    if carried and not carrier.is_wrapped(module):
        module.__class__ = carrier.base_of(module)
    for one in found:
        (_remove_hook if one.spelling == "hook" else _remove_parametrization)(module, one.name)
    if carried:
        carrier.carry(module, carried)
    for one in found:
        assert one.norm is not None, "convert refuses it"
        one.norm._adopt(module, one.parts)


def class_of(module: nn.Module) -> type:
    """The class that `module` was written as."""
    ours = [cls for cls in type(module).__mro__ if "_normed_base" in vars(cls) or cls is carrier.Carrier]
    parametrized = parametrize.is_parametrized(module)
    names = (cls for cls in type(module).__mro__ if cls not in ours)
    return next(cls for cls in names if not (parametrized and cls.__name__.startswith("Parametrized")))


def touched(module: nn.Module) -> list[nn.Module]:
    """The modules that `become_ours` changes."""
    return [module, *([module.parametrizations] if parametrize.is_parametrized(module) else [])]  # type: ignore[list-item]


def _remove_hook(module: nn.Module, name: str) -> None:
    vars(module).pop(name, None)
    hooks: Any
    for hooks in (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            hook = getattr(hook, "hook", hook)  # torch wraps some hooks
            hook = getattr(hook, "fn", hook)  # and the state-dict hooks of SpectralNorm hold the hook itself
            if isinstance(hook, (WeightNormHook, SpectralNormHook)) and hook.name == name:
                del hooks[key]


def _remove_parametrization(module: nn.Module, name: str) -> None:
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if _is_compat_hook(getattr(hook, "hook", hook), name):
            del module._load_state_dict_pre_hooks[key]
    cls, remaining = type(module), module.parametrizations
    del remaining[name]  # type: ignore[operator, union-attr]
    if len(remaining) > 0:  # type: ignore[arg-type]
        # a class of its own, without the property for this weight: copies of the module share the old one
        kept = {key: value for key, value in vars(cls).items() if key not in (name, "__dict__", "__weakref__")}
        module.__class__ = type(cls.__name__, cls.__bases__, kept)
    else:
        del module._modules["parametrizations"]
        module.__class__ = cls.__bases__[0]


def _is_compat_hook(hook: Any, name: str) -> bool:
    """Whether it is the hook by which torch's parametrization of `name` reads the checkpoints of its hook."""
    if getattr(hook, "__module__", "") != parametrizations.__name__ or not hook.__closure__:
        return False
    variables = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))
    return "name" in variables and variables["name"].cell_contents == name
