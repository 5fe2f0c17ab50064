"""What is wrong with a model, as a table."""

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..carrier import Recipe, is_current, recipes_of, store_of
from ..carrier.alarm import is_written_to
from ..layers import qualified
from ..refusals import kind_of
from ..reparametrization import Reparametrization
from ..table import Rows
from . import spellings
from .verbs import check_model


@attrs.frozen
class Finding:
    """One thing that is wrong."""

    name: str
    """The weight, part or norm that it is about, by its qualified name."""
    problem: str
    """`stale`, `lost write`, `unknown`, `not finite`, `broken`, `not in the optimizer`, `tied`, `same name`,
    `spelling of torch` or `foreign`."""
    way_out: str
    """What to do about it."""


@attrs.frozen(repr=False)
class Findings(Rows):
    """What `check` found: a table to walk through, and true if there is anything in it."""

    rows: list[Finding]

    def cells(self) -> list[list[str]]:
        return [["name", "problem", "way out"], *([row.name, row.problem, row.way_out] for row in self.rows)]


def check(model: nn.Module, optimizer: Any = None) -> Findings:
    """What is wrong with the norms of `model`, and what to do about each; an empty table if nothing is.

    It finds weights that are stale, that somebody wrote into (which the next recompute undoes), that are not finite or
    that the parts cannot make, as where their shapes do not belong together; parts that two modules share; norm objects
    of one name and other settings in one module; norms of torch's and of other projects; and, given the optimizer,
    trainable parts that it does not hold, as one does not that was made before `apply`. It changes nothing.

    ```pycon
    >>> from explicit_wn import WeightNorm
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> _ = WeightNorm().inline(model[0])
    >>> check(model, optimizer)
    name        problem               way out
    ----------  --------------------  --------------------------------------------------------------------------
    0.weight_g  not in the optimizer  optimizer.add_param_group({"params": [model.get_parameter("0.weight_g")]})

    ```
    """
    check_model("check", model)
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"check wants an optimizer second, with param_groups, and got {kind_of(optimizer)}.")
    rows = [row for path, module in model.named_modules() for row in _of_module(path, module)]
    rows += _tied(model)
    if optimizer is not None:
        rows += _not_optimized(model, {id(p) for group in optimizer.param_groups for p in group["params"]})
    return Findings(rows)


def _of_module(path: str, module: nn.Module) -> Iterator[Finding]:
    for recipe in recipes_of(module):
        yield from _of_weight(qualified(path, recipe.name), module, recipe)
    for found in (*spellings.find(module), *spellings.find_foreign(module)):
        if found.spelling == "foreign":
            yield Finding(qualified(path, found.name), "foreign", "end it in its project's way, and apply one of ours")
        elif found.state == "broken":
            yield Finding(qualified(path, found.name), "broken", str(found.why_not))
        elif found.is_norm:
            yield Finding(qualified(path, found.name), "spelling of torch", "explicit_wn.convert(model)")
    norms: dict[str, str] = {}
    for name, child in module.named_children():
        if isinstance(child, Reparametrization) and norms.setdefault(child._label, repr(child)) != repr(child):
            yield Finding(
                qualified(path, name), "same name", f"keep one: {child._label!r} is all that either recomputes"
            )


def _of_weight(name: str, module: nn.Module, recipe: Recipe) -> Iterator[Finding]:
    try:
        with torch.no_grad():
            weight = recipe.compute(module)
    except ValueError as error:
        yield Finding(name, "broken", str(error))
        return
    if not weight.is_meta and not weight.isfinite().all():
        yield Finding(name, "not finite", "look at its parts with explicit_wn.steps; initialize them, or set eps")
    state = state_of(module, recipe, weight)
    if state in _WAYS_OUT:
        yield Finding(name, state, _WAYS_OUT[state])


_WAYS_OUT = {
    "stale": "call recompute in the forward that uses it, or use inline in the place of apply",
    "lost write": "assign(module, weight) on the norm, or explicit_wn.assign_all(model, init)",
    "unknown": "it is not what its parts make, and .data leaves no trace: recompute, or assign what was written",
}


def state_of(module: nn.Module, recipe: Recipe, weight: Tensor) -> str:
    """`fresh`, `stale`, `lost write`, or `unknown`: the stored weight beside `weight`, which the parts make now.

    `unknown` is a weight that is not what the parts make, where no counter tells who changed: `.data` leaves no trace.
    """
    stored = store_of(module).get(recipe.name)
    if stored is None or not is_current(stored, module, recipe):
        return "fresh"  # whoever reads it has it computed
    if not recipe.inlined and stored.is_stale():
        return "stale"
    if is_written_to(module, recipe, stored):
        return "lost write"
    if weight.is_meta or recipe.inlined:
        return "fresh"
    close = torch.allclose(stored.value, weight, rtol=16 * torch.finfo(weight.dtype).eps, equal_nan=True)
    return "fresh" if close else "unknown"


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in model.named_modules():
        for recipe in recipes_of(module):
            for attribute in recipe.attributes:
                part = module._parameters.get(attribute)
                if part is not None:
                    yield qualified(path, attribute), part


def _tied(model: nn.Module) -> Iterator[Finding]:
    parts, first = {name for name, _ in _parts(model)}, dict[int, str]()
    for path, module in model.named_modules():
        for own, parameter in module._parameters.items():
            name = qualified(path, own)
            other = first.setdefault(id(parameter), name)
            if parameter is not None and other != name and not parts.isdisjoint((name, other)):
                part, other = (name, other) if name in parts else (other, name)
                yield Finding(part, "tied", f"it is {other} as well, and no other part is: share the whole module")


def _not_optimized(model: nn.Module, optimized: set[int]) -> Iterator[Finding]:
    for name, part in _parts(model):
        if part.requires_grad and id(part) not in optimized:
            way_out = f'optimizer.add_param_group({{"params": [model.get_parameter("{name}")]}})'
            yield Finding(name, "not in the optimizer", way_out)
