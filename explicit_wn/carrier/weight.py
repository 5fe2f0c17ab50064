"""A weight of a carrier: recomputing it and reading it, with care.

These functions say what is right in every case. The ordinary case is written out as source for each class beside them
(`straight.py`), and leaves for here whatever is not ordinary: a graph that is captured, a transform, a `cached` block,
a tracer, parts that another tool computes, shards.
"""

import operator
from collections.abc import Callable
from threading import get_ident
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..contexts import capture, torchscript
from .alarm import seal, tell_before_capture, tell_lost_write, tell_stale
from .recipe import Recipe, base_of
from .store import Stored, store_of, version_of

# A recompute


def recompute_recipe(module: nn.Module, recipe: Recipe) -> None:
    """Computes and stores a weight; stores nothing for a captured graph or a functorch transform."""
    if capture.capturing():
        advance(module, recipe)
    elif not is_held(module, recipe):
        forget(module, recipe)
        advance(module, recipe)
        if not _is_for_once(module, recipe):  # else whoever reads it computes it
            show_to_blocks(module, recipe, _compute_and_store(module, recipe))


def is_held(module: nn.Module, recipe: Recipe) -> bool:
    """Whether a `cached` block keeps the weight; not from torch.jit.trace or torch.fx, which want to see all of it."""
    if not store_of(module).held or torchscript.is_traced():
        return False
    return capture.is_getattr_torchs() or not isinstance(getattr(module, recipe.attributes[0]), torch.fx.Proxy)


def forget(module: nn.Module, recipe: Recipe) -> None:
    """Drops what is stored of a weight, and says so if somebody had written into it.

    That comes before its successor is allocated: the same memory is used again.
    """
    tell_lost_write(module, recipe)
    store_of(module).pop(recipe.name, None)


def advance(module: nn.Module, recipe: Recipe) -> None:
    """What a recompute in training mode does first."""
    if recipe.advance is not None and module.training:
        parts = recipe.read(module)
        try:
            recipe.advance(**{part: parts[part] for part in recipe.advance_parts}, **recipe.advance_options)
        except ValueError as error:
            raise recipe.refusal(module, error) from error


def _is_for_once(module: nn.Module, recipe: Recipe) -> bool:
    """Whether functorch runs, or `functional_call` with tensors in the place of the parameters: both leave nothing."""
    return capture.is_transformed() or any(type(module._parameters.get(name)) is Tensor for name in recipe.attributes)


def _compute_and_store(
    module: nn.Module, recipe: Recipe, by_read: bool = False, earlier: tuple[Stored, ...] = ()
) -> Tensor:
    value = compute(module, recipe, by_read)
    if not isinstance(value, torch.fx.Proxy):
        store, sources = store_of(module), recipe.sources(module)
        sums = seal(module, recipe.name, value) if by_read else None
        store[recipe.name] = Stored(value, sources, version_of(sources), get_ident(), sums, earlier)
        if (get_ident(), recipe.name) in store.in_forward:  # a recompute within the forward of an inlined module
            store.in_forward[get_ident(), recipe.name] = value
    return value


def compute(module: nn.Module, recipe: Recipe, by_read: bool = False) -> Tensor:
    """Computes a weight, for whom torch lets us."""
    try:
        value = recipe.compute(module)
    except RuntimeError:
        _refuse_sharded(module, recipe)
        raise
    if type(value) is not Tensor:
        _refuse_sharded(module, recipe)
        if isinstance(value, torch.fx.Proxy) and not by_read:
            _refuse_symbolic_trace(module, recipe)
    return value


def _refuse_sharded(module: nn.Module, recipe: Recipe) -> None:
    """Raises where the parts are the shards of a layer whose own forward, which would gather them, does not run."""
    sharded = any(type(part.data).__name__ == "DTensor" for part in recipe.read(module).values())
    if sharded and any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
        raise RuntimeError(
            f"{recipe.norm!r}: the parts of {recipe.name!r} of this {base_of(module).__name__} are sharded, because "
            "fully_shard was called on the layer while recompute is called in the forward of its parent. Call "
            "fully_shard on the module whose forward calls recompute, or use inline(layer) instead of apply(layer)."
        )


def _refuse_symbolic_trace(module: nn.Module, recipe: Recipe) -> None:
    """torch.fx records what is done to parameters, in the forwards that it looks into. What else there is, it loses."""
    what = f"torch.fx.symbolic_trace does not see recompute({base_of(module).__name__})"
    if not recipe.inlined:
        raise RuntimeError(
            f"{what}: the graph would hold {recipe.name!r} as it is now, for ever. Use inline(layer) instead of "
            "apply(layer), or torch.export."
        )
    for name in recipe.attributes:
        if name in module._buffers:
            raise RuntimeError(
                f"{what}: the graph would hold the buffer {name!r} as it is now, for ever. Make the module a leaf of "
                "the tracer, or use torch.export."
            )


def show_to_blocks(module: nn.Module, recipe: Recipe, value: Tensor) -> None:
    """Shows a recompute to the blocks that run; not one for a functorch transform or a tracer."""
    blocks = store_of(module).blocks
    if blocks and not (_is_for_once(module, recipe) or torchscript.is_traced() or isinstance(value, torch.fx.Proxy)):
        for block in tuple(blocks):
            block.on_recompute(module, recipe, value)


def advance_and_compute(module: nn.Module, recipe: Recipe) -> Tensor:
    """The weight as a recompute makes it; stores nothing."""
    advance(module, recipe)
    return compute(module, recipe)


# A read


def read(module: nn.Module, recipe: Recipe) -> Tensor:
    """The weight as its attribute gives it: stored in eager mode, computed in place in a captured graph."""
    if capture.capturing():
        if not torch.compiler.is_dynamo_compiling():
            tell_lost_write(module, recipe)
        elif not _announce():
            value: Tensor = recipe.operator.call(*recipe.read(module).values())
            return value
        return recipe.operator.formula(**recipe.read(module), **recipe.formula_options)
    if on_read is not None:
        on_read(module, recipe)
    store = store_of(module)
    if store.in_forward:
        running = store.in_forward.get((get_ident(), recipe.name))
        if running is not None:
            return running
    stored = store.get(recipe.name)
    if stored is not None and _is_given(stored, module, recipe):
        return stored.value
    if stored is not None and stored.thread != get_ident():
        return compute(module, recipe, by_read=True)
    if _is_for_once(module, recipe):
        forget(module, recipe)
        return compute(module, recipe, by_read=True)
    return refresh(module, recipe, by_read=True)


on_read: Callable[[nn.Module, Recipe], None] | None = None
"""Called at every read of a normed weight in eager mode, while `detect_stale` is on."""


@capture.run_by_dynamo
def _announce() -> bool:
    """Tells of lost writes before a compiler comes, who does not see what is stored; whether it is for an export."""
    tell_before_capture()
    return capture.announce_to_dynamo()


def _is_given(stored: Stored, module: nn.Module, recipe: Recipe) -> bool:
    """Whether a read gives what is stored; says so if it is stale.

    An inlined weight is for the forward of its own module, but within a `cached` block.
    """
    if (recipe.inlined and not store_of(module).held) or not is_current(stored, module, recipe):
        return False
    if stored.is_stale():
        tell_stale(module, recipe)
    return True


def is_current(stored: Stored, module: nn.Module, recipe: Recipe) -> bool:
    """Whether what is stored was made of the tensors that are the parts now, and is for this thread."""
    if stored.thread != get_ident() and not store_of(module).held:
        return False
    parameters, buffers = module._parameters, module._buffers
    for source, name in zip(stored.sources, recipe.attributes):  # noqa: B905 - strict takes longer
        if parameters.get(name) is not source and buffers.get(name) is not source:
            now = recipe.sources(module)  # a part that another tool computes may have several
            return len(now) == len(stored.sources) and all(map(operator.is_, now, stored.sources))
    return True


def refresh(module: nn.Module, recipe: Recipe, by_read: bool = False) -> Tensor:
    """Computes a weight anew, without what a recompute does first, and stores it."""
    earlier = _handed_out(module, recipe) if by_read else ()
    forget(module, recipe)
    return _compute_and_store(module, recipe, by_read, earlier)


def _handed_out(module: nn.Module, recipe: Recipe) -> tuple[Stored, ...]:
    """What somebody may write into still, who is given the next: `w.uniform_(-bound(w), bound(w))` reads thrice.

    Those are looked at in the end; now it is the turn of the last, and of the first where there are too many.
    """
    stored = store_of(module).get(recipe.name)
    if stored is None or stored.seal is None:
        return ()
    earlier, stored.earlier = stored.earlier, stored.earlier[2:]
    return attrs.evolve(stored, earlier=()), *earlier[:2]


class Derived:
    """The weight as an attribute of its module."""

    def __init__(self, recipe: Recipe, read: Callable[[Any], Any]) -> None:
        self.recipe, self.read = recipe, read

    def __get__(self, module: Any, owner: Any = None) -> Any:
        return self if module is None else self.read(module)

    def __set__(self, module: nn.Module, value: Any) -> None:
        recipe = self.recipe
        raise AttributeError(
            f"{recipe.name!r} of this {base_of(module).__name__} is computed by {recipe.norm!r} and cannot be set. "
            f"Call assign(module, weight) on the norm to give it a value, or remove(module) to end the norm."
        )

    def __delete__(self, module: nn.Module) -> None:
        self.__set__(module, None)


class FlatWeights:
    """`_flat_weights` of an RNN, the list that its forward reads, made of what its attributes say now."""

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        stored = {} if capture.capturing() else dict(store_of(module))  # which another thread may change meanwhile
        if on_read is not None and stored:
            for recipe in module._normed:
                on_read(module, recipe)
        there = [recipe for recipe in module._normed if recipe.name in stored]
        given = {r.name: stored[r.name].value for r in there if _is_given(stored[r.name], module, r)}
        return [given[n] if n in given else getattr(module, n, None) for n in module._flat_weights_names]

    def __set__(self, module: nn.Module, value: Any) -> None:
        """RNNs set the list wherever they think that it may be out of date; it never is."""


def in_use(module: nn.Module, name: str) -> Tensor | None:
    """The tensor that this thread was last given as the weight `name`."""
    store = store_of(module)
    stored = store.get(name)
    return store.in_forward.get((get_ident(), name), None if stored is None else stored.value)
