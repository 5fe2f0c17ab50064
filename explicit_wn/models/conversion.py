"""Making the norms of torch ours, and ending norms, in models that somebody else wrote."""

from torch import nn

from .. import carrier
from ..caller import warn
from ..carrier import all_or_nothing
from ..folded import Folded
from ..layers import qualified
from ..refusals import replaced_forward
from ..reparametrization import Reparametrization
from . import spellings
from .spellings import Found
from .verbs import check_model, naming, normed


class ForeignNormWarning(UserWarning):
    """`convert` left alone what looks like the parts of a norm that is neither torch's nor ours."""


def convert(model: nn.Module) -> list[str]:
    """Makes every weight norm and spectral norm of torch's, hook or parametrization, one of ours; returns their names.

    The norms are inlined: the model runs and trains on as before, on the same Parameter objects, and holds no hook of
    theirs. A norm that somebody derived from torch's, or that is parametrized otherwise as well, is refused by name,
    and nothing is changed then. Copies of the model stay as they are.

    A norm that has nothing of torch's is left as it is. Where tensors look like the parts of one, `weight_g` beside
    `weight_v` for example, one `ForeignNormWarning` names them all, and `report` shows them as `foreign`: only a
    warning, since a module may well compute its weight so in its own `forward`.

    Call it once, after a project's own `apply_weight_norm()`, and `fold` in the place of its `remove_weight_norm()`.
    Both look for torch's norms: in a converted model torch's function raises "weight_norm of 'weight' not found", and
    where a project swallows that error, every norm stays without a word. `report` shows what is left. Only a project
    that imports `remove_weight_norm` from this package may go on with its own.

    >>> import torch
    >>> model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    >>> convert(model)
    ['0.weight']
    >>> model
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True, weight=WeightNorm(dim=0))
    )
    """
    check_model("convert", model)
    for path, module in model.named_modules():
        for spelled in spellings.find(module):
            if spelled.is_norm and replaced_forward(module):
                raise _cannot("convert", path, module, spelled, replaced_forward(module))
    if foreign := _foreign(model):
        warn(
            f"convert leaves alone what looks like parts of norms that are neither torch's nor ours: {foreign}. End "
            "such a norm in the way of the project that made it and apply one of ours, or let it be if it is meant so.",
            ForeignNormWarning,
        )
    return _make_ours(model, "convert")


def _foreign(model: nn.Module) -> str:
    found = [(path, module, one) for path, module in model.named_modules() for one in spellings.find_foreign(module)]
    return "; ".join(
        f"{qualified(path, one.name)!r} of this {spellings.class_of(module).__name__} "
        f"({one.kind}, {', '.join(one.parts)})"
        for path, module, one in found
    )


def _make_ours(model: nn.Module, verb: str) -> list[str]:
    found = [(p, m, spelled) for p, m in model.named_modules() for spelled in spellings.find(m) if spelled.is_norm]
    by_module: dict[nn.Module, list[Found]] = {}
    for path, module, spelled in found:
        if spelled.why_not:
            raise _cannot(verb, path, module, spelled, spelled.why_not)
        by_module.setdefault(module, []).append(spelled)
    with all_or_nothing(*(changed for module in by_module for changed in spellings.touched(module))):
        for module, of_module in by_module.items():
            spellings.become_ours(module, of_module)
    return [qualified(path, spelled.name) for path, _, spelled in found]


def _cannot(verb: str, path: str, module: nn.Module, spelled: Found, why_not: str | None) -> ValueError:
    kind = spellings.class_of(module).__name__
    return ValueError(f"cannot {verb} {qualified(path, spelled.name)!r} of this {kind}: {why_not}.")


def fold(model: nn.Module) -> list[str]:
    """Bakes every weight norm and spectral norm of `model`, ours and both of torch's, into ordinary Parameters.

    Every module is of its ordinary class again. A `forward` that calls `self.wn.recompute(self.fc)` still runs, and
    scripts, as it is written: the norm objects that the model holds do nothing from now on. Returns the weights' names.

    >>> import torch
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
    check_model("fold", model)
    modules = {changed: None for module in model.modules() for changed in spellings.touched(module)}
    with all_or_nothing(*modules):
        _make_ours(model, "fold")
        folded = list(normed(model))
        ended = {label for module in model.modules() for r in carrier.recipes_of(module) for label in r.labels}
        for name, module, norm in folded:
            with naming(name.removesuffix(norm.name).removesuffix(".")):
                norm.remove(module, norm.name)
        for module in model.modules():
            for key, child in module._modules.items():
                if isinstance(child, Reparametrization) and child._label in ended:
                    inert = Folded(child).train(child.training)
                    module._modules[key] = inert  # in this place; another model may use the object still
    return [name for name, _, _ in folded]
