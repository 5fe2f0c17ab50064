"""What `fold` leaves in the place of a norm object."""

from typing import Any, TypeVar

from torch import nn

from .settings import Dim

Module = TypeVar("Module", bound=nn.Module)


class Folded(nn.Module):
    """What `fold` leaves in the place of a norm: its `recompute` does nothing, so that the forward still runs."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.ended = repr(norm)

    def recompute(self, module: Any) -> None:
        """Nothing: the weight is an ordinary Parameter."""

    def call(self, module: Module) -> Module:
        """The module, as it is."""
        return module

    def __call__(self, module: Module) -> Module:
        return module

    def apply(self, module: Any, name: str | None = None, dim: Dim = None) -> Any:
        """`nn.Module.apply` of a function; there is no norm any more to apply to a module."""
        if callable(module) and not isinstance(module, (nn.Module, type)):
            return super().apply(module)
        raise ValueError(f"{self!r} was ended by fold(model) and norms nothing any more; make a new norm object.")

    inline = apply

    def extra_repr(self) -> str:
        return self.ended
