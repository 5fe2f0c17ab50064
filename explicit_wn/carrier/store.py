"""What a carrier remembers: the weights as they were last computed, and from what."""

from collections.abc import Iterable
from typing import Any

import attrs
from torch import Tensor, nn


@attrs.define(eq=False)
class Stored:
    """A weight as it was last computed, and from what."""

    value: Tensor
    sources: tuple[Tensor, ...]
    version: int | None
    """How often they were changed in place, together; None where torch does not count that."""
    thread: int
    """The thread that computed it, and may use it: in another it would have no gradient, or too much of it."""
    seal: Tensor | None = None
    """What it looked like when it was handed out to somebody who may write into it."""
    earlier: "tuple[Stored, ...]" = ()
    """Those handed out before, of which the same is true: `weight.copy_(f(weight))` reads twice, and then writes."""

    def is_stale(self) -> bool:
        """Whether a part was changed in place since, as far as torch counts that."""
        return self.version is not None and self.version != version_of(self.sources)


@attrs.define(eq=False)
class Block:
    """One `cached` block: a switch that many stores share. A `record` block holds nothing, and listens."""

    active: bool = False

    def on_recompute(self, module: nn.Module, recipe: Any, value: Tensor) -> None:
        """Called with each weight that is recomputed in the block, in eager mode."""


class Store(dict[str, Stored]):
    """The stored weights of one module, by name. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[Block, None] = {}
        """The blocks that run, in whatever thread. One step adds or drops one: no thread can come between,
        and a lock would wait for ever where the collector ends a block in the midst of another's beginning."""
        self.in_forward: dict[tuple[int, str], Tensor] = {}
        """The inlined weights of the forwards that run now, by thread and name."""
        self.copying: set[int] = set()
        """The threads that copy or pickle the module now."""
        self.told: set[tuple[str, str]] = set()
        """What was said already, of which weight."""
        self.times_handed_out: dict[str, int] = {}
        """How often each weight was handed out to somebody who may write into it."""

    @property
    def held(self) -> bool:
        """Whether a `cached` block keeps the weights as they are."""
        for block in tuple(self.blocks):  # noqa: SIM110 - any() takes three times as long
            if block.active:
                return True
        return False

    def begin(self, block: Block) -> None:
        """Lets `block` hold the weights, as soon as it is active."""
        self.blocks[block] = None

    def end(self, block: Block, not_kept: Iterable[str]) -> None:
        """Ends `block`, and with the last one what is `not_kept` without one."""
        self.blocks.pop(block, None)
        if not self.blocks:
            for name in not_kept:
                self.pop(name, None)

    def __reduce_ex__(self, protocol: Any) -> tuple[type["Store"], tuple[()]]:
        return Store, ()


def store_of(module: nn.Module) -> Store:
    """The stored weights of a carrier."""
    store: Store = module.__dict__["_normed_store"]
    return store


def version_of(tensors: tuple[Tensor, ...]) -> int | None:
    """How often the tensors were changed in place; None if torch does not count it for one of them."""
    try:
        return sum([tensor._version for tensor in tensors])
    except (AttributeError, RuntimeError):  # None of a mask that is gone, and what inference mode made
        return None
