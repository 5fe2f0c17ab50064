"""What every `recompute` made: the parts and the weight, over a whole training run."""

import contextlib
from collections.abc import Collection, Iterator, Mapping

import attrs
import torch
from torch import Tensor, nn

from .. import settings
from ..carrier import Block, Recipe, store_of
from ..models.verbs import weights_of
from ..table import Table, parts_shown, shape_shown
from .steps import Steps, steps_of

LIMIT = 10_000_000
"""How many numbers a recording keeps: 40 MB of them, in single precision."""


@attrs.define(eq=False, repr=False)
class Record:
    """What one `recompute` made."""

    step: int
    """How many times this weight had been recomputed in the block before."""
    name: str
    parts: dict[str, Tensor]
    """Copies, by suffix: those that this recompute used."""
    weight: Tensor
    """A copy, outside of any graph."""
    gradient: Tensor | None = None
    """That of the loss for the weight, as soon as a backward has gone through it."""
    recipe: Recipe = attrs.field(kw_only=True)

    def steps(self) -> Steps:
        """The steps from the parts to the weight, as they were then; with gradients, if there is one."""
        return steps_of(self.recipe, self.parts, lambda: self.weight, self.gradient)

    def __repr__(self) -> str:
        seen = "no gradient" if self.gradient is None else "with its gradient"
        return f"Record(step {self.step} of {self.name}: {parts_shown(self.parts)}; {seen})"


@attrs.define(eq=False, repr=False)
class Recording(Table):
    """The records of a `record` block: by the name of the weight, in the order of the steps."""

    records: dict[str, list[Record]]
    limit: int
    every: int
    """Of how many steps one is kept; it doubles whenever the records exceed the limit."""
    _size: int = attrs.field(default=0, init=False)
    """How many numbers they hold, once each has its gradient."""

    def __getitem__(self, name: str) -> list[Record]:
        return self.records[name]

    def __iter__(self) -> Iterator[Record]:
        """All records, weight by weight."""
        return (record for records in self.records.values() for record in records)

    def __len__(self) -> int:
        return sum(map(len, self.records.values()))

    def stack(self, name: str, symbol: str) -> Tensor:
        """One value over all records of a weight, the records first; `symbol` is one of `steps`, "‖v‖" say."""
        return torch.stack([record.steps()[symbol].value for record in self[name]])

    def cells(self) -> list[list[str]]:
        rows = [_row(name, records) for name, records in self.records.items()]
        return [["name", "shape", "parts", "records", "steps"], *rows]

    def _add(self, record: Record) -> None:
        self.records[record.name].append(record)
        self._size += _size(record.parts, record.weight)
        while self._size > self.limit:
            self.every *= 2
            for name, records in self.records.items():
                self.records[name] = [one for one in records if one.step % self.every == 0]
            self._size = sum(_size(one.parts, one.weight) for one in self)


def _row(name: str, records: list[Record]) -> list[str]:
    if not records:
        return [name, "", "", "0", ""]
    first, last = records[0], records[-1]
    shape = shape_shown(tuple(first.weight.shape))
    return [name, shape, parts_shown(first.parts), str(len(records)), f"{first.step} … {last.step}"]


def _size(parts: Mapping[str, Tensor], weight: Tensor) -> int:
    """How many numbers a record holds: the parts, the weight, and its gradient."""
    return sum(part.numel() for part in parts.values()) + 2 * weight.numel()


@attrs.define(eq=False)
class _Listener(Block):
    """The block that is told of every recompute."""

    names: dict[tuple[int, str], str] = attrs.field(kw_only=True)
    """Of the weights that are recorded, by module and parameter."""
    recording: Recording = attrs.field(kw_only=True)
    counts: dict[str, int] = attrs.field(factory=dict)

    def on_recompute(self, module: nn.Module, recipe: Recipe, value: Tensor) -> None:
        name = self.names.get((id(module), recipe.name))
        if name is None:
            return
        step = self.counts.get(name, 0)
        self.counts[name] = step + 1
        if step % self.recording.every == 0:
            parts = {part: _copy(tensor) for part, tensor in recipe.read(module).items()}
            record = Record(step, name, parts, _copy(value), recipe=recipe)
            if value.requires_grad:
                value.register_hook(lambda gradient: _add_up(record, gradient))  # type: ignore[no-untyped-call]
            self.recording._add(record)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _add_up(record: Record, gradient: Tensor) -> None:
    """What several backwards bring, as `.grad` adds it up."""
    record.gradient = _copy(gradient) if record.gradient is None else record.gradient + gradient.detach()


@contextlib.contextmanager
def record(
    model: nn.Module, names: str | Collection[str] | None = None, every: int = 1, limit: int = LIMIT
) -> Iterator[Recording]:
    """Within this block every `recompute` is kept: the parts, the weight and, after a backward, its gradient.

    What was inlined is kept at each forward of its module. In eager mode, that is; what is compiled, exported or
    scripted computes its own weights. Copies of the model made in the block are not recorded, and outside of the
    block nothing of this costs anything.

    A long run stays small: whenever the records hold more than `limit` numbers, every second one is dropped, and from
    then on half as many are kept. So they always reach from the first step to nearly the last.

    Args:
        model: a model that holds normed weights.
        names: which of its weights, by their names in `normed(model)`; all by default.
        every: of how many steps one is kept, from the beginning.
        limit: the most numbers that are kept.

    ```pycon
    >>> from explicit_wn import WeightNorm
    >>> fc = WeightNorm().inline(nn.Linear(3, 2))
    >>> optimizer = torch.optim.SGD(fc.parameters(), lr=0.1)
    >>> with record(fc) as recorded:
    ...     for _ in range(4):
    ...         fc(torch.ones(1, 3)).square().sum().backward()
    ...         optimizer.step()
    >>> recorded
    name    shape  parts         records  steps
    ------  -----  ------------  -------  -----
    weight  2×3    g 2×1, v 2×3  4        0 … 3
    >>> recorded["weight"][0]
    Record(step 0 of weight: g 2×1, v 2×3; with its gradient)
    >>> length = recorded.stack("weight", "‖v‖")  # plt.plot(length.flatten(1)) draws it
    >>> length.shape
    torch.Size([4, 2, 1])
    >>> bool((length.diff(dim=0) > 0).all())  # v only grows
    True

    ```
    """
    chosen = weights_of("record", model, [names] if isinstance(names, str) else names)
    _check_limits(chosen, every, limit)
    listener = _Listener(
        names={(id(module), recipe.name): name for name, (module, recipe) in chosen.items()},
        recording=Recording({name: [] for name in chosen}, limit, every),
    )
    stores = [(store_of(module), [recipe.name] * recipe.inlined) for module, recipe in chosen.values()]
    try:
        for store, _ in stores:
            store.begin(listener)
        yield listener.recording
    finally:
        for store, not_kept in stores:
            store.end(listener, not_kept)


def _check_limits(weights: dict[str, tuple[nn.Module, Recipe]], every: int, limit: int) -> None:
    """Refuses what is no limit, and one that not even a single step keeps within."""
    for what, value in ("every", every), ("limit", limit):
        if not settings.is_int(value) or value < 1:
            raise ValueError(f"record: {what} is an int of 1 or more, not {value!r}.")
    with torch.no_grad():
        least = sum(_size(recipe.read(module), recipe.compute(module)) for module, recipe in weights.values())
    if least > limit:
        raise ValueError(
            f"record: one step of these {len(weights)} weights is {least:,} numbers, and the limit is {limit:,}. Name "
            "some of the weights, record(model, names=[...]), or set a larger limit."
        )
