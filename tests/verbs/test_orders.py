"""One instance goes through several contexts in a row, and is right in each and in eager after each."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import reloaded
from layers import Subject, change_parts, loss_of, subject, tensors_of
from torch import Tensor, nn

import explicit_wn

Step = Callable[[Subject, nn.Module], tuple[Any, nn.Module]]
"""Takes the model into a context: gives what to run there, and the model to go on with."""


def script(which: Subject, model: nn.Module) -> tuple[Any, nn.Module]:
    return torch.jit.script(model), model


def freeze(which: Subject, model: nn.Module) -> tuple[Any, nn.Module]:
    frozen = torch.jit.freeze(explicit_wn.script(model.eval()))
    model.train()
    return frozen, model


def trace(which: Subject, model: nn.Module) -> tuple[Any, nn.Module]:
    return torch.jit.trace(model, which.inputs()), model


def export(which: Subject, model: nn.Module) -> tuple[Any, nn.Module]:
    return torch.export.export(model, which.inputs(), strict=False).module(), model


def export_strictly(which: Subject, model: nn.Module) -> tuple[Any, nn.Module]:
    return torch.export.export(model, which.inputs(), strict=True).module(), model


def compile_(which: Subject, model: nn.Module) -> tuple[Any, nn.Module]:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True), model


def deep_copy(which: Subject, model: nn.Module) -> tuple[Any, nn.Module]:
    copied = copy.deepcopy(model)
    return copied, copied


def pickle(which: Subject, model: nn.Module) -> tuple[Any, nn.Module]:
    loaded = reloaded(model)
    return loaded, loaded


def functional_grad(which: Subject, model: nn.Module) -> tuple[Any, nn.Module]:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return loss_of(torch.func.functional_call(model, parameters, which.inputs()))

    gradients = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    expected = which.expected_gradients(model)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])
    return model, model


def load_state(which: Subject, model: nn.Module) -> tuple[Any, nn.Module]:
    other = copy.deepcopy(model)
    change_parts(other, seed=11)
    model.load_state_dict(other.state_dict())
    return model, model


def without_gradients(which: Subject, model: nn.Module) -> tuple[Any, nn.Module]:
    with torch.inference_mode():
        torch.testing.assert_close(model(*which.inputs()), which.expected(model))
    return model, model


STEPS: list[Step] = [
    script,
    freeze,
    trace,
    export,
    export_strictly,
    compile_,
    deep_copy,
    pickle,
    functional_grad,
    load_state,
    without_gradients,
]
RECURRENT_STEPS = [step for step in STEPS if step not in (export_strictly, compile_)]  # torch refuses RNNs there


def close(actual: Tensor | None, expected: Tensor, where: str) -> None:
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{where}: {text}")


def walk(which: Subject, order: tuple[Step, ...]) -> None:
    """Every context in that order, the parts changed before and after each."""
    model = which.model()
    seeds = itertools.count(2)
    for step in order:
        change_parts(model, next(seeds))
        run, model = step(which, model)
        close(run(*which.inputs()).detach(), which.expected(model), step.__name__)
        change_parts(model, next(seeds))
        output = model(*which.inputs())
        close(output.detach(), which.expected(model), f"eager after {step.__name__}")
        model.zero_grad()
        loss_of(output).backward()
        expected = which.expected_gradients(model)
        for name, parameter in tensors_of(model).items():
            close(parameter.grad, expected[name], f"{name} after {step.__name__}")


def names(order: Any) -> str:
    return "-".join(step.__name__ for step in order)


@pytest.mark.parametrize("order", list(itertools.permutations(STEPS, 2)), ids=names)
@pytest.mark.parametrize("form", ["explicit", "inlined"])
def test_every_context_follows_every_other(order: tuple[Step, ...], form: str) -> None:
    walk(subject("loop", form), order)


# torch.jit, and so freeze, makes two modules of a shared one, and functional_call leaves its parameters behind in it
SHARED_STEPS = [script, trace, export, compile_, pickle, load_state]


@pytest.mark.parametrize("order", list(itertools.permutations(SHARED_STEPS, 2)), ids=names)
def test_every_context_follows_every_other_for_an_inlined_layer_that_is_shared(order: tuple[Step, ...]) -> None:
    walk(subject("shared", "inlined"), order)


FORWARD = tuple(STEPS)
LONG = [
    FORWARD,
    FORWARD[::-1],
    (trace, script, pickle, trace, script, export, deep_copy, script, trace, compile_, script),
]


@pytest.mark.parametrize("order", LONG, ids=["forward", "backward", "torchscript_again_and_again"])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "own_parameter", "two_names", "MultiheadAttention"])
@pytest.mark.parametrize("form", ["explicit", "inlined"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:torch[.](?!jit)")
def test_one_instance_goes_through_all_contexts(order: tuple[Step, ...], kind: str, form: str) -> None:
    walk(subject(kind, form), order)


@pytest.mark.parametrize("order", [tuple(RECURRENT_STEPS), tuple(RECURRENT_STEPS[::-1])], ids=["forward", "backward"])
@pytest.mark.parametrize("form", ["explicit", "inlined"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:torch[.](?!jit)")
def test_one_recurrent_instance_goes_through_all_contexts(order: tuple[Step, ...], form: str) -> None:
    walk(subject("LSTM_one_name", form), order)


def test_two_models_share_one_inlined_layer() -> None:
    """Tracing after scripting, and scripting the second model after tracing the first."""
    layer = explicit_wn.WeightNorm().inline(nn.Linear(3, 3))
    first, second = nn.Sequential(layer, nn.Tanh()), nn.Sequential(nn.ReLU(), layer)
    x = torch.randn(2, 3)
    runs: list[Any] = [
        (torch.jit.script(first), first),
        (torch.jit.trace(second, x), second),
        (torch.jit.script(second), second),
        (torch.jit.trace(first, x), first),
        (torch.export.export(second, (x,)).module(), second),
    ]
    for seed in (1, 2):
        change_parts(layer, seed)
        weight = layer.weight_v * (layer.weight_g / layer.weight_v.norm(dim=1, keepdim=True))
        for run, model in runs:
            before = x if model is first else x.relu()
            expected = torch.nn.functional.linear(before, weight, layer.bias)
            torch.testing.assert_close(run(x), expected.tanh() if model is first else expected)


TRAINED = [
    "Linear",
    "Conv2d_channels_last",
    "ConvTranspose1d_out",
    "LSTM_one_name",
    "two_names",
    "loop",
    "own_parameter",
]


def train(run: Any, model: nn.Module, which: Subject, optimizer_class: type[torch.optim.Optimizer]) -> None:
    optimizer = optimizer_class(model.parameters(), lr=0.05)  # type: ignore[call-arg]
    for step in range(5):
        optimizer.zero_grad()
        loss_of(run(*(x * (1 + step) for x in which.inputs()))).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("form", ["explicit", "inlined"])
@pytest.mark.parametrize("context", ["script", "trace"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:torch[.](?!jit)")
def test_five_optimizer_steps_give_the_parameters_of_eager(
    context: str, form: str, kind: str, optimizer_class: type[torch.optim.Optimizer]
) -> None:
    which = subject(kind, form)
    eager = which.model()
    source, other = copy.deepcopy(eager), copy.deepcopy(eager)
    captured: Any = torch.jit.script(source) if context == "script" else torch.jit.trace(source, which.inputs())
    train(eager, eager, which, optimizer_class)
    train(captured, captured, which, optimizer_class)
    for name, parameter in tensors_of(eager).items():
        assert not torch.equal(parameter, tensors_of(other)[name]), name
        close(tensors_of(captured)[name], parameter, name)
    torch.testing.assert_close(captured(*which.inputs()).detach(), which.expected(eager))
    torch.testing.assert_close(source(*which.inputs()).detach(), which.expected(eager))
