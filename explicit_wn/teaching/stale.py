"""Weights that are out of date: finding the `recompute` that somebody forgot."""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from .. import carrier
from ..carrier import Recipe, Stored, store_of, weight
from ..carrier.alarm import bits, is_only_looked_at, name_and_advice, on_stale
from ..contexts.torchscript import is_tracing
from ..models.verbs import check_model


class StaleWeightError(RuntimeError):
    """A normed weight was read, or backpropagated through, that should have been recomputed first."""


@contextlib.contextmanager
def detect_stale(model: nn.Module | None = None) -> Iterator[None]:
    """Within this block, reading a weight whose parts changed since its last recompute raises, and says what to add.

    It is for finding a forgotten `recompute`, as `torch.autograd.detect_anomaly` is for finding a NaN. That line is
    easily missed, since the model runs: on old weights, until the second training step says "Trying to backward
    through the graph a second time". That error is explained here as well.

    What is inlined is never stale. The block compares the parts with copies of them, bit for bit, because fused
    optimizers and `.data` leave no other trace; outside of it nothing of this costs anything. It watches the reads of
    the thread that entered it, in eager mode. Blocks nest.

    Args:
        model: where the weight is looked up, to name it by its path. Without it the path starts at the outermost
            module whose method is running.

    >>> from explicit_wn import WeightNorm
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.wn = WeightNorm()
    ...         self.fc = self.wn.apply(nn.Linear(2, 1))
    ...     def forward(self, x):
    ...         return self.fc(x)  # no recompute
    >>> net = Net()
    >>> _ = nn.init.ones_(net.fc.weight_g)
    >>> with detect_stale():  # doctest: +ELLIPSIS
    ...     net(torch.ones(1, 2))
    Traceback (most recent call last):
    explicit_wn.teaching.stale.StaleWeightError: fc.weight of this Net is stale: ...
    <BLANKLINE>
        self.wn.recompute(self.fc)
    ...
    """
    if model is not None:
        check_model("detect_stale", model)
    watch = _Watch(model)
    try:
        with _lock:
            _active.append(watch)
            weight.on_read = _on_read
        _watching.set((watch, *_watching.get()))
        yield
    except RuntimeError as error:
        if watch.used_up and "Trying to backward through the graph a second time" in str(error):
            raise StaleWeightError("\n\n".join(watch.used_up)) from error
        raise
    finally:
        _watching.set(tuple(other for other in _watching.get() if other is not watch))
        with _lock:
            _active.remove(watch)
            weight.on_read = _on_read if _active else None


@attrs.define(eq=False)
class _Watch:
    """What one `detect_stale` block has seen."""

    model: nn.Module | None
    copies: dict[tuple[int, str], tuple["weakref.ref[Stored]", list[Tensor | None]]] = attrs.field(factory=dict)
    """By module and weight: a stored weight, and the parts as they were when it was first read here."""
    used_up: dict[str, None] = attrs.field(factory=dict)
    """What to say if a backward fails: on each weight that was read again after a backward through it."""

    def has_changed(self, module: nn.Module, recipe: Recipe, stored: Stored) -> bool:
        """Whether a part is not what it was when `stored` was first read here; remembers the parts if it is now."""
        key = id(module), recipe.name
        known, copies = self.copies.get(key, (None, []))
        if known is not None and known() is stored:
            return any(map(_differ, stored.sources, copies))
        with torch.no_grad():
            self.copies[key] = weakref.ref(stored), [_bits(source) for source in stored.sources]
        return False


_lock = threading.Lock()
_active: list[_Watch] = []
"""The blocks that are open in any thread."""
_watching: ContextVar[tuple[_Watch, ...]] = ContextVar("watching", default=())
"""Those of this thread, the innermost first."""


def _on_read(module: nn.Module, recipe: Recipe) -> None:
    store, watches = store_of(module), _watching.get()
    stored = store.get(recipe.name)
    if not watches or stored is None or (recipe.inlined and not store.held) or is_tracing() or is_only_looked_at():
        return
    if not carrier.is_current(stored, module, recipe):
        return  # such a read computes the weight anew
    models = tuple(watch.model for watch in watches if watch.model is not None)
    has_changed = [watch.has_changed(module, recipe, stored) for watch in watches]
    if any(has_changed) or stored.is_stale():
        raise StaleWeightError(on_stale(module, recipe, models))
    if torch.is_grad_enabled() and _is_used_up(stored.value.grad_fn):
        watches[0].used_up[_on_used_up(module, recipe, models)] = None


def _bits(source: Tensor | None) -> Tensor | None:
    """A copy of a part, as integers; None for what cannot be compared."""
    if source is None or type(source) not in (Tensor, nn.Parameter) or source.is_meta:
        return None
    with contextlib.suppress(RuntimeError):  # vmap on older torch
        return bits(source).clone()
    return None


def _differ(source: Tensor, copy: Tensor | None) -> bool:
    if copy is None:
        return False
    with contextlib.suppress(RuntimeError):  # vmap refuses to compare
        return not torch.equal(bits(source), copy)
    return False


def _is_used_up(root: Any) -> bool:
    """Whether a backward went through the graph of a weight and threw away what that had saved."""
    nodes = [root]
    for node in nodes:
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                try:  # to read what is saved may run hooks, those of checkpointing say; to read what is gone does not
                    if getattr(getattr(node, name), "data", node) is None:
                        getattr(node, name.removeprefix("_raw"))
                except RuntimeError:
                    return True
        nodes += [before for before, _ in getattr(node, "next_functions", ()) if before not in (None, *nodes)]
    return False


def _on_used_up(module: nn.Module, recipe: Recipe, models: tuple[nn.Module, ...]) -> str:
    name, advice = name_and_advice(module, recipe, models)
    if store_of(module).held:
        advice = "A cached(model) block holds it: one backward is all that a block can have."
    return (
        f"Trying to backward through the graph a second time: {name} was used again after a backward through it, "
        f"without a recompute in between. {advice}"
    )
