"""The verbs over a whole model, whoever wrote it and whichever way its weights are normed."""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import attrs
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from . import carrier, spellings, torchscript
from .layers import LAYERS, qualified
from .refusals import replaced_forward
from .reparametrization import Folded, Reparametrization
from .spellings import Found
from .store import Block, store_of
from .table import Table, shape_shown
from .undo import all_or_nothing

Model = TypeVar("Model", bound=nn.Module)
Where = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[..., bool]


def normed(model: nn.Module) -> Iterator[tuple[str, nn.Module, Reparametrization]]:
    """Every weight that a norm of ours makes: its qualified name, its module, and the norm with its settings.

    >>> from explicit_wn import WeightNorm
    >>> model = nn.Sequential(nn.Linear(2, 3), WeightNorm().inline(nn.Linear(3, 4)))
    >>> [(name, norm) for name, module, norm in normed(model)]
    [('1.weight', WeightNorm('weight', dim=0))]
    """
    for path, module in model.named_modules():
        for recipe in carrier.recipes_of(module):
            yield qualified(path, recipe.name), module, recipe.norm


def apply_all(model: nn.Module, norm: Reparametrization, where: Where | None = None) -> list[str]:
    """Inlines `norm` in every matching layer of `model`, or, if one refuses, in none; returns the weights' names.

    Args:
        model: the model, changed in place.
        norm: which norm; `dim="out"` is right for transposed convolutions as well.
        where: a module class or several, or a function that is asked about every module, as `where(module)` or
            `where(name, module)`. By default every Linear, Conv and ConvTranspose layer but the `out_proj` of
            attention.

    Left out by default, since they are no such layers, are Embedding, Bilinear and every RNN, and in
    `nn.MultiheadAttention` the bare parameter `in_proj_weight` and `out_proj`, whose weight it reads without calling
    that layer, which TorchScript does not see. `where` reaches each layer, and another norm the parameter:
    `WeightNorm("in_proj_weight").inline(attention)`.

    >>> from explicit_wn import WeightNorm
    >>> model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU(), nn.ConvTranspose1d(3, 4, 1))
    >>> apply_all(model, WeightNorm(dim="out"))
    ['0.weight', '2.weight']
    """
    _check("apply_all", model, norm)
    matches = _predicate(where)
    chosen = {path: module for path, module in model.named_modules() if matches(path, module)}
    with all_or_nothing(*chosen.values()):
        for path, module in chosen.items():
            with _naming(path):
                norm.inline(module)
    return [qualified(path, norm.name) for path in chosen]


def recompute_all(model: nn.Module) -> None:
    """Recomputes every normed weight of `model` once, as each norm's `recompute` would.

    >>> from explicit_wn import WeightNorm
    >>> model = nn.Sequential(WeightNorm().apply(nn.Linear(2, 2)))
    >>> _ = nn.init.constant_(model[0].weight_g, 3)
    >>> recompute_all(model)
    >>> torch.allclose(model[0].weight.norm(dim=1), torch.tensor(3.0))
    True
    """
    _check("recompute_all", model)
    for module in model.modules():
        for straight in getattr(type(module), "_normed_straight", ()):  # a look-up in a module that fails is slow
            straight.recompute(module)


@contextlib.contextmanager
def cached(model: Model) -> Iterator[Model]:
    """Within this block the normed weights are computed once, on entry; a `recompute` does nothing until the exit.

    Gradients flow through the one computation, as in torch's `parametrize.cached`. Blocks nest. What was exported,
    compiled or scripted computes its own weights and takes no notice.

    A spectral norm in training mode makes the power iterations of one computation, however many forwards the block
    holds: after two of them its u, v and weight, and so the loss, are not what two without the block give.

    >>> from explicit_wn import WeightNorm
    >>> layer = WeightNorm().inline(nn.Linear(2, 2))
    >>> with cached(layer):
    ...     first = layer.weight
    ...     _ = layer(torch.ones(1, 2))
    ...     layer.weight is first
    True
    """
    _check("cached", model)
    carriers = [module for module in model.modules() if carrier.recipes_of(module)]
    not_kept = [(store_of(m), [recipe.name for recipe in carrier.recipes_of(m) if recipe.inlined]) for m in carriers]
    block = Block()
    try:
        try:
            for store, _ in not_kept:
                store.begin(block)
            recompute_all(model)
            block.active = True
            yield model
        finally:
            block.active = False  # from here on no weight is held, whatever interrupts the rest
    finally:
        block.active = False
        for store, names in not_kept:
            store.end(block, names)


def convert(model: nn.Module) -> list[str]:
    """Makes every weight norm and spectral norm of torch's, hook or parametrization, one of ours; returns their names.

    The norms are inlined: the model runs and trains on as before, on the same Parameter objects, and holds no hook of
    theirs. A norm that somebody derived from torch's, or that is parametrized otherwise as well, is refused by name,
    and nothing is changed then. Copies of the model stay as they are.

    A norm that has nothing of torch's is left as it is. Where tensors look like the parts of one, `weight_g` beside
    `weight_v` for example, one warning names them all, and `report` shows them as `foreign`: only a warning, since a
    module may well compute its weight so in its own `forward`.

    Call it once, after a project's own `apply_weight_norm()`, and `fold` in the place of its `remove_weight_norm()`:
    both look for torch's norms and raise in a converted model.

    >>> model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    >>> convert(model)
    ['0.weight']
    >>> model
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True, weight=WeightNorm(dim=0))
    )
    """
    _check("convert", model)
    for path, module in model.named_modules():
        for spelled in spellings.find(module):
            if spelled.is_norm and replaced_forward(module):
                raise _cannot_convert(path, module, spelled, replaced_forward(module))
    if foreign := _foreign(model):
        warnings.warn(
            f"convert leaves alone what looks like parts of norms that are neither torch's nor ours: {foreign}. End "
            "such a norm in the way of the project that made it and apply one of ours, or let it be if it is meant so.",
            stacklevel=2,
        )
    return _make_ours(model)


def _foreign(model: nn.Module) -> str:
    found = [(path, module, one) for path, module in model.named_modules() for one in spellings.find_foreign(module)]
    return "; ".join(
        f"{qualified(path, one.name)!r} of this {spellings.class_of(module).__name__} "
        f"({one.kind}, {', '.join(one.parts)})"
        for path, module, one in found
    )


def _make_ours(model: nn.Module) -> list[str]:
    found = [(p, m, spelled) for p, m in model.named_modules() for spelled in spellings.find(m) if spelled.is_norm]
    by_module: dict[nn.Module, list[Found]] = {}
    for path, module, spelled in found:
        if spelled.objection:
            raise _cannot_convert(path, module, spelled, spelled.objection)
        by_module.setdefault(module, []).append(spelled)
    with all_or_nothing(*(changed for module in by_module for changed in spellings.touched(module))):
        for module, of_module in by_module.items():
            spellings.become_ours(module, of_module)
    return [qualified(path, spelled.name) for path, _, spelled in found]


def _cannot_convert(path: str, module: nn.Module, spelled: Found, objection: str | None) -> ValueError:
    kind = spellings.class_of(module).__name__
    return ValueError(f"cannot convert {qualified(path, spelled.name)!r} of this {kind}: {objection}.")


def fold(model: nn.Module) -> list[str]:
    """Bakes every weight norm and spectral norm of `model`, ours and both of torch's, into ordinary Parameters.

    Every module is of its ordinary class again. A `forward` that calls `self.wn.recompute(self.fc)` still runs, and
    scripts, as it is written: the norm objects that the model holds do nothing from now on. Returns the weights' names.

    >>> from explicit_wn import WeightNorm
    >>> model = nn.Sequential(WeightNorm().inline(nn.Linear(2, 3)), torch.nn.utils.spectral_norm(nn.Linear(3, 2)))
    >>> fold(model)
    ['0.weight', '1.weight']
    >>> model
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True)
      (1): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    _check("fold", model)
    modules = {changed: None for module in model.modules() for changed in spellings.touched(module)}
    with all_or_nothing(*modules):
        _make_ours(model)
        folded = list(normed(model))
        ended = {label for module in model.modules() for r in carrier.recipes_of(module) for label in r.labels}
        for name, module, norm in folded:
            with _naming(name.removesuffix(norm.name).removesuffix(".")):
                norm.remove(module, norm.name)
        for module in model.modules():
            for key, child in module._modules.items():
                if isinstance(child, Reparametrization) and child.label in ended:
                    inert = Folded(child).train(child.training)
                    module._modules[key] = inert  # in this place; another model may use the object still
    return [name for name, _, _ in folded]


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
    """`fresh`, or `stale` where the parts have changed since the weight was computed; empty where no one can tell."""


@attrs.frozen(repr=False)
class Report(Table):
    """The weights of a model as a table: `print` it, or show it in a notebook."""

    rows: list[Row]

    def cells(self) -> list[list[str]]:
        head = [field.name for field in attrs.fields(Row)]
        return [head, *([_show(value) for value in attrs.astuple(row, recurse=False)] for row in self.rows)]


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
    _check("report", model)
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
        stored = store_of(module).get(recipe.name)
        stale = stored is not None and stored.is_stale() and not recipe.inlined
        with torch.no_grad():
            shape = tuple(recipe.compute(module).shape)
        yield Found(recipe.name, "ours", recipe.norm, recipe.norm.kind, recipe.read(module), shape, stale, None)


def _row(path: str, found: Found) -> Row:
    return Row(
        name=qualified(path, found.name),
        norm=found.kind,
        spelling=found.spelling,
        dim=str(getattr(found.norm, "dim", "")),
        shape=found.shape,
        parts=", ".join(f"{part} {_show(tuple(value.shape))}" for part, value in found.parts.items()),
        parameters=sum(value.numel() for value in found.parts.values() if isinstance(value, nn.Parameter)),
        state="" if found.spelling == "foreign" else "stale" if found.stale else "fresh",
    )


def _show(value: Any) -> str:
    return shape_shown(value) if isinstance(value, tuple) else str(value)


def _check(verb: str, model: Any, norm: Any = None) -> None:
    """Refuses what is no model in eager mode, and what is no norm object."""
    eager = verb == "report" or not torchscript.is_scripted(model)
    if not isinstance(model, nn.Module) or isinstance(model, Reparametrization) or not eager:
        what = f"the norm {model!r}" if isinstance(model, Reparametrization) else f"a {type(model).__name__}"
        raise TypeError(f"{verb} wants the model first, an nn.Module in eager mode, and got {what}.")
    if verb == "apply_all" and not isinstance(norm, Reparametrization):
        raise TypeError(f"apply_all wants a norm object second, WeightNorm() for example, and got {norm!r}.")


def _predicate(where: Where | None) -> Callable[[str, nn.Module], bool]:
    """`where` as a function of name and module."""
    if where is None:  # MultiheadAttention reads the weight of its out_proj without calling that layer
        return lambda path, module: (
            isinstance(module, LAYERS) and not isinstance(module, NonDynamicallyQuantizableLinear)
        )
    _check_where(where)
    if isinstance(where, (type, tuple)):
        return lambda path, module: isinstance(module, where)
    required = [p for p in inspect.signature(where).parameters.values() if p.default is p.empty]
    if len(required) < 2:
        return lambda path, module: where(module)
    return where


def _check_where(where: Any) -> None:
    """Refuses what neither `isinstance` nor a call can answer."""
    is_module = isinstance(where, nn.Module)
    are_classes = isinstance(where, tuple) and where != () and all(isinstance(one, type) for one in where)
    if are_classes or (callable(where) and not is_module):
        return
    got = f"a {type(where).__name__} itself" if is_module else repr(where)
    message = f"apply_all: where is a module class, a tuple of them, or a function that is asked, not {got}"
    names = [where] if isinstance(where, str) else where
    if is_module:
        message += "; for that module alone write norm.inline(module)"
    elif isinstance(names, (list, tuple, set)) and names and all(isinstance(name, str) for name in names):
        message += f"; for names write where=lambda name, module: name in {names!r}"
    raise (ValueError if where == () else TypeError)(f"{message}.")


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Puts the module's place in the model in front of an error's message."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path or 'the model'}: {error}") from error
