"""The verbs over a whole model: apply_all, normed, recompute_all, cached, fold and report."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from layers import change_parts
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from whole_models import (
    LAYERS,
    LINEAR,
    SPECTRAL_NORMS,
    WEIGHT_NORMS,
    Count,
    Layer,
    Picture,
    anatomy,
    assert_unchanged,
    change_values,
    hook_spectral_norm,
    hook_weight_norm,
    hooks_of,
    interrupted,
    is_unchanged,
    normed_weight,
    parametrized_spectral_norm,
    parametrized_weight_norm,
    spectral_weight,
    train,
)

import explicit_wn
from explicit_wn import SpectralNorm, WeightNorm, apply_all, cached, convert, fold, normed, recompute_all, report

X = torch.linspace(-1, 1, 12).view(3, 4)


class Net(nn.Module):
    """Recomputes by hand, one layer directly and one behind a container."""

    def __init__(self, wn: Any = None) -> None:
        super().__init__()
        self.wn = WeightNorm() if wn is None else wn
        self.first = self.wn.apply(nn.Linear(4, 5))
        self.rest = nn.Sequential(nn.Tanh(), self.wn.apply(nn.Linear(5, 2)))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.first)
        self.wn.recompute(self.rest[1])
        return self.rest(self.first(x))


def by_hand(model: nn.Module, x: Tensor = X) -> Tensor:
    """What a Net gives, from its parts."""
    state = model.state_dict()
    hidden = nn.functional.linear(x, normed_weight(state, "first.weight", 0), state["first.bias"])
    return nn.functional.linear(torch.tanh(hidden), normed_weight(state, "rest.1.weight", 0), state["rest.1.bias"])


# normed


def test_normed_gives_names_modules_and_norms_as_they_were_applied() -> None:
    lstm = WeightNorm("weight_hh_l0").inline(nn.LSTM(2, 3))
    SpectralNorm("weight_ih_l0").apply(lstm)
    conv = WeightNorm(dim="out").apply(nn.ConvTranspose1d(2, 3, 1))
    model = nn.ModuleDict({"deep": nn.ModuleList([nn.Linear(2, 2), conv]), "lstm": lstm, "again": conv})
    found = list(normed(model))
    assert [name for name, _, _ in found] == ["deep.1.weight", "lstm.weight_hh_l0", "lstm.weight_ih_l0"]
    assert [module for _, module, _ in found] == [conv, lstm, lstm]
    assert [type(norm) for _, _, norm in found] == [WeightNorm, WeightNorm, SpectralNorm]
    assert [norm.name for _, _, norm in found] == ["weight", "weight_hh_l0", "weight_ih_l0"]
    assert [norm.dim for _, _, norm in found] == [1, 0, 0]


def test_normed_of_a_layer_itself_and_of_nothing() -> None:
    assert [name for name, _, _ in normed(WeightNorm().apply(nn.Linear(2, 2)))] == ["weight"]
    assert list(normed(nn.Sequential(nn.Linear(2, 2), hook_weight_norm(nn.Linear(2, 2))))) == []


# apply_all


def convolutions() -> nn.Module:
    torch.manual_seed(1)
    return nn.ModuleDict(
        {
            "linear": nn.Linear(4, 3),
            "conv": nn.ModuleList([nn.Conv1d(4, 3, 1), nn.Conv2d(4, 3, 1), nn.Conv3d(4, 3, 1)]),
            "transposed": nn.ModuleList(
                [nn.ConvTranspose1d(4, 3, 2), nn.ConvTranspose2d(4, 3, 2), nn.ConvTranspose3d(4, 3, 2)]
            ),
            "others": nn.ModuleList([nn.Embedding(4, 3), nn.LSTM(4, 3), nn.LayerNorm(4), nn.Bilinear(4, 3, 2)]),
        }
    )


CONVOLUTIONS = ["linear.weight", *(f"{kind}.{index}.weight" for kind in ("conv", "transposed") for index in range(3))]


@pytest.mark.parametrize("norm", [WeightNorm(dim="out"), SpectralNorm()], ids=repr)
def test_every_linear_and_convolution_is_normed_along_its_output_and_nothing_else(norm: Any) -> None:
    model, plain = convolutions(), convolutions()
    assert apply_all(model, norm) == CONVOLUTIONS
    assert {name: found.dim for name, _, found in normed(model)} == {
        name: int("transposed" in name) for name in CONVOLUTIONS
    }
    assert hooks_of(model) == []
    if isinstance(norm, WeightNorm):
        for name in CONVOLUTIONS:
            weight = model.get_submodule(name.removesuffix(".weight")).weight
            torch.testing.assert_close(weight.detach(), plain.get_parameter(name).detach())
        torch.testing.assert_close(model["conv"][1](torch.ones(1, 4, 2, 2)), plain["conv"][1](torch.ones(1, 4, 2, 2)))


def test_what_apply_all_norms_is_computed_from_its_parts_and_trains() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    parameters = [model[0].weight, model[2].weight]
    assert apply_all(model, WeightNorm()) == ["0.weight", "2.weight"]
    assert [model[0].weight_v, model[2].weight_v] == parameters
    change_parts(model, seed=1)
    state = model.state_dict()
    hidden = torch.tanh(nn.functional.linear(X, normed_weight(state, "0.weight", 0), state["0.bias"]))
    expected = nn.functional.linear(hidden, normed_weight(state, "2.weight", 0), state["2.bias"])
    torch.testing.assert_close(model(X).detach(), expected)
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


WHERE: list[tuple[Any, list[str]]] = [
    (nn.Conv2d, ["conv.1.weight"]),
    ((nn.Linear, nn.Embedding), ["linear.weight", "others.0.weight"]),
    (lambda module: isinstance(module, nn.Bilinear), ["others.3.weight"]),
    (lambda name, module: name.endswith(".0") and hasattr(module, "groups"), ["conv.0.weight", "transposed.0.weight"]),
    (lambda module, kind=nn.Linear: isinstance(module, kind), ["linear.weight"]),
    (lambda module: False, []),
]


@pytest.mark.parametrize(("where", "names"), WHERE, ids=[str(names) for _, names in WHERE])
def test_where_chooses_by_class_or_by_question(where: Any, names: list[str]) -> None:
    model = convolutions()
    assert apply_all(model, WeightNorm(), where=where) == names
    assert [name for name, _, _ in normed(model)] == names


def test_another_name_is_normed_where_asked() -> None:
    model = nn.Sequential(nn.LSTM(4, 3), nn.Linear(3, 2))
    assert apply_all(model, WeightNorm("weight_hh_l0"), nn.LSTM) == ["0.weight_hh_l0"]
    assert apply_all(model[1], WeightNorm()) == ["weight"]


def test_a_shared_layer_is_normed_once_and_a_shared_parameter_stays_shared() -> None:
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight
    model = nn.Sequential(shared, nn.Tanh(), shared, tied)
    assert apply_all(model, WeightNorm()) == ["0.weight", "3.weight"]
    assert model[0] is model[2]
    assert model[0].weight_v is model[3].weight_v


def test_by_default_the_projection_that_attention_never_calls_is_left_alone() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert apply_all(model, WeightNorm()) == ["linear1.weight", "linear2.weight"]
    assert apply_all(model, WeightNorm(), lambda name, module: name == "self_attn.out_proj") == [
        "self_attn.out_proj.weight"
    ]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of torch's attention, normed or not
@pytest.mark.parametrize("training", [True, False])
def test_every_weight_of_a_transformer_layer_can_be_normed_and_computes_it_wherever_torch_captures(
    training: bool,
) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0).train(training)
    plain, x = copy.deepcopy(model), torch.randn(3, 2, 4)
    apply_all(model, WeightNorm(), nn.Linear)
    WeightNorm("in_proj_weight").inline(model.self_attn)
    change_parts(model, seed=1)
    names = [name for name, _, _ in normed(model)]
    assert len(names) == 4
    state = model.state_dict()
    other = {name: value for name, value in state.items() if not name.endswith(("_g", "_v"))}
    plain.load_state_dict({**other, **{name: normed_weight(state, name, 0) for name in names}})
    for captured in (
        model,
        torch.export.export(model, (x,)).module(),
        torch.export.export(model, (x,), strict=True).module(),
        torch.compile(model, backend="eager", fullgraph=True),
        torch.jit.trace(model, (x,)),
    ):
        torch.testing.assert_close(captured(x).detach(), plain(x).detach())


def zero_row(layer: nn.Linear) -> nn.Module:
    with torch.no_grad():
        layer.weight[2] = 0
    return layer


REFUSED_LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a slice of zeros": (lambda: zero_row(nn.Linear(4, 4)), "slices 2 are zero"),
    "ours already": (lambda: WeightNorm().apply(nn.Linear(4, 4)), "normed already"),
    "the hook": (lambda: hook_weight_norm(nn.Linear(4, 4)), "torch's hook norms it already"),
    "the parametrization": (lambda: parametrized_weight_norm(nn.Linear(4, 4)), "it is parametrized"),
    "lazy": (lambda: nn.LazyLinear(4), "not initialized"),
    "a taken name": (lambda: taken(nn.Linear(4, 4)), "weight_g"),
}


def taken(layer: nn.Module) -> nn.Module:
    layer.weight_g = nn.Parameter(torch.ones(1))
    return layer


@pytest.mark.parametrize(("make", "says"), REFUSED_LAYERS.values(), ids=REFUSED_LAYERS.keys())
def test_one_layer_that_refuses_is_named_and_none_is_normed(make: Any, says: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.ModuleDict({"bad": make()}), nn.Linear(4, 4))
    before = Picture(model)
    with pytest.raises(ValueError, match=rf"^2\.bad: .*{says}"):
        apply_all(model, WeightNorm())
    assert_unchanged(model, before)


def test_where_that_chooses_what_has_no_weight_is_refused_and_nothing_is_normed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    before = Picture(model)
    with pytest.raises(ValueError, match=r"^1: .*no such parameter"):
        apply_all(model, WeightNorm(), lambda module: not isinstance(module, nn.Sequential))
    assert_unchanged(model, before)


NO_WHERE: list[tuple[Any, str]] = [
    (["0"], "for names write where=lambda name, module: name in ['0']"),
    (("0", "2"), "for names write where=lambda name, module: name in ['0', '2']"),
    *((names, "name in ['0']") for names in (np.array(["0"]), frozenset(["0"]), {"0": 1}, {"0": 1}.keys())),
    (np.array([1]), "not array([1])."),
    ("0", "for names write where=lambda name, module: name in ['0']"),
    (("0", nn.Linear), "not ('0', <class"),
    ((nn.Linear, nn.Linear(2, 2)), "not (<class"),
    ([nn.Linear], "not [<class"),
    (nn.Linear(2, 2), "not a Linear itself; for that module alone write norm.inline(module)"),
    ((), "not ()"),
    (3, "not 3"),
]


@pytest.mark.parametrize(("where", "says"), NO_WHERE, ids=str)
def test_what_where_cannot_be_is_refused_and_nothing_is_normed(where: Any, says: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(ValueError if isinstance(where, tuple) and not where else TypeError) as raised:
        apply_all(model, WeightNorm(), where=where)
    assert "where is a module class, a tuple of them, or a function that is asked" in str(raised.value)
    assert str(raised.value).endswith(".")
    assert says in str(raised.value)
    assert not list(normed(model))


def test_an_exception_in_where_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    before = Picture(model)
    with pytest.raises(ZeroDivisionError):
        apply_all(model, WeightNorm(), lambda name, module: bool(1 / (name != "1")))
    assert_unchanged(model, before)


def some_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.LSTM(4, 3)]), nn.Conv1d(4, 4, 1))


def test_ctrl_c_at_any_line_of_apply_all_leaves_it_undone_or_done() -> None:
    def verb(model: nn.Module) -> list[str]:
        return apply_all(model, WeightNorm(), (nn.Linear, nn.Conv1d))

    def run(model: nn.Module) -> Tensor:
        return model[2](model[0](X)[None].transpose(1, 2)).detach()

    expected, done = run(some_layers()), some_layers()
    assert len(verb(done)) == 2
    outcomes = []
    for model, before in interrupted(some_layers, verb):
        outcomes.append(is_unchanged(model, before))
        assert outcomes[-1] or anatomy(model) == anatomy(done)
        torch.testing.assert_close(run(model), expected)
    assert len(outcomes) > 60
    assert outcomes[0]
    assert not outcomes[-1]


# recompute_all


class Repeated(nn.Module):
    """Uses its weights many times after one recompute."""

    def __init__(self, norm: Any, uses: int) -> None:
        super().__init__()
        self.fc = norm.apply(nn.Linear(4, 4))
        self.uses = uses

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.uses):
            x = torch.tanh(self.fc(x))
        return x


def test_recompute_all_makes_every_weight_fresh() -> None:
    lstm = WeightNorm("weight_hh_l0").apply(nn.LSTM(4, 3))
    WeightNorm("weight_ih_l0", dim=1).apply(lstm)
    model = nn.ModuleDict({"net": Net(), "inlined": WeightNorm().inline(nn.Linear(4, 4)), "lstm": lstm})
    change_parts(model, seed=1)
    state = model.state_dict()
    names = ["net.first.weight", "net.rest.1.weight", "inlined.weight", "lstm.weight_hh_l0", "lstm.weight_ih_l0"]
    recompute_all(model)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        expected = normed_weight(state, name, int(attribute == "weight_ih_l0"))
        torch.testing.assert_close(getattr(model.get_submodule(owner), attribute).detach(), expected)


def test_after_recompute_all_using_a_weight_costs_no_computation() -> None:
    model = Repeated(WeightNorm(), uses=30)
    change_parts(model, seed=1)
    with Count() as count:
        recompute_all(model)
        model(X)
    assert count.of["aten._weight_norm_interface"] == 1
    assert count.of["aten.addmm"] == 30
    torch.testing.assert_close(model.fc.weight.detach(), normed_weight(model.state_dict(), "fc.weight", 0))


@pytest.mark.parametrize("training", [True, False])
def test_recompute_all_advances_a_spectral_norm_once_and_only_in_training_mode(training: bool) -> None:
    model = Repeated(SpectralNorm(), uses=3).train(training)
    u, v, orig = model.fc.weight_u.clone(), model.fc.weight_v.clone(), model.fc.weight_orig.detach()
    if training:
        v = nn.functional.normalize(orig.t() @ u, dim=0)
        u = nn.functional.normalize(orig @ v, dim=0)
    recompute_all(model)
    model(X)
    torch.testing.assert_close([model.fc.weight_u, model.fc.weight_v], [u, v])
    torch.testing.assert_close(model.fc.weight.detach(), spectral_weight(orig, u, v, 0))


def test_recompute_all_of_a_model_without_norms_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 3), hook_weight_norm(nn.Linear(3, 2)))
    before = Picture(model)
    recompute_all(model)
    assert_unchanged(model, before)


# cached


class Twice(nn.Module):
    """A layer whose weight is used twice, and a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.fc = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(torch.tanh(self.fc(x)))) @ self.scale.t()


class TwiceByHand(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.wn.apply(self.fc)
        self.wn.apply(self, name="scale")

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        self.wn.recompute(self)
        return torch.tanh(self.fc(torch.tanh(self.fc(x)))) @ self.scale.t()


def inlined_twice() -> nn.Module:
    model = Twice()
    WeightNorm("scale").inline(model)
    WeightNorm().inline(model.fc)
    return model


def twice_by_hand(model: nn.Module, x: Tensor = X) -> Tensor:
    state = model.state_dict()
    weight = normed_weight(state, "fc.weight", 0)
    for _ in range(2):
        x = torch.tanh(nn.functional.linear(x, weight, state["fc.bias"]))
    return x @ normed_weight(state, "scale", 0).t()


forms = pytest.mark.parametrize("make", [TwiceByHand, inlined_twice], ids=["explicit", "inlined"])


@forms
def test_cached_computes_each_weight_once_on_entry(make: Callable[[], nn.Module]) -> None:
    model = make()
    change_parts(model, seed=1)
    expected = twice_by_hand(model)
    with Count() as count, cached(model) as given:
        assert given is model
        entered = count.of["aten._weight_norm_interface"]
        for _ in range(5):
            torch.testing.assert_close(model(X).detach(), expected)
        recompute_all(model)
    assert (entered, count.of["aten._weight_norm_interface"]) == (2, 2)


@forms
def test_within_cached_the_weights_stay_and_after_it_they_are_fresh(make: Callable[[], nn.Module]) -> None:
    model = make()
    with cached(model):
        expected, weight = twice_by_hand(model), model.fc.weight
        weights = weight.detach().clone(), model.scale.detach().clone()
        change_parts(model, seed=1)
        torch.testing.assert_close(model.fc.weight.detach(), weights[0])
        assert model.fc.weight is weight
        model(X)
        assert model.fc.weight is weight
        torch.testing.assert_close((model.fc.weight.detach(), model.scale.detach()), weights)
    assert not torch.allclose(twice_by_hand(model), expected, atol=1e-2)
    torch.testing.assert_close(model(X).detach(), twice_by_hand(model))
    change_parts(model, seed=2)
    torch.testing.assert_close(model(X).detach(), twice_by_hand(model))


@forms
@pytest.mark.parametrize("passes", [1, 3])
def test_gradients_are_those_of_parametrize_cached(make: Callable[[], nn.Module], passes: int) -> None:
    model, original = make(), Twice()
    parametrized_weight_norm(original, "scale")
    parametrized_weight_norm(original.fc)
    losses = []
    for one, context in ((model, cached(model)), (original, parametrize.cached())):
        with context:
            loss = sum(one(X * index).square().sum() for index in range(1, passes + 1))
            loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    theirs = {name: parameter.grad for name, parameter in original.named_parameters()}
    assert len(ours) == len(theirs) == 5
    for name, key in (("fc.weight", "fc.parametrizations.weight"), ("scale", "parametrizations.scale")):
        torch.testing.assert_close(ours[f"{name}_g"], theirs[f"{key}.original0"])
        torch.testing.assert_close(ours[f"{name}_v"], theirs[f"{key}.original1"])
    torch.testing.assert_close(ours["fc.bias"], theirs["fc.bias"])


@forms
def test_a_training_loop_with_cached_steps_equals_one_without(make: Callable[[], nn.Module]) -> None:
    model, other = make(), make()
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in (model, other)]
    for _ in range(3):
        with cached(model):
            train(model, optimizers[0], (X,), steps=1)
        train(other, optimizers[1], (X,), steps=1)
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


def test_cached_advances_a_spectral_norm_once() -> None:
    model, original = nn.Sequential(SpectralNorm(first="u").inline(nn.Linear(4, 4))), nn.Linear(4, 4)
    with torch.no_grad():
        original.weight.copy_(model[0].weight_orig)
    original = parametrized_spectral_norm(original)
    for part in ("u", "v"):
        getattr(original.parametrizations.weight[0], f"_{part}").copy_(getattr(model[0], f"weight_{part}"))
    with cached(model), parametrize.cached():
        for _ in range(3):
            model(X)
            original(X)
    torch.testing.assert_close(model[0].weight_u, original.parametrizations.weight[0]._u)
    torch.testing.assert_close(model[0].weight_v, original.parametrizations.weight[0]._v)


@forms
def test_cached_nests(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make(), nn.Linear(2, 2))
    with cached(model):
        weight = model[0].fc.weight
        with cached(model[0]):
            change_parts(model, seed=1)
            model(X)
            assert model[0].fc.weight is weight
        model(X)
        assert model[0].fc.weight is weight
    torch.testing.assert_close(model[0](X).detach(), twice_by_hand(model[0]))


def test_after_the_block_an_inlined_weight_is_let_go_and_the_other_stays() -> None:
    inlined, applied = WeightNorm().inline(nn.Linear(4, 4)), WeightNorm().apply(nn.Linear(4, 4))
    with cached(nn.Sequential(inlined, applied)):
        gone, kept = weakref.ref(inlined.weight), applied.weight
    gc.collect()
    assert gone() is None
    assert applied.weight is kept


def test_an_inner_block_of_the_whole_computes_what_the_outer_one_does_not_hold() -> None:
    model = nn.Sequential(WeightNorm().inline(nn.Linear(4, 4)), WeightNorm().inline(nn.Linear(4, 4)))
    with cached(model[0]):
        held = model[0].weight
        change_parts(model, seed=1)
        with cached(model):
            assert model[0].weight is held
            expected = normed_weight(model.state_dict(), "1.weight", 0)
            torch.testing.assert_close(model[1].weight.detach(), expected)
    torch.testing.assert_close(model[0].weight.detach(), normed_weight(model.state_dict(), "0.weight", 0))


@forms
def test_cached_ends_well_with_an_exception(make: Callable[[], nn.Module]) -> None:
    model = make()
    with pytest.raises(ZeroDivisionError), cached(model), cached(model):
        raise ZeroDivisionError
    change_parts(model, seed=1)
    torch.testing.assert_close(model(X).detach(), twice_by_hand(model))


def test_an_exception_while_cached_computes_holds_nothing() -> None:
    model = nn.Sequential(inlined_twice(), WeightNorm().inline(nn.Linear(2, 2)))
    del model[1]._parameters["weight_g"]
    with pytest.raises(AttributeError, match="weight_g"), cached(model):
        pass
    change_parts(model[0], seed=1)
    torch.testing.assert_close(model[0](X).detach(), twice_by_hand(model[0]))


@forms
def test_ctrl_c_at_any_line_of_cached_holds_nothing_afterwards(make: Callable[[], nn.Module]) -> None:
    def verb(model: nn.Module) -> None:
        with cached(model):
            model(X)

    count = 0
    for model, _ in interrupted(make, verb):
        change_parts(model, seed=1)
        torch.testing.assert_close(model(X).detach(), twice_by_hand(model))
        count += 1
    assert count > 20


@forms
def test_cached_has_no_effect_on_what_was_captured_before(make: Callable[[], nn.Module]) -> None:
    model = make()
    captured = [
        torch.jit.script(model),
        torch.jit.trace(model, X),
        torch.export.export(model, (X,)).module(),
        torch.compile(model, backend="aot_eager", fullgraph=True),
    ]
    captured[-1](X)
    with cached(model):
        for way in captured:
            for one in {id(way): way, id(model): model}.values():
                change_parts(one, seed=1)
            expected = twice_by_hand(model if isinstance(way, torch._dynamo.OptimizedModule) else way)
            torch.testing.assert_close(way(X).detach(), expected)


@forms
@pytest.mark.parametrize("way", ["script", "trace", "export", "export_strict", "compile"])
def test_what_is_captured_within_cached_computes_its_weights(make: Callable[[], nn.Module], way: str) -> None:
    model = make()
    with torch.no_grad(), cached(model):
        captured: Any = {
            "script": torch.jit.script,
            "trace": lambda model: torch.jit.trace(model, X),
            "export": lambda model: torch.export.export(model, (X,)).module(),
            "export_strict": lambda model: torch.export.export(model, (X,), strict=True).module(),
            "compile": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
        }[way](model)
        captured(X)
    owner = model if way == "compile" else captured
    change_parts(owner, seed=1)
    torch.testing.assert_close(captured(X).detach(), twice_by_hand(owner))


def test_fx_within_cached_captures_the_computation_of_an_inlined_weight() -> None:
    model = nn.Module()
    model.own = OwnKernel()
    WeightNorm("kernel").inline(model.own)
    with cached(model):
        graph = torch.fx.symbolic_trace(model.own)
    change_parts(graph, seed=1)
    torch.testing.assert_close(graph(X).detach(), X @ normed_weight(graph.state_dict(), "kernel", 0).t())


class OwnKernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel.t()


def test_a_copy_made_within_cached_is_not_held() -> None:
    model = inlined_twice()
    with cached(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for copied in copies:
            change_parts(copied, seed=1)
            torch.testing.assert_close(copied(X).detach(), twice_by_hand(copied))


@forms
def test_a_load_or_a_move_within_cached_is_seen(make: Callable[[], nn.Module]) -> None:
    model, other = make(), make()
    change_parts(other, seed=1)
    with cached(model):
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(X).detach(), twice_by_hand(other))
        model.double()
        torch.testing.assert_close(model(X.double()).detach().float(), twice_by_hand(other))
    change_parts(model.float(), seed=2)
    torch.testing.assert_close(model(X).detach(), twice_by_hand(model))


def test_cached_of_a_model_without_norms_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 3), hook_weight_norm(nn.Linear(3, 2)))
    before = Picture(model)
    with cached(model):
        assert_unchanged(model, before)
    assert_unchanged(model, before)


# fold


def ours_weight_norm(module: nn.Module, name: str = "weight") -> nn.Module:
    return WeightNorm(name).apply(module)


def ours_spectral_norm(module: nn.Module, name: str = "weight") -> nn.Module:
    return SpectralNorm(name).apply(module)


def inlined_weight_norm(module: nn.Module, name: str = "weight") -> nn.Module:
    return WeightNorm(name).inline(module)


ALL_WEIGHT_NORMS = {**WEIGHT_NORMS, "ours": ours_weight_norm, "inlined": inlined_weight_norm}
ALL_NORMS = {f"weight_{key}": norm for key, norm in ALL_WEIGHT_NORMS.items()}
ALL_NORMS |= {f"spectral_{key}": norm for key, norm in {**SPECTRAL_NORMS, "ours": ours_spectral_norm}.items()}
all_norms = pytest.mark.parametrize("norm", ALL_NORMS.values(), ids=ALL_NORMS.keys())


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@all_norms
def test_folding_leaves_the_ordinary_layer_with_the_weight_of_the_parts(layer: Layer, norm: Any) -> None:
    model = layer.model(norm).eval()
    change_values(model, seed=1)
    expected = expected_of(layer, model)
    assert sorted(fold(model)) == sorted(f"layer.{name}" for name in layer.names)
    assert type(model.layer) is type(layer.make())
    assert hooks_of(model) == []
    torch.testing.assert_close(model(*layer.inputs()).detach(), expected)
    plain = layer.model(None)
    assert sorted(model.state_dict()) == sorted(plain.state_dict())
    assert vars(model.layer).keys() == vars(plain.layer).keys()
    assert all(type(parameter) is nn.Parameter and parameter.requires_grad for parameter in model.parameters())
    plain.eval().load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(*layer.inputs()), model(*layer.inputs()))
    train(model.train(), torch.optim.SGD(model.parameters(), 0.1), layer.inputs(), steps=1)


def expected_of(layer: Layer, model: nn.Module) -> Tensor:
    """The output, from the parts in whatever spelling they are."""
    dim = 1 if isinstance(model.layer, nn.ConvTranspose1d | nn.ConvTranspose2d) else 0
    weights = {}
    for name in layer.names:
        short = {"original0": "g", "original1": "v", "original": "orig", "0._u": "u", "0._v": "v"}
        state = dict(model.layer.state_dict())
        for spelled, part in short.items():
            key = f"parametrizations.{name}.{spelled}"
            if key in state:
                state[f"{name}_{part}"] = state[key]
        if f"{name}_orig" in state:
            parts = (state[f"{name}_{part}"] for part in ("orig", "u", "v"))
            weights[name] = spectral_weight(*parts, dim)
        else:
            weights[name] = normed_weight(state, name, 0)
    return layer.expected(weights, model)


@all_norms
def test_what_was_frozen_stays_frozen(norm: Any) -> None:
    model = LINEAR.model(norm).requires_grad_(False)
    assert fold(model) == ["layer.weight"]
    assert not model.layer.weight.requires_grad


def test_what_was_folded_of_several_names_and_of_mixed_spellings_is_returned_in_order() -> None:
    lstm = WeightNorm("weight_hh_l0").apply(hook_weight_norm(nn.LSTM(4, 4), "weight_ih_l0"))
    model = nn.Sequential(
        parametrized_spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4), lstm, SpectralNorm().inline(nn.Linear(4, 4))
    )
    assert sorted(fold(model)) == ["0.weight", "2.weight_hh_l0", "2.weight_ih_l0", "3.weight"]
    assert [type(module) for module in model] == [nn.Linear, nn.Linear, nn.LSTM, nn.Linear]
    assert fold(model) == []


def test_the_model_itself_may_be_the_layer() -> None:
    for norm in ALL_NORMS.values():
        layer = norm(nn.Linear(4, 3))
        assert fold(layer) == ["weight"]
        assert type(layer) is nn.Linear


class ParameterHolder(nn.Module):
    """Has no forward: its owner reads what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))


def with_forward_on_the_instance(norm: Any) -> nn.Module:
    module = norm(nn.Linear(4, 3))
    module.forward = lambda x: nn.functional.linear(x, module.weight)
    return module


WITHOUT_INLINED = {key: norm for key, norm in ALL_NORMS.items() if key != "weight_inlined"}


@pytest.mark.parametrize("norm", WITHOUT_INLINED.values(), ids=WITHOUT_INLINED.keys())
def test_folding_needs_no_forward(norm: Any) -> None:
    model = nn.Sequential(norm(ParameterHolder()), with_forward_on_the_instance(norm))
    assert fold(model) == ["0.weight", "1.weight"]
    assert type(model[0]) is ParameterHolder
    assert type(model[1]) is nn.Linear
    torch.testing.assert_close(model[1](X), X @ model[1].weight.t())


@forms
@pytest.mark.parametrize("ends", [fold, lambda model: WeightNorm().remove(model.fc)], ids=["fold", "remove"])
def test_a_norm_may_end_within_cached(make: Callable[[], nn.Module], ends: Any) -> None:
    model = make()
    expected = twice_by_hand(model)
    with cached(model):
        ends(model)
        torch.testing.assert_close(model.fc.weight, model.fc.weight.detach().requires_grad_())
    if ends is fold:
        torch.testing.assert_close(model(X).detach(), expected)


@forms
def test_a_norm_that_ends_within_cached_does_not_hide_an_exception(make: Callable[[], nn.Module]) -> None:
    def fail(model: nn.Module) -> None:
        fold(model)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), cached(make()) as model:
        fail(model)


def test_nothing_to_fold_returns_an_empty_list_and_changes_nothing() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wn = WeightNorm()  # applied to nothing yet
            self.body = nn.Sequential(nn.Linear(4, 3), parametrizations.orthogonal(nn.Linear(3, 3)))

    model = Holds()
    before = Picture(model)
    assert fold(model) == []
    assert_unchanged(model, before)
    model.wn.apply(model.body[0])


def ways_out(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """A model in every form, each made of the model as it is."""
    yield "eager", model
    yield "deepcopy", copy.deepcopy(model)
    yield "pickle", pickle.loads(pickle.dumps(model))
    scripted = torch.jit.script(model)
    yield "script", scripted
    yield "script, saved and loaded", saved_and_loaded(scripted)
    yield "freeze", torch.jit.freeze(torch.jit.script(copy.deepcopy(model).eval()))
    yield "optimize_for_inference", torch.jit.optimize_for_inference(torch.jit.script(copy.deepcopy(model).eval()))
    yield "explicit_wn.script, frozen", torch.jit.freeze(explicit_wn.script(copy.deepcopy(model).eval()))
    yield "trace", torch.jit.trace(model, X)
    yield "fx", torch.fx.symbolic_trace(model)
    yield "export", torch.export.export(model, (X,)).module()
    yield "strict export", torch.export.export(model, (X,), strict=True).module()
    yield "compile", torch.compile(model, backend="aot_eager", fullgraph=True)


def saved_and_loaded(scripted: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("build", [Net, TwiceByHand], ids=["layers", "own parameter"])
def test_a_forward_that_calls_recompute_runs_everywhere_as_it_is_written(build: Callable[[], nn.Module]) -> None:
    model = build()
    change_parts(model, seed=1)
    expected = by_hand(model) if build is Net else twice_by_hand(model)
    assert len(fold(model)) == 2
    for way, captured in ways_out(model):
        torch.testing.assert_close(captured(X).detach(), expected, msg=lambda text, way=way: f"{way}: {text}")


def test_a_folded_model_trains_its_ordinary_weights() -> None:
    model, plain = Net(), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    fold(model)
    with torch.no_grad():
        for index, layer in ((0, model.first), (2, model.rest[1])):
            plain[index].weight.copy_(layer.weight)
            plain[index].bias.copy_(layer.bias)
    for one in (model, plain):
        train(one, torch.optim.SGD(one.parameters(), 0.1), (X,))
    torch.testing.assert_close(model(X), plain(X))


LOAD = """
import sys, torch
model, x, expected = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(model(x), expected)
assert type(model.first) is torch.nn.Linear
"""


def test_a_folded_model_loads_in_a_fresh_process(tmp_path: Path) -> None:
    model = Net()
    change_parts(model, seed=1)
    fold(model)
    torch.save((model, X, model(X)), tmp_path / "folded.pt")
    script = [sys.executable, "-W", "error", "-c", LOAD, str(tmp_path / "folded.pt")]
    subprocess.run(script, check=True)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantization_by_exact_class_sees_a_folded_layer() -> None:
    model = Net().eval()
    change_parts(model, seed=1)
    expected = by_hand(model)

    def quantized(model: nn.Module) -> nn.Module:
        result: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        return result

    assert isinstance(quantized(model).first, nn.Linear)  # passed over
    fold(model)
    small = quantized(model)
    assert isinstance(small.first, torch.ao.nn.quantized.dynamic.Linear)
    torch.testing.assert_close(small(X), expected, atol=0.1, rtol=0)


def test_one_norm_object_in_two_models_is_ended_in_the_folded_one_only() -> None:
    wn = WeightNorm()
    model, other = Net(wn), Net(wn)
    fold(model)
    change_parts(other, seed=1)
    torch.testing.assert_close(other(X).detach(), by_hand(other))
    assert isinstance(wn, WeightNorm)
    wn.apply(nn.Linear(2, 2))
    model(X)


def test_one_norm_object_in_two_parts_is_ended_in_the_folded_one_only() -> None:
    wn = WeightNorm()
    model = nn.ModuleDict({"encoder": Net(wn), "decoder": Net(wn)})
    assert fold(model["encoder"]) == ["first.weight", "rest.1.weight"]
    change_parts(model["decoder"], seed=1)
    torch.testing.assert_close(model["decoder"](X).detach(), by_hand(model["decoder"]))
    assert fold(model) == ["decoder.first.weight", "decoder.rest.1.weight"]


@pytest.mark.parametrize("on_the_copy", [True, False])
def test_folding_leaves_copies_whole(on_the_copy: bool) -> None:
    model = Net()
    copied = copy.deepcopy(model)
    folded, other = (copied, model) if on_the_copy else (model, copied)
    before = Picture(other)
    fold(folded)
    assert_unchanged(other, before)
    change_parts(other, seed=1)
    torch.testing.assert_close(other(X).detach(), by_hand(other))


def test_a_folded_norm_says_that_it_was_ended() -> None:
    model = Net()
    fold(model)
    with pytest.raises(ValueError, match="was ended by fold"):
        model.wn.apply(model.first)
    assert "wn" in dict(model.named_children())
    repr(model)
    called: list[nn.Module] = []
    model.apply(called.append)
    assert model.first in called
    assert list(normed(model)) == []


def test_a_part_that_another_tool_computes_is_refused_by_name_and_nothing_is_folded() -> None:
    model = nn.Sequential(WeightNorm().apply(nn.Linear(4, 4)), hook_weight_norm(nn.Linear(4, 4)), Net())
    prune.l1_unstructured(model[2].first, "weight_v", 0.5)
    before = Picture(model)
    with pytest.raises(ValueError, match=r"2\.first.*weight_v.*computed by another tool"):
        fold(model)
    assert_unchanged(model, before)


def every_kind() -> nn.Module:
    torch.manual_seed(0)
    lstm = WeightNorm("weight_hh_l0").inline(hook_weight_norm(nn.LSTM(4, 4), "weight_ih_l0"))
    return nn.ModuleDict(
        {
            "net": Net(),
            "hook": hook_weight_norm(nn.Linear(2, 4)),
            "parametrized": parametrized_weight_norm(nn.Linear(4, 4)),
            "spectral": hook_spectral_norm(nn.Linear(4, 4)),
            "inlined": SpectralNorm().inline(nn.Linear(4, 4)),
            "lstm": lstm,
        }
    ).eval()


def run_every_kind(model: nn.Module) -> Tensor:
    x = X
    for layer in model.values():
        x = layer(x)
    return x[0].detach()  # type: ignore[no-any-return]


def test_ctrl_c_at_any_line_of_fold_leaves_it_undone_or_done() -> None:
    expected, done = run_every_kind(every_kind()), every_kind()
    assert len(fold(done)) == 8
    outcomes = []
    for model, before in interrupted(every_kind, fold):
        outcomes.append(is_unchanged(model, before))
        assert outcomes[-1] or anatomy(model) == anatomy(done)
        torch.testing.assert_close(run_every_kind(model), expected)
    assert len(outcomes) > 150
    assert outcomes[0]
    assert not outcomes[-1]


# report


def mixed() -> nn.Module:
    return nn.ModuleDict(
        {
            "ours": WeightNorm(dim=None).apply(nn.Linear(4, 3)),
            "inlined": SpectralNorm().inline(nn.ConvTranspose1d(4, 3, 2)),
            "hook": hook_weight_norm(nn.Conv1d(4, 3, 2), dim=1),
            "spectral": hook_spectral_norm(nn.Linear(4, 3)),
            "deep": nn.ModuleList(
                [parametrized_weight_norm(nn.Linear(4, 3)), parametrized_spectral_norm(nn.Linear(4, 3))]
            ),
            "plain": nn.LSTM(4, 3),
            "orthogonal": parametrizations.orthogonal(nn.Linear(3, 3)),
            "norm": nn.LayerNorm(3),
        }
    )


def test_a_report_has_a_row_for_every_weight_in_whatever_spelling() -> None:
    model = mixed()
    model["spectral"](X)  # torch's hook computes nothing before that
    rows = {row.name: row for row in report(model).rows}
    shown = {
        name: (row.norm, row.spelling, row.dim, row.shape, row.parameters, row.state) for name, row in rows.items()
    }
    assert shown == {
        "ours.weight": ("WeightNorm", "ours", "None", (3, 4), 13, "fresh"),
        "inlined.weight": ("SpectralNorm", "ours", "1", (4, 3, 2), 24, "fresh"),
        "hook.weight": ("WeightNorm", "hook", "1", (3, 4, 2), 28, "fresh"),
        "spectral.weight": ("SpectralNorm", "hook", "0", (3, 4), 12, "fresh"),
        "deep.0.weight": ("WeightNorm", "parametrization", "0", (3, 4), 15, "fresh"),
        "deep.1.weight": ("SpectralNorm", "parametrization", "0", (3, 4), 12, "fresh"),
        "plain.weight_ih_l0": ("", "plain", "", (12, 4), 48, ""),
        "plain.weight_hh_l0": ("", "plain", "", (12, 3), 36, ""),
        "orthogonal.weight": ("Orthogonal", "parametrization", "", (3, 3), 9, "fresh"),
    }
    assert rows["ours.weight"].parts == "g number, v 3×4"
    assert rows["hook.weight"].parts == "g 1×4×1, v 3×4×2"
    assert rows["inlined.weight"].parts == "orig 4×3×2, u 3, v 8"


@pytest.mark.parametrize("training", [True, False])
def test_a_report_changes_nothing(training: bool) -> None:
    model = mixed().train(training)
    change_values(model, seed=1)
    before = Picture(model)
    report(model)
    assert_unchanged(model, before)


def test_a_report_tells_stale_from_fresh() -> None:
    model = mixed()
    change_values(model, seed=1)
    states = {row.name: row.state for row in report(model).rows if row.norm}
    stale = {"ours.weight", "hook.weight", "spectral.weight"}  # the others compute theirs when it is read
    assert {name for name, state in states.items() if state == "stale"} == stale
    recompute_all(model)
    model["hook"](torch.ones(1, 4, 5))
    model["spectral"](X)
    assert {row.state for row in report(model).rows if row.norm} == {"fresh"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_hooks_weight_is_fresh_after_a_forward_in_every_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(hook_weight_norm(nn.Linear(33, 65)), hook_weight_norm(nn.Linear(65, 65), dim=1)).to(dtype)
    model(torch.randn(2, 33, dtype=dtype))
    assert [row.state for row in report(model).rows] == ["fresh", "fresh"]
    change_parts(model, seed=1)
    assert [row.state for row in report(model).rows] == ["stale", "stale"]


def test_a_hooks_weight_of_nan_is_as_fresh_as_its_parts() -> None:
    layer = hook_weight_norm(nn.Linear(3, 2))
    with torch.no_grad():
        layer.weight_v.fill_(torch.nan)
    layer(torch.ones(1, 3))
    assert [row.state for row in report(layer).rows] == ["fresh"]


def test_a_hooks_weight_that_was_left_behind_by_a_cast_or_a_move_is_stale() -> None:
    for moved in (torch.float64, torch.bfloat16, torch.device("meta")):
        model = hook_weight_norm(nn.Linear(3, 2)).to(moved)
        assert [row.state for row in report(model).rows] == ["stale"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(),
        lambda: nn.ReLU(),
        lambda: nn.LazyLinear(3),
        lambda: nn.Sequential(nn.LazyConv1d(3, 1), nn.BatchNorm1d(3)),
        lambda: torch.jit.script(nn.Linear(2, 2)),
        lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))),
        lambda: torch.export.export(nn.Linear(4, 2), (X,)).module(),
        lambda: WeightNorm().inline(nn.Embedding(3, 2).to("meta")),
        lambda: hook_weight_norm(nn.Linear(3, 2).to("meta")),
        lambda: parametrized_weight_norm(nn.Linear(3, 2).to("meta")),
        lambda: nn.ParameterList([torch.ones(2, 2)]),
        lambda: nn.EmbeddingBag(3, 2, sparse=True),
    ],
    ids=range(12),
)
def test_a_report_works_on_any_model(make: Callable[[], nn.Module]) -> None:
    text = str(report(make()))
    assert text.splitlines()[0].split() == [field.name for field in attrs.fields(explicit_wn.models.Row)]


def test_a_report_prints_as_a_table_and_shows_in_a_notebook() -> None:
    table = report(nn.ModuleDict({"a": WeightNorm().apply(nn.Linear(4, 3)), "<b>": nn.Linear(2, 1)}))
    assert str(table) == repr(table)
    assert [line.split() for line in str(table).splitlines()] == [
        ["name", "norm", "spelling", "dim", "shape", "parts", "parameters", "state"],
        ["-" * width for width in (10, 10, 8, 3, 5, 12, 10, 5)],
        ["a.weight", "WeightNorm", "ours", "0", "3×4", "g", "3×1,", "v", "3×4", "15", "fresh"],
        ["<b>.weight", "plain", "1×2", "2"],
    ]
    html = table._repr_html_()
    assert html.count("<tr>") == html.count("</tr>") == 3
    assert "&lt;b&gt;.weight" in html
    assert "<b>" not in html
    assert attrs.asdict(table.rows[0], recurse=False)["shape"] == (3, 4)


def test_a_report_shows_a_shared_module_once() -> None:
    shared = WeightNorm().apply(nn.Linear(4, 4))
    assert [row.name for row in report(nn.Sequential(shared, shared)).rows] == ["0.weight"]


def test_a_report_after_convert_and_fold_shows_what_they_did() -> None:
    model = mixed()
    names = {row.name for row in report(model).rows if row.norm in ("WeightNorm", "SpectralNorm")}
    convert(model)
    assert {row.name for row in report(model).rows if row.spelling == "ours"} == names
    fold(model)
    assert {row.spelling for row in report(model).rows if row.name in names} == {"plain"}


VERBS = {
    "apply_all": lambda model: explicit_wn.apply_all(model, WeightNorm()),
    "convert": explicit_wn.convert,
    "fold": explicit_wn.fold,
    "report": explicit_wn.report,
    "recompute_all": explicit_wn.recompute_all,
    "cached": lambda model: explicit_wn.cached(model).__enter__(),
    "check": explicit_wn.check,
    "assign_all": lambda model: explicit_wn.assign_all(model, print),
    "normed": lambda model: list(explicit_wn.normed(model)),
    "steps": explicit_wn.steps,
    "record": lambda model: explicit_wn.record(model).__enter__(),
    "data_dependent_init": explicit_wn.data_dependent_init,
    "detect_stale": lambda model: explicit_wn.detect_stale(model).__enter__(),
}


WRONG: dict[str, Callable[[], Any]] = {
    "a norm": WeightNorm,
    "a str": lambda: "model",
    "an int": lambda: 3,
    "a script": lambda: torch.jit.script(nn.Linear(2, 2)),
}
REFUSED = [(verb, wrong) for verb in VERBS for wrong in WRONG if (verb, wrong) != ("report", "a script")]


@pytest.mark.parametrize(("verb", "wrong"), REFUSED)
def test_what_is_no_model_is_refused(verb: str, wrong: str) -> None:
    got = {"a norm": r"the norm WeightNorm\('weight', dim=0\)", "a script": "a RecursiveScriptModule"}
    says = f"{verb} wants the model first, an nn.Module in eager mode, and got {got.get(wrong, wrong)}"
    with pytest.raises(TypeError, match=says):
        VERBS[verb](WRONG[wrong]())


def test_apply_all_wants_a_norm_object() -> None:
    with pytest.raises(TypeError, match=r"apply_all wants a norm object second, WeightNorm\(\) for example"):
        explicit_wn.apply_all(nn.Linear(2, 2), WeightNorm)  # type: ignore[arg-type]
