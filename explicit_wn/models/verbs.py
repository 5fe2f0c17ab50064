"""The verbs over a whole model of ours: which weights it has, norming its layers, and computing its weights."""

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import carrier
from ..carrier import Block, all_or_nothing, store_of
from ..carrier.alarm import tell_lost_write
from ..contexts.torchscript import is_scripted
from ..layers import LAYERS, qualified
from ..refusals import kind_of
from ..reparametrization import Reparametrization

Model = TypeVar("Model", bound=nn.Module)
Where = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[..., bool]


def normed(model: nn.Module) -> Iterator[tuple[str, nn.Module, Reparametrization]]:
    """Every weight that a norm of ours makes: its qualified name, its module, and the norm with its settings.

    >>> from explicit_wn import WeightNorm
    >>> model = nn.Sequential(nn.Linear(2, 3), WeightNorm().inline(nn.Linear(3, 4)))
    >>> [(name, norm) for name, module, norm in normed(model)]
    [('1.weight', WeightNorm('weight', dim=0))]
    """
    check_model("normed", model)
    for path, module in model.named_modules():
        for recipe in carrier.recipes_of(module):
            yield qualified(path, recipe.name), module, recipe.norm


def weights_of(
    verb: str, model: nn.Module, names: Collection[str] | None = None, remove_duplicate: bool = True
) -> dict[str, tuple[nn.Module, carrier.Recipe]]:
    """The weights of ours with these names, or all, in the order of the model; `verb` is who asks.

    A module that the model has twice is there by its first name, or by each, as in `nn.Module.named_modules`.
    """
    check_model(verb, model)
    found = {
        qualified(path, recipe.name): (module, recipe)
        for path, module in model.named_modules(remove_duplicate=remove_duplicate)
        for recipe in carrier.recipes_of(module)
    }
    unknown = [name for name in names or () if name not in found]
    if unknown or not found:
        what = f"makes {unknown[0]!r} of" if unknown else "makes a weight of"
        kind, shown = carrier.base_of(model).__name__, ", ".join(map(repr, found)) or "none"
        raise ValueError(
            f"{verb}: no norm of explicit_wn {what} this {kind}; the weights that one makes: {shown}. "
            "WeightNorm().apply(module) norms a weight, apply_all(model, WeightNorm()) those of a model, and "
            "convert(model) takes over the norms of torch."
        )
    return {name: weight for name, weight in found.items() if names is None or name in names}


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
    check_model("apply_all", model, norm)
    matches = _predicate(where)
    chosen = {path: module for path, module in model.named_modules() if matches(path, module)}
    with all_or_nothing(*chosen.values()):
        for path, module in chosen.items():
            with naming(path):
                norm.inline(module)
    return [qualified(path, norm.name) for path in chosen]


def recompute_all(model: nn.Module) -> None:
    """Recomputes every normed weight of `model` once, as each norm's `recompute` would.

    >>> import torch
    >>> from explicit_wn import WeightNorm
    >>> model = nn.Sequential(WeightNorm().apply(nn.Linear(2, 2)))
    >>> _ = nn.init.constant_(model[0].weight_g, 3)
    >>> recompute_all(model)
    >>> torch.allclose(model[0].weight.norm(dim=1), torch.tensor(3.0))
    True
    """
    check_model("recompute_all", model)
    for path, module in model.named_modules():
        for one in getattr(type(module), "_normed_functions", ()):  # a look-up in a module that fails is slow
            try:
                one.recompute(module)
            except (TypeError, ValueError) as error:
                raise named(path, error) from error


@contextlib.contextmanager
def cached(model: Model) -> Iterator[Model]:
    """Within this block the normed weights are computed once, on entry; a `recompute` does nothing until the exit.

    Gradients flow through the one computation, as in torch's `parametrize.cached`. Blocks nest. What was exported,
    compiled or scripted computes its own weights and takes no notice.

    A spectral norm in training mode makes the power iterations of one computation, however many forwards the block
    holds: after two of them its u, v and weight, and so the loss, are not what two without the block give.

    >>> import torch
    >>> from explicit_wn import WeightNorm
    >>> layer = WeightNorm().inline(nn.Linear(2, 2))
    >>> with cached(layer):
    ...     first = layer.weight
    ...     _ = layer(torch.ones(1, 2))
    ...     layer.weight is first
    True
    """
    check_model("cached", model)
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
            _tell_what_ends_with_the_block(carriers)
        finally:
            block.active = False  # from here on no weight is held, whatever interrupts the rest
    finally:
        block.active = False
        for store, names in not_kept:
            store.end(block, names)


def _tell_what_ends_with_the_block(carriers: list[nn.Module]) -> None:
    for module in carriers:
        for recipe in carrier.recipes_of(module):
            if recipe.inlined:  # whose weight ends with the block
                tell_lost_write(module, recipe)


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
    is_module, is_tuple = isinstance(where, nn.Module), isinstance(where, tuple)
    are_classes = is_tuple and len(where) > 0 and all(isinstance(one, type) for one in where)
    if are_classes or (callable(where) and not is_module):
        return
    got = f"{kind_of(where)} itself" if is_module else repr(where)
    message = f"apply_all: where is a module class, a tuple of them, or a function that is asked, not {got}"
    names = [where] if isinstance(where, str) else list(where) if isinstance(where, Collection) else []
    if is_module:
        message += "; for that module alone write norm.inline(module)"
    elif names and all(isinstance(name, str) for name in names):
        message += f"; for names write where=lambda name, module: name in {list(map(str, names))!r}"
    raise (ValueError if is_tuple and not names else TypeError)(f"{message}.")


def check_model(verb: str, model: Any, norm: Any = None) -> None:
    """Refuses what is no model in eager mode, and what is no norm object."""
    eager = verb == "report" or not is_scripted(model)
    if not isinstance(model, nn.Module) or isinstance(model, Reparametrization) or not eager:
        what = f"the norm {model!r}" if isinstance(model, Reparametrization) else kind_of(model)
        raise TypeError(f"{verb} wants the model first, an nn.Module in eager mode, and got {what}.")
    if verb == "apply_all" and not isinstance(norm, Reparametrization):
        raise TypeError(f"apply_all wants a norm object second, WeightNorm() for example, and got {norm!r}.")


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Puts the module's place in the model in front of an error's message."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise named(path, error) from error


def named(path: str, error: Exception) -> Exception:
    """`error` with the module's place in the model in front of its message."""
    return type(error)(f"{path or 'the model'}: {error}")
