"""What the settings of a norm may be: validators for its fields, which attrs runs whenever a norm is made.

eps: float = attrs.field(default=1e-5, validator=settings.positive_eps)
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch

if TYPE_CHECKING:
    Dim = int | Literal["out", "whole"] | None
else:
    Dim = int | str | None  # TorchScript reads the annotations of a norm, and knows no Literal

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def is_int(value: Any) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def at_least(least: int) -> Validator:
    """An int, and no bool, from `least` up."""

    def check(norm: Any, field: "attrs.Attribute[Any]", value: Any) -> None:
        wanted = f"an int from {least} up"
        if not is_int(value):
            raise wrong_setting(norm, field.name, value, wanted, TypeError)
        if value < least:
            raise wrong_setting(norm, field.name, value, wanted)

    return check


def one_of(*choices: str) -> Validator:
    """One of these texts."""

    def check(norm: Any, field: "attrs.Attribute[Any]", value: Any) -> None:
        wanted = " or ".join(f'"{choice}"' for choice in choices)
        if not isinstance(value, str):
            raise wrong_setting(norm, field.name, value, wanted, TypeError)
        if value not in choices:
            raise wrong_setting(norm, field.name, value, wanted)

    return check


def eps(norm: Any, field: "attrs.Attribute[Any]", value: Any) -> None:
    """The smallest norm that is divided by, or 0 for none."""
    _check_number(norm, field, value, "a finite float from 0 up")


def positive_eps(norm: Any, field: "attrs.Attribute[Any]", value: Any) -> None:
    """`eps`, where a norm needs one."""
    _check_above_0(norm, field, value, "a finite float above 0")


def positive(norm: Any, field: "attrs.Attribute[Any]", value: Any) -> None:
    """A number above 0."""
    _check_above_0(norm, field, value, "a finite number above 0")


def a_bool(norm: Any, field: "attrs.Attribute[Any]", value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise wrong_setting(norm, field.name, value, "True or False", TypeError)


def _check_above_0(norm: Any, field: "attrs.Attribute[Any]", value: Any, wanted: str) -> None:
    _check_number(norm, field, value, wanted)
    if value == 0:
        raise wrong_setting(norm, field.name, value, wanted)


def _check_number(norm: Any, field: "attrs.Attribute[Any]", value: Any, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_setting(norm, field.name, value, wanted, TypeError)
    if not 0 <= value < math.inf:
        raise wrong_setting(norm, field.name, value, wanted)
    single = torch.finfo(torch.float32)
    if 0 < value < single.tiny:
        raise wrong_setting(norm, field.name, value, "0 in single precision; take a larger one")
    if value > single.max:
        raise wrong_setting(norm, field.name, value, "infinite in single precision; take a smaller one")


def wrong_setting(norm: Any, setting: str, value: Any, wanted: str, error: type[Exception] = ValueError) -> Exception:
    """The error of a setting that is none: whose it is, what was given, and what is wanted."""
    return error(f"{type(norm).__name__}({setting}={value!r}): {setting} is {wanted}.")
