"""What `apply` turns a module into: a carrier of derived weights.

A carrier is an instance of a generated subclass of the module's own class, which keeps that class's name. On it

- the parts (`weight_g`, `weight_v`) are ordinary parameters and buffers; the weight itself is neither. It is stored
  beside them, together with the tensors it was computed from;
- reading the weight gives the stored tensor. If other tensors have taken the place of the parts since (after
  `functional_call`, `load_state_dict(assign=True)`, a copy), or the module was moved or loaded, it is computed anew;
  a part that changed *in place*, as an optimizer changes it, is what `recompute` is for;
- an inlined weight is kept only while the forward of its module runs; whoever else reads it gets it computed anew;
- copying and pickling leave the stored weight out; `load_state_dict` takes every spelling of the norm;
- no hook is registered, ever.
"""

import contextlib
import copyreg
import inspect
import operator
import sys
import weakref
from collections.abc import Callable, Mapping
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import capture, torchscript
from .recipe import INLINED, Recipe
from .store import Store, Stored, store_of, versions
from .straight import Straight, recompute_of
from .straight import straight as write_straight
from .undo import all_or_nothing, values_or_nothing


def refresh(module: nn.Module, recipe: Recipe, by_read: bool = False) -> Tensor:
    """Computes a weight and stores it."""
    store = store_of(module)
    store.pop(recipe.name, None)  # freed before its successor is allocated: the same memory is used again
    value = compute(module, recipe, by_read)
    if not isinstance(value, torch.fx.Proxy):
        sources = recipe.sources(module)
        store[recipe.name] = Stored(value, sources, versions(sources), get_ident())
        if (get_ident(), recipe.name) in store.running:  # a recompute within the forward of an inlined module
            store.running[get_ident(), recipe.name] = value
    return value


def in_use(module: nn.Module, name: str) -> Tensor | None:
    """The tensor that this thread was last given as the weight `name`."""
    store = store_of(module)
    stored = store.get(name)
    return store.running.get((get_ident(), name), None if stored is None else stored.value)


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


def recompute(module: nn.Module, label: str) -> None:
    """Computes and stores every weight of `module` that bears `label`; within a captured graph, stores nothing."""
    if capture.capturing() or get_ident() not in store_of(module).copying:
        type(module)._normed_recompute[label](module)  # type: ignore[attr-defined]


def recompute_recipe(module: nn.Module, recipe: Recipe) -> None:
    """Computes and stores a weight; stores nothing for a captured graph or a functorch transform."""
    if capture.capturing():
        advance(module, recipe)
    elif not _is_held(module, recipe):
        advance(module, recipe)
        if _is_for_once(module, recipe):
            store_of(module).pop(recipe.name, None)  # whoever reads it computes it
        else:
            refresh(module, recipe)


def advance_and_compute(module: nn.Module, recipe: Recipe) -> Tensor:
    """The weight as a recompute makes it; stores nothing."""
    advance(module, recipe)
    return compute(module, recipe)


def _is_for_once(module: nn.Module, recipe: Recipe) -> bool:
    """Whether functorch runs, or `functional_call` with tensors in the place of the parameters: both leave nothing."""
    return capture.is_transformed() or any(type(module._parameters.get(name)) is Tensor for name in recipe.attributes)


def advance(module: nn.Module, recipe: Recipe) -> None:
    """What a recompute in training mode does first."""
    if recipe.advance is not None and module.training:
        recipe.advance(**(recipe.own(module) or recipe.read(module)), **recipe.advance_options)


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


def _is_held(module: nn.Module, recipe: Recipe) -> bool:
    """Whether a `cached` block keeps the weight; not from torch.jit.trace or torch.fx, which want to see all of it."""
    if not store_of(module).held or torchscript.is_traced():
        return False
    return capture.is_getattr_torchs() or not isinstance(getattr(module, recipe.attributes[0]), torch.fx.Proxy)


on_read: Callable[[nn.Module, Recipe], None] | None = None
"""Called at every read of a normed weight in eager mode, while `detect_stale` is on."""


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


def read(module: nn.Module, recipe: Recipe) -> Tensor:
    """The weight as its attribute gives it: stored in eager mode, computed in place in a captured graph."""
    if capture.capturing():
        if torch.compiler.is_dynamo_compiling() and not capture.announce_to_dynamo():
            value: Tensor = recipe.operator.call(*recipe.read(module).values())
            return value
        return recipe.operator.formula(**recipe.read(module), **recipe.formula_options)
    if on_read is not None:
        on_read(module, recipe)
    store = store_of(module)
    if store.running:
        running = store.running.get((get_ident(), recipe.name))
        if running is not None:
            return running
    stored = store.get(recipe.name)
    not_kept = recipe.inlined and not store.held  # for others than the module's own forward
    if stored is None or not_kept or not is_current(stored, module, recipe):
        if stored is not None and stored.thread != get_ident():
            return compute(module, recipe, by_read=True)
        if _is_for_once(module, recipe):
            store.pop(recipe.name, None)
            return compute(module, recipe, by_read=True)
        return refresh(module, recipe, by_read=True)
    return stored.value


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


def _has_current(module: nn.Module, recipe: Recipe, stored: Mapping[str, Stored]) -> bool:
    return recipe.name in stored and is_current(stored[recipe.name], module, recipe)


class FlatWeights:
    """`_flat_weights` of an RNN, the list that its forward reads, made of what its attributes say now."""

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        stored = {} if capture.capturing() else dict(store_of(module))  # which another thread may change meanwhile
        if on_read is not None and stored:
            for recipe in module._normed:
                on_read(module, recipe)
        current = {r.name: stored[r.name].value for r in module._normed if _has_current(module, r, stored)}
        return [current[n] if n in current else getattr(module, n, None) for n in module._flat_weights_names]

    def __set__(self, module: nn.Module, value: Any) -> None:
        """RNNs set the list wherever they think that it may be out of date; it never is."""


class Carrier(nn.Module):
    """The first base of every generated class."""

    _normed: tuple[Recipe, ...] = ()
    _normed_straight: list[Straight] = []
    _normed_recompute: dict[str, Callable[[nn.Module], None]] = {}

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return ", ".join([*([own] if own else []), *(recipe.norm.describe() for recipe in self._normed)])

    def __setattr__(self, name: str, value: Any) -> None:
        descriptor = getattr(type(self), name, None)
        if isinstance(descriptor, Derived):
            descriptor.__set__(self, value)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if isinstance(getattr(type(self), name, None), Derived):
            setattr(self, name, param)
        super().register_parameter(name, param)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        store_of(self).clear()
        applied = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        store_of(self).clear()
        return applied

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        errors = rest[-1]  # what load_state_dict raises in the end
        known = len(errors)
        with contextlib.suppress(_DoesNotFit), all_or_nothing(self), values_or_nothing(_own_tensors(self)):
            for recipe in self._normed:
                recipe.norm.respell(state_dict, prefix, recipe.parts)
                objection = _split_plain(self, recipe, state_dict, prefix)
                if objection:
                    errors.append(objection)
            if len(errors) == known:
                store_of(self).clear()
                super()._load_from_state_dict(state_dict, prefix, *rest)
            if len(errors) > known:
                raise _DoesNotFit
        store_of(self).clear()

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__["_normed_store"] = Store()
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        copying = store_of(self).copying
        copying.add(get_ident())  # an RNN calls the method in which its weights are recomputed
        try:
            reduced: Any = super().__reduce_ex__(max(protocol, 2))  # the older ones name the class differently
        finally:
            copying.discard(get_ident())
        if reduced[0] is not copyreg.__newobj__ or reduced[1] != (type(self),):  # type: ignore[attr-defined]
            return reduced
        _, _, state, *rest = reduced
        if isinstance(state, dict):
            own = {*torchscript.declarations(base_of(self), self._normed), "_normed_store"}  # which `rebuild` makes
            state = {key: value for key, value in state.items() if key not in own}
        return rebuild, (base_of(self), self._normed), state, *rest

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        store_of(self).clear()  # an RNN reads its weights there, and a copy is as if nobody had

    def __prepare_scriptable__(self) -> "Carrier":
        torchscript.prepare(self, self._normed)
        store_of(self).clear()  # torch.jit.script copies the weight as it finds it: let it find a fresh one
        return self


def _run_inlined(self: Any, /, *arguments: Any, **keywords: Any) -> Any:
    """The forward of an inlined module: its weights are there while its own forward runs, and no longer.

    So whoever else reads one gets it computed for him, fresh and with a gradient of its own: nn.MultiheadAttention
    reads the weight of a layer that it never calls.
    """
    if capture.capturing():
        recompute(self, INLINED)
        return self._forward_of_base(*arguments, **keywords)
    inlined, store = self._normed_inlined, self._normed_store
    if store.blocks and _is_held(self, inlined[0].recipe):
        return self._forward_of_base(*arguments, **keywords)
    thread = get_ident()
    try:
        for straight in inlined:
            store.pop(straight.name, None)  # what a recompute from outside left
            store.running[thread, straight.name] = straight.compute(self)
        return self._forward_of_base(*arguments, **keywords)
    finally:
        for straight in inlined:
            store.running.pop((thread, straight.name), None)


class _DoesNotFit(Exception):
    """What a checkpoint has for a module is not what the module holds."""


def _own_tensors(module: nn.Module) -> list[Tensor]:
    own: list[Any] = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in own if tensor is not None and not is_lazy(tensor)]


def _split_plain(module: nn.Module, recipe: Recipe, state_dict: dict[str, Any], prefix: str) -> str | None:
    """Replaces a plain weight in `state_dict` by its parts; says why if it cannot."""
    key, attributes = prefix + recipe.name, [prefix + attribute for attribute in recipe.attributes]
    weight = state_dict.get(key)
    if not isinstance(weight, Tensor) or any(attribute in state_dict for attribute in attributes):
        return None  # left for torch to report, if it is there
    del state_dict[key]
    with torch.no_grad():
        current = recipe.compute(module)
    if weight.shape != current.shape or not weight.is_floating_point():
        got, wanted = f"{weight.dtype} {tuple(weight.shape)}", f"{current.dtype} {tuple(current.shape)}"
        return f"{key} in the checkpoint is {got}, and {base_of(module).__name__} has {wanted}"
    objection = recipe.norm.objection(weight)
    if objection:
        return f"{recipe.norm!r} cannot norm {key} of the checkpoint: {objection}"
    state_dict.update(zip(attributes, recipe.norm.split(weight).values(), strict=True))
    return None


def recipes_of(module: nn.Module) -> tuple[Recipe, ...]:
    """What `module` carries."""
    return module._normed if isinstance(module, Carrier) else ()


def is_wrapped(module: nn.Module) -> bool:
    """Whether another tool put a class of its own on top of a carrier's (parametrize, fully_shard)."""
    return isinstance(module, Carrier) and "_normed_base" not in type(module).__dict__


def base_of(module: nn.Module) -> type[nn.Module]:
    """The class that `module` has without us."""
    for cls in type(module).__mro__:
        if cls.__dict__.get("_normed_base") is not None:
            return cls._normed_base  # type: ignore[attr-defined, no-any-return]
    return type(module)


_classes: "weakref.WeakValueDictionary[Any, type[nn.Module]]" = weakref.WeakValueDictionary()


def carrier_class(base: type[nn.Module], recipes: tuple[Recipe, ...]) -> type[nn.Module]:
    """The subclass of `base` whose instances carry `recipes`; the same class for the same arguments."""
    # equal is not enough: 0 == 0.0, and the source holds one or the other
    key = base, recipes, repr([recipe.settings for recipe in recipes])
    made = _classes.get(key)
    if made is None:
        made = _classes[key] = _make_class(base, recipes)
    return made


def _make_class(base: type[nn.Module], recipes: tuple[Recipe, ...]) -> type[nn.Module]:
    straight = [write_straight(recipe, base, sys.modules[__name__]) for recipe in recipes]
    namespace: dict[str, Any] = {name: getattr(base, name, None) for name in ("__module__", "__qualname__", "__doc__")}
    # TorchScript reads the annotations of the first class in the MRO that has any
    namespace["__annotations__"] = next(filter(None, map(inspect.get_annotations, base.__mro__)), {})
    namespace |= {"_normed_base": base, "_normed": recipes, "_normed_straight": straight}
    namespace["_normed_inlined"] = [one for one in straight if one.recipe.inlined]
    namespace["_normed_recompute"] = {label: recompute_of(straight, label) for one in recipes for label in one.labels}
    ignored = [*getattr(base, "__jit_ignored_attributes__", []), "_normed_store"]
    namespace["__jit_ignored_attributes__"] = ignored  # TorchScript would try, long and in vain, to compile it
    namespace |= {one.name: Derived(one.recipe, one.read) for one in straight}
    namespace |= torchscript.methods(base, recipes, recompute, _run_inlined)
    if issubclass(base, nn.RNNBase):
        namespace["_flat_weights"] = FlatWeights()
    return type(base.__name__, (Carrier, base), namespace)


def rebuild(base: type[nn.Module], recipes: tuple[Recipe, ...]) -> nn.Module:
    """An empty carrier: what copies and pickles are made of."""
    if not (isinstance(base, type) and issubclass(base, nn.Module)):
        raise TypeError(f"only an nn.Module can carry a norm, and the data names {base!r}")
    if not (isinstance(recipes, tuple) and recipes and all(isinstance(recipe, Recipe) for recipe in recipes)):
        raise TypeError(f"a carrier carries recipes, and the data names {recipes!r}")
    cls = carrier_class(base, recipes)
    module = cls.__new__(cls)
    vars(module).update(torchscript.declarations(base, recipes), _normed_store=Store())
    return module


def carry(module: nn.Module, recipes: tuple[Recipe, ...]) -> None:
    """Makes `module` carry exactly `recipes`. Its parts are in place already."""
    base, attributes = base_of(module), vars(module)
    for name in ("_normed_store", *torchscript.declarations(base, recipes_of(module))):
        attributes.pop(name, None)
    if recipes:
        attributes.update(torchscript.declarations(base, recipes), _normed_store=Store())
        module.__class__ = carrier_class(base, recipes)
    else:
        module.__class__ = base
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
