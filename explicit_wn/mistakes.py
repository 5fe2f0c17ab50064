"""What is wrong with a norm as its author wrote it, and the way out, as data: the first that holds counts.

Each is the end of a sentence: "Doubled: its formula takes 'self'; ...". The class is read when the first object is made
of it; what it does is tried on copies, at the first `apply`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

FUNCTIONS = ("formula", "advance", "quick", "steps")
_UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@attrs.frozen(eq=False)
class Written:
    """A norm's class, read."""

    cls: Any

    @property
    def settings(self) -> list[str]:
        """Its fields."""
        return [field.name for field in attrs.fields(self.cls)]

    @property
    def parts(self) -> list[str]:
        """What its formula takes besides."""
        return [name for name in self.takes("formula") if name not in self.settings]

    def takes(self, function: str) -> dict[str, inspect.Parameter]:
        """The arguments of one of its functions; none of one that it has not."""
        found = getattr(self.cls, function, None)
        return dict(inspect.signature(found).parameters) if found else {}

    @property
    def unreadable(self) -> str | None:
        """The function whose arguments cannot be read by name."""
        for function in FUNCTIONS:
            try:
                arguments = self.takes(function).values()
            except (TypeError, ValueError):  # one of torch's own, which has no signature
                return function
            if any(argument.kind in _UNNAMED for argument in arguments):
                return function
        return None

    @property
    def bound(self) -> str | None:
        """The function that was written as a method."""
        return next((function for function in FUNCTIONS if "self" in self.takes(function)), None)

    @property
    def unknown(self) -> tuple[str, str] | None:
        """A function beside the formula, and what it takes that is neither a part nor a setting."""
        for function in FUNCTIONS[1:]:
            for name in self.takes(function):
                if name not in (*self.parts, *self.settings):
                    return function, name
        return None

    @property
    def no_part(self) -> str | None:
        """What is called a buffer, and is no part."""
        return next((part for part in self.cls.buffer_parts if part not in self.parts), None)

    @property
    def parts_shown(self) -> str:
        """Its parts, in words."""
        return ", ".join(map(repr, self.parts))


MISTAKES: tuple[tuple[Callable[[Written], Any], str], ...] = (
    (
        lambda written: not hasattr(written.cls, "formula"),
        "it has no formula; write one as a staticmethod that takes the parts and the settings by their names",
    ),
    (
        lambda written: written.unreadable,
        "the arguments of its {written.unreadable} have no names; write a function that names each part and setting",
    ),
    (
        lambda written: written.bound,
        "its {written.bound} takes 'self'; write @staticmethod above it, and name the parts and settings instead",
    ),
    (
        lambda written: not written.parts,
        "its formula names no part, only settings; let it take each part that split returns, by its name",
    ),
    (
        lambda written: written.unknown,
        "its {written.unknown[0]} takes {written.unknown[1]!r}, which is neither a part that its formula takes "
        "({written.parts_shown}) nor a setting; rename it, or make it a field",
    ),
    (
        lambda written: written.no_part,
        "its buffer_parts name {written.no_part!r}, which is no part; its formula takes {written.parts_shown}",
    ),
)
"""What can be wrong with a class."""


def mistake(cls: Any) -> str | None:
    """What is wrong with a norm's class; None if nothing is."""
    written = Written(cls)
    for holds, what in MISTAKES:
        if holds(written):
            return what.format(written=written)
    return None


def mistake_in_parts(norm: Any, parts: Any) -> str | None:
    """Why `parts` are not what the formula of `norm` makes a weight of; None if they are."""
    if not isinstance(parts, dict) or not all(isinstance(part, Tensor) for part in parts.values()):
        return "its split must return a dict of tensors, by the names that its formula has for them"
    written = Written(type(norm))
    for name in parts:
        if name not in written.parts:
            return f"its split returns {name!r}, and its formula takes {written.parts_shown}; give it the same name"
    for name, argument in written.takes("formula").items():
        if name in written.parts and name not in parts and argument.default is inspect.Parameter.empty:
            return f"its formula takes {name!r}, which its split does not return; return it, or give it a default"
    return None


def mistake_in_weight(make: Callable[[dict[str, Tensor]], Any], parts: dict[str, Tensor], weight: Tensor) -> str | None:
    """Why the formula does not `make` a weight of `parts`, tried on copies of them; None if it does."""
    with torch.inference_mode(False), torch.no_grad():  # what inference mode makes has no version
        copies = {name: part.detach().clone() for name, part in parts.items()}
        before = [copy._version for copy in copies.values()]
        made = make(copies)
    for (name, copy), version in zip(copies.items(), before, strict=True):
        if copy._version != version:
            return f"its formula changes {name!r} in place; compute a new tensor, or change it in advance"
    if not isinstance(made, Tensor) or made.shape != weight.shape:
        got = f"the shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        return f"its formula gives {got} for a weight of the shape {tuple(weight.shape)}; both must be of one shape"
    return None
