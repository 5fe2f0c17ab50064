"""Gradients: right by finite differences, and those of the hook and of the parametrization to the last bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import SUBJECTS, NoNorm, Subject, change_parts, holding, loss_of, subject, tensors_of, weight_of
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from explicit_wn import WeightNorm

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


SHAPES: list[tuple[int, ...]] = [(3,), (2, 3), (2, 3, 2), (2, 1, 3, 2)]
CHECKED = [(shape, dim, eps) for shape in SHAPES for dim in (*range(len(shape)), None) for eps in (0.0, 1e-3)]


def weight_by(verb: str, norm: WeightNorm, module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The weight as a function of its parts, by one of the verbs."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self) -> Any:
            if verb == "compute_weight":
                return norm.compute_weight(self.layer)
            norm.recompute(self.layer)
            return self.layer.weight

    net = Net()
    return lambda g, v: torch.func.functional_call(net, {"layer.weight_g": g, "layer.weight_v": v}, ())


@pytest.mark.parametrize(("shape", "dim", "eps"), CHECKED)
@pytest.mark.parametrize("verb", ["recompute", "compute_weight"])
def test_first_and_second_derivatives_are_those_of_finite_differences(
    verb: str, shape: tuple[int, ...], dim: int | None, eps: float
) -> None:
    norm = WeightNorm(dim=dim, eps=eps)
    module = norm.apply(holding(torch.randn(shape, dtype=torch.float64)))
    change_parts(module, seed=1)
    parts = tuple(p.detach().clone().requires_grad_() for p in (module.weight_g, module.weight_v))
    run = weight_by(verb, norm, module)
    torch.testing.assert_close(run(*parts), weight_of(*parts, dim, eps))
    assert gradcheck(run, parts)
    assert gradgradcheck(run, parts)


# Left out: an Embedding says that the gradient of its padding is 0, and what is slow
SKIPPED = "Embedding_padding", "Conv3d_replicate", "shared", "MultiheadAttention"
SMOOTH = [which for which in SUBJECTS if not which.recurrent and which.kind not in SKIPPED]


@pytest.mark.parametrize("which", SMOOTH, ids=str)
def test_derivatives_of_a_model_are_those_of_finite_differences(which: Subject) -> None:
    model = which.model().double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in which.inputs())
    parts = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if n.endswith(("_g", "_v"))}

    def run(*values: Tensor) -> Any:
        return torch.func.functional_call(model, dict(zip(parts, values, strict=True)), inputs)

    assert gradcheck(run, tuple(parts.values()), fast_mode=True)
    assert gradgradcheck(run, tuple(parts.values()), fast_mode=True)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "two_names"])
@pytest.mark.parametrize("form", ["explicit", "inlined"])
def test_a_gradient_penalty_gives_the_gradients_of_the_plain_formula(kind: str, form: str) -> None:
    which = subject(kind, form)
    model = which.model().double()
    (x,) = (x.double().requires_grad_() for x in which.inputs())

    def penalty(output: Tensor, at: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(loss_of(output.tanh()), at, create_graph=True)
        return slope.pow(2).sum()

    penalty(model(x), x).backward()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in tensors_of(model).items()}
    plain = which.build(NoNorm).double()
    penalty(torch.func.functional_call(plain, which.plain_state(parameters), (x,)), x).backward()
    for name, parameter in model.named_parameters():
        expected = parameters[name].grad
        torch.testing.assert_close(parameter.grad, expected)


# The hook and the parametrization


def with_hook(layer: nn.Module, dim: int | None) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        normed: nn.Module = torch.nn.utils.weight_norm(layer, dim=dim)  # type: ignore[arg-type]
    return normed


def with_parametrization(layer: nn.Module, dim: int | None) -> nn.Module:
    normed: nn.Module = torch.nn.utils.parametrizations.weight_norm(layer, dim=dim)  # type: ignore[arg-type]
    return normed


HOOKED = "weight_g", "weight_v"
PARAMETRIZED = "parametrizations.weight.original0", "parametrizations.weight.original1"
LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...], list[int | None]]] = [
    (lambda: nn.Linear(7, 5), (3, 7), [0, 1, None]),
    (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9), [0, 2, None]),
    (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6), [0, 3, None]),
    (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), [0, 4, None]),
    (lambda: nn.ConvTranspose1d(4, 3, 3), (2, 4, 5), [0, 2, None]),
    (lambda: nn.ConvTranspose2d(3, 4, 2), (2, 3, 4, 4), [0, 3, None]),
]
FUSED = [(make, shape, dim) for make, shape, dims in LAYERS for dim in dims]


@pytest.mark.parametrize(("make", "shape", "dim"), FUSED, ids=[f"{m().__class__.__name__}-{d}" for m, _, d in FUSED])
@pytest.mark.parametrize("form", ["apply", "inline"])
@pytest.mark.parametrize(
    "torchs", [(with_hook, HOOKED), (with_parametrization, PARAMETRIZED)], ids=["hook", "parametrization"]
)
def test_outputs_and_gradients_are_those_of_torch_to_the_last_bit(
    torchs: Any, form: str, make: Callable[[], nn.Module], shape: tuple[int, ...], dim: int | None
) -> None:
    """In single precision and for the dims of torch's kernel."""
    norm_by_torch, names = torchs
    norm, plain = WeightNorm(dim=dim), make()
    ours, theirs = getattr(norm, form)(copy.deepcopy(plain)), norm_by_torch(copy.deepcopy(plain), dim)
    change_parts(ours, seed=1)
    theirs.load_state_dict(dict(zip((*names, "bias"), (ours.weight_g, ours.weight_v, ours.bias), strict=True)))
    x = torch.randn(*shape)
    at = x.clone().requires_grad_(), x.clone().requires_grad_()
    if form == "apply":
        norm.recompute(ours)
    outputs = ours(at[0]), theirs(at[1])
    for output in outputs:
        loss_of(output).backward()
    assert torch.equal(*outputs)
    assert torch.equal(at[0].grad, at[1].grad)  # type: ignore[arg-type]
    assert torch.equal(ours.bias.grad, theirs.bias.grad)  # type: ignore[arg-type]
    for name, of_torch in zip(HOOKED, names, strict=True):
        assert torch.equal(ours.get_parameter(name).grad, theirs.get_parameter(of_torch).grad)  # type: ignore[arg-type]


# Several forwards, several backwards


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in tensors_of(model).items()}


@pytest.fixture(params=SUBJECTS, ids=str)
def which(request: pytest.FixtureRequest) -> Subject:
    return request.param  # type: ignore[no-any-return]


def two_batches(which: Subject) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    first = which.inputs()
    return first, tuple(x.flip(0) * (2 if x.is_floating_point() else 1) for x in first)


def summed_gradients(which: Subject, model: nn.Module) -> dict[str, Tensor]:
    first, second = (which.expected_gradients(model, batch) for batch in two_batches(which))
    return {name: first[name] + second[name] for name in first}


def close(actual: dict[str, Any], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_two_forwards_and_one_backward(which: Subject) -> None:
    model = which.model()
    first, second = two_batches(which)
    (loss_of(model(*first)) + loss_of(model(*second))).backward()
    close(gradients(model), summed_gradients(which, model))


def test_gradients_accumulate(which: Subject) -> None:
    model = which.model()
    for batch in two_batches(which):
        loss_of(model(*batch)).backward()
    close(gradients(model), summed_gradients(which, model))


def test_backward_runs_again_over_a_graph_that_is_retained(which: Subject) -> None:
    model = which.model()
    loss = loss_of(model(*which.inputs()))
    loss.backward(retain_graph=True)
    loss.backward()
    expected = which.expected_gradients(model)
    close(gradients(model), {name: 2 * gradient for name, gradient in expected.items()})


def test_a_forward_without_gradients_between_forward_and_backward_changes_nothing(which: Subject) -> None:
    model = which.model()
    first, second = two_batches(which)
    loss = loss_of(model(*first))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(*second)
    loss.backward()
    close(gradients(model), which.expected_gradients(model))


def test_a_graph_outlives_the_stored_weight_and_its_model(which: Subject) -> None:
    model = which.model()
    expected = which.expected_gradients(model)
    parameters = tensors_of(model)
    loss = loss_of(model(*which.inputs()))
    for _ in range(3):
        model(*which.inputs())  # each takes the memory of the one before
    del model
    loss.backward()
    close({name: parameter.grad for name, parameter in parameters.items()}, expected)


@pytest.mark.parametrize("frozen", ["weight_g", "weight_v", "bias"])
@pytest.mark.parametrize("form", ["explicit", "inlined"])
def test_a_frozen_part_gets_no_gradient_and_the_other_the_right_one(form: str, frozen: str) -> None:
    which = subject("Conv2d", form)
    model = which.model()
    model.get_parameter(f"layer.{frozen}").requires_grad_(False)
    loss_of(model(*which.inputs())).backward()
    expected = which.expected_gradients(model)
    for name, parameter in model.named_parameters():
        if name == f"layer.{frozen}":
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("form", ["explicit", "inlined"])
def test_a_part_that_is_unfrozen_gets_its_gradient(form: str) -> None:
    which = subject("Linear", form)
    model = which.model().requires_grad_(False)
    assert not model(*which.inputs()).requires_grad
    model.requires_grad_(True)
    loss_of(model(*which.inputs())).backward()
    close(gradients(model), which.expected_gradients(model))
