"""torch's two spellings of a norm: converting them, refusing what cannot be, and loading every checkpoint anywhere."""

import copy
import itertools
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layers import Net, change_parts
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook
from whole_models import (
    CONV1D,
    LAYERS,
    LINEAR,
    SPECTRAL_NORMS,
    WEIGHT_NORMS,
    Count,
    Holder,
    Layer,
    Picture,
    assert_unchanged,
    change_values,
    check_ctrl_c_at_every_line,
    hook_spectral_norm,
    hook_weight_norm,
    hooks_of,
    normed_weight,
    spectral_weight,
    torch_hooks_of,
    train,
    unchanged,
)

from explicit_wn import SpectralNorm, WeightNorm, convert, fold, normed, report

Norm = Callable[..., nn.Module]

layers = pytest.mark.parametrize("layer", LAYERS, ids=str)
weight_norms = pytest.mark.parametrize("norm", WEIGHT_NORMS.values(), ids=WEIGHT_NORMS.keys())
spectral_norms = pytest.mark.parametrize("norm", SPECTRAL_NORMS.values(), ids=SPECTRAL_NORMS.keys())
BOTH_NORMS = {f"weight_{key}": norm for key, norm in WEIGHT_NORMS.items()}
BOTH_NORMS |= {f"spectral_{key}": norm for key, norm in SPECTRAL_NORMS.items()}
both_norms = pytest.mark.parametrize("norm", BOTH_NORMS.values(), ids=BOTH_NORMS.keys())


class Double(nn.Module):
    """A parametrization that is no norm."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def rows_of(layer: nn.Module) -> int:
    """The dimension that spectral norm takes as the matrix's rows by default."""
    return 1 if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) else 0


# Same numbers, on the same parameters


@layers
@weight_norms
def test_a_converted_weight_norm_gives_the_same_and_then_what_its_parts_say(layer: Layer, norm: Norm) -> None:
    model, original = layer.model(norm), layer.model(norm)
    parameters = list(model.parameters())
    assert sorted(convert(model)) == sorted(f"layer.{name}" for name in layer.names)
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    assert len(list(model.parameters())) == len(parameters)
    torch.testing.assert_close(model(*layer.inputs()), original(*layer.inputs()))

    change_parts(model, seed=1)
    state = model.state_dict()
    weights = {name: normed_weight(state, f"layer.{name}", 0) for name in layer.names}
    torch.testing.assert_close(model(*layer.inputs()).detach(), layer.expected(weights, model))


@layers
@spectral_norms
def test_a_converted_spectral_norm_gives_the_same_and_then_what_its_parts_say(layer: Layer, norm: Norm) -> None:
    model, original = layer.model(norm).eval(), layer.model(norm).eval()
    assert sorted(convert(model)) == sorted(f"layer.{name}" for name in layer.names)
    torch.testing.assert_close(model(*layer.inputs()), original(*layer.inputs()))

    change_values(model, seed=1)
    parts = dict(model.layer.named_parameters(recurse=False)) | dict(model.layer.named_buffers(recurse=False))
    weights = {
        name: spectral_weight(*(parts[f"{name}_{part}"] for part in ("orig", "u", "v")), rows_of(model.layer)).detach()
        for name in layer.names
    }
    torch.testing.assert_close(model(*layer.inputs()).detach(), layer.expected(weights, model))


@pytest.mark.parametrize("dim", [0, 1, 2, -2, -1, None])
@weight_norms
def test_every_dim_keeps_its_meaning(norm: Norm, dim: int | None) -> None:
    model, original = CONV1D.model(norm, dim=dim), CONV1D.model(norm, dim=dim)
    convert(model)
    torch.testing.assert_close(model(*CONV1D.inputs()), original(*CONV1D.inputs()))
    change_parts(model, seed=1)
    weight = normed_weight(model.state_dict(), "layer.weight", 1 if dim == -2 else dim)
    torch.testing.assert_close(model(*CONV1D.inputs()).detach(), CONV1D.expected({"weight": weight}, model))
    ((_, _, found),) = normed(model)
    assert found.dim == (None if dim == -1 else dim)


@pytest.mark.parametrize("layer", [LAYERS[4], LAYERS[5]], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@weight_norms
def test_a_transposed_convolution_keeps_the_dim_it_was_normed_with(layer: Layer, norm: Norm, dim: int) -> None:
    model = layer.model(norm, dim=dim)
    convert(model)
    change_parts(model, seed=1)
    weight = normed_weight(model.state_dict(), "layer.weight", dim)
    torch.testing.assert_close(model(*layer.inputs()).detach(), layer.expected({"weight": weight}, model))


def is_advanced_by_every_read(layer: Layer, norm: Norm) -> bool:
    """torch's RNNs read a weight several times per forward, and each read of this parametrization is an iteration."""
    return norm is parametrizations.spectral_norm and layer.kind in ("LSTM", "GRU")


PAIRS_TO_TRAIN = [
    pytest.param(layer, norm, id=f"{kind}-{layer}")
    for layer in LAYERS
    for kind, norm in BOTH_NORMS.items()
    if not is_advanced_by_every_read(layer, norm)
]


@pytest.mark.parametrize(("layer", "norm"), PAIRS_TO_TRAIN)
def test_a_converted_model_trains_like_its_original(layer: Layer, norm: Norm) -> None:
    model, original = layer.model(norm), layer.model(norm)
    parameters, others = list(model.parameters()), list(original.parameters())
    optimizers = [torch.optim.SGD(values, lr=0.1, momentum=0.9) for values in (parameters, others)]
    convert(model)  # after the optimizer was made: it holds the same parameters
    for trained, optimizer in zip((model, original), optimizers, strict=True):
        train(trained, optimizer, layer.inputs(), steps=5)
    for parameter, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(parameter, other)
    for buffer, other in zip(model.buffers(), original.buffers(), strict=True):  # u and v of spectral norm
        torch.testing.assert_close(buffer, other)
    torch.testing.assert_close(model.eval()(*layer.inputs()), original.eval()(*layer.inputs()))


@pytest.mark.parametrize(
    "layer", [layer for layer in LAYERS if is_advanced_by_every_read(layer, parametrizations.spectral_norm)], ids=str
)
def test_what_every_read_advances_trains_like_its_original_once_u_and_v_are_found(layer: Layer) -> None:
    model, original = layer.model(parametrizations.spectral_norm), layer.model(parametrizations.spectral_norm)
    parameters, others = list(model.parameters()), list(original.parameters())
    convert(model)
    for one, values in ((model, parameters), (original, others)):
        with torch.no_grad():
            for _ in range(200):
                one(*layer.inputs())
        train(one, torch.optim.SGD(values, lr=0.01), layer.inputs())
    torch.testing.assert_close(parameters, others, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.eval()(*layer.inputs()), original.eval()(*layer.inputs()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"n_power_iterations": 3}, {"eps": 1e-3}, {"dim": 1}], ids=str)
@spectral_norms
def test_the_settings_of_a_spectral_norm_are_kept(norm: Norm, options: dict[str, Any]) -> None:
    model, original = CONV1D.model(norm, **options), CONV1D.model(norm, **options)
    with torch.no_grad():  # so small that eps matters
        for parameter in (*model.parameters(), *original.parameters()):
            parameter.mul_(1e-3)
    convert(model)
    for _ in range(3):
        torch.testing.assert_close(model(*CONV1D.inputs()), original(*CONV1D.inputs()))
    ((_, _, found),) = normed(model)
    assert {key: getattr(found, key) for key in options} == options


@spectral_norms
@pytest.mark.parametrize("eps", [0.0, 1e-45])
def test_an_eps_that_ours_refuses_is_converted_to_one_that_divides_alike(norm: Norm, eps: float) -> None:
    model, original = CONV1D.model(norm, eps=eps), CONV1D.model(norm, eps=eps)
    convert(model)
    for _ in range(3):
        torch.testing.assert_close(model(*CONV1D.inputs()), original(*CONV1D.inputs()))


@weight_norms
@pytest.mark.parametrize("name", ["a b", "class", "ﬁ"])
def test_a_name_that_ours_refuses_is_reported_and_not_converted(norm: Norm, name: str) -> None:
    layer = nn.Linear(3, 2)
    layer.register_parameter(name, nn.Parameter(torch.ones(2, 3)))
    norm(layer, name)
    row = next(row for row in report(layer).rows if row.name == name)
    assert (row.norm, row.parts) == ("WeightNorm", "g 2×1, v 2×3")
    for verb in convert, fold:
        with pytest.raises(ValueError, match=f"cannot {verb.__name__} {name!r} of this Linear: .*register"):
            verb(layer)


@weight_norms
def test_a_bias_is_converted_too(norm: Norm) -> None:
    model = Holder(norm(LINEAR.make(), "bias"))
    original = copy.deepcopy(model) if norm is parametrizations.weight_norm else None
    bias = model.layer.bias.detach().clone()
    assert convert(model) == ["layer.bias"]
    torch.testing.assert_close(model.layer.bias.detach(), bias)
    with torch.no_grad():
        model.layer.bias_g.mul_(3)
    torch.testing.assert_close(model(torch.zeros(1, 5)).detach(), 3 * bias[None])
    assert original is None or torch.equal(original.layer.bias, bias)


def test_a_vector_normed_by_the_spectral_parametrization_is_converted() -> None:
    model = Holder(parametrizations.spectral_norm(LINEAR.make(), "bias"))
    expected = model.layer.bias.detach().clone()
    assert convert(model) == ["layer.bias"]
    torch.testing.assert_close(model.layer.bias.detach(), expected)
    assert list(model.state_dict()) == ["layer.weight", "layer.bias_orig"]
    assert [norm.n_power_iterations for _, _, norm in normed(model)] == [1]


def test_a_vector_normed_by_the_spectral_hook_is_converted() -> None:
    model = Holder(hook_spectral_norm(LINEAR.make(), "bias")).eval()
    expected = model(*LINEAR.inputs())
    assert convert(model) == ["layer.bias"]
    torch.testing.assert_close(model(*LINEAR.inputs()), expected)


# What is left behind


@layers
@both_norms
def test_no_hook_of_any_kind_is_left(layer: Layer, norm: Norm) -> None:
    model = layer.model(norm)
    assert hooks_of(model) or norm is parametrizations.spectral_norm
    convert(model)
    assert hooks_of(model) == []
    assert not any(isinstance(module, parametrize.ParametrizationList) for module in model.modules())
    assert not parametrize.is_parametrized(model.layer)
    assert isinstance(model.layer, type(layer.make()))
    assert type(model.layer).__name__ == layer.kind


@both_norms
def test_hooks_of_others_stay_in_their_order(norm: Norm) -> None:
    called: list[str] = []
    model = nn.Sequential(LINEAR.make())
    model[0].register_forward_pre_hook(lambda module, inputs: called.append("before the norm"))
    norm(model[0])
    model[0].register_forward_pre_hook(lambda module, inputs: called.append("after the norm"))
    model[0].register_forward_hook(lambda module, inputs, output: called.append("forward"))
    model[0].register_load_state_dict_pre_hook(lambda *arguments: called.append("load"))
    model[0].register_state_dict_post_hook(lambda *arguments: called.append("state"))
    convert(model)
    model(*LINEAR.inputs())
    model.load_state_dict(model.state_dict())
    assert called == ["before the norm", "after the norm", "forward", "state", "load"]
    assert torch_hooks_of(model) == []
    fold(model)
    called.clear()
    model(*LINEAR.inputs())
    assert called == ["before the norm", "after the norm", "forward"]


def test_a_load_hook_of_the_users_own_stays() -> None:
    """Even if it looks like torch's: a closure with a variable called name."""
    name, called = "weight", []
    model = parametrizations.weight_norm(nn.Linear(4, 3))
    model.register_load_state_dict_pre_hook(lambda *arguments: called.append(name))
    convert(model)
    model.load_state_dict(model.state_dict())
    assert called == ["weight"]


@both_norms
def test_nothing_is_converted_twice(norm: Norm) -> None:
    model = LINEAR.model(norm)
    convert(model)
    with unchanged(model):
        assert convert(model) == []


def test_what_is_ours_already_stays_as_it_is() -> None:
    model = nn.Sequential(WeightNorm().apply(nn.Linear(4, 3)), parametrizations.weight_norm(nn.Linear(3, 2)))
    with unchanged(model[0]):
        assert convert(model) == ["1.weight"]


def test_nothing_to_convert_returns_an_empty_list_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 2), parametrizations.orthogonal(nn.Linear(2, 2)))
    with unchanged(model):
        assert convert(model) == []


@both_norms
def test_the_model_itself_may_be_the_layer(norm: Norm) -> None:
    layer = norm(LINEAR.make()).eval()
    expected = layer(*LINEAR.inputs())
    assert convert(layer) == ["weight"]
    torch.testing.assert_close(layer(*LINEAR.inputs()), expected)


@spectral_norms
def test_u_and_v_are_those_of_the_original_also_in_training_mode(norm: Norm) -> None:
    model, untouched = LINEAR.model(norm), LINEAR.model(norm)
    convert(model)
    for buffer, expected in zip(model.buffers(), untouched.buffers(), strict=True):
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("verb", [convert, fold])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@both_norms
def test_a_model_that_was_cast_after_its_last_forward_is_converted(norm: Norm, dtype: torch.dtype, verb: Any) -> None:
    """torch's hook leaves the weight itself behind, in the old precision."""
    model, original = LINEAR.model(norm).to(dtype).eval(), LINEAR.model(norm).to(dtype).eval()
    (x,) = LINEAR.inputs()
    assert verb(model) == ["layer.weight"]
    torch.testing.assert_close(model(x.to(dtype)), original(x.to(dtype)))


@both_norms
def test_a_model_on_the_meta_device_is_converted_filled_and_loaded(norm: Norm) -> None:
    model, original = LINEAR.model(norm).to("meta"), LINEAR.model(norm).eval()
    assert convert(model) == ["layer.weight"]
    model.to_empty(device="cpu").eval().load_state_dict(original.state_dict())
    torch.testing.assert_close(model(*LINEAR.inputs()), original(*LINEAR.inputs()))


@both_norms
def test_a_model_that_is_compiled_already_is_converted(norm: Norm) -> None:
    model = LINEAR.model(norm).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = compiled(*LINEAR.inputs()).detach()
    assert convert(model) == ["layer.weight"]
    torch.testing.assert_close(compiled(*LINEAR.inputs()).detach(), expected)
    change_values(model, seed=1)
    torch.testing.assert_close(compiled(*LINEAR.inputs()), model(*LINEAR.inputs()))
    assert fold(model) == ["layer.weight"]
    torch.testing.assert_close(compiled(*LINEAR.inputs()), model(*LINEAR.inputs()))


# Several on one module


@both_norms
def test_norms_of_both_spellings_on_one_module(norm: Norm) -> None:
    """The hook first and the parametrization second: the other way round torch itself fails."""

    def build() -> nn.Module:
        torch.manual_seed(1)
        return Holder(parametrizations.weight_norm(norm(nn.LSTM(3, 4), "weight_ih_l0"), "weight_hh_l0"))

    model, original = build().eval(), build().eval()
    x = torch.randn(5, 2, 3)
    assert sorted(convert(model)) == ["layer.weight_hh_l0", "layer.weight_ih_l0"]
    torch.testing.assert_close(model(x), original(x))
    assert hooks_of(model) == []
    change_parts(model, seed=1)
    model.layer.flatten_parameters()
    weight = normed_weight(model.state_dict(), "layer.weight_hh_l0", 0)
    torch.testing.assert_close(model.layer.weight_hh_l0.detach(), weight)


@pytest.mark.parametrize("ours_first", [True, False])
@both_norms
def test_ours_and_torchs_on_one_module(norm: Norm, ours_first: bool) -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        layer = nn.Bilinear(3, 4, 2)
        layer.extra = nn.Parameter(torch.randn(3, 4))
        wn = WeightNorm("extra")
        layer = norm(wn.apply(layer)) if ours_first else wn.apply(norm(layer))
        return Holder(layer).eval()

    model, original, inputs = build(), build(), LAYERS[7].inputs()
    expected = original(*inputs).detach()
    assert convert(model) == ["layer.weight"]
    torch.testing.assert_close(model(*inputs).detach(), expected)
    assert sorted(name for name, _, _ in normed(model)) == ["layer.extra", "layer.weight"]
    change_parts(model, seed=1)
    WeightNorm("extra").recompute(model.layer)
    torch.testing.assert_close(model.layer.extra.detach(), normed_weight(model.state_dict(), "layer.extra", 0))
    assert sorted(fold(model)) == ["layer.extra", "layer.weight"]
    assert type(model.layer) is nn.Bilinear


@both_norms
@pytest.mark.parametrize("other_first", [True, False])
def test_a_parametrization_of_another_name_stays(norm: Norm, other_first: bool) -> None:
    layer = LINEAR.make()
    if other_first:
        parametrize.register_parametrization(layer, "bias", Double())
    norm(layer)
    if not other_first:
        parametrize.register_parametrization(layer, "bias", Double())
    model = Holder(layer).eval()
    expected = model(*LINEAR.inputs()).detach()
    earlier = copy.deepcopy(model) if norm not in (hook_weight_norm, hook_spectral_norm) else None

    def check(model: nn.Module) -> None:
        torch.testing.assert_close(model(*LINEAR.inputs()).detach(), expected)
        assert parametrize.is_parametrized(model.layer, "bias")
        assert not parametrize.is_parametrized(model.layer, "weight")

    assert convert(model) == ["layer.weight"]
    check(model)
    copied = copy.deepcopy(model)
    check(copied)
    with torch.no_grad():
        copied.layer.parametrizations.bias.original.add_(1)
    check(model)

    assert fold(model) == ["layer.weight"]
    check(model)
    assert sorted(model.state_dict()) == ["layer.parametrizations.bias.original", "layer.weight"]
    check(copy.deepcopy(model))
    parametrize.remove_parametrizations(model.layer, "bias")
    assert type(model.layer) is nn.Linear
    torch.testing.assert_close(model(*LINEAR.inputs()).detach(), expected)
    if earlier is not None:  # its class was shared, and is still whole
        torch.testing.assert_close(earlier(*LINEAR.inputs()).detach(), expected)
        parametrize.remove_parametrizations(earlier.layer, "weight")
        torch.testing.assert_close(earlier(*LINEAR.inputs()).detach(), expected)


def bilinear_with(order: tuple[str, ...]) -> nn.Module:
    torch.manual_seed(1)
    layer = nn.Bilinear(3, 4, 2)
    layer.extra = nn.Parameter(torch.randn(3, 4))
    apply: dict[str, Callable[[], Any]] = {
        "ours": lambda: WeightNorm("extra").apply(layer),
        "torch's": lambda: parametrizations.weight_norm(layer),
        "another": lambda: parametrize.register_parametrization(layer, "bias", Double()),
    }
    for tool in order:
        apply[tool]()
    return Holder(layer)


@pytest.mark.parametrize("verb", [convert, fold])
@pytest.mark.parametrize("order", list(itertools.permutations(["ours", "torch's", "another"])), ids=str)
def test_three_tools_on_one_module_are_told_apart_or_refused_by_name(order: tuple[str, ...], verb: Any) -> None:
    model, inputs = bilinear_with(order), LAYERS[7].inputs()
    expected, extra = model(*inputs).detach(), model.layer.extra.detach().clone()
    before = Picture(model)
    try:
        verb(model)
    except ValueError as error:
        assert "of this Bilinear" in str(error)  # noqa: PT017
        assert_unchanged(model, before)
    torch.testing.assert_close(model(*inputs).detach(), expected)
    torch.testing.assert_close(model.layer.extra.detach(), extra)
    with torch.no_grad():
        model.layer.parametrizations.bias.original.add_(1)
    torch.testing.assert_close(model(*inputs).detach(), expected + 2)


# Shared modules and parameters


@both_norms
def test_a_shared_module_is_converted_once(norm: Norm) -> None:
    shared = norm(nn.Linear(4, 4))
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.ModuleDict({"again": shared})["again"]).eval()
    x = torch.randn(2, 4)
    expected = model(x)
    assert convert(model) == ["0.weight"]
    assert model[0] is model[2] is model[3]
    torch.testing.assert_close(model(x), expected)
    assert fold(model) == ["0.weight"]
    assert model[0] is model[2] is model[3]
    torch.testing.assert_close(model(x), expected)


@weight_norms
def test_parameters_that_two_modules_share_stay_shared(norm: Norm) -> None:
    model = nn.Sequential(norm(nn.Linear(4, 4)), nn.Tanh(), norm(nn.Linear(4, 4)))
    owners = [m.parametrizations.weight if norm is parametrizations.weight_norm else m for m in (model[0], model[2])]
    magnitude, direction = list(owners[0].named_parameters(recurse=False))[-2:]
    for name, parameter in (magnitude, direction):
        setattr(owners[1], name, parameter)
    x, count = torch.randn(2, 4), len(list(model.parameters()))
    expected = model(x)
    convert(model)
    assert model[0].weight_v is model[2].weight_v is direction[1]
    assert model[0].weight_g is model[2].weight_g is magnitude[1]
    assert len(list(model.parameters())) == count
    torch.testing.assert_close(model(x), expected)


# Copies


def wrapped(norm: Norm) -> nn.Module:
    """A model whose deep copies torch allows: the hook's weight holds no graph after a forward without one."""
    torch.manual_seed(2)
    model = nn.Sequential(norm(nn.Conv1d(4, 3, 2)), nn.Tanh(), norm(nn.Conv1d(3, 2, 2))).eval()
    with torch.no_grad():
        model(torch.randn(1, 4, 6))
    return model


X = torch.linspace(-1, 1, 48).view(2, 4, 6)


@both_norms
@pytest.mark.parametrize("verb", [convert, fold])
@pytest.mark.parametrize("on_the_copy", [True, False])
def test_the_copy_and_the_model_it_was_copied_from_stay_whole(norm: Norm, verb: Any, on_the_copy: bool) -> None:
    model = wrapped(norm)
    copied = copy.deepcopy(model)
    changed, other = (copied, model) if on_the_copy else (model, copied)
    expected = wrapped(norm)(X).detach()
    with unchanged(other):
        assert verb(changed) == ["0.weight", "2.weight"]
    torch.testing.assert_close(changed(X).detach(), expected)
    torch.testing.assert_close(other(X).detach(), expected)

    change_values(changed, seed=4)
    torch.testing.assert_close(other(X).detach(), expected)
    reference = wrapped(norm)
    for trained in (other, reference):  # it still trains, and is still torch's
        train(trained.train(), torch.optim.SGD(trained.parameters(), 0.1), (X,))
    torch.testing.assert_close(other.eval()(X), reference.eval()(X))
    assert type(other[0]) is type(model[0]) if changed is copied else type(copied[0])
    assert verb(other) == ["0.weight", "2.weight"]
    torch.testing.assert_close(other(X), reference(X))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_torchs_own_removal_works_on_the_model_that_was_not_converted(norm: Norm) -> None:
    model = wrapped(norm)
    copied = copy.deepcopy(model)
    expected = model(X).detach()
    convert(copied)
    for index in (0, 2):
        parametrize.remove_parametrizations(model[index], "weight")
        assert type(model[index]) is nn.Conv1d
    torch.testing.assert_close(model(X).detach(), expected)
    torch.testing.assert_close(copied(X).detach(), expected)


@both_norms
def test_a_converted_model_is_copied_and_pickled_at_any_time(norm: Norm) -> None:
    model = wrapped(norm)
    convert(model)
    model(X).sum().backward()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(X), model(X))
        change_values(copied, seed=1)
        assert not torch.allclose(copied(X), model(X))


# MultiheadAttention and the transformer layers read weights without calling the layers that own them


def encoder(norm: Norm | None) -> nn.Module:
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    for module in (layer.linear1, layer.linear2, layer.self_attn.out_proj) if norm else ():
        norm(module)
    return layer


NORMED = ("linear1.weight", "linear2.weight", "self_attn.out_proj.weight")
SEQUENCE = torch.linspace(-1, 1, 48).view(2, 3, 8)


def plain_encoder(model: nn.Module) -> nn.Module:
    """A plain layer with the weights that the parts of `model` make."""
    plain = encoder(None).train(model.training)
    state = dict(model.state_dict())
    for name in NORMED:
        state[name] = normed_weight(state, name, 0)
        del state[f"{name}_g"], state[f"{name}_v"]
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@weight_norms
def test_weights_that_are_read_without_a_call_are_fresh(norm: Norm, training: bool, grad: bool) -> None:
    model = encoder(norm).train(training)
    assert sorted(convert(model)) == sorted(NORMED)
    with torch.set_grad_enabled(grad):
        for seed in (1, 2):
            change_parts(model, seed)
            with Count() as count:
                output = model(SEQUENCE)
            assert ("aten._transformer_encoder_layer_fwd" in count.of) == (not training and not grad)
            torch.testing.assert_close(output, plain_encoder(model)(SEQUENCE))


def test_weights_that_are_read_without_a_call_train_as_in_the_parametrization() -> None:
    model, original = encoder(parametrizations.weight_norm), encoder(parametrizations.weight_norm)
    parameters, others = list(model.parameters()), list(original.parameters())
    convert(model)
    for trained, values in ((model, parameters), (original, others)):
        train(trained, torch.optim.SGD(values, 0.1, momentum=0.9), (SEQUENCE,))
    for parameter, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(parameter, other)


@weight_norms
def test_a_transformer_layer_folds_into_ordinary_classes(norm: Norm) -> None:
    model = encoder(norm).eval()
    convert(model)
    change_parts(model, seed=1)
    plain = plain_encoder(model)
    assert sorted(fold(model)) == sorted(NORMED)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    with torch.no_grad():
        torch.testing.assert_close(model(SEQUENCE), plain(SEQUENCE))


# Refusals


def with_hook_subclass(kind: type) -> Callable[[nn.Module], nn.Module]:
    def norm(module: nn.Module) -> nn.Module:
        (hook_weight_norm if issubclass(kind, WeightNormHook) else hook_spectral_norm)(module)
        for hook in module._forward_pre_hooks.values():
            hook.__class__ = kind
        return module

    return norm


class WeightNormOfSomebody(WeightNormHook):
    pass


class SpectralNormOfSomebody(SpectralNormHook):
    pass


class ParametrizationOfSomebody(parametrizations._WeightNorm):
    pass


def with_another_after(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(parametrizations.weight_norm(module), "weight", Double())
    return module


def with_another_before(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Double())
    return parametrizations.spectral_norm(module)


def with_parametrization_subclass(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", ParametrizationOfSomebody())
    return module


def with_parametrized_part(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(hook_weight_norm(module), "weight_v", Double())
    return module


def with_pruned_original(module: nn.Module) -> nn.Module:
    prune.l1_unstructured(parametrizations.weight_norm(module).parametrizations.weight, "original1", 0.5)
    return module


def with_pruned_part(module: nn.Module) -> nn.Module:
    prune.l1_unstructured(hook_weight_norm(module), "weight_v", 0.5)
    return module


def with_forward_of_its_own(module: nn.Module) -> nn.Module:
    hook_spectral_norm(module)
    module.forward = lambda x: nn.functional.linear(x, module.weight)  # a class does not see it
    return module


REFUSED = {
    "another parametrization after": (with_another_after, "by WeightNorm, Double"),
    "another parametrization before": (with_another_before, "by Double, SpectralNorm"),
    "a subclass of the parametrization": (with_parametrization_subclass, "ParametrizationOfSomebody"),
    "a subclass of the weight norm hook": (with_hook_subclass(WeightNormOfSomebody), "WeightNormOfSomebody"),
    "a subclass of the spectral norm hook": (with_hook_subclass(SpectralNormOfSomebody), "SpectralNormOfSomebody"),
    "a part that is parametrized": (with_parametrized_part, "part of it is computed by another tool"),
    "an original that is pruned": (with_pruned_original, ""),
    "a part that is pruned": (with_pruned_part, "part of it is computed by another tool"),
    "a forward on the instance": (with_forward_of_its_own, "forward"),
}


REFUSALS = [
    pytest.param(verb, *case, id=f"{verb.__name__}-{name}")
    for name, case in REFUSED.items()
    for verb in (convert, fold)
    if verb is convert or name != "a forward on the instance"  # which folding does not need
]


@pytest.mark.parametrize(("verb", "spoil", "says"), REFUSALS)
def test_what_is_not_torchs_norm_alone_is_refused_by_name_and_nothing_is_changed(
    verb: Any, spoil: Any, says: str
) -> None:
    model = nn.Sequential(
        hook_weight_norm(nn.Linear(4, 4)),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        hook_spectral_norm(nn.Linear(4, 4)),
        nn.ModuleDict({"inner": spoil(nn.Linear(4, 4))}),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
        WeightNorm().apply(nn.Linear(4, 4)),
    )
    with unchanged(model), pytest.raises(ValueError, match=r"'3\.inner\.weight' of this Linear.*" + says):
        verb(model)


def test_a_report_shows_what_convert_refuses() -> None:
    for spoil, _ in REFUSED.values():
        model = nn.Sequential(spoil(nn.Linear(4, 4)))
        with unchanged(model):
            assert report(model).rows[0].name == "0.weight"


# Norms of other projects, in the forms in which people write them


def singular_value(matrix: Tensor, u: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        v.copy_(nn.functional.normalize(matrix.t() @ u, dim=0))
        u.copy_(nn.functional.normalize(matrix @ v, dim=0))
    return u @ matrix @ v


class HeldNorm:
    """An object that the module holds: it takes the parameter out and leaves a plain tensor in its place."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, module: Any) -> None:
        if self.kind == "weight":
            module.weight = module.weight_g * module.weight_v / module.weight_v.norm(dim=1, keepdim=True)
        else:
            sigma = singular_value(module.weight_orig, module.weight_u, module.weight_v[0])
            module.weight = module.weight_g * module.weight_orig / sigma

    def apply(self, module: Any) -> nn.Module:
        weight = module._parameters.pop("weight")
        module.weight_g = nn.Parameter(weight.detach().norm(dim=1, keepdim=True))
        if self.kind == "weight":
            module.weight_v = nn.Parameter(weight.detach())
        else:
            module.weight_orig = weight
            module.register_buffer("weight_u", torch.ones(weight.shape[0]))
            module.register_buffer("weight_v", torch.ones(1, weight.shape[1]))  # a matrix to look at
        module.held_norm = self
        self(module)
        checked: nn.Module = module
        return checked


class MixinNorm:
    """A class beside the layer's, whose forward divides the weight, which stays a parameter."""

    weight: nn.Parameter
    u0: Tensor

    def divided(self) -> Tensor:
        with torch.no_grad():
            v = nn.functional.normalize(self.u0 @ self.weight, dim=1)
            self.u0.copy_(nn.functional.normalize(v @ self.weight.t(), dim=1))
        return self.weight / (self.u0 @ self.weight @ v.t()).squeeze()


class MixedLinear(nn.Linear, MixinNorm):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("u0", torch.randn(1, outputs))
        self.register_buffer("sv0", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.divided(), self.bias)


class PropertyLinear(nn.Linear):
    """The same, with one buffer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("u", torch.randn(1, outputs))

    @property
    def divided(self) -> Tensor:
        return self.weight / (self.u @ self.weight).norm()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.divided, self.bias)


class Wrapper(nn.Module):
    """A module around the layer: the parts are the layer's, and `weight` is there after the first forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        weight = module._parameters.pop("weight")
        assert weight is not None
        u, v = (nn.Parameter(torch.ones(size), requires_grad=False) for size in weight.shape)
        self.hold(u, v, nn.Parameter(weight.detach()))

    def hold(self, u: nn.Parameter, v: nn.Parameter, bar: nn.Parameter) -> None:
        self.module.weight_u, self.module.weight_v, self.module.weight_bar = u, v, bar

    def held(self) -> Any:
        return self.module.weight_bar, self.module.weight_u, self.module.weight_v

    def forward(self, x: Tensor) -> Any:
        bar, u, v = self.held()
        self.module.weight = bar / singular_value(bar, u, v)
        return self.module(x)


class HoldingWrapper(Wrapper):
    """The same, holding the parts itself."""

    def hold(self, u: nn.Parameter, v: nn.Parameter, bar: nn.Parameter) -> None:
        self.u, self.v, self.w_bar = u, v, bar

    def held(self) -> Any:
        return self.w_bar, self.u, self.v


class ByHand(nn.Module):
    """A module that is meant so."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel_g = nn.Parameter(torch.ones(4))
        self.kernel_v = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.kernel_g[:, None] * nn.functional.normalize(self.kernel_v, dim=1))


class Named(nn.Module):
    """What is called as the parts of a weight are, whatever its shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(7, 2))
        self.weight_v = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x


FOREIGN: dict[str, tuple[Callable[[], nn.Module], str, str, str, str]] = {
    "an object that is held": (
        lambda: HeldNorm("weight").apply(nn.Linear(4, 4)), "weight", "Linear", "WeightNorm", "weight_g, weight_v"
    ),
    "an object with a scale": (
        lambda: HeldNorm("spectral").apply(nn.Linear(4, 4)),
        "weight", "Linear", "SpectralNorm", "weight_g, weight_orig, weight_u, weight_v",
    ),
    "a class beside": (lambda: MixedLinear(4, 4), "weight", "MixedLinear", "SpectralNorm", "weight, u0, sv0"),
    "a property": (lambda: PropertyLinear(4, 4), "weight", "PropertyLinear", "SpectralNorm", "weight, u"),
    "a wrapper": (
        lambda: Wrapper(nn.Linear(4, 4)), "module.weight", "Linear", "SpectralNorm", "weight_u, weight_v, weight_bar"
    ),
    "a wrapper that holds": (
        lambda: HoldingWrapper(nn.Linear(4, 4)), "w_bar", "HoldingWrapper", "SpectralNorm", "u, v, w_bar"
    ),
    "by its names alone": (Named, "weight", "Named", "WeightNorm", "weight_g, weight_v"),
    "by hand": (ByHand, "kernel", "ByHand", "WeightNorm", "kernel_g, kernel_v"),
}  # fmt: skip
foreign = pytest.mark.parametrize(("make", "name", "module", "kind", "parts"), FOREIGN.values(), ids=FOREIGN.keys())


@foreign
@pytest.mark.parametrize("after_a_forward", [False, True])
def test_a_report_shows_the_norm_of_another_project_as_foreign(
    make: Callable[[], nn.Module], name: str, module: str, kind: str, parts: str, after_a_forward: bool
) -> None:
    model = nn.Sequential(make())
    if after_a_forward:
        model(torch.ones(2, 4))
    with unchanged(model):
        (row,) = report(model).rows
        shown = re.sub(r" [0-9×]+", "", row.parts)
        assert (row.name, row.norm, row.spelling, row.shape) == (f"0.{name}", kind, "foreign", (4, 4))
        assert (shown, row.dim, row.state) == (parts, "", "")


@pytest.mark.parametrize("norm", WEIGHT_NORMS.values(), ids=WEIGHT_NORMS.keys())
def test_convert_names_the_norms_of_other_projects_in_one_warning_and_goes_on(norm: Norm) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(4, 4)), *(make() for make, *_ in FOREIGN.values()), norm(nn.Linear(4, 4)))
    left = nn.Sequential(*model[1:-1])
    with unchanged(left), pytest.warns(UserWarning, match="convert leaves alone what looks like") as warned:
        assert convert(model) == ["0.weight", "9.weight"]
    (warning,) = warned
    assert warning.filename == __file__
    for index, (_, name, module, kind, parts) in enumerate(FOREIGN.values(), 1):
        assert f"'{index}.{name}' of this {module} ({kind}, {parts})" in str(warning.message)
    assert model(torch.ones(2, 4)).isfinite().all()


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(hook_weight_norm(nn.Linear(4, 4)), ByHand())
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"'1\.kernel' of this ByHand"):
            convert(model)


class Recomputing(Net):
    def __init__(self) -> None:
        super().__init__(layer=nn.Linear(4, 4))


class Gate(nn.Module):
    """Names and shapes that only resemble: a gate and a value, a bias, a weight of its own, what has no shape yet."""

    def __init__(self) -> None:
        super().__init__()
        self.w_g, self.w_v = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
        self.bias_g, self.bias_v = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(4))
        self.weight, self.u = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
        self.weight_g, self.weight_v = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 4))
        self.late_g, self.late_v = nn.Parameter(torch.ones(4)), nn.UninitializedParameter()


class Around(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


def normed_lstm() -> nn.Module:
    lstm = WeightNorm("weight_ih_l0").inline(nn.LSTM(4, 4))
    return SpectralNorm("weight_hh_l0").inline(lstm)


def exported() -> Any:
    return torch.export.export(ours_twice().eval(), (torch.ones(2, 4),))


def ours_twice() -> nn.Module:
    return nn.Sequential(WeightNorm().inline(nn.Linear(4, 4)), SpectralNorm().inline(nn.Linear(4, 4)))


def folded() -> nn.Module:
    model = Recomputing()
    fold(model)
    return model


NO_ALARM: dict[str, Callable[[], nn.Module]] = {
    **{
        f"{kind} {layer}": lambda norm=norm, layer=layer: layer.model(norm)
        for kind, norm in BOTH_NORMS.items()
        for layer in (LINEAR, CONV1D)
    },
    "ours": ours_twice,
    "ours, by recompute": Recomputing,
    "ours, an LSTM": normed_lstm,
    "ours, pruned": lambda: prune_part(SpectralNorm().apply(nn.Linear(4, 4)), "weight_orig"),
    "pruned": lambda: prune_part(nn.Linear(4, 4), "weight"),
    "another parametrization": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "folded": folded,
    "scripted": lambda: nn.Sequential(torch.jit.script(ours_twice())),
    "traced": lambda: nn.Sequential(torch.jit.trace(ours_twice().eval(), torch.ones(2, 4))),
    "exported": lambda: nn.Sequential(exported().module()),
    "unflattened": lambda: nn.Sequential(torch.export.unflatten(exported())),
    "symbolically traced": lambda: torch.fx.symbolic_trace(ours_twice()),
    "in a wrapper": lambda: Around(nn.DataParallel(Recomputing())),
    "compiled": lambda: Around(torch.compile(Recomputing(), backend="eager")),
    "resembling": Gate,
    "lazy": lambda: nn.LazyLinear(4),
    "all at once": lambda: nn.Sequential(
        normed_lstm(), Gate(), parametrizations.weight_norm(hook_spectral_norm(nn.Bilinear(4, 4, 4)), "bias")
    ),
}


def prune_part(module: nn.Module, name: str) -> nn.Module:
    prune.l1_unstructured(module, name, 0.5)
    return module


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch's own, of unflatten
@pytest.mark.parametrize("make", NO_ALARM.values(), ids=NO_ALARM.keys())
def test_what_is_known_or_only_resembles_is_not_foreign(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert "foreign" not in {row.spelling for row in report(model).rows}
    convert(model)  # a warning would be an error


# Ctrl-C


def every_spelling() -> nn.Module:
    torch.manual_seed(0)
    lstm = parametrizations.weight_norm(parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0"), "weight_ih_l0")
    return nn.Sequential(
        hook_weight_norm(nn.Linear(4, 4)),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        hook_spectral_norm(nn.Linear(4, 4)),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
        hook_weight_norm(hook_spectral_norm(nn.LSTM(4, 4), "weight_ih_l0"), "weight_hh_l0"),
        nn.ModuleList([lstm]),
    ).eval()


def run_every_spelling(model: nn.Module) -> Tensor:
    x = torch.linspace(-1, 1, 12).view(3, 4)
    for layer in model[:4]:
        x = layer(x)
    output: Tensor = model[5][0](model[4](x)[0])[0]
    return output.detach()


def test_ctrl_c_at_any_line_of_convert_leaves_it_undone_or_done() -> None:
    done = every_spelling()
    assert len(convert(done)) == 8
    assert hooks_of(done) == []
    check_ctrl_c_at_every_line(every_spelling, convert, run_every_spelling, lines=100)


# Checkpoints


def in_spelling(spelling: str, kind: str, seed: int) -> nn.Module:
    """One model in any spelling, its parts scaled and moved so that no two parts say the same."""
    norms = (WEIGHT_NORMS if kind == "weight" else SPECTRAL_NORMS) | {"plain": lambda layer: layer}
    torch.manual_seed(seed)
    norm = norms["hook" if spelling == "converted" else spelling]
    model = nn.Sequential(norm(nn.Conv1d(4, 3, 2)), nn.ModuleDict({"deep": norm(nn.Linear(5, 2))})["deep"])
    if spelling == "converted":
        convert(model)
    if spelling != "plain":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("_g", "original0")):
                    parameter.mul_(1.7)
    return model.eval()


PAIRS = [("converted", "hook"), ("hook", "hook"), ("converted", "converted")]
PAIRS += [(source, "converted") for source in ("plain", "hook", "parametrization")]


@pytest.mark.parametrize(("source", "target"), [*PAIRS, ("converted", "parametrization"), ("hook", "parametrization")])
def test_a_checkpoint_of_a_weight_norm_loads(source: str, target: str) -> None:
    check_loading(source, target, "weight")


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[0] != "plain"])
def test_a_checkpoint_of_a_spectral_norm_loads(source: str, target: str) -> None:
    check_loading(source, target, "spectral")


def check_loading(source: str, target: str, kind: str) -> None:
    saved, model = in_spelling(source, kind, seed=1), in_spelling(target, kind, seed=2)
    assert not torch.allclose(saved(X), model(X), atol=1e-3)
    model(X)  # so that there is a stored weight, which the load makes stale
    keys = model.load_state_dict(saved.state_dict())
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    torch.testing.assert_close(model(X), saved(X))
    state = model.state_dict()
    if target != "plain":
        model.load_state_dict(state)
        torch.testing.assert_close(model(X), saved(X))


@both_norms
def test_a_converted_model_has_the_keys_of_the_hook(norm: Norm) -> None:
    kind = "weight" if norm in WEIGHT_NORMS.values() else "spectral"
    model = wrapped(norm)
    convert(model)
    norms = WEIGHT_NORMS if kind == "weight" else SPECTRAL_NORMS
    assert sorted(model.state_dict()) == sorted(wrapped(norms["hook"]).state_dict())


def test_a_checkpoint_goes_through_torch_save(tmp_path: Path) -> None:
    for norm in WEIGHT_NORMS.values():
        original, model = wrapped(norm), wrapped(norm)
        convert(model)
        change_values(original, seed=3)
        with torch.no_grad():
            expected = original(X)
        torch.save(original.state_dict(), tmp_path / "original.pt")
        model.load_state_dict(torch.load(tmp_path / "original.pt", weights_only=True))
        torch.testing.assert_close(model(X).detach(), expected)

        change_values(model, seed=4)
        torch.save(model.state_dict(), tmp_path / "converted.pt")
        original.load_state_dict(torch.load(tmp_path / "converted.pt", weights_only=True))
        torch.testing.assert_close(original(X), model(X))


def test_a_file_as_r_saves_it_loads(tmp_path: Path) -> None:
    """R's `torch_save` writes safetensors, with the keys of the hook."""
    safetensors = pytest.importorskip("safetensors.torch")
    state = {
        "0.weight_g": 1 + torch.rand(3, 1, 1),
        "0.weight_v": torch.randn(3, 4, 2),
        "0.bias": torch.randn(3),
        "2.weight_g": 1 + torch.rand(2, 1, 1),
        "2.weight_v": torch.randn(2, 3, 2),
        "2.bias": torch.randn(2),
    }
    safetensors.save_file(state, tmp_path / "from_r.safetensors")
    expected = nn.functional.conv1d(X, normed_weight(state, "0.weight", 0), state["0.bias"])
    expected = nn.functional.conv1d(torch.tanh(expected), normed_weight(state, "2.weight", 0), state["2.bias"])
    for norm in WEIGHT_NORMS.values():
        model = wrapped(norm)
        convert(model)
        model.load_state_dict(safetensors.load_file(tmp_path / "from_r.safetensors"))
        torch.testing.assert_close(model(X).detach(), expected)
        safetensors.save_model(model, str(tmp_path / "back.safetensors"))
        assert sorted(safetensors.load_file(tmp_path / "back.safetensors")) == sorted(state)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
def test_a_dim_that_is_a_number_of_numpys_is_converted(make: Any) -> None:
    layer = make(nn.Conv1d(2, 3, 4), dim=np.int64(1))
    with torch.no_grad():
        next(p for name, p in layer.named_parameters() if name.endswith(("weight_g", "original0"))).mul_(2)
    x = torch.randn(1, 2, 5)
    wanted = layer(x)
    assert convert(layer) == ["weight"]
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=0)
    assert [repr(norm) for _, _, norm in normed(layer)] == ["WeightNorm('weight', dim=1)"]
