"""The generated class of a carrier: how it is copied and moved, and how a module becomes one."""

import copyreg
import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

from torch import nn

from ..contexts import torchscript
from . import inlined, loading, straight
from .alarm import tell_lost_writes
from .recipe import Recipe, base_of
from .store import Store, store_of
from .weight import Derived, FlatWeights, forget


class Carrier(nn.Module):
    """The first base of every generated class."""

    _normed: tuple[Recipe, ...] = ()
    _normed_functions: list[straight.Functions] = []
    _normed_recompute: dict[str, dict[str, Callable[[nn.Module], None]]] = {}

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return ", ".join([*([own] if own else []), *(recipe.norm._describe() for recipe in self._normed)])

    def __setattr__(self, name: str, value: Any) -> None:
        descriptor = getattr(type(self), name, None)
        if isinstance(descriptor, Derived):
            descriptor.__set__(self, value)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        parts = [attribute for recipe in self._normed for attribute in recipe.attributes]
        for derived in name, name.removesuffix("_orig"):  # which torch.nn.utils.prune makes of the weight
            if name not in parts and isinstance(getattr(type(self), derived, None), Derived):
                setattr(self, derived, param)
        super().register_parameter(name, param)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        forget_all(self)
        applied = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        store_of(self).clear()
        return applied

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        load_parts = functools.partial(super()._load_from_state_dict, state_dict, prefix, *rest)
        loading.load(self, self._normed, state_dict, prefix, rest[-1], load_parts)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        tell_lost_writes(self)  # which the file will not have
        super()._save_to_state_dict(*arguments)

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__["_normed_store"] = Store()
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        copying = store_of(self).copying
        tell_lost_writes(self)  # for the copy, which computes it anew
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
        forget_all(self)  # torch.jit.script copies the weight as it finds it: let it find a fresh one
        return self


def forget_all(module: nn.Module) -> None:
    """`forget` for every weight of `module`."""
    for recipe in recipes_of(module):
        forget(module, recipe)


def recipes_of(module: nn.Module) -> tuple[Recipe, ...]:
    """What `module` carries."""
    return module._normed if isinstance(module, Carrier) else ()


def is_wrapped(module: nn.Module) -> bool:
    """Whether another tool put a class of its own on top of a carrier's (parametrize, fully_shard)."""
    return isinstance(module, Carrier) and "_normed_base" not in type(module).__dict__


_classes: "weakref.WeakValueDictionary[Any, type[nn.Module]]" = weakref.WeakValueDictionary()


def carrier_class(base: type[nn.Module], recipes: tuple[Recipe, ...]) -> type[nn.Module]:
    """The subclass of `base` whose instances carry `recipes`; the same class for the same arguments."""
    made = _classes.get((base, recipes))
    if made is None:
        made = _classes[base, recipes] = _make_class(base, recipes)
    return made


def _make_class(base: type[nn.Module], recipes: tuple[Recipe, ...]) -> type[nn.Module]:
    for recipe in recipes:
        _ = recipe.operator  # made before Dynamo looks for it
    functions = [straight.functions_of(recipe, base) for recipe in recipes]
    namespace: dict[str, Any] = {name: getattr(base, name, None) for name in ("__module__", "__qualname__", "__doc__")}
    # TorchScript reads the annotations of the first class in the MRO that has any
    namespace["__annotations__"] = next(filter(None, map(inspect.get_annotations, base.__mro__)), {})
    namespace |= {"_normed_base": base, "_normed": recipes, "_normed_functions": functions}
    namespace["_normed_inlined"] = [one for one in functions if one.recipe.inlined]
    namespace["_normed_recompute"] = straight.recomputes_of(functions)
    ignored = [*getattr(base, "__jit_ignored_attributes__", []), "_normed_store"]
    namespace["__jit_ignored_attributes__"] = ignored  # TorchScript would try, long and in vain, to compile it
    namespace |= {one.name: Derived(one.recipe, one.read) for one in functions}
    eager = inlined.methods(base, recipes)
    namespace |= eager | torchscript.methods(base, recipes, eager)
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
    tell_lost_writes(module)
    for name in ("_normed_store", *torchscript.declarations(base, recipes_of(module))):
        attributes.pop(name, None)
    if recipes:
        attributes.update(torchscript.declarations(base, recipes), _normed_store=Store())
        module.__class__ = carrier_class(base, recipes)
    else:
        module.__class__ = base
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


def bake(module: nn.Module, recipes: Sequence[Recipe]) -> None:
    """Ends `recipes` in `module`: their weights, as the parts make them, become ordinary Parameters."""
    for recipe in recipes:
        trainable = any(part.requires_grad for part in recipe.read(module).values())
        weight = nn.Parameter(recipe.compute(module), requires_grad=trainable)
        for attribute in recipe.attributes:
            delattr(module, attribute)
        module._parameters[recipe.name] = weight
    carry(module, tuple(recipe for recipe in recipes_of(module) if recipe not in recipes))
