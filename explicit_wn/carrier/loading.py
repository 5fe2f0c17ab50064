"""What a carrier takes from a state dict: its parts, in every spelling of them, or a plain weight."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .recipe import Recipe, base_of
from .store import store_of
from .undo import all_or_nothing, values_or_nothing


def load(
    module: nn.Module,
    recipes: tuple[Recipe, ...],
    state_dict: dict[str, Any],
    prefix: str,
    errors: list[str],
    load_parts: Callable[[], None],
) -> None:
    """Loads what `load_parts` does, once every weight in `state_dict` is in our parts; all of it, or adds to `errors`.

    `load_state_dict` raises in the end what is in `errors`.
    """
    known = len(errors)
    with contextlib.suppress(_DoesNotFit), all_or_nothing(module), values_or_nothing(_own_tensors(module)):
        for recipe in recipes:
            recipe.norm._respell(state_dict, prefix, recipe.parts)
            problem = _split_plain(module, recipe, state_dict, prefix)
            if problem:
                errors.append(problem)
        if len(errors) == known:
            store_of(module).clear()
            load_parts()
        if len(errors) > known:
            raise _DoesNotFit
    store_of(module).clear()


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
