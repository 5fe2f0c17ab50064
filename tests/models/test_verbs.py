"""The verbs over a whole model: normed, apply_all, recompute_all and cached; and what each says of what is no model."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from layers import change_parts
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from whole_models import (
    Count,
    Picture,
    Twice,
    TwiceByHand,
    TwoLayers,
    X,
    assert_unchanged,
    check_ctrl_c_at_every_line,
    hook_weight_norm,
    hooks_of,
    interrupted,
    normed_weight,
    spectral_weight,
    train,
    twice_by_hand,
    unchanged,
)

import explicit_wn
from explicit_wn import SpectralNorm, WeightNorm, apply_all, cached, fold, normed, recompute_all

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
    "the hook": (lambda: hook_weight_norm(nn.Linear(4, 4)), "torch's hook norms it;"),
    "the parametrization": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "it is parametrized"),
    "lazy": (lambda: nn.LazyLinear(4), "not initialized"),
    "a taken name": (lambda: taken(nn.Linear(4, 4)), "weight_g"),
}


def taken(layer: nn.Module) -> nn.Module:
    layer.weight_g = nn.Parameter(torch.ones(1))
    return layer


@pytest.mark.parametrize(("make", "says"), REFUSED_LAYERS.values(), ids=REFUSED_LAYERS.keys())
def test_one_layer_that_refuses_is_named_and_none_is_normed(make: Any, says: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.ModuleDict({"bad": make()}), nn.Linear(4, 4))
    with unchanged(model), pytest.raises(ValueError, match=rf"^2\.bad: .*{says}"):
        apply_all(model, WeightNorm())


def test_where_that_chooses_what_has_no_weight_is_refused_and_nothing_is_normed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with unchanged(model), pytest.raises(ValueError, match=r"^1: .*it has no parameters; leave such modules out"):
        apply_all(model, WeightNorm(), lambda module: not isinstance(module, nn.Sequential))


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
    with unchanged(model), pytest.raises(ZeroDivisionError):
        apply_all(model, WeightNorm(), lambda name, module: bool(1 / (name != "1")))


def some_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.LSTM(4, 3)]), nn.Conv1d(4, 4, 1))


def test_ctrl_c_at_any_line_of_apply_all_leaves_it_undone_or_done() -> None:
    def verb(model: nn.Module) -> list[str]:
        return apply_all(model, WeightNorm(), (nn.Linear, nn.Conv1d))

    def run(model: nn.Module) -> Tensor:
        return model[2](model[0](X)[None].transpose(1, 2)).detach()

    assert len(verb(some_layers())) == 2
    check_ctrl_c_at_every_line(some_layers, verb, run, lines=60)


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
    model = nn.ModuleDict({"net": TwoLayers(), "inlined": WeightNorm().inline(nn.Linear(4, 4)), "lstm": lstm})
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
    with unchanged(model):
        recompute_all(model)


# cached


def inlined_twice() -> nn.Module:
    model = Twice()
    WeightNorm("scale").inline(model)
    WeightNorm().inline(model.fc)
    return model


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
    parametrizations.weight_norm(original, "scale")
    parametrizations.weight_norm(original.fc)
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
    original = parametrizations.spectral_norm(original)
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


# What is no model


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
