"""What is said, once for each weight, where it is quietly wrong: read when it is stale, or written into in vain."""

import weakref

import torch
from torch import Tensor, nn

from ..caller import callers, running, warn
from ..contexts import capture, torchscript
from ..layers import qualified
from .recipe import Recipe, base_of
from .store import Stored, store_of


class StaleWeightWarning(UserWarning):
    """A normed weight was read whose parts have changed in place since the last `recompute`."""


class LostWriteWarning(UserWarning):
    """A normed weight was written into; the norm computes it anew from its parts, so that what was written is lost."""


def tell_stale(module: nn.Module, recipe: Recipe) -> None:
    """Warns that the weight which is read now is not what its parts make; not where a `cached` block wants it so."""
    told = store_of(module).told
    if (recipe.name, "stale") not in told and not store_of(module).held and not is_only_looked_at():
        warn(on_stale(module, recipe), StaleWeightWarning)
        told.add((recipe.name, "stale"))  # not where the warning is an error, which somebody may catch


def tell_lost_write(module: nn.Module, recipe: Recipe) -> None:
    """Warns if somebody wrote into the stored weight, which is about to be dropped."""
    store = store_of(module)
    stored = store.get(recipe.name)
    if stored is not None and (recipe.name, "lost") not in store.told and is_written_to(module, recipe, stored):
        warn(on_lost_write(module, recipe), LostWriteWarning)
        store.told.add((recipe.name, "lost"))


def tell_lost_writes(module: nn.Module) -> None:
    """`tell_lost_write` of every weight that `module` carries, if any."""
    for recipe in getattr(module, "_normed", ()):
        tell_lost_write(module, recipe)


def tell_before_capture() -> None:
    """`tell_lost_writes` for what is about to be captured."""
    models = running() if handed_out else []
    captured = {module for model in models for module in model.modules()}
    for module in captured.intersection(handed_out) if models else list(handed_out):  # a strict export runs none itself
        tell_lost_writes(module)


_LOOK = ("extra_repr", "flatten_parameters", "all_weights")


def is_only_looked_at() -> bool:
    """Whether nobody uses what is read: a `repr` asks for a bias, torch.jit looks around before it traces a forward."""
    for frame in callers():
        name = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name in _LOOK or frame.f_code is nn.TransformerEncoder.forward.__code__ or name == "inspect":
            return True
        if frame.f_code.co_name == "forward" or not name.startswith("torch."):
            return False
        if name.startswith(("torch.jit", "torch._jit")):
            return True
    return False


# Writes
#
# A weight that a read has to compute is *handed out*: whoever reads it may write into it, unless that is torch's own
# code, or a forward. It is *sealed* then: a write breaks the sums that are `Stored.seal`. The next such read hands out
# another, which has those before in `Stored.earlier`. `Store.times_handed_out` counts them, since sums take time, and
# `handed_out` has the modules to look at before a capture.

handed_out: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""The modules of which somebody was given a weight that he may write into."""

ENOUGH = 100
"""So often a weight is watched that is handed out: who has written into none of so many is no initialization."""


def seal(module: nn.Module, name: str, value: Tensor) -> Tensor | None:
    """The sums of a weight along its rows and columns, by which a write into it is seen that no counter shows.

    None where it is not handed out to be written into: torch's own code only reads, and so does a forward.
    """
    if next(callers()).f_globals.get("__name__", "").startswith("torch."):
        return None
    times = store_of(module).times_handed_out
    if times.get(name, 0) >= ENOUGH or any(frame.f_code.co_name == "forward" for frame in callers()):
        return None
    times[name] = times.get(name, 0) + 1
    handed_out.add(module)
    return _sums(value)


def _sums(value: Tensor) -> Tensor | None:
    if type(value) is not Tensor or value.is_meta or not _may_look(value) or value.numel() == 0:
        return None
    with capture.unrecorded():
        matrix = bits(value).reshape(len(value) if value.dim() > 1 else 1, -1)
        return torch.cat([matrix.sum(0, dtype=matrix.dtype), matrix.sum(1, dtype=matrix.dtype)])


def bits(tensor: Tensor) -> Tensor:
    """The same as integers: among them NaN equals NaN, and a sum is one sum in whatever order."""
    return tensor.detach().view(_INTEGERS[tensor.element_size()])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _may_look(value: Tensor) -> bool:
    """Whether nobody records what is done here with numbers: torch.jit.trace, functorch, or a CUDA graph."""
    cuda_graph = value.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (cuda_graph or torchscript.is_traced() or capture.is_transformed())


def is_written_to(module: nn.Module, recipe: Recipe, stored: Stored) -> bool:
    """Whether somebody wrote into a stored weight, as far as that can be seen."""
    if getattr(module, "max_norm", None) is not None:
        return False  # an Embedding renorms its weight by itself, at every forward again
    if any(is_written_to(module, recipe, one) for one in stored.earlier):
        return True
    if stored.seal is not None and _may_look(stored.value):
        return not _same(_sums(stored.value), stored.seal)
    if stored.value.is_inference() or stored.value._version == 0:
        return False
    with torch.no_grad():  # a formula may change its own result in place, or give a part as it is
        now = recipe.compute(module)
    return now.is_inference() or stored.value._version > now._version


def _same(sums: Tensor | None, seal: Tensor) -> bool:
    with capture.unrecorded():
        return sums is not None and torch.equal(sums, seal)


# What to say


def on_stale(module: nn.Module, recipe: Recipe, models: tuple[nn.Module, ...] = ()) -> str:
    """That a weight is stale, and the line to add."""
    name, advice = name_and_advice(module, recipe, models)
    parts = " and ".join(recipe.attributes)
    if store_of(module).held:
        return f"{name} is stale: {parts} changed while a cached(model) block holds it. Change them after the block."
    message = f"{name} is stale: {parts} changed since it was last computed from them. {advice}"
    if running():
        message += (
            "\n\nWithout that the model goes on with the old weight, and the second training step fails with torch's "
            'error "Trying to backward through the graph a second time".'
        )
    return message


def on_lost_write(module: nn.Module, recipe: Recipe) -> str:
    """That what was written is lost, and the lines that keep it."""
    place = _Place(module, recipe)
    return (
        f"{place.name} was written into, and that is lost: {recipe.norm._kind} computes it anew from "
        f"{' and '.join(recipe.attributes)}. To initialize a model, write explicit_wn.assign_all(model, init) in the "
        "place of model.apply(init). Before a tool merges something into it, call explicit_wn.fold(model). "
        f"To give it a value, write this{place.which}:\n\n    {place.norm}.assign({place.target}, weight)"
    )


def name_and_advice(module: nn.Module, recipe: Recipe, models: tuple[nn.Module, ...] = ()) -> tuple[str, str]:
    """What the weight is called, and which line recomputes it where."""
    place = _Place(module, recipe, models)
    where = "before the model is called" if running() else "before you read it"
    where = f"to the forward of {base_of(place.owner).__name__}" if place.owner else where
    line = f"Add this line {where}{place.which}:\n\n    {place.norm}.recompute({place.target})\n\n"
    return place.name, line + "or use inline(layer) in the place of apply(layer), which recomputes by itself."


class _Place:
    """Where a weight is in a model, and how the code there calls it."""

    def __init__(self, module: nn.Module, recipe: Recipe, models: tuple[nn.Module, ...] = ()) -> None:
        model, path = _path_of(module, models)
        self.name = f"{qualified(path, recipe.name)} of this {base_of(model).__name__}"
        names = path.split(".") if path else []
        self.norm, self.owner = "wn", None
        for depth in range(len(names), -1, -1):
            owner = model.get_submodule(".".join(names[:depth]))
            norms = [name for name, child in owner._modules.items() if getattr(child, "_label", None) in recipe.labels]
            if norms:
                self.norm, self.owner = f"self.{norms[0]}", owner
                break
        self.target = "self" if self.owner else "model"
        self.target += "".join(f"[{n}]" if n.isdigit() else f".{n}" for n in names[depth:])
        self.which = "" if self.owner else f", where wn is {recipe.norm!r}"


def _path_of(module: nn.Module, models: tuple[nn.Module, ...]) -> tuple[nn.Module, str]:
    """The path of `module`, and the model in which it has that path: a given one, or the outermost one running."""
    for model in (*models, *running()):
        for path, other in model.named_modules():
            if other is module:
                return model, path
    return module, ""
