"""What norms a model holds, as a table."""

from collections.abc import Iterator

import attrs
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from .. import carrier
from ..layers import qualified
from ..table import Rows, cells_of, parts_shown
from . import spellings
from .checking import state_of
from .spellings import Found
from .verbs import check_model


@attrs.frozen
class Row:
    """One weight of a model."""

    name: str
    """Its qualified name."""
    norm: str
    """`WeightNorm`, `SpectralNorm`, the name of another norm, or empty; what it looks like where it is foreign."""
    spelling: str
    """`ours`, `hook`, `parametrization`, `foreign` (somebody else's, by the names of its parts) or `plain`."""
    dim: str
    """The dimension of the norm."""
    shape: tuple[int, ...]
    """The weight's shape."""
    parts: str
    """The shapes of its parts."""
    parameters: int
    """How many numbers in it are trained or trainable."""
    state: str
    """`fresh`; `stale` where the parts have changed since the weight was computed; `lost write` where the weight has;
    `unknown` where it is not what the parts make and no counter tells why; `broken` where the parts make no weight, as
    `check` explains; empty where there is nothing to compare."""


@attrs.frozen(repr=False)
class Report(Rows):
    """The weights of a model as a table: `print` it, show it in a notebook, or walk through its rows."""

    rows: list[Row]

    def cells(self) -> list[list[str]]:
        return cells_of(Row, self.rows)


def report(model: nn.Module) -> Report:
    """What norms a model holds, in whatever spelling: the first thing to run on a model that you did not write.

    Every parameter of two dimensions or more has a row. Tensors that look like the parts of a norm which is neither
    torch's nor ours have one together, spelled `foreign`.

    ```pycon
    >>> print(report(nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), nn.Linear(3, 1))))
    name      norm        spelling         dim  shape  parts         parameters  state
    --------  ----------  ---------------  ---  -----  ------------  ----------  -----
    0.weight  WeightNorm  parametrization  0    3×2    g 3×1, v 3×2  9           fresh
    1.weight              plain                 1×3                  3

    ```
    """
    check_model("report", model)
    rows = []
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue  # shown where it belongs
        found = [*_ours(module), *spellings.find(module), *spellings.find_foreign(module)]
        rows += [_row(path, one) for one in found]
        parts = {id(part) for one in found for part in one.parts.values()}
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in parts and not isinstance(parameter, UninitializedParameter) and parameter.dim() > 1:
                shape, size = tuple(parameter.shape), parameter.numel()
                rows.append(Row(qualified(path, name), "", "plain", "", shape, "", size, ""))
    return Report(rows)


def _ours(module: nn.Module) -> Iterator[Found]:
    for recipe in carrier.recipes_of(module):
        try:
            with torch.no_grad():
                weight = recipe.compute(module)
            shape, state = tuple(weight.shape), state_of(module, recipe, weight)
        except ValueError:
            shape, state = (), "broken"
        parts = {part: value for part, value in recipe.read(module).items() if value is not None}
        yield Found(recipe.name, "ours", recipe.norm, recipe.norm._kind, parts, shape, state, None)


def _row(path: str, found: Found) -> Row:
    return Row(
        name=qualified(path, found.name),
        norm=found.kind,
        spelling=found.spelling,
        dim=str(getattr(found.norm, "dim", "")),
        shape=found.shape,
        parts=parts_shown(found.parts),
        parameters=sum(value.numel() for value in found.parts.values() if isinstance(value, nn.Parameter)),
        state=found.state,
    )
