"""What is refused: every error says what is wrong with what, and the way out, and leaves the module as it was."""

import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from whole_models import first_and_last_visits, lines_run

from explicit_wn import (
    ForcedWeightNorm,
    ScaledWeightNorm,
    SigmaReparam,
    SpectralNorm,
    UnitNorm,
    WeightNorm,
    WeightStandardization,
    convert,
    settings,
)
from explicit_wn.reparametrization import Reparametrization


class State(NamedTuple):
    """All that a refused call must leave alone."""

    cls: type
    attributes: list[str]
    names: list[list[str]]
    identities: list[list[int]]
    values: list[Tensor]
    hooks: list[int]


def state_of(module: nn.Module) -> State:
    own = module._parameters, module._buffers, module._modules
    tensors = [value for values in own[:2] for value in values.values() if has_values(value)]
    hooks = [len(value) for name, value in vars(module).items() if name.endswith("_hooks")]
    return State(
        type(module),
        list(vars(module)),
        [list(values) for values in own],
        [[id(value) for value in values.values()] for values in own],
        [tensor.detach().clone() for tensor in tensors],
        hooks,
    )


def has_values(tensor: Tensor | None) -> bool:
    return tensor is not None and not isinstance(tensor, nn.parameter.UninitializedParameter)


def assert_same(after: State, before: State) -> None:
    assert after._replace(values=[]) == before._replace(values=[])
    for one, other in zip(after.values, before.values, strict=True):
        assert one.layout == other.layout
        one, other = (one.to_dense(), other.to_dense()) if one.layout is torch.sparse_coo else (one, other)
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def refused(call: Callable[[], Any], module: nn.Module, *says: str, error: type[Exception] = ValueError) -> str:
    """Checks that `call` raises, says all of `says` and leaves `module` as it was; returns the message."""
    before = state_of(module)
    with pytest.raises(error) as raised:
        call()
    assert_same(state_of(module), before)
    assert type(raised.value) is error
    message = str(raised.value)
    for text in says:
        assert text in message
    return message


def holding(weight: Any, **others: Any) -> nn.Module:
    module = Own()
    module.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
    for name, value in others.items():
        setattr(module, name, value)
    return module


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.gain


def zeros_at(*rows: int, dim: int = 0, size: int = 8) -> nn.Module:
    weight = torch.ones(size, size)
    weight.index_fill_(dim, torch.tensor(rows), 0)
    return holding(weight)


class Case(NamedTuple):
    """A module, a norm and what `apply` is given, and the words that the refusal has."""

    make: Callable[[], nn.Module]
    norm: WeightNorm
    options: dict[str, Any]
    says: tuple[str, ...]
    error: type[Exception] = ValueError


def linear() -> nn.Module:
    return nn.Linear(3, 2)


def case(
    make: Callable[[], nn.Module], *says: str, error: type[Exception] = ValueError, norm: Any = None, **options: Any
) -> Case:
    return Case(make, WeightNorm() if norm is None else norm, options, says, error)


def changed(**settings: Any) -> WeightNorm:
    """A norm whose settings were good when it was made."""
    norm = WeightNorm()
    vars(norm).update(settings)
    return norm


KEEP_LAST = "dim=1 to keep the last dimension"
OWN_NAMES = "its parameters are 'weight', 'bias'"
NAMES: dict[str, Case] = {
    "unknown": case(linear, "'wieght'", "no such parameter", OWN_NAMES, name="wieght"),
    "unknown of the object": case(linear, "'wieght'", OWN_NAMES, norm=WeightNorm("wieght")),
    "plain attribute": case(linear, "'in_features'", "no such parameter", OWN_NAMES, name="in_features"),
    "None": case(lambda: nn.Linear(3, 2, bias=False), "'bias'", "is None", "are 'weight'", name="bias"),
    "buffer": case(lambda: nn.BatchNorm1d(3), "'running_mean'", "buffer", OWN_NAMES, name="running_mean"),
    "submodule": case(Outer, "'fc'", "submodule", "apply(module.fc)", name="fc"),
    "dotted": case(Outer, "'fc.weight'", "owns the parameter", "apply(model.fc)", name="fc.weight"),
    "empty": case(linear, "''", OWN_NAMES, name=""),
    "number": case(linear, "cannot norm 3", "name is a str", OWN_NAMES, name=3, error=TypeError),
    "bytes": case(linear, "b'weight'", "name is a str", OWN_NAMES, name=b"weight", error=TypeError),
    "list": case(linear, "['weight']", "name is a str", OWN_NAMES, name=["weight"], error=TypeError),
    "None of the object": case(linear, "name is a str", OWN_NAMES, norm=changed(name=None), error=TypeError),
    "dotted, of the object": case(Outer, "WeightNorm('weight').apply(model.fc)", norm=changed(name="fc.weight")),
    "no parameters": case(nn.ReLU, "'weight'", "it has no parameters; leave such modules out"),
}
DIMS: dict[str, Case] = {
    "too large": case(linear, "dim=2", "2 dimensions", 'from 0 to 1, or "whole"', dim=2),
    "too large in R": case(linear, "dim=5", 'from 1 to 2, or "whole" (as R', norm=WeightNorm.from_r("weight", 5)),
    "too large in R's clone": case(linear, "dim=5", "from 1 to 2", norm=WeightNorm.from_r("weight", 5).clone()),
    "too large for a norm of R's": case(linear, "dim=4", "from 0 to 1", norm=WeightNorm.from_r("weight", 1), dim=4),
    "too small": case(linear, "dim=-3", "2 dimensions", 'from 0 to 1, or "whole"', dim=-3),
    "too large for a bias": case(linear, "'bias'", "dim=1", 'from 0 to 0, or "whole"', name="bias", dim=1),
    "-1": case(linear, "dim=-1", "whole tensor", 'dim="whole"', KEEP_LAST, dim=-1),
    "-1 of a bias": case(linear, "dim=-1", "dim=0 to keep the last dimension", name="bias", dim=-1),
    "-1 of the object": case(linear, "dim=-1", "whole tensor", 'dim="whole"', KEEP_LAST, norm=changed(dim=-1)),
    "True": case(linear, "not True", 'an int, "out", "whole" or None', dim=True, error=TypeError),
    "False": case(linear, "not False", 'an int, "out", "whole" or None', norm=changed(dim=False), error=TypeError),
    "float": case(linear, "not 0.0", 'an int, "out", "whole" or None', dim=0.0, error=TypeError),
    "str": case(linear, "not 'in'", 'an int, "out", "whole" or None', dim="in", error=TypeError),
    "empty str": case(linear, "not ''", 'an int, "out", "whole" or None', dim="", error=TypeError),
    "tuple": case(linear, "not (0,)", 'an int, "out", "whole" or None', dim=(0,), error=TypeError),
    "tensor": case(linear, "not tensor(0)", 'an int, "out", "whole" or None', dim=torch.tensor(0), error=TypeError),
}
WEIGHTS: dict[str, Case] = {
    "lazy": case(lambda: nn.LazyLinear(2), "LazyLinear", "not initialized yet", "run one batch"),
    "lazy bias": case(lambda: nn.LazyConv1d(2, 3), "LazyConv1d", "'bias'", "run one batch", name="bias"),
    "integer": case(lambda: holding(torch.ones(2, 3, dtype=torch.int64)), "torch.int64", "float32"),
    "quantized like": case(lambda: holding(torch.ones(2, 3, dtype=torch.int8)), "torch.int8", "float32"),
    "bool": case(lambda: holding(torch.ones(2, 3, dtype=torch.bool)), "torch.bool", "float32"),
    "complex": case(lambda: holding(torch.ones(2, 3, dtype=torch.complex64)), "torch.complex64", "float32"),
    "float8": case(lambda: holding(torch.ones(2, 3).to(torch.float8_e4m3fn)), "torch.float8_e4m3fn", "float32"),
    "sparse": case(lambda: holding(torch.ones(2, 3).to_sparse()), "sparse", "dense"),
    "scalar": case(lambda: holding(torch.tensor(2.0)), "scalar", "leave it"),
    "one zero slice": case(lambda: zeros_at(3), "dim 0", "slices 3 are", "NaN", "set eps (1e-12, say)"),
    "one zero slice in half precision": case(lambda: zeros_at(3).half(), "slices 3 are", "set eps (1e-06, say)"),
    "some zero slices": case(lambda: zeros_at(1, 4, dim=1), "dim 1", "slices 1, 4 are", "NaN", "eps", dim=1),
    "five zero slices": case(lambda: zeros_at(*range(5)), "slices 0, 1, 2, 3, 4 are zero", "eps"),
    "many zero slices": case(lambda: zeros_at(*range(7)), "slices 0, 1, 2, 3, 4 and 2 more are", "eps"),
    "all zero": case(lambda: zeros_at(*range(8)), "all of it is zero", "eps", norm=WeightNorm(dim=None)),
    "zero bias": case(lambda: zero_bias(), "'bias'", "slices 1 are", "eps", name="bias"),
}


def zero_bias() -> nn.Module:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.bias[1] = 0
    return module


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def hooked(name: str = "weight") -> nn.Module:
    module: nn.Module = torch.nn.utils.weight_norm(nn.Linear(3, 2), name)
    return module


class WithAProperty(nn.Linear):
    @property
    def weight_v(self) -> int:
        return 1


ELSEWHERE: dict[str, Case] = {
    "ours": case(lambda: WeightNorm(dim=1).apply(nn.Linear(3, 2)), "already", "WeightNorm('weight', dim=1)", "remove"),
    "ours inlined": case(lambda: WeightNorm().inline(nn.Linear(3, 2)), "already", "remove(module)"),
    "ours spectral": case(lambda: SpectralNorm().apply(nn.Linear(3, 2)), "already", "SpectralNorm('weight'", "remove"),
    "hook": case(hooked, "hook norms it;", "explicit_wn.convert(model)", "fold(model)"),
    "spectral hook": case(lambda: torch.nn.utils.spectral_norm(nn.Linear(3, 2)), "hook norms it", "convert(model)"),
    "parametrization": case(lambda: parametrizations.weight_norm(nn.Linear(3, 2)), "parametrized", "remove_param"),
    "spectral parametrization": case(lambda: parametrizations.spectral_norm(nn.Linear(3, 2)), "remove_param"),
    "orthogonal": case(lambda: parametrizations.orthogonal(nn.Linear(3, 2)), "parametrized", "remove_param"),
    "pruned": case(lambda: prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5), "'weight_orig'"),
    "part taken by a parameter": case(lambda: holding(torch.ones(2, 2), weight_v=nn.Parameter(torch.ones(1))), "_v'"),
    "part taken by an attribute": case(lambda: holding(torch.ones(2, 2), weight_g=1), "attribute 'weight_g' already"),
    "part taken by a submodule": case(lambda: holding(torch.ones(2, 2), weight_g=nn.ReLU()), "'weight_g' already"),
    "part taken by the class": case(lambda: WithAProperty(3, 2), "attribute 'weight_v' already", "rename"),
    "another already normed": case(lambda: normed_bias(), "'wieght'", "no such parameter", name="wieght"),
    "another already normed, bad dim": case(lambda: normed_bias(), "dim=-1", 'dim="whole"', dim=-1),
    "class changed since": case(lambda: parametrized_since(), "changed to ParametrizedLinear", "undo that first"),
}


def normed_bias() -> nn.Module:
    module: nn.Module = WeightNorm("bias").inline(nn.Linear(3, 2))
    return module


def parametrized_since() -> nn.Module:
    module = normed_bias()
    parametrize.register_parametrization(module, "bias_v", nn.Identity())
    return module


CASES = {f"{kind}: {key}": value for kind, group in
         {"name": NAMES, "dim": DIMS, "weight": WEIGHTS, "elsewhere": ELSEWHERE}.items()
         for key, value in group.items()}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning", "ignore:Lazy modules")
@pytest.mark.parametrize("verb", ["apply", "inline"])
@pytest.mark.parametrize("bad", CASES.values(), ids=CASES)
def test_a_refused_apply_says_why_and_changes_nothing(bad: Case, verb: str) -> None:
    module = bad.make()
    shown = repr(bad.norm)
    name = bad.options.get("name", bad.norm.name)
    says = (shown, f"cannot norm {name!r} of this", *bad.says)
    message = refused(lambda: getattr(bad.norm, verb)(module, **bad.options), module, *says, error=bad.error)
    cls = "Linear" if "Linear" in type(module).__name__ and "Lazy" not in message else type(module).__name__
    assert f"{cls}:" in message
    assert repr(bad.norm) == shown


@pytest.mark.parametrize("name", ["a b", "1st", "class", "None", "lambda", "weight\nimport os", "it's"])
def test_a_name_that_is_no_identifier_is_refused(name: str) -> None:
    module = Own()
    module.register_parameter(name, nn.Parameter(torch.ones(2, 3)))
    refused(lambda: WeightNorm().apply(module, name), module, "of this Own:", repr(name), "identifier", "register it")


@pytest.mark.parametrize(
    "value", [torch.ones(2, 3), object(), "weight", None, 3, [nn.Linear(3, 2)], nn.Linear], ids=str
)
@pytest.mark.parametrize("verb", ["apply", "inline", "recompute", "call", "__call__", "remove", "compute_weight"])
def test_what_is_no_module_is_refused(verb: str, value: Any) -> None:
    article = "an" if isinstance(value, int) or type(value) is object else "a"
    kind = "the class Linear" if value is nn.Linear else f" {article} {type(value).__name__}"
    with pytest.raises(TypeError) as raised:
        getattr(WeightNorm(), verb)(value)
    for text in ("WeightNorm('weight', dim=0)", "'weight'", kind, "nn.Module"):
        assert text in str(raised.value)


def test_a_scripted_module_is_refused() -> None:
    scripted = torch.jit.script(nn.Linear(3, 2))
    for verb in ("apply", "inline", "recompute", "remove", "compute_weight"):
        with pytest.raises(TypeError, match=r"'weight' of a RecursiveScriptModule: .*eager"):
            getattr(WeightNorm(), verb)(scripted)


NOT_CALLED = "WeightNorm.apply(module) was not called for it, or remove ended it; this module carries"
VERBS: dict[str, Callable[[WeightNorm, nn.Module], Any]] = {
    "recompute": lambda wn, module: wn.recompute(module),
    "call": lambda wn, module: wn.call(module),
    "__call__": lambda wn, module: wn(module),
    "remove": lambda wn, module: wn.remove(module),
    "remove by name": lambda wn, module: wn.remove(module, "weight"),
    "compute_weight": lambda wn, module: wn.compute_weight(module),
    "compute_weight by name": lambda wn, module: wn.compute_weight(module, "weight"),
    "assign": lambda wn, module: wn.assign(module, torch.ones(2, 3)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (linear, f"{NOT_CALLED} no norm"),
        (hooked, "torch's hook norms it; explicit_wn.convert(model) makes that ours, and fold(model) ends it"),
        (lambda: torch.nn.utils.spectral_norm(nn.Linear(3, 2)), "torch's hook norms it; explicit_wn.convert(model)"),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 2)), "it is parametrized; where torch's norm does"),
        (
            lambda: parametrizations.spectral_norm(nn.Linear(3, 2)),
            "convert(model) makes it ours, and fold(model) ends it",
        ),
        (normed_bias, f"{NOT_CALLED} WeightNorm('bias', dim=0)"),
        (lambda: SpectralNorm().apply(nn.Linear(3, 2)), f"{NOT_CALLED} SpectralNorm('weight'"),
    ],
    ids=["plain", "hook", "spectral", "parametrization", "parametrized spectral", "another name", "another norm"],
)
@pytest.mark.parametrize(("verb", "act"), VERBS.items(), ids=VERBS)
def test_verbs_on_what_is_not_normed_say_what_it_carries(
    verb: str, act: Callable[[WeightNorm, nn.Module], Any], make: Callable[[], nn.Module], says: str
) -> None:
    module, wn = make(), WeightNorm()
    called = {"call": "recompute", "__call__": "recompute", "compute_weight": "compute"}
    verb = verb.removesuffix(" by name")
    refused(
        lambda: act(wn, module), module, f"{wn!r} cannot {called.get(verb, verb)} 'weight' of this", "Linear:", says
    )


def test_the_smallest_eps_of_single_precision_is_one() -> None:
    tiny = torch.finfo(torch.float32).tiny
    for norm in WeightNorm(eps=tiny), SpectralNorm(eps=tiny):
        module = linear()
        weight = module.weight.detach().clone()
        torch.testing.assert_close(norm.remove(norm.apply(module)).weight.detach().sign(), weight.sign())


def test_a_name_that_is_nowhere_in_a_container_is_what_is_wrong() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    refused(lambda: WeightNorm("wieght").apply(model), model, "no such parameter; its parameters are none")


def test_a_container_of_what_is_wanted_says_so() -> None:
    wn, model = WeightNorm(), nn.Sequential(nn.Linear(3, 2), WeightNorm().apply(nn.Linear(2, 2)))
    for verb in wn.apply, wn.inline:
        refused(lambda verb=verb: verb(model), model, "this Sequential", "within it has one", "apply_all(model")
    for verb, way_out in (wn.recompute, "use explicit_wn.recompute_all(module)"), (wn.remove, "give it one of those"):
        refused(lambda verb=verb: verb(model), model, "this Sequential", f"modules within it do: {way_out}")
    other = nn.Sequential(SpectralNorm().apply(nn.Linear(3, 2)))
    assert refused(lambda: wn.recompute(other), other, "this Sequential").endswith("this module carries no norm.")


@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
class Short(Reparametrization):
    """As short as a norm can be: what is checked of it is what every norm inherits."""

    name: str = "weight"
    dim: int | str | None = "out"
    times: int = attrs.field(default=1, validator=settings.at_least(1))
    formula = staticmethod(lambda v, times: times * v)


OF_SLICES = WeightNorm, ScaledWeightNorm, ForcedWeightNorm, UnitNorm
OF_OUTPUTS = SpectralNorm, SigmaReparam, WeightStandardization
FROM_0 = *OF_SLICES, WeightStandardization
ALL = *OF_SLICES, *OF_OUTPUTS, Short
NO_DIMS = [1.5, 0.0, True, "in", "", (0,), np.int64(1), torch.tensor(0)]
NORMS_AND_BAD: dict[str, tuple[tuple[Any, ...], list[Any], str, type[Exception]]] = {
    "name": (ALL, [3, None, b"weight", ["weight"], True], "name is a str, the name of a parameter", TypeError),
    "name, odd": (ALL, ["", "a b", "class", "1st", "it's"], "is no Python identifier; register it under", ValueError),
    "name, taken": (
        ALL,
        ["forward", "__len__", "_normed", "_recompute_normed", "ﬁ", "training", "_parameters", "_modules", "_buffers"],
        "needs that name itself",
        ValueError,
    ),
    "name, dotted": (ALL, ["fc.weight"], "('weight').apply(model.fc)", ValueError),
    "dim": ((*OF_SLICES, Short), NO_DIMS, 'dim is an int, "out", "whole" or None', TypeError),
    "dim, ambiguous": (OF_SLICES, [-1], 'last dimension to most readers; say dim="whole" for one norm', ValueError),
    "dim, of a matrix": (OF_OUTPUTS, [*NO_DIMS, "whole"], 'dim is an int, "out" or None', TypeError),
    "eps": (FROM_0, [-1, -1e-12, float("nan"), float("inf")], "eps is a finite float from 0 up", ValueError),
    "eps, type": (FROM_0, ["a", True, None, np.float32(1)], "eps is a finite float from 0 up", TypeError),
    "eps, above": (
        (SpectralNorm, SigmaReparam),
        [0, 0.0, -1, float("nan"), float("inf")],
        "eps is a finite float above 0",
        ValueError,
    ),
    "eps, above, type": ((SpectralNorm, SigmaReparam), ["a", True, None], "eps is a finite float above 0", TypeError),
    "eps, tiny": (ALL[:-1], [1e-40], "eps is 0 in single precision; take a larger", ValueError),
    "eps, large": (ALL[:-1], [10**400, 1e300], "eps is infinite in single precision; take a smaller", ValueError),
    "gain": ((ForcedWeightNorm,), [0, -1, float("inf")], "gain is a finite number above 0", ValueError),
    "gain, type": ((ForcedWeightNorm,), ["a", True, None], "gain is a finite number above 0", TypeError),
    "gain, tiny": ((ForcedWeightNorm,), [1e-60], "gain is 0 in single precision; take a larger", ValueError),
    "gain, large": ((ForcedWeightNorm,), [1e60, 10**400], "gain is infinite in single precision", ValueError),
    "clip": ((ScaledWeightNorm,), [0, -1, float("nan")], "clip is a finite number above 0", ValueError),
    "clip, tiny": ((ScaledWeightNorm,), [1e-60], "clip is 0 in single precision", ValueError),
    "clip, large": ((ScaledWeightNorm,), [1e60], "clip is infinite in single precision", ValueError),
    "target_norm": ((ScaledWeightNorm,), [float("inf"), -2], "target_norm is a finite number above 0", ValueError),
    "target_norm, tiny": ((ScaledWeightNorm,), [1e-60], "target_norm is 0 in single precision", ValueError),
    "target_norm, large": ((ScaledWeightNorm,), [1e60], "target_norm is infinite in single precision", ValueError),
    "learn_scale": ((ScaledWeightNorm,), [1, None], "learn_scale is True or False", TypeError),
    "n_power_iterations": ((SpectralNorm,), [0, -3], "n_power_iterations is an int from 1 up", ValueError),
    "n_power_iterations, type": ((SpectralNorm,), [1.0, True, "1", None], "n_power_iterations is an int", TypeError),
    "warmup": ((SpectralNorm,), [-1], "warmup is an int from 0 up", ValueError),
    "warmup, type": ((SpectralNorm,), [1.5, True, None], "warmup is an int from 0 up", TypeError),
    "first": ((SpectralNorm,), ["w", "", "uv"], 'first is "u" or "v"', ValueError),
    "first, type": ((SpectralNorm,), [None, 1], 'first is "u" or "v"', TypeError),
    "times": ((Short,), [0], "times is an int from 1 up", ValueError),
}
BAD_SETTINGS = [
    pytest.param(norm, field.partition(",")[0], value, says, error, id=f"{norm.__name__}({field}={value!r})")
    for field, (norms, values, says, error) in NORMS_AND_BAD.items()
    for norm in norms
    for value in values
]


@pytest.mark.parametrize(("norm", "field", "value", "says", "error"), BAD_SETTINGS)
def test_what_is_known_when_a_norm_is_made_is_refused_then(
    norm: Any, field: str, value: Any, says: str, error: type[Exception]
) -> None:
    """And when it was changed later, at the next use: nothing is made of it."""
    late = norm()
    setattr(late, field, value)
    for make in (lambda: norm(**{field: value}), lambda: attrs.evolve(norm(), **{field: value}), late.clone):
        with pytest.raises(error) as raised:
            make()
        assert type(raised.value) is error
        assert says in str(raised.value)
        assert str(raised.value).startswith((f"{norm.__name__}({field}={value!r}): ", f"{norm.__name__} cannot norm "))
    if norm is not Short:
        module = linear()
        refused(lambda: late.apply(module), module, repr(value), error=error)


@pytest.mark.parametrize(
    ("dim", "says", "error"),
    [
        *((dim, "R's dim is an int, or NULL, which is None here", TypeError) for dim in ("1", True, 1.0, "out")),
        (0, "R counts dimensions from 1", ValueError),
    ],
)
def test_a_dim_that_is_none_in_R_is_refused(dim: Any, says: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=re.escape(f"from_r('weight', {dim!r}): {says}")):
        WeightNorm.from_r("weight", dim)


@pytest.mark.parametrize(
    "norm",
    [WeightNorm(eps=0), WeightNorm(dim=-2), WeightNorm(dim="out"), SpectralNorm(eps=1), SpectralNorm(warmup=0)],
    ids=repr,
)
def test_settings_at_the_edge_are_taken(norm: Any) -> None:
    assert norm.apply(linear()).weight.isfinite().all()


def test_a_module_in_the_place_of_the_name_is_refused() -> None:
    """As torch's functions take them."""
    for norm in WeightNorm, SpectralNorm:
        with pytest.raises(TypeError, match=rf'not a Linear; .*{norm.__name__}\("weight"\).apply\(module\)'):
            norm(nn.Linear(3, 2))  # type: ignore[arg-type]


def test_a_norm_that_was_removed_says_that() -> None:
    wn = WeightNorm()
    module = wn.remove(wn.apply(nn.Linear(3, 2)))
    refused(lambda: wn.recompute(module), module, "was not called for it, or remove ended it")


@pytest.mark.parametrize("verb", ["remove", "compute_weight", "assign"])
def test_a_name_that_is_not_normed_is_refused_on_a_normed_module(verb: str) -> None:
    wn = WeightNorm()
    module = wn.apply(nn.Linear(3, 2))
    arguments = (torch.ones(2),) if verb == "assign" else ()
    for outer in module, nn.Sequential(module):
        message = refused(
            lambda outer=outer: getattr(wn, verb)(outer, *arguments, name="bias"), outer, "'bias' of this "
        )
        assert "within it" not in message
        assert ("and this object norms 'weight' in it" in message) == (outer is module)
        assert ("carries WeightNorm('weight'" in message) == (outer is module)
    if verb == "remove":
        refused(
            lambda: wn.remove(nn.Sequential(module), "weight"), module, "modules within it do: give it one of those"
        )


@pytest.mark.parametrize("verb", ["remove", "compute_weight", "assign"])
@pytest.mark.parametrize("make", [linear, lambda: WeightNorm().apply(nn.Linear(3, 2)), lambda: nn.Sequential(linear())])
def test_a_name_that_is_none_is_said_to_be(make: Callable[[], nn.Module], verb: str) -> None:
    module, arguments = make(), (torch.ones(2),) if verb == "assign" else ()
    says = "cannot " + verb.removesuffix("_weight")
    act = functools.partial(getattr(WeightNorm(), verb), module, *arguments)
    refused(lambda: act(name="nothing"), module, f"{says} 'nothing'", "it has no such parameter; its parameters are ")
    refused(lambda: act(name=3), module, f"{says} 3 of", "a parameter's name is a str", error=TypeError)


def test_an_object_applied_to_several_names_asks_which() -> None:
    wn, module = WeightNorm("weight_ih_l0"), nn.LSTM(2, 3)
    wn.apply(module, name="weight_hh_l0")
    wn.apply(module, name="bias_hh_l0")
    refused(lambda: wn.compute_weight(module), module, "this LSTM", "'weight_hh_l0', 'bias_hh_l0'", "name=")


def test_compute_weight_refuses_another_dim_than_the_recorded() -> None:
    wn = WeightNorm()
    module = wn.apply(nn.Linear(3, 2))
    refused(lambda: wn.compute_weight(module, dim=1), module, "this Linear", "dim=1", "dim=0", "remove")
    refused(lambda: wn.compute_weight(module, dim=-1), module, "dim=-1", 'dim="whole"')
    refused(lambda: wn.compute_weight(module, dim=True), module, "this Linear", "not True", error=TypeError)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.ones(3, 2), "shape (2, 3) is wanted, not the shape (3, 2)"),
        (torch.ones(()), "shape (2, 3) is wanted, not the shape ()"),
        ([[1.0] * 3] * 2, "not a list"),
        (torch.tensor([[1.0] * 3, [0.0] * 3]), "slices 1 are zero"),
        (torch.ones(2, 3, dtype=torch.int64), "torch.int64"),
        (torch.ones(2, 3, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(2, 3, device="meta"), "meta"),
    ],
    ids=str,
)
def test_assign_refuses_what_cannot_be_the_weight(weight: Any, says: str) -> None:
    wn = WeightNorm()
    module = wn.apply(nn.Linear(3, 2))
    refused(lambda: wn.assign(module, weight), module, "cannot assign 'weight' of this Linear:", says)


@pytest.mark.parametrize("verb", ["remove", "assign"])
@pytest.mark.parametrize("tool", ["parametrize", "prune", "parametrize another"])
def test_parts_that_another_tool_holds_are_not_written(verb: str, tool: str) -> None:
    wn = WeightNorm()
    module = wn.apply(nn.Linear(3, 2))
    if tool == "prune":
        prune.l1_unstructured(module, "weight_v", 0.5)
    else:
        parametrize.register_parametrization(module, "bias" if "another" in tool else "weight_v", nn.Identity())
    arguments = (module, torch.ones(2, 3)) if verb == "assign" else (module,)
    says = "changed to ParametrizedLinear" if "another" in tool else "'weight_v' is computed by another tool"
    refused(lambda: getattr(wn, verb)(*arguments), module, f"cannot {verb} 'weight' of this", says, "first")


def test_inline_refuses_a_module_without_a_forward() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(2, 3))
    refused(lambda: WeightNorm().inline(module), module, "inline 'weight' of this Module", "no forward", "use apply")


def test_inline_refuses_a_forward_replaced_on_the_instance() -> None:
    module = nn.Linear(3, 2)
    module.forward = lambda x: x  # type: ignore[method-assign]
    refused(lambda: WeightNorm().inline(module), module, "inline 'weight' of this Linear", "replaced", "use apply")


class WithAStaticForward(nn.Linear):
    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * x


def test_inline_and_convert_refuse_a_forward_that_is_a_staticmethod() -> None:
    module = WithAStaticForward(3, 2)
    refused(lambda: WeightNorm().inline(module), module, "inline 'weight' of this", "a staticmethod", "use apply")
    torch.testing.assert_close(WeightNorm().apply(module)(torch.ones(3)), torch.full((3,), 2.0))
    theirs = parametrizations.weight_norm(WithAStaticForward(3, 2))
    refused(lambda: convert(theirs), theirs, "cannot convert 'weight' of this", "a staticmethod", "use apply")


class Registered(nn.Linear):
    def __init_subclass__(cls, *, tag: str) -> None:
        super().__init_subclass__()


@pytest.mark.parametrize("verb", ["apply", "inline"])
def test_a_class_that_cannot_be_derived_from_leaves_the_module_as_it_was(verb: str) -> None:
    module = Registered(3, 2)
    refused(lambda: getattr(WeightNorm(), verb)(module), module, "tag", error=TypeError)


def test_the_attributes_of_a_module_survive_a_failed_call_even_if_they_cannot_be_refilled() -> None:
    class Frozen(dict[str, int]):
        def update(self, *others: Any, **more: Any) -> None:
            raise TypeError("frozen")

    module = Registered(3, 2)
    module.config = Frozen(channels=3)
    with pytest.raises(TypeError, match="tag"):
        WeightNorm().apply(module)
    assert module.config == {"channels": 3}


# Ctrl-C


def own_lstm() -> nn.Module:
    class Fresh(nn.LSTM):  # a class of its own each time, so that its generated class is made each time
        pass

    return Fresh(3, 2)


def own_linear() -> nn.Module:
    class Fresh(nn.Linear):
        pass

    return Fresh(3, 2)


def normed(make: Callable[[], nn.Module], *names: str, verb: str = "apply") -> nn.Module:
    module, wn = make(), WeightNorm(names[0])
    for name in names:
        getattr(wn, verb)(module, name=name)
    with torch.no_grad():
        for name in names:
            getattr(module, f"{name}_g").mul_(2)
    return module


INTERRUPTED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "apply": (own_linear, lambda module: WeightNorm().apply(module)),
    "apply with eps to a dim": (own_linear, lambda module: WeightNorm(dim=1, eps=1e-6).apply(module)),
    "apply to a second name": (lambda: normed(own_linear, "bias"), lambda module: WeightNorm().apply(module)),
    "apply to an LSTM": (own_lstm, lambda module: WeightNorm("weight_hh_l0").apply(module)),
    "inline": (own_linear, lambda module: WeightNorm().inline(module)),
    "remove": (lambda: normed(own_linear, "weight"), lambda module: WeightNorm().remove(module)),
    "remove an inlined one": (lambda: normed(own_linear, "weight", verb="inline"), lambda m: WeightNorm().remove(m)),
    "remove one of two": (lambda: normed(own_linear, "weight", "bias"), lambda m: WeightNorm("bias").remove(m)),
    "remove two": (lambda: normed(own_linear, "weight", "bias"), lambda m: WeightNorm().remove(m)),
    "remove from an LSTM": (lambda: normed(own_lstm, "weight_hh_l0"), lambda m: WeightNorm("weight_hh_l0").remove(m)),
    "assign": (lambda: normed(own_linear, "weight"), lambda m: WeightNorm().assign(m, torch.ones(2, 3))),
}


def assert_alike(module: nn.Module, other: nn.Module) -> None:
    """Checks that two modules that went the same way look the same."""
    ours, theirs = state_of(module), state_of(other)
    assert ours.cls.__qualname__ == theirs.cls.__qualname__
    assert len(ours.cls.__mro__) == len(theirs.cls.__mro__)
    assert (ours.attributes, ours.names, ours.hooks) == (theirs.attributes, theirs.names, theirs.hooks)
    torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=0)
    torch.testing.assert_close(module(torch.ones(4, 3)), other(torch.ones(4, 3)))


def is_same(after: State, before: State) -> bool:
    try:
        assert_same(after, before)
    except AssertionError:
        return False
    return True


def make_alike(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's kernel for a small weight takes a hundred times longer on busy cores with two
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("make", "act"), INTERRUPTED.values(), ids=INTERRUPTED)
def test_ctrl_c_anywhere_leaves_the_module_before_or_after(
    make: Callable[[], nn.Module], act: Callable[[nn.Module], Any]
) -> None:
    done = make_alike(make)
    act(done)
    undone = ended = 0
    for index in first_and_last_visits(lines_run(functools.partial(act, make_alike(make)))):
        module = make_alike(make)
        before = state_of(module)
        lines_run(functools.partial(act, module), interrupt_before=index)
        if is_same(state_of(module), before):
            undone += 1
            act(module)  # nothing is left behind that stands in its way
        else:
            ended += 1
        assert_alike(module, done)
    assert undone > 30
    assert ended >= 1


# fully_shard

SHARDED = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from explicit_wn import WeightNorm

class Net(nn.Module):
    def __init__(self, eps=0.0):
        super().__init__()
        self.wn = WeightNorm(eps=eps)
        self.fc = self.wn.apply(nn.Linear(3, 2))

    def forward(self, x):
        self.wn.recompute(self.fc)
        return self.fc(x)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
x = torch.randn(4, 3)

net = Net()
fully_shard(net.fc, mesh=mesh)
try:
    net(x)
except RuntimeError as error:
    print("REFUSED", error)

net = Net()  # the ways out that the error names
g, v, bias = (p.detach().clone() for p in (net.fc.weight_g, net.fc.weight_v, net.fc.bias))
fully_shard(net, mesh=mesh)
expected = nn.functional.linear(x, g * v / v.square().sum(1, keepdim=True).sqrt(), bias)
torch.testing.assert_close(net(x), expected)

layer = WeightNorm().inline(nn.Linear(3, 2))
g, v, bias = (p.detach().clone() for p in (layer.weight_g, layer.weight_v, layer.bias))
fully_shard(layer, mesh=mesh)
expected = nn.functional.linear(x, g * v / v.square().sum(1, keepdim=True).sqrt(), bias)
torch.testing.assert_close(layer(x), expected)
print("WAYS OUT HOLD")

def sharded(net):  # by whatever else: then its weight is what torch makes of the shards
    for name, part in list(net.fc._parameters.items()):
        net.fc._parameters[name] = nn.Parameter(distribute_tensor(part.detach(), mesh, [Shard(0)]))
    return net(distribute_tensor(x, mesh, [Replicate()])).full_tensor()

for eps in (0.0, 1e-6):
    net = Net(eps)
    expected = net(x)
    plain = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    try:
        found = sharded(net)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
    except NotImplementedError:
        print("NO GRADIENT WITH EPS", eps)
    else:
        torch.testing.assert_close(tuple(part.grad.full_tensor() for part in net.parameters()), plain)
        print("A GRADIENT WITH EPS", eps)
dist.destroy_process_group()
"""


def test_fully_shard_on_the_layer_alone_says_what_to_do() -> None:
    """And other DTensors are left to torch, whose kernel has no gradient for them: with one, a limit is gone."""
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, refusal, ways_out, without_eps, with_eps = done.stdout.splitlines()  # gloo may have something to say first
    for text in (
        "WeightNorm('weight', dim=0)",
        "'weight' of this Linear",
        "fully_shard",
        "whose forward calls",
        "inline",
    ):
        assert text in refusal
    assert ways_out == "WAYS OUT HOLD"
    assert without_eps == "NO GRADIENT WITH EPS 0.0"
    if torch.__version__ >= (2, 11):  # 2.10 takes the norm of no DTensor
        assert with_eps == "A GRADIENT WITH EPS 1e-06"
