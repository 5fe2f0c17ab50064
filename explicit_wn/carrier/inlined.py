"""Inlined weights: the forward of their module computes them first, and has them while it runs."""

from functools import update_wrapper
from threading import get_ident
from types import FunctionType
from typing import Any

from torch import nn

from ..contexts import capture
from .recipe import Recipe
from .store import store_of
from .weight import forget, is_held, show_to_blocks


def methods(base: type[nn.Module], recipes: tuple[Recipe, ...]) -> dict[str, Any]:
    """What has a class compute the inlined ones of `recipes` where its forward begins."""
    if issubclass(base, nn.RNNBase):
        return {"_update_flat_weights": _update_flat_weights}
    if not any(recipe.inlined for recipe in recipes) or base.forward is nn.Module.forward:
        return {}
    forward = FunctionType(run_inlined.__code__, globals(), "forward")
    return {"_forward_of_base": base.forward, "forward": update_wrapper(forward, base.forward, updated=())}


def run_inlined(self: Any, /, *arguments: Any, **keywords: Any) -> Any:
    """The forward of an inlined module: its weights are there while its own forward runs, and no longer.

    So whoever else reads one gets it computed for him, fresh and with a gradient of its own: nn.MultiheadAttention
    reads the weight of a layer that it never calls.
    """
    if capture.capturing():
        recompute_inlined(self)
        return self._forward_of_base(*arguments, **keywords)
    inlined, store = self._normed_inlined, self._normed_store
    if store.blocks and is_held(self, inlined[0].recipe):
        return self._forward_of_base(*arguments, **keywords)
    thread = get_ident()
    try:
        for one in inlined:
            if one.name in store:  # what a recompute or a read from outside left
                forget(self, one.recipe)
            value = store.in_forward[thread, one.name] = one.compute(self)
            if store.blocks:
                show_to_blocks(self, one.recipe, value)
        return self._forward_of_base(*arguments, **keywords)
    finally:
        for one in inlined:
            store.in_forward.pop((thread, one.name), None)


def recompute_inlined(module: Any) -> None:
    """Recomputes every inlined weight of `module`."""
    for one in module._normed_inlined:
        one.recompute(module)


def _update_flat_weights(self: Any) -> None:
    """The first thing that the forward of an RNN calls, which goes on with the list of its weights (`FlatWeights`).

    That forward itself is overloaded and stays as it is; and a copy or a pickle calls this as well.
    """
    if self._normed_inlined and (capture.capturing() or get_ident() not in store_of(self).copying):
        recompute_inlined(self)
