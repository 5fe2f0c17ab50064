"""The verbs that every norm shares, over one module.

What a norm is by itself stands in `protocol.py`; which weights a verb means, and how it refuses, in `asking.py`.
"""

from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from . import carrier, refusals
from .asking import Asking
from .carrier import Recipe, all_or_nothing, recipe_for, store_of, values_or_nothing
from .contexts.interface import WhatApplyReturns
from .contexts.torchscript import is_scripting
from .folded import Folded as Folded  # where pickles of folded models look for it
from .mistakes import mistake_in_parts, mistake_in_weight
from .settings import Dim

Module = TypeVar("Module", bound=nn.Module)
Self = TypeVar("Self", bound="Reparametrization")

_NONE: dict[str, Any] = {}


class Reparametrization(Asking):
    """An object that makes a weight out of parts, when it is called.

    A norm of one's own is an attrs class, decorated as below (so that attrs leaves what is nn.Module's to it). It has

    - its settings, as fields: `name`, and whatever its functions take; `explicit_wn.settings` has validators for them;
    - `formula`: the weight from the parts and the settings, which it takes by their names, and leaves as they are.
      TorchScript compiles it;
    - `split`: the parts from a weight, by the formula's names for them.

    >>> import attrs
    >>> norm = attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
    >>> @norm
    ... class Exponential(Reparametrization):
    ...     name: str = "weight"
    ...     formula = staticmethod(lambda log: log.exp())
    ...
    ...     def split(self, weight):
    ...         return {"log": weight.log()}
    >>> layer = nn.Linear(2, 3)
    >>> _ = nn.init.constant_(layer.weight, 5)
    >>> Exponential().apply(layer)
    Linear(in_features=2, out_features=3, bias=True, weight=Exponential())
    >>> [name for name, _ in layer.named_parameters()]
    ['bias', 'weight_log']

    The rest is there where a norm needs it. `buffer_parts` are the parts that are buffers; the others are parameters.

    >>> @norm
    ... class Sparse(Reparametrization):
    ...     name: str = "weight"
    ...     buffer_parts = ("mask",)
    ...     formula = staticmethod(lambda v, mask: v * mask)
    ...
    ...     def split(self, weight):
    ...         return {"v": weight, "mask": (weight > 0).to(weight.dtype)}
    >>> [name for name, _ in Sparse().apply(nn.Linear(2, 3)).named_buffers()]
    ['weight_mask']

    `advance` changes parts in place before a recompute in training mode; it takes those that it names, and settings.
    Where it changes a parameter `v` of which the gradient is made, the formula takes `functional.kept(v)` for it.

    >>> @norm
    ... class Clipped(Reparametrization):
    ...     name: str = "weight"
    ...     limit: float = 0.01
    ...     formula = staticmethod(lambda v: 1 * v)
    ...     advance = staticmethod(lambda v, limit: v.detach().clamp_(-limit, limit))
    ...
    ...     def split(self, weight):
    ...         return {"v": weight}
    >>> layer = Clipped().apply(nn.Linear(2, 3))
    >>> Clipped().call(layer).weight.abs().max()
    tensor(0.0100, grad_fn=<MaxBackward1>)

    A field `dim`, of the type `settings.Dim`, may be an int, `"out"`, `"whole"` or None, and reaches the functions as
    an int or None. `default_dim` is what `dim=None` stands for: None itself, if the formula takes that for the whole
    tensor.

    >>> @norm
    ... class Contrast(Reparametrization):  # the outputs of a layer sum to nothing
    ...     name: str = "weight"
    ...     dim: Dim = None
    ...     default_dim = "out"
    ...     formula = staticmethod(lambda v, dim: v - v.mean(dim, keepdim=True))
    ...
    ...     def split(self, weight):
    ...         return {"v": weight}
    >>> Contrast().apply(nn.ConvTranspose1d(3, 2, 4))
    ConvTranspose1d(3, 2, kernel_size=(4,), stride=(1,), weight=Contrast(dim=1))

    And: `objection`, for weights that it refuses; `inverse`, if `split` does not give the parts that make exactly that
    weight, and `no_inverse`, if none do; `steps`, like `formula`, yields its steps; `quick`, like `formula`, is a
    faster way in the ordinary case, and gives None in any other; `spellings` are torch's names for the parts in the
    `state_dict` of a parametrized module. A mistake in a class is refused when the first object is made or applied.

    Guarantees: the parts stay in `parameters()`, `buffers()` and the `state_dict`, the weight is in none of them; the
    original Parameter object stays the part that `split` returns it as; a call that fails changes nothing; no hook is
    registered on any module.
    """

    # The verbs

    @overload  # mypy minds that a module can be called as well; the first that fits counts
    def apply(self, module: Module, name: str | None = None, dim: Dim = None) -> Module: ...  # type: ignore[overload-overlap]

    @overload
    def apply(self: Self, module: Callable[[nn.Module], object]) -> Self: ...

    def apply(self, module: Any, name: str | None = None, dim: Dim = None) -> Any:
        """Replaces the parameter `name` of `module` by its parts and computes the weight; returns `module`.

        Args:
            module: the module, changed in place. Given a function instead, this is `nn.Module.apply`, so that
                `model.apply(init_fn)` works on a model that holds a norm.
            name: the parameter; by default this object's `name`.
            dim: the dimension that is kept. Here `None` means that of this object, as `NULL` does in R, though
                `WeightNorm(dim=None)` means the whole tensor; `"whole"` means the whole tensor in both places.
        """
        if callable(module) and not isinstance(module, (nn.Module, type)):
            return super().apply(module)
        return self._install(module, name, dim, inlined=False)

    def inline(self, module: Module, name: str | None = None, dim: Dim = None) -> Module:
        """`apply`, and the recompute goes at the top of the module's own `forward`."""
        return self._install(module, name, dim, inlined=True)

    def compute_weight(self, module: nn.Module, name: str | None = None, dim: Dim = None) -> Tensor:
        """The weight from the parts as they are now; stores nothing."""
        recipe = self._recipe(module, name, "compute")
        weight = recipe.compute(module)
        recorded = getattr(recipe.norm, "dim", None)
        if dim is not None and self._resolve_dim(module, recipe.name, dim, weight.dim()) != recorded:
            # TorchScript stops and shows these lines: there, write self.wn.recompute(module) and read module.weight
            reason = f"its parts were made for {recipe.norm!r}; they say nothing about dim={dim!r}. "
            reason += "Call remove, then apply with the other dim"
            raise self._refusal(module, recipe.name, reason, verb="compute")
        return weight

    def recompute(self, module: WhatApplyReturns) -> None:
        """Computes the weight of `module` from its parts and stores it: the line to write in `forward`.

        It means every parameter that this object was applied to in `module`, and the one that bears its `name`. In a
        graph that `torch.compile` or `torch.export` captures nothing is stored: the weight is part of the graph.
        """
        if is_scripting():
            module._recompute_normed(self._label)  # type: ignore[operator]
        else:
            recomputes = getattr(type(module), "_normed_recompute", _NONE).get(self._kind, _NONE)
            (recomputes.get(self.name) or self._cannot_recompute)(module)

    def call(self, module: Module) -> Module:
        """`recompute`, returning the module. `wn(module)` is the same."""
        self.recompute(module)
        return module

    def __call__(self, module: Module) -> Module:
        return self.call(module)

    def forward(self, module: WhatApplyReturns) -> None:
        """What TorchScript makes of `wn(module)`."""
        self.recompute(module)

    def remove(self, module: Module, name: str | None = None) -> Module:
        """Bakes the weight, as the parts now have it, into an ordinary Parameter; returns `module`.

        Without `name` this ends everything that this object does in `module`. When the last norm of `module` is gone
        its class and its attributes are what they were.
        """
        recipes = self._recipes(module, name, "remove")
        for recipe in recipes:
            self._check(module, recipe.name, refusals.not_its_own(module, recipe), "remove")
        with torch.no_grad(), all_or_nothing(module):
            carrier.bake(module, recipes)
        return module

    def assign(self, module: Module, weight: Tensor, name: str | None = None) -> Module:
        """Sets the parts, in place, so that the weight becomes `weight`; returns `module`."""
        recipe = self._recipe(module, name, "assign")
        current = recipe.compute(module)
        why_not = refusals.odd_shape(weight, current.shape) or refusals.odd_kind(weight)
        why_not = why_not or refusals.no_values(weight, current)
        why_not = why_not or recipe.norm.objection(weight) or recipe.norm.no_inverse(weight)
        self._check(module, recipe.name, why_not or refusals.not_its_own(module, recipe), "assign")
        with torch.no_grad():
            values = recipe.norm.inverse(weight.detach().to(current))
            parts = recipe.read(module)
            store_of(module).pop(recipe.name, None)
            with values_or_nothing(parts[part] for part in values):
                for part, value in values.items():
                    parts[part].copy_(value)
        return module

    # Behind the verbs

    def _install(self, module: Module, name: str | None, dim: Dim, inlined: bool) -> Module:
        norm, weight = self._resolve(module, name, dim)
        if inlined:
            self._check(module, norm.name, refusals.no_forward(module), "inline")
        with torch.no_grad():
            parts = norm.split(weight)
        self._check(module, norm.name, mistake_in_parts(norm, parts), "norm")
        recipe = recipe_for(norm, tuple(parts), self.name, inlined)
        taken = [attribute for attribute in recipe.attributes if hasattr(module, attribute)]
        if taken:
            reason = f"the module has an attribute {taken[0]!r} already, which would be one of its parts; rename it"
            raise self._refusal(module, norm.name, reason)
        if not type(self)._was_tried:
            self._check(module, norm.name, mistake_in_weight(recipe.make, parts, weight), "norm")
            type(self)._was_tried = True
        with all_or_nothing(module):
            del module._parameters[norm.name]
            for part, value in parts.items():
                if part not in self.buffer_parts and value is not weight:
                    value = nn.Parameter(value, requires_grad=weight.requires_grad)
                parts[part] = value
            norm._put(module, recipe, parts)
            getattr(module, norm.name)
        return module

    def _adopt(self, module: nn.Module, parts: dict[str, Tensor]) -> None:
        """Makes `module` carry this norm, inlined, with parts that exist already; the caller sees to the rest."""
        self._put(module, recipe_for(self, tuple(parts), self.name, inlined=True), parts)

    def _put(self, module: nn.Module, recipe: Recipe, parts: dict[str, Tensor]) -> None:
        for part, value in parts.items():
            own = module._buffers if part in self.buffer_parts else module._parameters
            own[recipe.attribute(part)] = value  # type: ignore[assignment]
        carrier.carry(module, (*carrier.recipes_of(module), recipe))
