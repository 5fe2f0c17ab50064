"""A norm by itself: its settings, what its author defines, and how it shows. No module is involved yet."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import attrs
from torch import Tensor, nn

from . import refusals, settings
from .mistakes import Written, mistake
from .refusals import Asked

Self = TypeVar("Self", bound="Norm")


AMBIGUOUS = (
    "dim=-1 means the whole tensor to torch's weight_norm and the last dimension to most readers; say "
    'dim="whole" for one norm of the whole tensor'
)
"""Why a dim of -1 is refused, and one way out; the other has a number."""


class Norm(nn.Module):
    """What `Reparametrization` knows without a module; its docstring says what a norm's author writes."""

    name: str
    formula: ClassVar[Callable[..., Tensor]]
    advance: ClassVar[Callable[..., None] | None] = None
    quick: ClassVar[Callable[..., Tensor | None] | None] = None
    steps: ClassVar[Callable[..., Iterable[tuple[str, str, str, Tensor]]] | None] = None
    buffer_parts: tuple[str, ...] = ()
    spellings: ClassVar[dict[str, str]] = {}
    default_dim: ClassVar[settings.Dim] = None
    _counts_from: int = 0
    """What the first dimension is called where this object comes from: 1 in R."""
    _kind: ClassVar[str]
    _was_read: ClassVar[bool]
    _was_tried: ClassVar[bool]
    __constants__ = ["_kind"]  # for TorchScript, which compiles `_label`

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls._kind = cls.__name__
        cls._was_read = False
        cls._was_tried = vars(cls).get("_was_tried", False)

    def __attrs_pre_init__(self) -> None:
        super().__init__()

    def __attrs_post_init__(self) -> None:
        """Checks what is known before there is a module; attrs has run the validators of the other settings."""
        self._read_class()
        name = self.name
        if isinstance(name, nn.Module):  # as torch's functions take them
            raise TypeError(
                f"{self._kind}(name) takes the name of a parameter, not a {type(name).__name__}; the module comes "
                f'after it: {self._kind}("weight").apply(module).'
            )
        if not isinstance(name, str):
            raise settings.wrong_setting(self, "name", name, "a str, the name of a parameter", TypeError)
        name = str.__str__(name)  # whatever a subclass says of itself
        reason = refusals.reason((*refusals.NAMES, refusals.NO_IDENTIFIER), Asked(self, nn.Module(), name))
        if reason:
            raise ValueError(f"{self._kind} cannot norm {name!r}: {reason}.")
        if not self._is_dim(getattr(self, "dim", None)):
            raise settings.wrong_setting(self, "dim", self.dim, self._dims_shown(), TypeError)
        if self._is_ambiguous(getattr(self, "dim", None)):
            raise ValueError(f"{self._kind}(dim=-1): {AMBIGUOUS}, or its number to keep the last dimension.")

    # What a norm defines

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts of `weight`. The one that is `weight` itself keeps the Parameter."""
        raise NotImplementedError(
            f"{self._kind}: it has no split; write one that returns the parts of a weight by name."
        )

    def inverse(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts that make `weight`."""
        return self.split(weight)

    def objection(self, weight: Tensor) -> str | None:
        """Why `weight` cannot be normed with these settings, and the way out; None if it can."""
        return None

    def no_inverse(self, weight: Tensor) -> str | None:
        """Why no parts make `weight`, and the way out; None if some do."""
        return None

    def clone(self: Self, deep: bool = False) -> Self:
        """A copy of this object, as R6's `clone`; a norm refers to nothing that `deep` would copy."""
        made: Self = attrs.evolve(self)  # type: ignore[misc]
        made._counts_from = self._counts_from
        return made

    @classmethod
    def _part_names(cls) -> set[str]:
        """What the formula takes that is no setting."""
        return set(Written(cls).parts)

    # What `dim` may be

    @classmethod
    def _named_dims(cls) -> tuple[str, ...]:
        """The names for a `dim`. Where None stands for a dimension, there is no norm of the whole tensor."""
        return ("out", "whole") if cls.default_dim is None else ("out",)

    @classmethod
    def _is_dim(cls, value: Any) -> bool:
        if isinstance(value, str):
            return value in cls._named_dims()
        return value is None or settings.is_int(value)

    @classmethod
    def _is_ambiguous(cls, dim: Any) -> bool:
        """Whether it is -1 where that may mean the whole tensor."""
        return dim == -1 and cls.default_dim is None

    @classmethod
    def _dims_shown(cls) -> str:
        return ", ".join(["an int", *(f'"{name}"' for name in cls._named_dims())]) + " or None"

    # How it shows

    @property
    def _label(self) -> str:
        """What this object calls its own in a module."""
        return self._kind + " " + self.name

    def extra_repr(self) -> str:
        """The name and the settings, for the `repr`."""
        return ", ".join([repr(self.name), *self._settings_shown()])

    def _describe(self) -> str:
        """This norm as a setting of the module it is applied to: `weight=WeightNorm(dim=0)`."""
        return f"{self.name}={self._kind}({', '.join(self._settings_shown())})"

    def _settings_shown(self) -> list[str]:
        fields = [f for f in attrs.fields(type(self)) if f.name != "name"]  # type: ignore[arg-type]
        values = [(f.name, getattr(self, f.name), f.default) for f in fields]
        return [f"{name}={value!r}" for name, value, default in values if name == "dim" or value != default]

    # State dicts

    def _respell(self, state_dict: dict[str, Any], prefix: str, parts: tuple[str, ...]) -> None:
        """Renames the parts of one weight as a parametrized module calls them to ours."""
        for part, spelling in self.spellings.items():
            foreign = f"{prefix}parametrizations.{self.name}.{spelling}"
            if foreign in state_dict:
                state_dict[f"{prefix}{self.name}_{part}"] = state_dict.pop(foreign)

    # What its author wrote

    def _read_class(self) -> None:
        """Refuses a class whose author made a mistake, when the first object is made of it."""
        cls = type(self)
        if not cls._was_read:
            wrong = mistake(cls)
            if wrong:
                raise TypeError(f"{cls.__name__}: {wrong}.")
            cls._was_read = True

    def _check_class(self) -> None:
        cls = type(self)
        if not attrs.has(cls) or "__slots__" in vars(cls) or cls.__eq__ is not nn.Module.__eq__:
            raise TypeError(
                f"{cls.__name__} is no attrs class that torch can use; write the line "
                "@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False) above it."
            )
