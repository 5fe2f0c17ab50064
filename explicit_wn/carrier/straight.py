"""The ordinary case of computing and reading a weight, written out as source for each class that carries one.

`weight.py` defines what is right in every case, in functions that can be read. A small layer feels each of them, so
here is what they do where nothing unusual is going on: the parts are the module's own, no graph is captured, no
transform runs, no block holds the weights. Where it is otherwise they leave for the careful ones: before they have
changed anything, or, where somebody may have written into the stored weight, having put it back. The norm's `quick`
way to the weight stands before its `formula`; `advance` stands before both, in training mode.
"""

import inspect
from collections.abc import Callable
from textwrap import indent
from threading import get_ident
from typing import Any

import attrs
from torch import Tensor, nn

from ..contexts import capture
from ..contexts.torchscript import is_traced
from ..source import define, literal
from . import weight as carefully
from .recipe import Recipe
from .store import Stored

RECOMPUTE = """
def recompute(module):
    if not is_ordinary():
        return carefully.recompute_recipe(module, recipe)
    store = module._normed_store
    if store.blocks:
        return None if store.held and not is_traced() else carefully.recompute_recipe(module, recipe)
    {find_parts}
    if {parts_are_unusual} or store.in_forward:
        return carefully.recompute_recipe(module, recipe)
    stored = store.pop({name!r}, None)
    if stored is not None:
        try:
            written = stored.seal is not None or stored.value._version
        except RuntimeError:  # of what inference mode made
            written = False
        if written:  # somebody may have, at least
            store[{name!r}] = stored
            return carefully.recompute_recipe(module, recipe)
        del stored  # freed before its successor is allocated: the same memory is used again
    try:
        {advance}
        value = {value}
    except ValueError as error:
        raise recipe.refusal(module, error) from error
    try:
        version = {versions}
    except RuntimeError:  # of what inference mode made
        version = None
    store[{name!r}] = Stored(value, ({parts},), version, get_ident())
"""

COMPUTE = """
def compute(module):
    if not is_ordinary():
        return carefully.advance_and_compute(module, recipe)
    {find_parts}
    if {parts_are_unusual}:
        return carefully.advance_and_compute(module, recipe)
    try:
        {advance}
        value = {value}
    except ValueError as error:
        raise recipe.refusal(module, error) from error
    return value
"""

READ = """
def read(module):
    if capturing() or carefully.on_read is not None:
        return carefully.read(module, recipe)
    store = module._normed_store
    stored = store.get({name!r})
    if stored is not None:
        {tables}
        sources = stored.sources
        if {parts_are_the_same} and stored.thread == get_ident():
            version = stored.version
            if version is None or {versions} == version:
                return stored.value
    return carefully.read(module, recipe)
"""

READ_INLINED = """
def read(module):
    if capturing() or carefully.on_read is not None:
        return carefully.read(module, recipe)
    store = module._normed_store
    if store.in_forward:
        value = store.in_forward.get((get_ident(), {name!r}))
        if value is not None:
            return value
    elif store.blocks and store.held:
        stored = store.get({name!r})
        if stored is not None:
            {tables}
            sources = stored.sources
            if {parts_are_the_same}:
                return stored.value
    return carefully.read(module, recipe)
"""


@attrs.frozen(eq=False)
class Functions:
    """What one recipe does in one class."""

    recipe: Recipe
    name: str
    """The weight's, again: one look-up less."""
    recompute: Callable[[nn.Module], None]
    """Computes the weight and stores it."""
    compute: Callable[[nn.Module], Tensor]
    """Computes the weight as a recompute does, and stores nothing."""
    read: Callable[[nn.Module], Any]
    """The weight, as a read of the attribute gives it."""


def functions_of(recipe: Recipe, base: type[nn.Module]) -> Functions:
    """The functions for a class that carries `recipe`."""
    quick = _quick_of(type(recipe.norm))
    text = _text_of(recipe, quick)
    scope: dict[str, Any] = {
        "recipe": recipe,
        "carefully": carefully,
        "formula": recipe.formula,
        "quick": quick,
        "advance": recipe.advance,
        "Stored": Stored,
        "Parameter": nn.Parameter,
        "Tensor": Tensor,
        "capturing": capture.capturing,
        "is_ordinary": capture.is_ordinary,
        "is_traced": is_traced,
        "get_ident": get_ident,
    }

    def made(template: str, name: str) -> Any:
        return define(_fill(template, text), name, base, dict(scope))

    read = READ_INLINED if recipe.inlined else READ
    return Functions(recipe, recipe.name, made(RECOMPUTE, "recompute"), made(COMPUTE, "compute"), made(read, "read"))


def _text_of(recipe: Recipe, quick: Callable[..., Tensor | None] | None) -> dict[str, str]:
    """What stands in the fields of the templates."""
    buffers = recipe.norm.buffer_parts
    own = [(f"part_{i}", a, p in buffers) for i, (p, a) in enumerate(zip(recipe.parts, recipe.attributes, strict=True))]
    names = [name for name, *_ in own]
    given = {part: f"{part}={name}" for part, name in zip(recipe.parts, names, strict=True)}
    find = [f"{name} = {'buffers' if buffer else 'parameters'}.get({a!r})" for name, a, buffer in own]
    same = [
        f"{'buffers' if buffer else 'parameters'}.get({a!r}) is ({name} := sources[{i}])"
        for i, (name, a, buffer) in enumerate(own)
    ]
    kinds = dict.fromkeys("buffers" if buffer else "parameters" for *_, buffer in own)
    tables = [f"{kind} = module._{kind}" for kind in kinds]
    value = f"formula({', '.join([*given.values(), *_options(recipe.formula_options)])})"
    if quick is not None:
        by_name = dict(zip(recipe.parts, names, strict=True)) | {k: literal(v) for k, v in recipe.settings}
        arguments = ", ".join(by_name[parameter] for parameter in inspect.signature(quick).parameters)
        value = f"quick({arguments})\nif value is None:\n    value = {value}"
    advancing = [*(given[part] for part in recipe.advance_parts), *_options(recipe.advance_options)]
    advance = f"if module.training:\n    advance({', '.join(advancing)})"
    return {
        "name": recipe.name,
        "parts": ", ".join(names),
        "find_parts": "\n".join([*tables, *find]),
        "parts_are_unusual": " or ".join(f"type({n}) is not {'Tensor' if b else 'Parameter'}" for n, _, b in own),
        "tables": "\n".join(tables),
        "parts_are_the_same": " and ".join(same),
        "versions": " + ".join(f"{name}._version" for name in names),
        "advance": advance if recipe.advance else "",
        "value": value,
    }


def recomputes_of(weights: list[Functions]) -> dict[str, dict[str, Callable[[nn.Module], None]]]:
    """By the kind and the name of a norm object, the function that recomputes all weights that it means."""
    found: dict[str, dict[str, Callable[[nn.Module], None]]] = {}
    for kind, name in [(one.recipe.norm._kind, name) for one in weights for name in one.recipe.asked_by]:
        meant = [one for one in weights if one.recipe.norm._kind == kind and name in one.recipe.asked_by]
        found.setdefault(kind, {})[name] = _in_turn([one.recompute for one in meant])
    return found


def _in_turn(recomputes: list[Callable[[nn.Module], None]]) -> Callable[[nn.Module], None]:
    def recompute(module: nn.Module) -> None:
        for one in recomputes:
            one(module)

    return recomputes[0] if len(recomputes) == 1 else recompute


def _quick_of(norm: type) -> Callable[..., Tensor | None] | None:
    """The quick way to what the norm's formula gives; None for a class with a formula of its own, and no such way."""
    for cls in norm.__mro__:
        if "quick" in vars(cls):
            return cls.quick  # type: ignore[attr-defined, no-any-return]
        if "formula" in vars(cls):
            return None
    return None


def _options(options: dict[str, Any]) -> list[str]:
    return [f"{name}={literal(value)}" for name, value in options.items()]


def _fill(template: str, text: dict[str, str]) -> str:
    """`template` with its fields filled in; what is of several lines is indented as the field is."""
    lines = []
    for line in template.strip().split("\n"):
        filled = line.strip().format(**text)
        lines.append(indent(filled, line[: len(line) - len(line.lstrip())]))
    return "\n".join(line for line in lines if line.strip()) + "\n"
