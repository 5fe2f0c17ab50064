"""A recipe: how one weight of a module is made of its parts."""

import inspect
import keyword
import weakref
from collections.abc import Callable
from functools import cached_property
from types import NoneType
from typing import Any

import attrs
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..contexts import capture

INLINED = "inlined"


@attrs.frozen(slots=False, eq=False)
class Recipe:
    """How one weight of a module is made of its parts: what `apply` decided, and nothing that changes later."""

    norm: Any
    """The `Reparametrization`, whose verbs are about recipes, with the settings that hold here: `name` is the
    parameter's, `dim` an index or None."""
    parts: tuple[str, ...]
    """The suffixes of the parts, which are the formula's argument names as well."""
    owner: str
    """The `name` of the object that was applied."""
    inlined: bool

    # What is written into source must be names and numbers, wherever this recipe comes from (a pickle, say)

    def __attrs_post_init__(self) -> None:
        odd = [value for _, value in self.settings if not isinstance(value, (int, float, str, NoneType))]
        if odd:
            raise TypeError(f"a setting of a norm is a number, a str or None, not {odd[0]!r}")
        for name in (self.name, *self.parts):
            if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
                raise ValueError(f"{name!r} is no Python identifier, hence no name of a parameter that can be normed")

    def __reduce__(self) -> Any:
        return recipe_from, (type(self.norm), self.settings, self.parts, self.owner, self.inlined)

    # What follows from that

    @cached_property
    def settings(self) -> tuple[tuple[str, Any], ...]:
        """The fields of the norm."""
        return _settings_of(self.norm)

    @cached_property
    def name(self) -> str:
        """The parameter's name."""
        name: str = self.norm.name
        return name

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """What a recompute in TorchScript may ask for to mean this weight."""
        labels = [f"{self.norm._kind} {name}" for name in self.asked_by]
        return (*labels, INLINED) if self.inlined else tuple(labels)

    @cached_property
    def asked_by(self) -> tuple[str, ...]:
        """The names of the norm objects that mean this weight: of the one that was applied, and of the weight."""
        return tuple(dict.fromkeys((self.owner, self.name)))

    @cached_property
    def attributes(self) -> tuple[str, ...]:
        """The attributes of the module that hold the parts."""
        return tuple(map(self.attribute, self.parts))

    @cached_property
    def formula(self) -> Callable[..., Tensor]:
        """The weight from its parts and options."""
        formula: Callable[..., Tensor] = type(self.norm).formula
        return formula

    @cached_property
    def formula_options(self) -> dict[str, Any]:
        """The settings that the formula takes."""
        return self.options_of(self.formula)

    @cached_property
    def advance(self) -> Callable[..., None] | None:
        """What a recompute in training mode does first, in place; None if nothing, or if it is not for these parts."""
        advance = type(self.norm).advance
        known = {*self.parts, *dict(self.settings)}
        return advance if advance and known.issuperset(inspect.signature(advance).parameters) else None

    @cached_property
    def advance_parts(self) -> tuple[str, ...]:
        """The parts that `advance` takes."""
        return self.parts_of(self.advance) if self.advance else ()

    @cached_property
    def advance_options(self) -> dict[str, Any]:
        """The settings that `advance` takes."""
        return self.options_of(self.advance) if self.advance else {}

    @cached_property
    def operator(self) -> capture.Operator:
        """The formula for a captured graph."""
        changing = self.norm.buffer_parts if self.advance else ()
        return capture.operator(self.formula, self.parts, self.formula_options, changing)

    def attribute(self, part: str) -> str:
        """The attribute of the module that holds `part`."""
        return f"{self.name}_{part}"

    def parts_of(self, function: Callable[..., Any]) -> tuple[str, ...]:
        """The parts that `function` takes."""
        takes = inspect.signature(function).parameters
        return tuple(part for part in self.parts if part in takes)

    def options_of(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The settings that `function` takes."""
        takes = inspect.signature(function).parameters
        options = {key: value for key, value in self.settings if key in takes and key not in self.parts}
        for key, value in options.items():  # TorchScript takes no int for a float
            if type(value) is int and "float" in (wanted := str(takes[key].annotation)) and "int" not in wanted:
                options[key] = float(value)
        return options

    # The parts in a module, and the weight that they make

    def read(self, module: nn.Module) -> dict[str, Tensor]:
        """The parts as they are now, by suffix."""
        return {part: _part(module, name) for part, name in zip(self.parts, self.attributes, strict=True)}

    def sources(self, module: nn.Module) -> tuple[Tensor, ...]:
        """The parameters and buffers behind the parts."""
        return tuple([source for name in self.attributes for source in _behind(module, name)])

    def make(self, parts: dict[str, Tensor]) -> Tensor:
        """The weight from these parts."""
        return self.formula(**parts, **self.formula_options)

    def compute(self, module: nn.Module) -> Tensor:
        """The weight from the parts as they are now."""
        parts = self.read(module)
        missing = [self.attribute(part) for part, value in parts.items() if value is None]
        if missing:
            raise self.refusal(module, ValueError(f"its part {missing[0]!r} is None"))
        try:
            return self.make(parts)
        except ValueError as error:
            raise self.refusal(module, error) from error

    def refusal(self, module: nn.Module, error: Exception) -> ValueError:
        """What the formula says of the parts, and whose they are."""
        return ValueError(f"{self.norm!r} cannot compute {self.name!r} of this {base_of(module).__name__}: {error}")


def _part(module: nn.Module, attribute: str) -> Tensor:
    # torch.nn.utils.prune refreshes a pruned part in a hook of the layer itself, after our recompute: so do it here
    mask = module._buffers.get(f"{attribute}_mask")
    part: Tensor = getattr(module, attribute if mask is None else f"{attribute}_orig")
    return part if mask is None else part * mask


def _behind(module: nn.Module, attribute: str) -> list[Any]:
    """The tensor that is a part, or those from which another tool computes it: parametrize, or prune."""
    for own in (module._parameters, module._buffers):
        if attribute in own:
            return [own[attribute]]
    if parametrize.is_parametrized(module, attribute):
        return list(module.parametrizations[attribute].parameters())  # type: ignore[index, union-attr]
    return [module._parameters.get(f"{attribute}_orig"), module._buffers.get(f"{attribute}_mask")]


_recipes: "weakref.WeakValueDictionary[Any, Recipe]" = weakref.WeakValueDictionary()


def recipe_for(norm: Any, parts: tuple[str, ...], owner: str, inlined: bool) -> Recipe:
    """The recipe with these fields; the same one for all the layers of a model.

    Its norm is made anew, of plain numbers and texts: it is shared, and its settings are written into source.
    """
    settings, parts, owner = _settings_of(norm), tuple(map(_exact, parts)), _exact(owner)
    key = type(norm), repr(settings), parts, owner, inlined  # by repr, since 0 == 0.0
    recipe = _recipes.get(key)
    if recipe is None:
        recipe = _recipes[key] = Recipe(type(norm)(**dict(settings)), parts, owner, inlined)
    return recipe


def recipe_from(norm_class: Any, settings: Any, parts: tuple[str, ...], owner: str, inlined: bool) -> Recipe:
    """The recipe that a pickle names, which may name anything."""
    is_norm = isinstance(norm_class, type) and issubclass(norm_class, nn.Module) and hasattr(norm_class, "formula")
    if not is_norm:
        raise TypeError(f"a recipe is for a norm, and the data names {norm_class!r}")
    fields = [field.name for field in attrs.fields(norm_class)]
    values = dict(settings)
    if list(values) != fields:
        raise ValueError(f"the settings of a {norm_class.__name__} are {fields}, not {settings!r}")
    if not isinstance(owner, str):
        raise TypeError(f"the owner of a recipe is a str, not {owner!r}")
    return recipe_for(norm_class(**values), parts, owner, inlined)


def _settings_of(norm: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((field.name, _exact(getattr(norm, field.name))) for field in attrs.fields(type(norm)))


def _exact(value: Any) -> Any:
    """A setting as what it is written as in source, whatever a subclass calls itself (an enum, or a float of NumPy)."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return value if type(value) is kind else getattr(kind, f"__{kind.__name__}__")(value)
    return value


def base_of(module: nn.Module) -> type[nn.Module]:
    """The class that `module` has without us."""
    for cls in type(module).__mro__:
        if cls.__dict__.get("_normed_base") is not None:
            return cls._normed_base  # type: ignore[attr-defined, no-any-return]
    return type(module)
