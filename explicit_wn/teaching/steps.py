"""The computation of a weight, step by step."""

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ..carrier import Recipe
from ..models.verbs import weights_of
from ..table import Table, shape_shown


@attrs.frozen(eq=False)
class Step:
    """One step of a computation."""

    symbol: str
    meaning: str
    """What it is."""
    expression: str
    shape: tuple[int, ...]
    value: Tensor
    """A copy, outside of any graph."""
    gradient: Tensor | None = None
    """That of a loss for this value, where `steps` was given the weight's and this value has a part in it."""


@attrs.frozen(eq=False, repr=False)
class Steps(Table):
    """The steps from the parts to the weight: a table to look at, and records to compute with."""

    records: tuple[Step, ...]

    def __getitem__(self, key: int | str) -> Step:
        if isinstance(key, str):
            by_symbol = {step.symbol: step for step in self.records}
            if key not in by_symbol:
                raise KeyError(f"no step is called {key!r}; the steps are {', '.join(by_symbol)}")
            return by_symbol[key]
        return self.records[key]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def cells(self) -> list[list[str]]:
        rows = [[s.symbol, s.meaning, s.expression, shape_shown(s.shape), _shown(s.value)] for s in self.records]
        table = [["symbol", "what it is", "expression", "shape", "value"], *rows]
        gradients = [s.gradient for s in self.records]
        if all(gradient is None for gradient in gradients):
            return table
        column = ["gradient", *("" if gradient is None else _shown(gradient) for gradient in gradients)]
        return [[*row, cell] for row, cell in zip(table, column, strict=True)]


def steps(module: nn.Module, name: str = "weight", gradient: Tensor | None = None) -> Steps:
    """How the weight `name` of `module` comes from its parts, step by step, as they are now; changes nothing.

    A norm of your own shows its parts and its weight; give its class a function `steps` to have it show more, as
    `WeightNorm` does.

    Args:
        module: a module that carries a norm, or a model that holds one.
        name: the weight; within a model its qualified name, as in `normed(model)`.
        gradient: the gradient of a loss for the weight. Then each step has its own as well, up to those of the parts.

    ```pycon
    >>> from explicit_wn import WeightNorm
    >>> layer = WeightNorm().apply(nn.Linear(2, 2))
    >>> WeightNorm().assign(layer, torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    Linear(in_features=2, out_features=2, bias=True, weight=WeightNorm(dim=0))
    >>> steps(layer, "weight")
    symbol  what it is                    expression                    shape  value
    ------  ----------------------------  ----------------------------  -----  --------------
    v       the direction, of any length  parameter weight_v            2×2    3.0000  4.0000
                                                                               0.0000  2.0000
    ‖v‖     the length of v               norm_except_dim(v, 2, dim=0)  2×1    5.0000
                                                                               2.0000
    v/‖v‖   the direction, of length 1    v / ‖v‖                       2×2    0.6000  0.8000
                                                                               0.0000  1.0000
    g       the magnitude                 parameter weight_g            2×1    5.0000
                                                                               2.0000
    w       the weight                    g · v/‖v‖                     2×2    3.0000  4.0000
                                                                               0.0000  2.0000
    >>> steps(layer)["‖v‖"].shape
    (2, 1)
    >>> steps(layer, gradient=torch.ones(2, 2))["v"].gradient  # at a right angle to v
    tensor([[ 0.1600, -0.1200],
            [ 1.0000,  0.0000]])

    ```
    """
    owner, recipe = weights_of("steps", module, [name], remove_duplicate=False)[name]
    recipe.compute(owner)  # refused where the parts do not belong together
    return steps_of(recipe, recipe.read(owner), lambda: recipe.compute(owner), gradient)


def steps_of(
    recipe: Recipe, parts: dict[str, Tensor], compute: Callable[[], Tensor], gradient: Tensor | None = None
) -> Steps:
    """The steps from `parts` to the weight, which `compute` gives where the norm has no steps of its own."""
    if gradient is None:
        return Steps(tuple(_step(*row) for row in _rows(recipe, parts, compute)))
    with torch.inference_mode(False), torch.enable_grad():
        buffers = recipe.norm.buffer_parts
        leaves = {part: value.detach().clone().requires_grad_(part not in buffers) for part, value in parts.items()}
        rows = list(_rows(recipe, leaves, lambda: recipe.make(leaves)))
        gradients = _gradients([value for *_, value in rows], gradient)
    return Steps(tuple(_step(*row, found) for row, found in zip(rows, gradients, strict=True)))


def _gradients(values: list[Any], gradient: Tensor) -> list[Tensor | None]:
    """The gradient of a loss for each of `values`, where it is `gradient` for the last, the weight."""
    weight = values[-1]
    if gradient.shape != weight.shape:
        shapes = f"{shape_shown(tuple(weight.shape))}, not {shape_shown(tuple(gradient.shape))}"
        raise ValueError(f"steps: the gradient of a weight has the shape of the weight, {shapes}.")
    inputs = [value for value in values if getattr(value, "requires_grad", False)]
    found = torch.autograd.grad(weight, inputs, gradient.detach().clone().to(weight), allow_unused=True)
    of = {id(value): one for value, one in zip(inputs, found, strict=True)}
    return [of.get(id(value)) for value in values]


def _rows(
    recipe: Recipe, parts: dict[str, Tensor], compute: Callable[[], Tensor]
) -> Iterator[tuple[str, str, str, Tensor]]:
    explained = recipe.norm.steps
    if explained is not None:
        yield from explained(**parts, **recipe.options_of(explained))
        return
    for part, value in parts.items():
        kind = "buffer" if part in recipe.norm.buffer_parts else "parameter"
        yield part, "a part of the weight", f"{kind} {recipe.attribute(part)}", value
    options = [f"{option}={value!r}" for option, value in recipe.formula_options.items()]
    yield "w", "the weight", f"{recipe.formula.__name__}({', '.join([*parts, *options])})", compute()


def _step(symbol: str, meaning: str, expression: str, value: Any, gradient: Tensor | None = None) -> Step:
    value = torch.as_tensor(value).detach().clone()
    return Step(symbol, meaning, expression, tuple(value.shape), value, gradient)


_MOST = 6
"""How many rows and how many columns of a value are shown."""


def _shown(value: Tensor) -> str:
    """A vector as a line, anything larger as lines of numbers, the first dimension downward."""
    if value.is_meta or value.numel() == 0:
        return "on meta" if value.is_meta else "empty"
    matrix = value.reshape(1, -1) if value.dim() < 2 else value.flatten(1)
    numbers = matrix[:_MOST, :_MOST].double().cpu()
    largest = numbers.abs().nan_to_num(0, 0).max().item()
    style = ".4f" if largest == 0 or 1e-3 <= largest < 1e5 else ".3e"
    lines = [[format(number, style) for number in row] for row in numbers.tolist()]
    width = max(len(number) for line in lines for number in line)
    more = "  …" if matrix.shape[1] > _MOST else ""
    shown = ["  ".join(number.rjust(width) for number in line) + more for line in lines]
    return "\n".join(shown + (["…"] if matrix.shape[0] > _MOST else []))
