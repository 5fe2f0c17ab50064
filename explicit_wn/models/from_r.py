"""The numbers of a module that torch for R has saved, in a model of Python's."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import carrier
from ..carrier import all_or_nothing, values_or_nothing
from ..functional.weight import shape_of_g
from ..layers import qualified
from ..norms import WeightNorm
from ..reparametrization import Reparametrization
from ..table import shape_shown
from . import spellings
from .verbs import Model, check_model

FileName = str | os.PathLike[str]


def load_r(model: Model, path: FileName) -> Model:
    """Loads what `torch_save(module, path)` of torch for R wrote into `model`, in place, and returns it.

    The submodules are called as in R; the layers of an RNN count from 0 here and from 1 there. A weight that is normed
    on one side only is computed from its parts, or split; one that is normed on both sides has the same dim on both.
    dtypes, devices and `requires_grad` are those of `model`. What does not fit is refused, all of it by name, and then
    nothing is loaded. It needs torch for R 0.12 or newer, and here the package `safetensors`.

    R's own RNNs ignore `recompute`: where g or v of one was changed, the numbers here are those of the formula.

    >>> import os, tempfile
    >>> from safetensors.torch import save_file
    >>> in_r = {"weight_g": torch.tensor([[10.0]]), "weight_v": torch.tensor([[3.0, 4.0]]), "bias": torch.zeros(1)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(in_r, os.path.join(folder, "fc.pt"))  # R: torch_save(fc, "fc.pt")
    ...     fc = load_r(WeightNorm.from_r("weight", 1).inline(nn.Linear(2, 1)), os.path.join(folder, "fc.pt"))
    ...     plain = load_r(nn.Linear(2, 1), os.path.join(folder, "fc.pt"))
    >>> fc.weight_g.item(), plain.weight.tolist()
    (10.0, [[6.0, 8.0]])
    """
    check_model("load_r", model)
    rnns = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.RNNBase)}
    state = {_renumbered(name, rnns, by=-1): value for name, value in _read(path).items()}
    norms, own = dict(_norms(model)), dict(model.state_dict(keep_vars=True))
    problems = [*_meet(state, own, norms, rnns), *_misfits(state, own, rnns), *_torn(state, own)]
    if problems:
        kind = spellings.class_of(model).__name__
        raise ValueError(f"load_r: {os.fspath(path)} does not fit this {kind}: {'; '.join(problems)}.")
    _load(model, {name: value.reshape(own[name].shape) for name, value in state.items()}, norms)
    return model


def _load(model: nn.Module, state: dict[str, Tensor], norms: "dict[str, _Normed]") -> None:
    for name, normed in norms.items():
        if name in state:
            state.update({f"{name}_{part}": value for part, value in normed.norm.split(state.pop(name)).items()})
    with torch.no_grad(), all_or_nothing(*model.modules()), values_or_nothing([*model.parameters(), *model.buffers()]):
        model.load_state_dict(state)


# The file


def _read(path: FileName) -> dict[str, Tensor]:
    """The tensors of a module of R's, by R's names for them."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("load_r reads with safetensors, which is not installed: pip install safetensors.") from error
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            _check_kind(path, file.metadata())
            return {name: file.get_tensor(name) for name in file.keys() if name != _OBJECT}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"load_r: {os.fspath(path)} is no safetensors file, or not all of one ({error}); torch for R writes them "
            "since 0.12: load an older file there with torch_load, and torch_save it again."
        ) from error


_OBJECT = "__robj__"
"""The entry that is the R object itself."""


def _check_kind(path: FileName, metadata: dict[str, str] | None) -> None:
    kind = json.loads((metadata or {}).get("__r__", "{}")).get("type", "module")
    if kind != "module":
        raise ValueError(
            f"load_r: {os.fspath(path)} holds a {kind}, in which the tensors have no names of R's; save the module "
            "itself: torch_save(module, path)."
        )


# Its names


def _renumbered(name: str, rnns: set[str], by: int) -> str:
    """`name` with another number if it belongs to the layer of an RNN."""
    path, _, own = name.rpartition(".")
    found = re.fullmatch(r"((?:weight|bias)_(?:ih|hh|hr)_l)(-?\d+)(|_.*)", own) if path in rnns else None
    return qualified(path, f"{found[1]}{int(found[2]) + by}{found[3]}") if found else name


# Its norms, and the model's


@attrs.frozen(eq=False)
class _Normed:
    """A weight of the model that a norm makes."""

    norm: Reparametrization
    parts: tuple[str, ...]
    weight: Tensor
    """A tensor of the weight's shape and dtype."""


def _norms(model: nn.Module) -> Iterator[tuple[str, _Normed]]:
    """Every weight that a norm of ours makes, or a weight norm of torch's."""
    for path, module in model.named_modules(remove_duplicate=False):
        for recipe in carrier.recipes_of(module):
            with torch.no_grad():
                yield qualified(path, recipe.name), _Normed(recipe.norm, recipe.parts, recipe.compute(module))
        for found in spellings.find(module):
            if isinstance(found.norm, WeightNorm) and not found.why_not:
                yield qualified(path, found.name), _Normed(found.norm, ("g", "v"), found.parts["v"])


def _meet(state: dict[str, Tensor], own: dict[str, Any], norms: dict[str, _Normed], rnns: set[str]) -> Iterator[str]:
    """Makes `state` and `own` name the same weights and parts; yields why where that cannot be."""
    for name, normed in norms.items():
        if type(normed.norm) is WeightNorm:
            normed.norm._respell(own, name[: -len(normed.norm.name)], normed.parts)
    for name in [key[:-2] for key in state if key.endswith("_g") and f"{key[:-2]}_v" in state]:
        if not _takes_parts(name, own, norms):
            yield from _join(name, state, in_r=_renumbered(name, rnns, by=1))
    for name in [name for name in norms if name in state]:
        objection = _join_own(name, own, norms[name], state[name])
        if objection:
            yield f"{norms[name].norm!r} cannot norm {_renumbered(name, rnns, by=1)!r} of the file: {objection}"


def _takes_parts(name: str, own: dict[str, Any], norms: dict[str, _Normed]) -> bool:
    """Whether the g and v of R's weight norm go into the model as they are."""
    if name in norms:
        return type(norms[name].norm) is WeightNorm
    return name not in own or f"{name}_g" in own


def _join(name: str, state: dict[str, Tensor], in_r: str) -> Iterator[str]:
    """Replaces the parts of a weight in the file by the weight."""
    g, v = state.pop(f"{name}_g"), state.pop(f"{name}_v")
    state[name] = v
    kept = _dims_of_g(g, v)
    if not kept:
        yield f"'{in_r}_g' of the file, {_shown(g)}, is no magnitude of a weight {_shown(v)}"
        return
    norm = WeightNorm(dim=kept[0])
    objection = norm.objection(v)
    if objection:
        yield f"no weight can be made of '{in_r}_v' of the file: {objection}"
        return
    state[name] = norm.formula(v, g.reshape(norm.split(v)["g"].shape), kept[0])


def _dims_of_g(g: Tensor, v: Tensor) -> list[int | None]:
    """The dim that a magnitude was made for, None for the whole tensor; nothing if it was made for no dim of `v`."""
    if g.numel() == 1:
        return [None]
    return [dim for dim in range(v.dim()) if g.shape == shape_of_g(v.shape, dim)]


def _join_own(name: str, own: dict[str, Any], normed: _Normed, weight: Tensor) -> str | None:
    """Replaces the parts of a weight of the model by the weight, as in the file; says why that cannot be normed."""
    for part in normed.parts:
        own.pop(f"{name}_{part}", None)
    own[name] = normed.weight
    fits = weight.shape == normed.weight.shape and weight.is_floating_point()
    return normed.norm.objection(weight) if fits else None


# What does not fit


def _misfits(state: dict[str, Tensor], own: dict[str, Any], rnns: set[str]) -> Iterator[str]:
    for name in [name for name in state if name not in own]:
        yield f"{_renumbered(name, rnns, by=1)!r} of the file has no place in the model"
    for name in [name for name in own if name not in state]:
        yield f"{_both(name, rnns)} of the model is not in the file"
    for name in [name for name in own if name in state]:
        why = _why_not(state[name], own[name])
        if why:
            yield f"{_both(name, rnns)} {why}{_way_out(name, state, own)}"


def _both(name: str, rnns: set[str]) -> str:
    in_r = _renumbered(name, rnns, by=1)
    return repr(name) if in_r == name else f"{name!r} ({in_r!r} in R)"


def _why_not(value: Tensor, own: Tensor) -> str | None:
    """Why `value` cannot be written into `own`; one number is one number, in whatever shape."""
    if is_lazy(own):
        return "is not initialized yet: run one batch through the lazy module first"
    if own.is_meta:
        return "is on the meta device: give the model memory with to_empty first"
    if value.shape != own.shape and not value.numel() == own.numel() == 1:
        return f"is {_shown(value)} in the file and {_shown(own)} in the model"
    if value.is_floating_point() != own.is_floating_point() or not torch.can_cast(value.dtype, own.dtype):
        return f"is {value.dtype} in the file and {own.dtype} in the model"
    return None


def _shown(tensor: Tensor) -> str:
    return shape_shown(tensor.shape) if tensor.dim() else "a single number"


def _way_out(name: str, state: dict[str, Tensor], own: dict[str, Any]) -> str:
    """The norm that R has used, where a magnitude is of another one."""
    weight, v = name[:-2], f"{name[:-2]}_v"
    if not name.endswith("_g") or v not in state or v not in own or state[v].shape != own[v].shape:
        return ""
    dims = [None if kept is None else kept + 1 for kept in _dims_of_g(state[name], state[v])]
    return f"; it was normed with WeightNorm.from_r({weight.rpartition('.')[2]!r}, {dims[0]})" if dims else ""


def _torn(state: dict[str, Tensor], own: dict[str, Any]) -> Iterator[str]:
    """What is one tensor in the model and has two values in the file."""
    first: dict[int, str] = {}
    for name in [name for name in own if name in state]:
        other = first.setdefault(id(own[name]), name)
        value, expected = state[name].flatten(), state[other].flatten()
        if not torch.equal(value.to(expected.dtype), expected):
            yield f"{other!r} and {name!r} are one tensor of the model, and differ in the file"
