"""A norm and a module: which of the module's weights a call means, and the sentence that refuses one."""

from typing import Any, TypeVar

import attrs
from torch import nn

from . import carrier, refusals
from .carrier import Recipe
from .contexts.torchscript import is_scripted
from .layers import TRANSPOSED
from .protocol import AMBIGUOUS, Norm
from .refusals import Asked
from .settings import Dim

Self = TypeVar("Self", bound="Asking")


class Asking(Norm):
    """What `Reparametrization` asks before a verb changes anything."""

    def _resolve(self: Self, module: Any, name: str | None, dim: Dim) -> tuple[Self, nn.Parameter]:
        """This norm with the settings that hold for one parameter of `module`, and that parameter."""
        self._check_class()
        name = self.name if name is None else name
        name = str.__str__(name) if isinstance(name, str) else name  # whatever a subclass says of itself
        self._check_module(module, name)
        weight = self._parameter(module, name)
        changes: dict[str, Any] = {"name": name}
        if hasattr(self, "dim"):
            changes["dim"] = self._resolve_dim(module, name, self.dim if dim is None else dim, weight.dim())
        norm = attrs.evolve(self, **changes)  # type: ignore[misc]
        objection = norm.objection(weight)
        if objection:
            raise self._refusal(module, name, objection)
        return norm, weight

    def _resolve_dim(self, module: nn.Module, name: str, dim: Any, ndim: int) -> int | None:
        dim = self.default_dim if dim is None else dim
        if dim is None:
            return None
        if isinstance(dim, str) and dim == "out":
            return 1 if ndim > 1 and isinstance(module, TRANSPOSED) else 0
        if not self._is_dim(dim):
            raise self._refusal(module, name, f"dim is {self._dims_shown()}, not {dim!r}", TypeError)
        if dim == "whole":
            return None
        if self._is_ambiguous(dim):
            raise self._refusal(module, name, f"{AMBIGUOUS}, or dim={ndim - 1} to keep the last dimension")
        if not -ndim <= dim < ndim:
            first = self._counts_from if dim > 0 and dim == getattr(self, "dim", None) else 0
            reason = f"dim={dim + first} is out of range for a weight of {ndim} dimensions; take one from {first} to "
            reason += f'{ndim - 1 + first}, or "{self._named_dims()[-1]}"'
            raise self._refusal(module, name, reason + first * " (as R counts them)")
        return int(dim) % ndim

    def _parameter(self, module: nn.Module, name: Any) -> nn.Parameter:
        """The parameter `name` of `module`, if it is one that can be normed."""
        asked = self._asked(module, name, "norm")
        reason = refusals.reason(refusals.PARAMETERS, asked)
        if reason:
            raise self._refusal(module, name, reason)
        parameter: nn.Parameter = asked.parameter
        return parameter

    def _asked(self, module: nn.Module, name: Any, verb: str) -> Asked:
        asked = Asked(self, module, name)
        if not isinstance(name, str):
            reason = f"a parameter's name is a str; its parameters are {asked.names}"
            raise self._refusal(module, name, reason, TypeError, verb)
        return asked

    def _check_module(self, module: Any, name: Any, verb: str = "norm") -> None:
        if not isinstance(module, nn.Module) or is_scripted(module):
            kind = f"the class {module.__name__}" if isinstance(module, type) else refusals.kind_of(module)
            raise TypeError(f"{self!r} cannot {verb} {name!r} of {kind}: give it an nn.Module in eager mode.")

    def _cannot_recompute(self, module: Any) -> None:
        self._check_module(module, self.name, "recompute")
        raise self._not_normed(module, None, "recompute")

    def _not_normed(self, module: nn.Module, name: str | None, verb: str) -> Exception:
        asked = self._asked(module, self.name if name is None else name, verb)
        reason = refusals.reason(refusals.NOT_OURS, asked) or self._not_applied(module, name, verb)
        return self._refusal(module, asked.name, reason, verb=verb)

    def _not_applied(self, module: nn.Module, name: str | None, verb: str) -> str:
        by = ", ".join(repr(recipe.norm) for recipe in carrier.recipes_of(module)) or "no norm"
        reason = f"{self._kind}.apply(module) was not called for it, or remove ended it; this module carries {by}"
        own = ", ".join(repr(recipe.name) for recipe in self._own(module, None))
        if own:
            reason += f", and this object norms {own} in it"
        if any(self._own(layer, name) for layer in module.modules()):
            way_out = "use explicit_wn.recompute_all(module)" if verb == "recompute" else "give it one of those"
            reason += f", but modules within it do: {way_out}"
        return reason

    def _own(self, module: nn.Module, name: str | None) -> list[Recipe]:
        """What this object does in `module`, if anything: to `name`, or to all that it was applied to."""
        ours = [recipe for recipe in carrier.recipes_of(module) if self._label in recipe.labels]
        found = [recipe for recipe in ours if name is None or recipe.name == name]
        if not found and name is not None:
            found = [r for r in carrier.recipes_of(module) if r.name == name and type(r.norm) is type(self)]
        return found

    def _recipes(self, module: Any, name: str | None, verb: str) -> list[Recipe]:
        """`_own`, of which there must be some."""
        self._check_module(module, self.name if name is None else name, verb)
        found = self._own(module, name)
        if not found:
            raise self._not_normed(module, name, verb)
        return found

    def _recipe(self, module: Any, name: str | None, verb: str) -> Recipe:
        recipes = self._recipes(module, name, verb)
        recipes = [recipe for recipe in recipes if recipe.name == self.name] or recipes
        if len(recipes) > 1:
            names = ", ".join(repr(recipe.name) for recipe in recipes)
            raise self._refusal(module, self.name, f"it was applied to {names}; say which with name=", verb="choose")
        return recipes[0]

    def _check(self, module: nn.Module, name: str, reason: str | None, verb: str) -> None:
        if reason:
            raise self._refusal(module, name, reason, verb=verb)

    def _refusal(
        self, module: nn.Module, name: Any, reason: str, error: type[Exception] = ValueError, verb: str = "norm"
    ) -> Exception:
        """The error of every refused call: who, what, of which class, why, and the way out."""
        return error(f"{self!r} cannot {verb} {name!r} of this {carrier.base_of(module).__name__}: {reason}.")
