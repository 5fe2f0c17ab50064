"""fold: what it leaves of every kind of layer and norm, where it runs, and what it refuses."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from captured import reloaded_script
from layers import change_parts, holding
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from whole_models import (
    LAYERS,
    LINEAR,
    SPECTRAL_NORMS,
    WEIGHT_NORMS,
    Layer,
    TwiceByHand,
    TwoLayers,
    X,
    change_values,
    check_ctrl_c_at_every_line,
    hook_spectral_norm,
    hook_weight_norm,
    hooks_of,
    normed_weight,
    spectral_weight,
    train,
    twice_by_hand,
    two_layers_by_hand,
    unchanged,
)

import explicit_wn
from explicit_wn import SpectralNorm, WeightNorm, fold, normed


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
        parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4), lstm, SpectralNorm().inline(nn.Linear(4, 4))
    )
    assert sorted(fold(model)) == ["0.weight", "2.weight_hh_l0", "2.weight_ih_l0", "3.weight"]
    assert [type(module) for module in model] == [nn.Linear, nn.Linear, nn.LSTM, nn.Linear]
    assert fold(model) == []


def test_the_model_itself_may_be_the_layer() -> None:
    for norm in ALL_NORMS.values():
        layer = norm(nn.Linear(4, 3))
        assert fold(layer) == ["weight"]
        assert type(layer) is nn.Linear


def with_forward_on_the_instance(norm: Any) -> nn.Module:
    module = norm(nn.Linear(4, 3))
    module.forward = lambda x: nn.functional.linear(x, module.weight)
    return module


WITHOUT_INLINED = {key: norm for key, norm in ALL_NORMS.items() if key != "weight_inlined"}


@pytest.mark.parametrize("norm", WITHOUT_INLINED.values(), ids=WITHOUT_INLINED.keys())
def test_folding_needs_no_forward(norm: Any) -> None:
    model = nn.Sequential(norm(holding(torch.randn(3, 4))), with_forward_on_the_instance(norm))
    assert fold(model) == ["0.weight", "1.weight"]
    assert type(model[0]) is nn.Module
    assert type(model[1]) is nn.Linear
    torch.testing.assert_close(model[1](X), X @ model[1].weight.t())


def test_nothing_to_fold_returns_an_empty_list_and_changes_nothing() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wn = WeightNorm()  # applied to nothing yet
            self.body = nn.Sequential(nn.Linear(4, 3), parametrizations.orthogonal(nn.Linear(3, 3)))

    model = Holds()
    with unchanged(model):
        assert fold(model) == []
    model.wn.apply(model.body[0])


def ways_out(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """A model in every form, each made of the model as it is."""
    yield "eager", model
    yield "deepcopy", copy.deepcopy(model)
    yield "pickle", pickle.loads(pickle.dumps(model))
    scripted = torch.jit.script(model)
    yield "script", scripted
    yield "script, saved and loaded", reloaded_script(scripted)
    yield "freeze", torch.jit.freeze(torch.jit.script(copy.deepcopy(model).eval()))
    yield "optimize_for_inference", torch.jit.optimize_for_inference(torch.jit.script(copy.deepcopy(model).eval()))
    yield "explicit_wn.script, frozen", torch.jit.freeze(explicit_wn.script(copy.deepcopy(model).eval()))
    yield "trace", torch.jit.trace(model, X)
    yield "fx", torch.fx.symbolic_trace(model)
    yield "export", torch.export.export(model, (X,)).module()
    yield "strict export", torch.export.export(model, (X,), strict=True).module()
    yield "compile", torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("build", [TwoLayers, TwiceByHand], ids=["layers", "own parameter"])
def test_a_forward_that_calls_recompute_runs_everywhere_as_it_is_written(build: Callable[[], nn.Module]) -> None:
    model = build()
    change_parts(model, seed=1)
    expected = two_layers_by_hand(model) if build is TwoLayers else twice_by_hand(model)
    assert len(fold(model)) == 2
    for way, captured in ways_out(model):
        torch.testing.assert_close(captured(X).detach(), expected, msg=lambda text, way=way: f"{way}: {text}")


def test_a_folded_model_trains_its_ordinary_weights() -> None:
    model, plain = TwoLayers(), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
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
    model = TwoLayers()
    change_parts(model, seed=1)
    fold(model)
    torch.save((model, X, model(X)), tmp_path / "folded.pt")
    script = [sys.executable, "-W", "error", "-c", LOAD, str(tmp_path / "folded.pt")]
    subprocess.run(script, check=True)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantization_by_exact_class_sees_a_folded_layer() -> None:
    model = TwoLayers().eval()
    change_parts(model, seed=1)
    expected = two_layers_by_hand(model)

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
    model, other = TwoLayers(wn), TwoLayers(wn)
    fold(model)
    change_parts(other, seed=1)
    torch.testing.assert_close(other(X).detach(), two_layers_by_hand(other))
    assert isinstance(wn, WeightNorm)
    wn.apply(nn.Linear(2, 2))
    model(X)


def test_one_norm_object_in_two_parts_is_ended_in_the_folded_one_only() -> None:
    wn = WeightNorm()
    model = nn.ModuleDict({"encoder": TwoLayers(wn), "decoder": TwoLayers(wn)})
    assert fold(model["encoder"]) == ["first.weight", "rest.1.weight"]
    change_parts(model["decoder"], seed=1)
    torch.testing.assert_close(model["decoder"](X).detach(), two_layers_by_hand(model["decoder"]))
    assert fold(model) == ["decoder.first.weight", "decoder.rest.1.weight"]


@pytest.mark.parametrize("on_the_copy", [True, False])
def test_folding_leaves_copies_whole(on_the_copy: bool) -> None:
    model = TwoLayers()
    copied = copy.deepcopy(model)
    folded, other = (copied, model) if on_the_copy else (model, copied)
    with unchanged(other):
        fold(folded)
    change_parts(other, seed=1)
    torch.testing.assert_close(other(X).detach(), two_layers_by_hand(other))


def test_a_folded_norm_says_that_it_was_ended() -> None:
    model = TwoLayers()
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
    model = nn.Sequential(WeightNorm().apply(nn.Linear(4, 4)), hook_weight_norm(nn.Linear(4, 4)), TwoLayers())
    prune.l1_unstructured(model[2].first, "weight_v", 0.5)
    with unchanged(model), pytest.raises(ValueError, match=r"2\.first.*weight_v.*computed by another tool"):
        fold(model)


def every_kind() -> nn.Module:
    torch.manual_seed(0)
    lstm = WeightNorm("weight_hh_l0").inline(hook_weight_norm(nn.LSTM(4, 4), "weight_ih_l0"))
    return nn.ModuleDict(
        {
            "net": TwoLayers(),
            "hook": hook_weight_norm(nn.Linear(2, 4)),
            "parametrized": parametrizations.weight_norm(nn.Linear(4, 4)),
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
    assert len(fold(every_kind())) == 8
    check_ctrl_c_at_every_line(every_kind, fold, run_every_kind, lines=150)
