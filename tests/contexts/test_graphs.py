"""One recompute is one computation in a captured graph, which is captured once; in a frozen one it is none."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import SUBJECTS, Net, Subject, change_parts, loss_of, subject, tensors_of
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import explicit_wn
from explicit_wn import WeightNorm

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
READS = 16  # TorchScript reads no global, so the models below say 16


class ReadsOften(Net):
    """A model that recomputes once and reads the weight many times, as a fixed-point iteration does."""

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        for _ in range(16):
            x = torch.tanh(self.fc(x))
        return x


class ReadsOftenFromParent(ReadsOften):
    """The same, the weight being read as an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        for _ in range(16):
            x = torch.tanh(x @ self.fc.weight.t() + self.fc.bias)
        return x


class ReadsInLayer(nn.Module):
    """A layer with the norm inlined, which reads its weight many times in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(16):
            x = torch.tanh(x @ self.kernel.t())
        return x


NORMS: list[Callable[[], WeightNorm]] = [
    lambda: WeightNorm(dim=0),
    lambda: WeightNorm(dim=1),
    lambda: WeightNorm(dim=None),
    lambda: WeightNorm(dim=0, eps=1e-6),
]
OFTEN: list[Callable[[], nn.Module]] = [
    *(lambda norm=norm: ReadsOften(norm(), nn.Linear(3, 3)) for norm in NORMS),  # type: ignore[misc]
    lambda: ReadsOftenFromParent(layer=nn.Linear(3, 3)),
    lambda: WeightNorm("kernel").inline(ReadsInLayer()),
]
often = pytest.mark.parametrize("make", OFTEN, ids=["dim_0", "dim_1", "whole", "eps", "from_parent", "inlined"])

# What each way to a norm calls exactly once; everything else of it follows from that
NORM_OPERATORS = ("weight_norm", "norm_except_dim", "linalg_vector_norm", "aten.norm.")


def computations(graph: torch.fx.Graph) -> int:
    """How many weights `graph` computes."""
    found = [str(node.target) for node in graph.nodes if any(name in str(node.target) for name in NORM_OPERATORS)]
    return len([target for target in found if "backward" not in target])


def gradients_of_weights(graph: torch.fx.Graph) -> int:
    return len([node for node in graph.nodes if "weight_norm_interface_backward" in str(node.target)])


@often
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch's run_decompositions
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_one_recompute_is_one_computation_in_an_exported_graph(make: Callable[[], nn.Module], strict: bool) -> None:
    model, x = make(), torch.randn(2, 3)
    change_parts(model, seed=1)
    program = torch.export.export(model, (x,), strict=strict)
    assert computations(program.graph) == 1
    assert computations(program.run_decompositions({}).graph) == 1
    assert len([node for node in program.graph.nodes if "tanh" in str(node.target)]) == READS
    torch.testing.assert_close(program.module()(x), model(x))


class Graphs:
    """A backend that keeps what it is given to compile: the graphs below autograd."""

    def __init__(self) -> None:
        self.forwards: list[torch.fx.Graph] = []
        self.backwards: list[torch.fx.Graph] = []
        self.backend = aot_autograd(
            fw_compiler=self._keep(self.forwards),
            bw_compiler=self._keep(self.backwards),
            inference_compiler=self._keep(self.forwards),
        )

    def _keep(self, graphs: list[torch.fx.Graph]) -> Callable[..., Any]:
        def compiler(module: torch.fx.GraphModule, example_inputs: Any) -> Any:
            graphs.append(module.graph)
            return make_boxed_func(module.forward)  # type: ignore[no-untyped-call]

        return compiler


@often
def test_one_recompute_is_one_computation_in_a_compiled_training_step(make: Callable[[], nn.Module]) -> None:
    model, x, graphs = make(), torch.randn(2, 3), Graphs()
    run = torch.compile(model, backend=graphs.backend, fullgraph=True)
    change_parts(model, seed=1)
    loss_of(run(x)).backward()
    gradients = {name: tensor.grad for name, tensor in tensors_of(model).items()}
    model.zero_grad()
    loss_of(model(x)).backward()
    for name, tensor in tensors_of(model).items():
        torch.testing.assert_close(gradients[name], tensor.grad)
    (forward,), (backward,) = graphs.forwards, graphs.backwards
    assert computations(forward) == 1
    assert computations(backward) == 0
    assert gradients_of_weights(backward) == (1 if computations_are_fused(forward) else 0)


def computations_are_fused(graph: torch.fx.Graph) -> bool:
    return any("weight_norm_interface" in str(node.target) for node in graph.nodes)


@often
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_recompute_is_one_computation_in_compiled_inference(make: Callable[[], nn.Module], mode: Any) -> None:
    model, x, graphs = make().eval(), torch.randn(2, 3), Graphs()
    run = torch.compile(model, backend=graphs.backend, fullgraph=True)
    for seed in (1, 2):
        change_parts(model, seed)
        with mode():
            torch.testing.assert_close(run(x), model(x))
    (forward,) = graphs.forwards
    assert computations(forward) == 1


def test_that_is_so_in_a_process_that_has_captured_nothing_before() -> None:
    """What Dynamo was told of our functions, by whatever ran before, it knows until its process ends."""
    one = f"{__file__}::{test_one_recompute_is_one_computation_in_compiled_inference.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", one]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTEST_ADDOPTS": ""})
    assert done.returncode == 0, done.stdout


@often
@pytest.mark.parametrize(
    "script", [None, torch.jit.script, explicit_wn.script], ids=["eager", "torch_script", "our_script"]
)
def test_one_recompute_is_one_computation_when_it_runs(make: Callable[[], nn.Module], script: Any) -> None:
    model, x = make(), torch.randn(2, 3)
    run = script(model) if script else model
    for seed in range(3):  # TorchScript optimizes in between
        change_parts(model, seed)
        expected = model(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            output = run(x)
        counts = {event.key: event.count for event in profile.key_averages()}  # type: ignore[no-untyped-call]
        assert counts["aten::tanh"] == READS
        assert counts.get("aten::_weight_norm", 0) + counts.get("aten::norm_except_dim", 0) >= 1
        assert counts.get("aten::norm_except_dim", 0) <= 1
        assert counts.get("aten::_weight_norm", 0) <= 1
        torch.testing.assert_close(output, expected)


class RecomputesTwice(Net):
    """A model that changes its parts between two recomputes: two weights, not one."""

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        first = self.fc(x)
        with torch.no_grad():
            self.fc.weight_g.mul_(3.0)
        self.wn.recompute(self.fc)
        return torch.cat([first, self.fc(x)])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_parts_that_change_within_a_compiled_graph_give_another_weight(mode: Any) -> None:
    model, x = RecomputesTwice(layer=nn.Linear(3, 3)).requires_grad_(False), torch.randn(2, 3)
    v, bias = model.fc.weight_v, model.fc.bias
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with mode():
        for seed in (1, 2):
            change_parts(model, seed)
            g = model.fc.weight_g.clone()
            first, second = (
                torch.nn.functional.linear(x, s * g * v / v.norm(dim=1, keepdim=True), bias) for s in (1, 3)
            )
            torch.testing.assert_close(run(x), torch.cat([first, second]))


class ReadsInTwoGradModes(Net):
    """One read without gradients, one with: the second must have its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        with torch.no_grad():
            start = self.fc(x)
        self.wn.recompute(self.fc)
        return self.fc(start)


@pytest.mark.parametrize("backend", ["aot_eager", None])
def test_a_read_without_gradients_does_not_take_them_from_the_next(backend: str | None) -> None:
    model, x = ReadsInTwoGradModes(layer=nn.Linear(3, 3)), torch.randn(2, 3)
    change_parts(model, seed=1)
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    loss_of(run(x)).backward()
    g, v, bias = (p.detach().clone().requires_grad_() for p in (model.fc.weight_g, model.fc.weight_v, model.fc.bias))
    weight = g * v / v.norm(dim=1, keepdim=True)
    start = torch.nn.functional.linear(x, weight, bias).detach()
    loss_of(torch.nn.functional.linear(start, weight, bias)).backward()
    for parameter, expected in zip((model.fc.weight_g, model.fc.weight_v, model.fc.bias), (g, v, bias), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


COMPILED = ["Linear", "Conv2d", "two_names", "loop", "own_parameter", "shared"]


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("form", ["explicit", "inlined"])
def test_compile_does_not_recompile_between_optimizer_steps(kind: str, form: str) -> None:
    which = subject(kind, form)
    model = which.model()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[no-untyped-call]
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            output = run(*which.inputs())
            torch.testing.assert_close(output.detach(), which.expected(model))
            loss_of(output).backward()
            optimizer.step()
            model(*which.inputs())  # eager in between, which stores a weight


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("form", ["explicit", "inlined"])
def test_compile_does_not_recompile_when_a_model_switches_between_train_and_eval(kind: str, form: str) -> None:
    which = subject(kind, form)
    model = which.model()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[no-untyped-call]
        for seed, training in enumerate([True, False, True, False]):
            model.train(training)
            change_parts(model, seed)
            torch.testing.assert_close(run(*which.inputs()).detach(), which.expected(model))


def test_compile_works_with_dynamic_shapes_and_after_a_load() -> None:
    which = subject("Linear", "explicit")
    model, other = which.model(), which.model()
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (2, 3, 5):
        x = torch.randn(rows, 3)
        change_parts(other, seed=rows)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(run(x).detach(), which.expected(other, (x,)))


def operators_of(block: Any) -> list[str]:
    """The operators of a TorchScript graph, those of its branches too."""
    found = []
    for node in block.nodes():
        found.append(node.kind())
        for inner in node.blocks():
            found += operators_of(inner)
    return found


# torch.jit.freeze does not evaluate the norm of an attention, though it is one of constants
FROZEN = [which for which in SUBJECTS if which.kind != "MultiheadAttention"]


@pytest.mark.parametrize("which", FROZEN, ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_a_frozen_graph_computes_no_norm_and_holds_no_parameter(which: Subject) -> None:
    frozen = torch.jit.freeze(explicit_wn.script(which.model().eval()))
    assert not [operator for operator in operators_of(frozen.inlined_graph) if "norm" in operator]
    assert not list(frozen.parameters())
