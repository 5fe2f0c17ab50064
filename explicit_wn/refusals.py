"""Why a parameter is not normed, and the way out, as data: read from the top, the first that holds counts.

Each is the end of a sentence: "WeightNorm('weight', dim=0) cannot norm 'bias' of this Linear: ...".
"""

import inspect
import keyword
import unicodedata
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from . import carrier
from .carrier import Recipe
from .contexts import torchscript


@attrs.frozen(eq=False)
class Asked:
    """A parameter that a norm is to be applied to."""

    norm: Any
    module: nn.Module
    name: str

    @property
    def parameter(self) -> Any:
        """The parameter, if the module has it."""
        return self.module._parameters.get(self.name)

    @property
    def names(self) -> str:
        """What there is to choose from."""
        return ", ".join(repr(name) for name, p in self.module._parameters.items() if p is not None) or "none"

    @property
    def norm_there(self) -> Any:
        """The norm of ours that makes it already."""
        return {recipe.name: recipe.norm for recipe in carrier.recipes_of(self.module)}.get(self.name)

    @property
    def clash(self) -> str:
        """The parts that both norms would have, in brackets."""
        both = sorted(f"{self.name}_{part}" for part in self.norm_there._part_names() & self.norm._part_names())
        return f" (both would keep a part in {', '.join(map(repr, both))})" if both else ""

    @property
    def is_hooked(self) -> bool:
        """Whether a hook of torch's makes it."""
        makers = [function.__module__ for function in (torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm)]
        hooks = [hook for hook in self.module._forward_pre_hooks.values() if type(hook).__module__ in makers]
        return any(getattr(hook, "name", None) == self.name for hook in hooks)

    @property
    def is_within(self) -> bool:
        """Whether a module within this one has a parameter of that name."""
        return any(isinstance(layer._parameters.get(self.name), nn.Parameter) for layer in self.module.modules())

    @property
    def is_made_within(self) -> bool:
        """Whether a norm of ours makes a weight of that name, here or in a module within this one."""
        made = (recipe.name for layer in self.module.modules() for recipe in carrier.recipes_of(layer))
        return self.name in made

    @property
    def owner(self) -> str:
        """What comes before the last point of a dotted name."""
        return self.name.rpartition(".")[0]

    @property
    def own(self) -> str:
        """What comes after it."""
        return self.name.rpartition(".")[2]

    @property
    def odd_kind(self) -> str | None:
        """What is odd about the parameter's dtype or layout."""
        return odd_kind(self.parameter)

    @property
    def cls(self) -> str:
        """The class of the module as it is now."""
        return type(self.module).__name__


Refusal = tuple[Callable[[Asked], Any], str]

NAMES: tuple[Refusal, ...] = (
    (
        lambda asked: "." in asked.name,
        "apply wants the module that owns the parameter: {asked.norm._kind}({asked.own!r}).apply(model.{asked.owner})",
    ),
    (
        lambda asked: is_reserved(asked.name),
        "torch, Python or explicit_wn needs that name itself; register the parameter under another",
    ),
)
"""Names that no parameter can have."""

NO_IDENTIFIER: Refusal = (
    lambda asked: not asked.name.isidentifier() or keyword.iskeyword(asked.name),
    "its name is no Python identifier; register it under one that is",
)

BY_TORCH: tuple[Refusal, ...] = (
    (
        lambda asked: parametrize.is_parametrized(asked.module, asked.name),
        "it is parametrized; where torch's norm does that, explicit_wn.convert(model) makes it ours, and fold(model) "
        "ends it; otherwise torch.nn.utils.parametrize.remove_parametrizations(module, name) does",
    ),
    (
        lambda asked: asked.is_hooked,
        "torch's hook norms it; explicit_wn.convert(model) makes that ours, and fold(model) ends it",
    ),
)
"""Weights that torch computes."""

PARAMETERS: tuple[Refusal, ...] = (
    *NAMES,
    (
        lambda asked: asked.norm_there is not None,
        "it is normed already, by {asked.norm_there!r}{asked.clash}; call remove(module) on that first",
    ),
    *BY_TORCH,
    (
        lambda asked: asked.name in asked.module._parameters and asked.parameter is None,
        "it is None in this module; its parameters are {asked.names}",
    ),
    (
        lambda asked: asked.name in asked.module._buffers,
        "it is a buffer, and only parameters are normed; its parameters are {asked.names}",
    ),
    (
        lambda asked: asked.name in asked.module._modules,
        "it is a submodule; apply the norm to that: apply(module.{asked.name})",
    ),
    (
        lambda asked: asked.parameter is None and asked.is_within,
        "it has no such parameter; its parameters are {asked.names}; a module within it has one: apply the norm to "
        "that, or to every layer with explicit_wn.apply_all(model, norm)",
    ),
    (
        lambda asked: next(asked.module.parameters(), None) is None,
        "it has no parameters; leave such modules out, as explicit_wn.apply_all(model, norm) does",
    ),
    (
        lambda asked: asked.parameter is None,
        "it has no such parameter; its parameters are {asked.names}",
    ),
    NO_IDENTIFIER,
    (
        lambda asked: isinstance(asked.parameter, UninitializedParameter),
        "it is not initialized yet; run one batch through the lazy module first",
    ),
    (
        lambda asked: odd_kind(asked.parameter),
        "{asked.odd_kind}",
    ),
    (
        lambda asked: asked.parameter.dim() == 0,
        "it is a scalar, which has a magnitude and no direction; leave it as it is",
    ),
    (
        lambda asked: carrier.is_wrapped(asked.module),
        "its class was changed to {asked.cls} since another parameter was normed; undo that first",
    ),
)
"""Parameters that are not normed, in whatever module."""

NOT_OURS: tuple[Refusal, ...] = (
    *BY_TORCH,
    (
        lambda asked: asked.name != asked.norm.name and asked.parameter is None and not asked.is_made_within,
        "it has no such parameter; its parameters are {asked.names}",
    ),
)
"""Weights that are not made by the norm that is asked about them."""


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def is_reserved(name: str) -> bool:
    """Whether torch, Python or a carrier needs that name itself."""
    ours = hasattr(carrier.Carrier, name) or name in _OF_EVERY_MODULE or name in torchscript.ATTRIBUTES
    return ours or name.startswith(("__", "_normed")) or unicodedata.normalize("NFKC", name) != name


def no_values(weight: Tensor, current: Tensor) -> str | None:
    """Why `weight` cannot be given to a module whose weight is `current`; None if it has values, or neither has."""
    return "it is a meta tensor, which has no values" if weight.is_meta and not current.is_meta else None


def odd_kind(weight: Tensor) -> str | None:
    """Why a weight of that dtype and layout is not normed; None if it is."""
    if weight.is_floating_point() and weight.layout is torch.strided and torch.finfo(weight.dtype).bits >= 16:
        return None
    kind = weight.dtype if weight.layout is torch.strided else f"{weight.dtype}, {weight.layout}"
    return f"it is {kind}; only dense weights of float16, bfloat16, float32 and float64 are normed"


def kind_of(value: Any) -> str:
    """What somebody gave, with its article: "a str", "an int"."""
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def odd_shape(weight: Any, wanted: torch.Size) -> str | None:
    """Why `weight` cannot take the place of one of the shape `wanted`; None if it can."""
    if isinstance(weight, Tensor) and weight.shape == wanted:
        return None
    got = f"the shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else kind_of(weight)
    return f"a tensor of the shape {tuple(wanted)} is wanted, not {got}"


def replaced_forward(module: nn.Module) -> str | None:
    """Why nothing can be inlined in a forward that is no method of the module's class; None if it is one."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance, which a class cannot see; use apply, and call recompute"
    if isinstance(inspect.getattr_static(module, "forward"), staticmethod):
        return "its forward is a staticmethod, which sees no module to recompute in; use apply, and call recompute"
    return None


def no_forward(module: nn.Module) -> str | None:
    """Why nothing can be inlined in `module`; None if it can."""
    if type(module).forward is nn.Module.forward:
        return "the module has no forward to recompute it in; use apply, and call recompute where it is used"
    return replaced_forward(module)


def not_its_own(module: nn.Module, recipe: Recipe) -> str | None:
    """Why the parts of a weight cannot be set or removed; None if they can."""
    for attribute in recipe.attributes:
        if attribute not in module._parameters and attribute not in module._buffers:
            return f"its part {attribute!r} is computed by another tool (parametrize or prune); end that first"
    if carrier.is_wrapped(module):
        return f"the module's class was changed to {type(module).__name__} since it was normed; undo that first"
    return None


def reason(refusals: tuple[Refusal, ...], asked: Asked) -> str | None:
    """Why `asked` is refused; None if it is not."""
    for holds, why in refusals:
        if holds(asked):
            return why.format(asked=asked)
    return None
