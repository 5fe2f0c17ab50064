"""Every context times every layer, in both forms.

The parts are changed behind the stored weight before every check: before a context takes the model, again in what it
made of it, and again in the eager model afterwards.
"""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import (
    CONTEXTS,
    Captured,
    Inputs,
    compiled,
    compiled_by_inductor,
    exported_and_loaded,
    exported_strictly,
    frozen_and_loaded,
    in_eager,
    same,
    scripted_by_us,
    traced_and_loaded,
)
from layers import SUBJECTS, NoNorm, Subject, change_parts, loss_of, subject, tensors_of, weight_of
from torch import Tensor, nn

import explicit_wn

# What torch warns of for plain layers too
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*batching rule for aten..(_trilinear|bilinear):UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:torch[.](?!jit)"),
]
UNCONTIGUOUS_SAVE = pytest.mark.filterwarnings("ignore:No complete tensor found in the group:UserWarning")


COMBINATIONS = [scripted_by_us, frozen_and_loaded, traced_and_loaded]


def cells() -> list[Any]:
    """Every context with every subject. torch itself refuses to compile, and to export strictly, an RNN."""
    found = []
    for context in CONTEXTS + COMBINATIONS:
        for which in SUBJECTS:
            if which.recurrent and context in (compiled, exported_strictly):
                continue
            if context in COMBINATIONS and which.kind not in ("Conv2d_channels_last", "LSTM_one_name", "loop"):
                continue
            marks = [UNCONTIGUOUS_SAVE] if "channels_last" in which.kind and context is exported_and_loaded else []
            found.append(pytest.param(context, which, id=f"{context.__name__}-{which}", marks=marks))
    return found


def check(run: Callable[..., Any], which: Subject, expected: Tensor) -> None:
    """Twice, since TorchScript optimizes at the second call."""
    for _ in range(2):
        torch.testing.assert_close(run(*which.inputs()).detach(), expected)


def check_gradients(captured: Captured, which: Subject) -> None:
    module = captured.module
    assert module is not None
    module.zero_grad()
    loss_of(captured.run(*which.inputs())).backward()
    expected = which.expected_gradients(module)
    parameters = {id(parameter): parameter for parameter in module.parameters()}.values()
    for name, tensor in tensors_of(module).items():
        aliases = [parameter for parameter in parameters if parameter.data_ptr() == tensor.data_ptr()]
        gradients = [parameter.grad for parameter in aliases if parameter.grad is not None]
        torch.testing.assert_close(sum(gradients), expected[name])


@pytest.mark.parametrize(("context", "which"), cells())
def test_the_weight_is_fresh(context: Callable[[nn.Module, Inputs], Captured], which: Subject) -> None:
    model = which.model()
    captured = context(model, which.inputs())
    check(captured.run, which, which.expected(model))
    if captured.module is not None:
        change_parts(captured.module, seed=2)
        check(captured.run, which, which.expected(captured.module))
        check_gradients(captured, which)
    change_parts(model, seed=3)
    check(model, which, which.expected(model))


all_subjects = pytest.mark.parametrize("which", SUBJECTS, ids=str)


@all_subjects
def test_changing_the_parts_changes_the_output(which: Subject) -> None:
    """Without which none of the checks here could fail."""
    model = which.model()
    before = which.expected(model)
    change_parts(model, seed=2)
    assert not torch.allclose(which.expected(model), before, rtol=1e-2, atol=1e-2)


@all_subjects
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_weight_is_fresh_without_gradients_and_trains_afterwards(which: Subject, mode: Any) -> None:
    model = which.model().eval()
    for seed in (2, 3):
        with mode():
            check(model, which, which.expected(model))
        change_parts(model, seed)
    check_gradients(in_eager(model, which.inputs()), which)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
@pytest.mark.parametrize("form", ["explicit", "inlined"])
def test_the_weight_is_fresh_in_inductor(kind: str, form: str) -> None:
    which = subject(kind, form)
    model = which.model()
    captured = compiled_by_inductor(model, which.inputs())
    check(captured.run, which, which.expected(model))
    change_parts(model, seed=2)
    with torch.no_grad():
        check(captured.run, which, which.expected(model))
    change_parts(model, seed=3)
    check_gradients(captured, which)
    change_parts(model, seed=4)
    check(model, which, which.expected(model))


class ReadsWithoutRecompute(nn.Module):
    """A model whose forward leaves the weight as it is, as one does that recomputes once per step elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = explicit_wn.WeightNorm().apply(nn.Linear(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.fc.weight)


@pytest.mark.parametrize("script", [torch.jit.script, explicit_wn.script])
@pytest.mark.parametrize("change", ["in_place", "by_load_state_dict"])
def test_what_torchscript_takes_along_is_the_weight_of_the_parts_as_they_are(
    change: str, script: Callable[[nn.Module], Any]
) -> None:
    """https://github.com/pytorch/pytorch/issues/30754"""
    model, other, x = ReadsWithoutRecompute(), ReadsWithoutRecompute(), torch.randn(2, 3)
    model(x)
    change_parts(other, seed=1)
    if change == "in_place":
        change_parts(model, seed=1)
    else:
        model.load_state_dict(other.state_dict())
    weight = weight_of(other.fc.weight_g, other.fc.weight_v, 0)
    torch.testing.assert_close(script(model)(x), torch.nn.functional.linear(x, weight))


def test_a_deep_copy_and_its_original_are_independent() -> None:
    for which in SUBJECTS:
        model = which.model()
        expected = which.expected(model)
        copied = copy.deepcopy(model)
        change_parts(copied, seed=2)
        check(copied, which, which.expected(copied))
        check(model, which, expected)


# A fresh process: one for all the subjects


LOAD_AND_RUN = """
import sys
import torch

models, inputs = torch.load(sys.argv[1], weights_only=False)
assert "explicit_wn" in sys.modules
from layers import change_parts

results = {}
for name, model in models.items():
    first = model(*inputs[name]).detach()
    change_parts(model, seed=2)
    second = model(*inputs[name]).detach()
    scripted = torch.jit.script(model)
    change_parts(model, seed=3)
    results[name] = first, second, scripted(*inputs[name]).detach()
torch.save(results, sys.argv[2])
"""


@pytest.fixture(scope="module")
def of_a_fresh_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The models as they were saved, and the outputs of those that a fresh process loaded."""
    folder = tmp_path_factory.mktemp("pickle")
    models = {str(which): which.model() for which in SUBJECTS}
    torch.save((models, {str(which): which.inputs() for which in SUBJECTS}), folder / "saved")
    warnings = ["-W", "error", "-W", "ignore:`torch.jit", "-W", "ignore:LSTM with projections"]
    script = [sys.executable, *warnings, "-c", LOAD_AND_RUN, str(folder / "saved"), str(folder / "results")]
    subprocess.run(script, check=True)
    return models, torch.load(folder / "results")


@all_subjects
def test_the_weight_is_fresh_in_a_process_that_loads_the_model(which: Subject, of_a_fresh_process: Any) -> None:
    models, results = of_a_fresh_process
    model, (first, second, scripted) = copy.deepcopy(models[str(which)]), results[str(which)]
    torch.testing.assert_close(first, which.expected(model))
    change_parts(model, seed=2)
    torch.testing.assert_close(second, which.expected(model))
    change_parts(model, seed=3)
    torch.testing.assert_close(scripted, which.expected(model))


# Function transforms


# torch's functional_call leaves its parameters behind in a module that the model holds twice, a plain one too
FUNCTIONAL = [which for which in SUBJECTS if which.kind != "shared"]
DIFFERENTIABLE = [which for which in SUBJECTS if not which.recurrent and not which.kind.startswith("Embedding")]
# torch has no batching rule for its RNN kernels
BATCHABLE = [which for which in FUNCTIONAL if not which.recurrent]
functional_subjects = pytest.mark.parametrize("which", FUNCTIONAL, ids=str)
batchable_subjects = pytest.mark.parametrize("which", BATCHABLE, ids=str)


def with_other_parts(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    change_parts(other, seed=5)
    return other


def stored_weights(which: Subject, model: nn.Module) -> list[Tensor]:
    """What an attribute access gives, without a recompute."""
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in which.normed]
    return [getattr(owner, name.rpartition(".")[2]) for owner, name in zip(owners, which.normed, strict=True)]


def check_nothing_is_left(which: Subject, model: nn.Module) -> None:
    """The model is in its own state again: by its attributes, by its own call, and all of it is ordinary tensors."""
    plain = which.plain_state({name: tensor.detach() for name, tensor in tensors_of(model).items()})
    for weight, name in zip(stored_weights(which, model), which.normed, strict=True):
        assert type(weight) is Tensor
        assert not torch._C._functorch.is_functorch_wrapped_tensor(weight)  # type: ignore[attr-defined]
        torch.testing.assert_close(weight.detach(), plain[name])
    check(model, which, which.expected(model))
    check(copy.deepcopy(model), which, which.expected(model))
    change_parts(model, seed=6)
    check_gradients(in_eager(model, which.inputs()), which)


@functional_subjects
def test_functional_call_computes_from_the_given_parameters_and_leaves_nothing(which: Subject) -> None:
    model = which.model()
    model(*which.inputs())
    other = with_other_parts(model)
    parameters = dict(other.named_parameters())
    output = torch.func.functional_call(model, parameters, which.inputs())
    torch.testing.assert_close(output.detach(), which.expected(other))
    loss_of(output).backward()
    expected = which.expected_gradients(other)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, expected[name])
        assert all(own.grad is None for own in model.parameters())
    check_nothing_is_left(which, model)


@functional_subjects
def test_grad_gives_the_gradients_and_leaves_nothing(which: Subject) -> None:
    model = which.model()
    model(*which.inputs())
    other = with_other_parts(model)
    parameters = dict(other.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return loss_of(torch.func.functional_call(model, parameters, which.inputs()))

    gradients = torch.func.grad(loss)(parameters)
    expected = which.expected_gradients(other)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])
    check_nothing_is_left(which, model)


@batchable_subjects
def test_vmap_of_grad_gives_the_gradients_of_each_sample_and_leaves_nothing(which: Subject) -> None:
    model = which.model()
    change_parts(model, seed=4)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    samples = tuple(torch.stack([x, x.flip(0) * 2 if x.is_floating_point() else x.flip(0)]) for x in which.inputs())

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, parameters, sample))

    in_dims = (None, *(0 for _ in samples))
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=in_dims)(parameters, *samples)
    for index in range(2):
        expected = which.expected_gradients(model, tuple(x[index] for x in samples))
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient[index], expected[name])
    check_nothing_is_left(which, model)


@batchable_subjects
def test_vmap_over_the_parameters_runs_an_ensemble(which: Subject) -> None:
    model = which.model()
    members = [copy.deepcopy(model) for _ in range(3)]
    for seed, member in enumerate(members):
        change_parts(member, seed)
    parameters, _ = torch.func.stack_module_state(members)
    inputs = which.inputs()

    def run(parameters: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(model, parameters, inputs)
        return output

    outputs = torch.func.vmap(run)(parameters)
    for output, member in zip(outputs, members, strict=True):
        torch.testing.assert_close(output.detach(), which.expected(member))
    check_nothing_is_left(which, model)


TRANSFORMS = {
    "grad": lambda run, x: torch.func.grad(lambda x: loss_of(run(x)))(x),
    "vmap_of_grad": lambda run, x: torch.func.vmap(torch.func.grad(lambda row: loss_of(run(row[None]))))(x),
    "jacrev": lambda run, x: torch.func.jacrev(run)(x).sum(dim=tuple(range(run(x).dim()))),
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("which", DIFFERENTIABLE, ids=str)
def test_a_transform_of_the_input_is_right_and_leaves_nothing(which: Subject, transform: str) -> None:
    """The parts are no arguments of the transform, and yet what is computed from them within it belongs to it."""
    model = which.model()
    x, *others = which.inputs()
    plain = which.build(NoNorm)
    plain.load_state_dict(which.plain_state({name: tensor.detach() for name, tensor in tensors_of(model).items()}))
    if others:  # of a pair, each sample has its own
        transform = "grad"
    actual, expected = (TRANSFORMS[transform](lambda x, run=run: run(x, *others), x) for run in (model, plain))
    torch.testing.assert_close(actual.detach(), expected.detach())
    check_nothing_is_left(which, model)


# Activation checkpointing


@all_subjects
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_activation_checkpointing_gives_the_same_gradients(which: Subject, use_reentrant: bool) -> None:
    model = which.model()
    attached = torch.ones((), requires_grad=True)  # the reentrant kind wants an input that has a gradient

    def run(attached: Tensor, *inputs: Tensor) -> Any:
        return model(*inputs) * attached

    def checkpointed(*inputs: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(run, attached, *inputs, use_reentrant=use_reentrant)

    for seed in (2, 3):
        change_parts(model, seed)
        check(checkpointed, which, which.expected(model))
        check_gradients(Captured(checkpointed, model), which)
    change_parts(model, seed=4)
    check(model, which, which.expected(model))


# Autocast


@all_subjects
def test_autocast_computes_with_the_fresh_weight(which: Subject) -> None:
    model = which.model()
    with torch.autocast("cpu", torch.bfloat16):
        for seed in (2, 3):  # within one autocast, which keeps casts of parameters
            change_parts(model, seed)
            output = model(*which.inputs())
            expected = which.expected(model)
            assert output.dtype == expected.dtype
            torch.testing.assert_close(output.detach(), expected, rtol=2e-2, atol=2e-2)
    change_parts(model, seed=4)
    check(model, which, which.expected(model))


# torch.fx


@pytest.mark.parametrize("which", [w for w in SUBJECTS if w.form == "inlined"], ids=str)
def test_fx_captures_an_inlined_layer(which: Subject) -> None:
    model = which.model()
    graph = torch.fx.symbolic_trace(model)
    check(graph, which, which.expected(model))
    change_parts(model, seed=2)
    check_gradients(same(graph), which)
    check(graph, which, which.expected(graph))
    change_parts(model, seed=3)
    check(model, which, which.expected(model))


@pytest.mark.parametrize("which", [w for w in SUBJECTS if w.form == "explicit"], ids=str)
def test_fx_refuses_a_recompute_that_it_cannot_see(which: Subject) -> None:
    model = which.model()
    model(*which.inputs())
    with pytest.raises(RuntimeError, match=r"symbolic_trace does not see recompute.*inline"):
        torch.fx.symbolic_trace(model)
    check_nothing_is_left(which, model)
