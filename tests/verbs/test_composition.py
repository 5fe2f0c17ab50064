"""Other tools on the same module: prune, parametrize, tied parameters, optimizers, replicas, averages."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import Net, weight_of
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, parameters_to_vector, parametrize, prune, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

from explicit_wn import WeightNorm
from explicit_wn.carrier import store_of

linear = nn.functional.linear


class Explicit(Net):
    def __init__(self) -> None:
        super().__init__(layer=nn.Linear(4, 3))


class Inlined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = WeightNorm().inline(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


every_form = pytest.mark.parametrize("form", [Explicit, Inlined])


def parts_of(layer: Any, *names: str) -> list[Tensor]:
    """Copies of parameters of `layer`, which train on their own."""
    return [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]


def train_alike(
    model: nn.Module, formula: Callable[[Tensor], Tensor], parts: list[Tensor], names: list[str], steps: int = 5
) -> None:
    """Trains `model` and `formula`, which is the same in plain tensors, and checks that they stay the same."""
    ours = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    theirs = torch.optim.SGD(parts, 0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(5, 4, generator=generator)
        result, wanted = model(x), formula(x)
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)
        for optimizer, output in ((ours, result), (theirs, wanted)):
            optimizer.zero_grad()
            (output - 1).square().sum().backward()
            optimizer.step()
    for name, part in zip(names, parts, strict=True):
        torch.testing.assert_close(model.get_parameter(name).detach(), part.detach(), rtol=1e-4, atol=1e-5)


def train_with_a_made_part(model: Any, part: str, held_as: str, make: Callable[[Tensor], Tensor]) -> None:
    """The same with the part that a tool makes of what it holds by another name."""
    other = "weight_v" if part == "weight_g" else "weight_g"
    held, whole, bias = parts = parts_of(model.fc, held_as, other, "bias")

    def formula(x: Tensor) -> Tensor:
        g, v = (make(held), whole) if part == "weight_g" else (whole, make(held))
        return linear(x, weight_of(g, v), bias)

    train_alike(model, formula, parts, [f"fc.{held_as}", f"fc.{other}", "fc.bias"])


# prune


@every_form
@pytest.mark.parametrize("part", ["weight_v", "weight_g"])
def test_a_pruned_part_trains_under_its_mask(form: type[Any], part: str) -> None:
    model = form()
    prune.l1_unstructured(model.fc, part, 0.4)
    mask = model.fc.get_buffer(f"{part}_mask").clone()
    assert 0 < mask.sum() < mask.numel()
    model(torch.ones(1, 4))
    assert (model.fc.weight is model.fc.weight) == (form is Explicit)  # computed once
    train_with_a_made_part(model, part, f"{part}_orig", lambda held: held * mask)


@every_form
def test_pruning_again_and_making_it_permanent(form: type[Any]) -> None:
    model, x = form(), torch.randn(5, 4)
    prune.l1_unstructured(model.fc, "weight_v", 0.25)
    prune.random_unstructured(model.fc, "weight_v", 0.25)
    model(x).square().sum().backward()
    with torch.no_grad():
        model.fc.weight_v_orig.add_(0.5)
        model.fc.weight_g.mul_(2)
    masked = (model.fc.weight_v_orig * model.fc.weight_v_mask).detach()
    wanted = linear(x, weight_of(model.fc.weight_g, masked), model.fc.bias)
    torch.testing.assert_close(model(x), wanted)
    prune.remove(model.fc, "weight_v")
    torch.testing.assert_close(model(x), wanted)
    WeightNorm().remove(model.fc)
    assert type(model.fc) is nn.Linear
    assert torch.equal(model.fc.weight == 0, masked == 0)
    torch.testing.assert_close(model.fc(x), wanted)


@every_form
def test_a_pruned_part_is_replaced_by_functional_call(form: type[Any]) -> None:
    model, x = form(), torch.randn(5, 4)
    prune.l1_unstructured(model.fc, "weight_v", 0.4)
    other = torch.randn(3, 4)
    before = model(x)
    got = torch.func.functional_call(model, {"fc.weight_v_orig": other}, (x,))
    wanted = weight_of(model.fc.weight_g, other * model.fc.weight_v_mask)
    torch.testing.assert_close(got, linear(x, wanted, model.fc.bias))
    masked = model.fc.weight_v_orig * model.fc.weight_v_mask
    torch.testing.assert_close(model.fc.weight, weight_of(model.fc.weight_g, masked))
    torch.testing.assert_close(model(x), before)


@every_form
def test_a_pruned_model_goes_through_its_state_dict(form: type[Any]) -> None:
    source, target, x = form(), form(), torch.randn(5, 4)
    prune.l1_unstructured(source.fc, "weight_v", 0.4)
    prune.identity(target.fc, "weight_v")
    target(x)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(x), source(x))


# parametrize


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value + 0.1


class Positive(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return nn.functional.softplus(value)


@every_form
@pytest.mark.parametrize("part", ["weight_v", "weight_g"])
def test_a_parametrized_part_trains(form: type[Any], part: str) -> None:
    model = form()
    parametrize.register_parametrization(model.fc, part, Doubled())
    parametrize.register_parametrization(model.fc, part, Positive())
    held_as = f"parametrizations.{part}.original"
    train_with_a_made_part(model, part, held_as, lambda held: nn.functional.softplus(2 * held + 0.1))


@every_form
def test_a_parametrized_part_is_cached_copied_and_ended(form: type[Any]) -> None:
    model, x = form(), torch.randn(5, 4)
    parametrize.register_parametrization(model.fc, "weight_v", Doubled())
    with torch.no_grad():
        model.fc.parametrizations.weight_v.original.add_(0.5)
        model.fc.weight_g.mul_(2)
    made = (2 * model.fc.parametrizations.weight_v.original + 0.1).detach()
    wanted = linear(x, weight_of(model.fc.weight_g, made), model.fc.bias)
    torch.testing.assert_close(model(x), wanted)
    with parametrize.cached():
        torch.testing.assert_close(model(x), wanted)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.fc.parametrizations.weight_v.original.zero_().add_(torch.eye(3, 4))
    torch.testing.assert_close(twin(x), wanted)
    parametrize.remove_parametrizations(twin.fc, "weight_v")
    torch.testing.assert_close(twin(x), wanted)
    assert type(WeightNorm().remove(twin.fc)) is nn.Linear
    torch.testing.assert_close(twin(x) if form is Inlined else twin.fc(x), wanted)


@every_form
def test_a_parametrized_part_is_replaced_by_functional_call(form: type[Any]) -> None:
    model, x = form(), torch.randn(5, 4)
    parametrize.register_parametrization(model.fc, "weight_v", Doubled())
    other, before = torch.randn(3, 4), model(x)
    got = torch.func.functional_call(model, {"fc.parametrizations.weight_v.original": other}, (x,))
    torch.testing.assert_close(got, linear(x, weight_of(model.fc.weight_g, 2 * other + 0.1), model.fc.bias))
    torch.testing.assert_close(model.fc.weight, weight_of(model.fc.weight_g, model.fc.weight_v))
    torch.testing.assert_close(model(x), before)


@every_form
def test_another_parameter_of_the_module_is_parametrized_after(form: type[Any]) -> None:
    model, x = form(), torch.randn(5, 4)
    cls, attributes = type(model.fc), list(vars(model.fc))
    parametrize.register_parametrization(model.fc, "bias", Doubled())
    g, v, held = parts = parts_of(model.fc, "weight_g", "weight_v", "parametrizations.bias.original")

    def formula(x: Tensor) -> Tensor:
        return linear(x, weight_of(g, v), 2 * held + 0.1)

    train_alike(model, formula, parts, ["fc.weight_g", "fc.weight_v", "fc.parametrizations.bias.original"])
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    wanted = model(x)
    parametrize.remove_parametrizations(model.fc, "bias")
    assert type(model.fc) is cls
    assert list(vars(model.fc)) == attributes
    torch.testing.assert_close(model(x), wanted)
    assert type(WeightNorm().remove(model.fc)) is nn.Linear


@pytest.mark.parametrize("verb", ["apply", "inline"])
def test_another_parameter_of_the_module_was_parametrized_before(verb: str) -> None:
    wn, layer, x = WeightNorm(), nn.Linear(4, 3), torch.randn(5, 4)
    parametrize.register_parametrization(layer, "bias", Doubled())
    cls, attributes = type(layer), list(vars(layer))
    getattr(wn, verb)(layer)
    with torch.no_grad():
        layer.weight_g.mul_(2)
        layer.weight_v.add_(0.5)
    wn.recompute(layer)
    wanted = linear(x, weight_of(layer.weight_g, layer.weight_v), layer.bias)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(copy.deepcopy(layer)(x), wanted)
    wn.remove(layer)
    assert type(layer) is cls
    assert list(vars(layer)) == attributes
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer(x), wanted)


# Tied parameters


class Tied(nn.Module):
    """Two layers with one weight, both normed, with one magnitude or two."""

    def __init__(self, verb: str, one_magnitude: bool) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.other.weight = self.one.weight
        getattr(self.wn, verb)(self.one)
        getattr(self.wn, verb)(self.other)
        if one_magnitude:
            self.other.weight_g = self.one.weight_g

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.one)
        self.wn.recompute(self.other)
        return self.other(self.one(x).tanh())


@pytest.mark.parametrize("verb", ["apply", "inline"])
@pytest.mark.parametrize("one_magnitude", [False, True])
def test_tied_parameters_stay_tied_and_train(one_magnitude: bool, verb: str) -> None:
    model = Tied(verb, one_magnitude)
    assert model.one.weight_v is model.other.weight_v
    names = ["one.weight_g", "one.weight_v"] + ([] if one_magnitude else ["other.weight_g"])
    assert sorted(dict(model.named_parameters())) == sorted(names)
    parts = parts_of(model, *names)

    def formula(x: Tensor) -> Tensor:
        hidden = linear(x, weight_of(parts[0], parts[1])).tanh()
        return linear(hidden, weight_of(parts[0] if one_magnitude else parts[2], parts[1]))

    train_alike(model, formula, parts, names)
    twin = copy.deepcopy(model)
    assert twin.one.weight_v is twin.other.weight_v
    assert (twin.one.weight_g is twin.other.weight_g) is one_magnitude
    assert twin.one.weight_v is not model.one.weight_v


def test_a_weight_tied_to_a_plain_layer_is_its_direction() -> None:
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    wn = WeightNorm()
    wn.apply(head)
    assert head.weight_v is embedding.weight
    before = embedding.weight.detach().clone()
    x = torch.randn(2, 4)
    with torch.no_grad():
        embedding.weight.add_(0.5)
    wn.recompute(head)
    torch.testing.assert_close(head(x), linear(x, weight_of(head.weight_g, before + 0.5)))
    wn.remove(head)
    torch.testing.assert_close(embedding.weight.detach(), before + 0.5)
    assert head.weight is not embedding.weight


# Optimizers


@every_form
def test_an_optimizer_made_before_apply_trains_the_direction(form: type[Any]) -> None:
    model = form()
    WeightNorm().remove(model.fc)
    optimizer = torch.optim.SGD(model.fc.parameters(), 0.1)
    WeightNorm().inline(model.fc)
    g, v, bias = parts_of(model.fc, "weight_g", "weight_v", "bias")
    theirs = torch.optim.SGD([v, bias], 0.1)
    x = torch.randn(5, 4)
    for _ in range(3):
        for each, output in ((optimizer, model.fc(x)), (theirs, linear(x, weight_of(g, v), bias))):
            each.zero_grad()
            output.square().sum().backward()
            each.step()
    torch.testing.assert_close(model.fc.weight_v.detach(), v.detach())
    torch.testing.assert_close(model.fc.weight_g.detach(), g.detach(), rtol=0, atol=0)
    optimizer.add_param_group({"params": [model.fc.weight_g]})
    model.fc(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.fc.weight_g, g)


@every_form
@pytest.mark.parametrize("saved", [False, True])
def test_a_copied_model_and_optimizer_go_on_as_the_original_would(form: type[Any], saved: bool) -> None:
    model = form()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    x = torch.randn(5, 4)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step(model, optimizer)
    if saved:
        twin = form()
        twin(x)
        twin.load_state_dict(copy.deepcopy(model.state_dict()))
    else:
        twin = copy.deepcopy(model)
    other = torch.optim.Adam(twin.parameters(), 0.05)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    g, v, bias = parts_of(model.fc, "weight_g", "weight_v", "bias")
    torch.testing.assert_close(twin(x), linear(x, weight_of(g, v), bias))
    for _ in range(3):
        step(model, optimizer)
        step(twin, other)
    torch.testing.assert_close(dict(twin.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)


@every_form
def test_parameters_written_as_one_vector(form: type[Any]) -> None:
    model, x = form(), torch.randn(5, 4)
    model(x)
    vector_to_parameters(parameters_to_vector(model.parameters()) * 2 + 0.1, model.parameters())
    layer = model.fc
    torch.testing.assert_close(model(x), linear(x, weight_of(layer.weight_g, layer.weight_v), layer.bias))


@every_form
def test_an_averaged_model_norms_the_averaged_parts(form: type[Any]) -> None:
    model, x = form(), torch.randn(5, 4)
    model(x)
    averaged = AveragedModel(model)
    means = [torch.zeros_like(part) for part in parts_of(model.fc, "weight_g", "weight_v", "bias")]
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.rand_like(parameter))
        averaged.update_parameters(model)
        for mean, part in zip(means, parts_of(model.fc, "weight_g", "weight_v", "bias"), strict=True):
            mean += part.detach() / 4
    g, v, bias = means
    torch.testing.assert_close(averaged(x), linear(x, weight_of(g, v), bias))


def test_fusing_a_batch_norm_into_a_normed_convolution_says_what_to_do() -> None:
    wn = WeightNorm()
    conv, norm = wn.inline(nn.Conv2d(2, 3, 3)).eval(), nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        conv.weight_g.mul_(2)
    with pytest.raises(AttributeError, match=r"'weight' of this Conv2d .* remove\(module\)"):
        fuse_conv_bn_eval(conv, norm)
    x = torch.randn(1, 2, 5, 5)
    wanted = norm(conv(x))
    torch.testing.assert_close(fuse_conv_bn_eval(wn.remove(conv), norm)(x), wanted)


# Replicas


def replicate(module: nn.Module) -> Any:
    """A replica as nn.DataParallel makes it, on this device: the parameters become plain attributes."""
    originals = list(module.modules())
    replicas = {original: original._replicate_for_data_parallel() for original in originals}
    for original, replica in replicas.items():
        replica._former_parameters = OrderedDict()
        for name, child in original._modules.items():
            setattr(replica, name, None if child is None else replicas[child])
        for name, parameter in original._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
                continue
            value = parameter.clone()
            setattr(replica, name, value)
            replica._former_parameters[name] = value
        for name, buffer in original._buffers.items():
            setattr(replica, name, buffer)
    return replicas[module]


@every_form
def test_replicas_compute_their_own_weight_and_pass_the_gradient_on(form: type[Any]) -> None:
    model, xs = form(), torch.randn(2, 5, 4)
    model(xs[0])
    stored = dict(store_of(model.fc))
    with torch.no_grad():
        model.fc.weight_g.mul_(2)
        model.fc.weight_v.add_(0.5)
    g, v, bias = parts = parts_of(model.fc, "weight_g", "weight_v", "bias")
    linear(xs, weight_of(g, v), bias).square().sum().backward()

    replicas = [replicate(model) for _ in xs]
    results = [replica(x) for replica, x in zip(replicas, xs, strict=True)]
    torch.testing.assert_close(torch.stack(results), linear(xs, weight_of(g, v), bias))
    torch.stack(results).square().sum().backward()
    assert store_of(model.fc).keys() == stored.keys()
    assert all(store_of(model.fc)[name] is weight for name, weight in stored.items())
    for name, part in zip(("weight_g", "weight_v", "bias"), parts, strict=True):
        torch.testing.assert_close(model.fc.get_parameter(name).grad, part.grad)
    torch.testing.assert_close(model(xs[0]), linear(xs[0], weight_of(g, v), bias))


@pytest.mark.parametrize("verb", ["apply", "inline"])
def test_a_replica_of_an_rnn_computes_its_own_weight(verb: str) -> None:
    wn, plain, x = WeightNorm("weight_hh_l0"), nn.LSTM(4, 3), torch.randn(5, 1, 4)
    model = getattr(wn, verb)(copy.deepcopy(plain))
    model(x)
    with torch.no_grad():
        model.weight_hh_l0_g.mul_(2)
        plain.weight_hh_l0.copy_(weight_of(model.weight_hh_l0_g, model.weight_hh_l0_v))
    replica = replicate(model)
    wn.recompute(replica)
    torch.testing.assert_close(replica(x)[0], plain(x)[0])
    replica(x)[0].sum().backward()
    assert model.weight_hh_l0_g.grad is not None
    wn.recompute(model)
    torch.testing.assert_close(model(x)[0], plain(x)[0])
