"""Initializing the weights of a model whose norms are applied already."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .. import refusals
from ..carrier import Recipe, all_or_nothing, bake, base_of, carry, recipes_of, values_or_nothing
from ..layers import qualified
from .verbs import check_model, naming


def assign_all(model: nn.Module, init: Callable[[nn.Module], Any]) -> list[str]:
    """`model.apply(init)` with what it does to normed weights kept, as if it had come before the norms; their names.

    What `init` writes into a normed weight is lost otherwise, at the next recompute. Here it finds, in the place of
    each normed module, the plain one: a Linear with a Parameter `weight` that it may fill, replace or reset. What it
    made of the weight is split into the parts then, in place, so that an optimizer holds them as before; a weight that
    it left alone keeps its parts. If `init` fails, or a norm refuses what it wrote, nothing is changed.

    A weight norm then gives the very weight that was written, a spectral norm that weight divided by its σ.

    >>> import torch
    >>> from explicit_wn import WeightNorm, apply_all
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> _ = apply_all(model, WeightNorm())
    >>> def init_weights(module):
    ...     if isinstance(module, nn.Linear):
    ...         module.weight.data.normal_(0, 0.01)
    >>> assign_all(model, init_weights)
    ['0.weight', '2.weight']
    >>> round(model[0].weight.std().item(), 2)
    0.01
    """
    check_model("assign_all", model)
    if isinstance(init, nn.Module) or not callable(init):
        raise TypeError(f"assign_all wants a function second, which is given each module, and got {init!r}.")
    carriers = {path: module for path, module in model.named_modules() if recipes_of(module)}
    for path, module in carriers.items():
        for recipe in recipes_of(module):
            _refuse(path, module, recipe, refusals.not_its_own(module, recipe))
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if not is_lazy(tensor)]
    with all_or_nothing(*model.modules()), values_or_nothing(tensors):
        bare = {path: _Bare(module) for path, module in carriers.items()}
        model.apply(init)
        changed = [qualified(path, name) for path, one in bare.items() for name in one.dress(path)]
    return changed


class _Bare:
    """A module without its norms, for a while."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.recipes = module, recipes_of(module)
        self.parameters, self.buffers = dict(module._parameters), dict(module._buffers)
        with torch.no_grad():
            bake(module, self.recipes)
            self.before = {recipe.name: getattr(module, recipe.name).clone() for recipe in self.recipes}

    def dress(self, path: str) -> list[str]:
        """Gives the module its norms back, with the parts of what its weights are now; the names of those changed."""
        module = self.module
        weights = {name: getattr(module, name, None) for name in self.before}
        both: Any = (module._parameters, self.parameters), (module._buffers, self.buffers)
        for own, before in both:
            now = {key: value for key, value in own.items() if key not in weights}
            parts = {attribute for recipe in self.recipes for attribute in recipe.attributes}
            own.clear()
            own.update({key: value if key in parts else now.pop(key, None) for key, value in before.items()} | now)
        for name in weights:
            vars(module).pop(name, None)
        carry(module, self.recipes)
        return [recipe.name for recipe in self.recipes if self._take(path, recipe, weights[recipe.name])]

    def _take(self, path: str, recipe: Recipe, weight: Any) -> bool:
        before = self.before[recipe.name]
        _refuse(path, self.module, recipe, refusals.odd_shape(weight, before.shape))
        weight = weight.detach().to(before)
        if not before.is_meta and torch.equal(weight, before):
            return False
        _refuse(path, self.module, recipe, recipe.norm.objection(weight))
        with torch.no_grad():
            parts = recipe.read(self.module)
            for part, value in recipe.norm.split(weight).items():
                parts[part].copy_(value)
        return True


def _refuse(path: str, module: nn.Module, recipe: Recipe, reason: str | None) -> None:
    if reason:
        with naming(path):
            raise ValueError(
                f"{recipe.norm!r} cannot take over {recipe.name!r} of this {base_of(module).__name__}: {reason}."
            )
