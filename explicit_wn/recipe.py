"""A recipe: how one weight of a module is made of its parts."""

import functools
import inspect
import keyword
import weakref
from collections.abc import Callable
from types import NoneType
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import capture

if TYPE_CHECKING:
    from .reparametrization import Reparametrization

INLINED = "inlined"


_derived: Any = functools.partial(attrs.field, init=False, eq=False, repr=False)


@attrs.frozen
class Recipe:
    """How one weight of a module is made of its parts: what `apply` decided, and nothing that changes later."""

    norm_class: "type[Reparametrization]"
    settings: tuple[tuple[str, Any], ...]
    """The fields of the norm: `name` is the parameter's, `dim` an index or None."""
    parts: tuple[str, ...]
    """The suffixes of the parts, which are the formula's argument names as well."""
    owner: str
    """The `name` of the object that was applied."""
    inlined: bool

    # Derived from the above, once, since the hot paths read them
    norm: "Reparametrization" = _derived()
    """A norm object with these settings."""
    name: str = _derived()
    """The parameter's name."""
    labels: tuple[str, ...] = _derived()
    """What a recompute may ask for to mean this weight."""
    attributes: tuple[str, ...] = _derived()
    """The attributes of the module that hold the parts."""
    formula: Callable[..., Tensor] = _derived()
    """The weight from its parts and options."""
    operator: capture.Operator = _derived()
    """The formula for a captured graph."""
    formula_options: dict[str, Any] = _derived()
    """The settings that the formula takes."""
    advance: Callable[..., None] | None = _derived()
    """What a recompute in training mode does first, in place; None if nothing, or if it is not for these parts."""
    advance_options: dict[str, Any] = _derived()
    """The settings that `advance` takes."""

    def __attrs_post_init__(self) -> None:
        self._check_types()
        exact = {
            "settings": tuple((field, _exact(value)) for field, value in self.settings),
            "parts": tuple(map(_exact, self.parts)),
            "owner": _exact(self.owner),
        }
        for key, made in exact.items():
            object.__setattr__(self, key, made)
        self._check_names()
        kind, settings = self.norm_class.kind, dict(self.settings)
        name, formula, advance = settings["name"], self.norm_class.formula, self.norm_class.advance
        known = {*self.parts, *settings}
        if advance is not None and not known.issuperset(inspect.signature(advance).parameters):
            advance = None
        options, changing = self.options_of(formula), () if advance is None else self.norm_class.buffer_parts
        labels = [f"{kind} {self.owner}", f"{kind} {name}", *([INLINED] if self.inlined else [])]
        derived = {
            "norm": self.norm_class(**settings),
            "name": name,
            "labels": tuple(dict.fromkeys(labels)),
            "attributes": tuple(f"{name}_{part}" for part in self.parts),
            "formula": formula,
            "operator": capture.operator(formula, self.parts, options, changing),
            "formula_options": options,
            "advance": advance,
            "advance_options": {} if advance is None else self.options_of(advance),
        }
        for key, value in derived.items():
            object.__setattr__(self, key, value)

    # What is written into source must be names and numbers, wherever this recipe comes from (a pickle, say)

    def _check_types(self) -> None:
        if not (isinstance(self.norm_class, type) and issubclass(self.norm_class, nn.Module)) or not hasattr(
            self.norm_class, "formula"
        ):
            raise TypeError(f"a recipe is for a norm, and the data names {self.norm_class!r}")
        settings = dict(self.settings)
        fields = [field.name for field in attrs.fields(self.norm_class)]  # type: ignore[arg-type]
        if list(settings) != fields or not all(isinstance(v, (int, float, str, NoneType)) for v in settings.values()):
            raise ValueError(f"the settings of a {self.norm_class.__name__} are {fields}, not {self.settings!r}")
        if not isinstance(self.owner, str):
            raise TypeError(f"the owner of a recipe is a str, not {self.owner!r}")

    def _check_names(self) -> None:
        for name in (dict(self.settings)["name"], *self.parts):
            if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
                raise ValueError(f"{name!r} is no Python identifier, hence no name of a parameter that can be normed")

    def __reduce__(self) -> Any:
        return Recipe, (self.norm_class, self.settings, self.parts, self.owner, self.inlined)

    def attribute(self, part: str) -> str:
        """The attribute of the module that holds `part`."""
        return f"{self.name}_{part}"

    def options_of(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The settings that `function` takes."""
        takes = inspect.signature(function).parameters
        options = {key: value for key, value in self.settings if key in takes and key not in self.parts}
        for key, value in options.items():  # TorchScript takes no int for a float
            if isinstance(value, int) and takes[key].annotation in (float, "float"):
                options[key] = float(value)
        return options

    def read(self, module: nn.Module) -> dict[str, Tensor]:
        """The parts as they are now, by suffix."""
        return {
            part: _read_part(module, attribute) for part, attribute in zip(self.parts, self.attributes, strict=True)
        }

    def own(self, module: nn.Module) -> dict[str, Tensor] | None:
        """`read` for the hot path: None if a part is neither a parameter nor a buffer, or if somebody looks on."""
        if not capture.is_getattr_torchs():
            return None
        parameters, buffers, found = module._parameters, module._buffers, {}
        for part, attribute in zip(self.parts, self.attributes):  # noqa: B905 - takes longer
            value = parameters[attribute] if attribute in parameters else buffers.get(attribute)
            if value is None:
                return None
            found[part] = value
        return found

    def sources(self, module: nn.Module) -> tuple[Tensor, ...]:
        """The parameters and buffers behind the parts."""
        own, buffers = module._parameters, module._buffers
        found: list[Any] = []
        for name in self.attributes:
            if name in own:
                found.append(own[name])
            elif name in buffers:
                found.append(buffers[name])
            else:
                found += _behind(module, name)
        return tuple(found)

    def compute(self, module: nn.Module) -> Tensor:
        """The weight from the parts as they are now."""
        parts = self.own(module) or self.read(module)
        missing = [self.attribute(part) for part, value in parts.items() if value is None]
        if missing:
            raise self.refusal(module, ValueError(f"its part {missing[0]!r} is None"))
        try:
            return self.formula(**parts, **self.formula_options)
        except ValueError as error:
            raise self.refusal(module, error) from error

    def refusal(self, module: nn.Module, error: Exception) -> ValueError:
        """What the formula says of the parts, and whose they are."""
        return ValueError(f"{self.norm!r} cannot compute {self.name!r} of this {type(module).__name__}: {error}")


def _exact(value: Any) -> Any:
    """A setting as what it is written as in source, whatever a subclass calls itself (an enum, or a float of NumPy)."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return value if type(value) is kind else getattr(kind, f"__{kind.__name__}__")(value)
    return value


_recipes: "weakref.WeakValueDictionary[Any, Recipe]" = weakref.WeakValueDictionary()


def recipe_for(
    norm_class: "type[Reparametrization]",
    settings: tuple[tuple[str, Any], ...],
    parts: tuple[str, ...],
    owner: str,
    inlined: bool,
) -> Recipe:
    """The recipe with these fields; the same one for all the layers of a model."""
    key = norm_class, repr(settings), parts, owner, inlined  # by repr, since 0 == 0.0
    recipe = _recipes.get(key)
    if recipe is None:
        recipe = _recipes[key] = Recipe(norm_class, settings, parts, owner, inlined)
    return recipe


def _read_part(module: nn.Module, attribute: str) -> Tensor:
    # torch.nn.utils.prune refreshes a pruned part in a hook of the layer itself, after our recompute: so do it here
    mask = module._buffers.get(f"{attribute}_mask")
    part: Tensor = getattr(module, attribute if mask is None else f"{attribute}_orig")
    return part if mask is None else part * mask


def _behind(module: nn.Module, attribute: str) -> list[Any]:
    """The tensors from which another tool computes a part: parametrize, or prune."""
    if parametrize.is_parametrized(module, attribute):
        return list(module.parametrizations[attribute].parameters())  # type: ignore[index, union-attr]
    return [module._parameters.get(f"{attribute}_orig"), module._buffers.get(f"{attribute}_mask")]
