"""Graph capture: one computation per trace, and pins of how Dynamo, functorch and the tracers behave that we build on.

A pin that fails tells that torch has changed, and its docstring what to do then.
"""

import contextlib
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import layers
import numpy as np
import pytest
import torch
import torch._dynamo
from layers import by_hand, make_stale, read_stale
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from explicit_wn import (
    ScaledWeightNorm,
    SigmaReparam,
    SpectralNorm,
    WeightNorm,
    WeightStandardization,
    carrier,
    recompute_all,
)
from explicit_wn.contexts import capture
from explicit_wn.functional import weight_norm

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Net(layers.Net):
    """Reads its weight `reads` times after each recompute."""

    def __init__(self, reads: int = 3, recomputes: int = 1) -> None:
        super().__init__()
        self.reads, self.recomputes = reads, recomputes

    def forward(self, x: Tensor) -> Tensor:
        result = torch.zeros(2)
        for _ in range(self.recomputes):
            self.wn.recompute(self.fc)
            for _ in range(self.reads):
                result = result + nn.functional.linear(x, self.fc.weight, self.fc.bias)
        return result


def expected(model: Net, x: Tensor) -> Tensor:
    return nn.functional.linear(x, by_hand(model.fc), model.fc.bias) * model.reads * model.recomputes


def computations(graph: torch.fx.Graph) -> int:
    """How often the weight is computed in `graph`."""
    return sum(node.op == "call_function" and "_weight_norm" in str(node.target) for node in graph.nodes)


def graphs_of(model: nn.Module, x: Tensor) -> tuple[list[torch.fx.GraphModule], Tensor]:
    """The graphs that a backend is given for `model`, and its output."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    return graphs, torch.compile(model, backend=backend, fullgraph=True)(x)


# What is captured


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("reads", "recomputes"), [(1, 1), (5, 1), (2, 3)])
def test_however_many_reads_an_exported_graph_computes_once(strict: bool, reads: int, recomputes: int) -> None:
    model, x = Net(reads, recomputes), torch.randn(4, 3)
    stored = model.fc.weight
    make_stale(model.fc)
    exported = torch.export.export(model, (x,), strict=strict)
    assert computations(exported.graph) == 1
    torch.testing.assert_close(exported.module()(x), expected(model, x))
    assert read_stale(model.fc) is stored


def test_nothing_is_stored_while_a_graph_is_captured() -> None:
    model, x = Net(), torch.randn(4, 3)
    stored = model.fc.weight
    make_stale(model.fc)
    graphs, result = graphs_of(model, x)
    torch.testing.assert_close(result, expected(model, x))
    assert len(graphs) == 1
    assert read_stale(model.fc) is stored
    outputs = next(node for node in graphs[0].graph.nodes if node.op == "output").args[0]
    assert len(outputs) == 1


def test_make_fx_records_the_computation() -> None:
    model, x = Net(), torch.randn(4, 3)
    graph = make_fx(lambda x: model(x))(x)
    make_stale(model.fc)
    assert computations(graph.graph) == 1
    torch.testing.assert_close(graph(x), expected(model, x))
    torch.testing.assert_close(model(x), expected(model, x))


RECORDED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "trace": lambda layer, x: torch.jit.trace(layer, x),
    "export": lambda layer, x: torch.export.export(layer, (x,)).module(),
    "strict export": lambda layer, x: torch.export.export(layer, (x,), strict=True).module(),
}


def kinds(graph: Any) -> list[str]:
    """What the nodes of a graph of TorchScript or of fx do."""
    if isinstance(graph, torch.fx.Graph):
        return [str(node.target) for node in graph.nodes]
    return [node.kind() for node in graph.nodes()]


@pytest.mark.parametrize("norm", [WeightNorm(), ScaledWeightNorm(clip=0.5), WeightStandardization(), SigmaReparam()])
@pytest.mark.parametrize("record", RECORDED.values(), ids=RECORDED)
def test_a_recorded_graph_asks_for_the_shape_of_g_as_it_runs(record: Callable[..., Any], norm: Any) -> None:
    """torch's kernel, recorded bare, reads past the end of a g of another shape that is put there later."""
    layer, x = norm.inline(nn.Linear(20, 40)).eval(), torch.ones(1, 20)
    recorded = record(layer, x)
    assert torch.equal(recorded(x), layer(x))
    graph = kinds(getattr(recorded, "inlined_graph", None) or recorded.graph)
    assert "aten::view" in [kind.removesuffix(".default").replace(".", "::") for kind in graph]
    name = "weight_gain" if hasattr(layer, "weight_gain") else "weight_g"
    setattr(recorded, name, nn.Parameter(torch.rand(1, 20)))
    with pytest.raises(RuntimeError, match="is invalid for input of size 20"):
        recorded(x)


def test_pin_make_fx_records_the_kernel_bare() -> None:
    """It is not asked for, since only its dispatch mode tells. If this fails, mend the sentence in the limits."""
    layer = WeightNorm().inline(nn.Linear(20, 40))
    assert not any("view" in kind for kind in kinds(make_fx(lambda x: layer(x))(torch.ones(1, 20)).graph))


@pytest.mark.parametrize("strict", [False, True])
def test_the_functions_are_exported_for_every_length_of_the_kept_dim(strict: bool) -> None:
    class Function(nn.Module):
        def forward(self, v: Tensor, g: Tensor) -> Tensor:
            return weight_norm(v, g)

    lengths = {"v": {0: torch.export.Dim("rows", min=2)}, "g": {0: torch.export.Dim("rows", min=2)}}
    given = torch.ones(40, 20), torch.ones(40, 1)
    exported = torch.export.export(Function(), given, dynamic_shapes=lengths, strict=strict).module()
    traced = torch.jit.trace(Function(), given)
    v, g = torch.randn(30, 20), torch.rand(30, 1)
    assert torch.equal(exported(v, g), weight_norm(v, g))
    assert torch.equal(traced(v, g), weight_norm(v, g))


def test_symbolic_trace_refuses_a_recompute_that_it_cannot_see() -> None:
    model = Net()
    with pytest.raises(RuntimeError) as raised:
        torch.fx.symbolic_trace(model)
    for text in ("recompute(Linear)", "'weight'", "inline(layer)", "torch.export"):
        assert text in str(raised.value)
    assert type(model.fc.weight) is Tensor
    x = torch.randn(4, 3)
    make_stale(model.fc)
    torch.testing.assert_close(model(x), expected(model, x))


def test_symbolic_trace_keeps_an_inlined_layer_fresh() -> None:
    model, x = nn.Sequential(WeightNorm().inline(nn.Linear(3, 2))), torch.randn(4, 3)
    traced = torch.fx.symbolic_trace(model)
    make_stale(model[0])
    wanted = nn.functional.linear(x, by_hand(model[0]), model[0].bias)
    torch.testing.assert_close(traced(x), wanted)
    make_stale(traced.get_submodule("0"))
    wanted = nn.functional.linear(x, by_hand(model[0]), model[0].bias)
    torch.testing.assert_close(traced(x), wanted)


class Read(nn.Module):
    """Reads a weight that is nowhere recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = WeightNorm().apply(nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.fc.weight)


def test_symbolic_trace_records_what_a_read_computes() -> None:
    model, x = Read().double(), torch.randn(4, 3).double()  # after which no weight is stored
    traced = [torch.fx.symbolic_trace(model)]
    model.fc.weight  # noqa: B018 - now it is, by this thread
    thread = threading.Thread(target=lambda: traced.append(torch.fx.symbolic_trace(model)))
    thread.start()
    thread.join()
    assert len(traced) == 2
    make_stale(model.fc)
    for graph in traced:
        torch.testing.assert_close(graph(x), nn.functional.linear(x, by_hand(model.fc)))


# once


def test_outside_a_trace_it_computes_every_time() -> None:
    given: dict[str, Any] = {"v": torch.randn(2, 3), "g": torch.rand(2, 1), "dim": 0, "eps": 0.0}
    formula = capture.once(weight_norm)
    first, second = formula(**given), formula(**given)
    assert first is not second
    torch.testing.assert_close(first, weight_norm(**given), rtol=0, atol=0)


def second_is_first(change: Callable[..., None]) -> bool:
    """Whether the second of two calls in one trace, with `change` between them, is given the tensor of the first."""
    formula, same = capture.once(weight_norm), []

    def function(v: Tensor, g: Tensor) -> Tensor:
        first = formula(v=v, g=g, dim=0, eps=0.0)
        change(v, g)
        second = formula(v=v, g=g, dim=0, eps=0.0)
        same.append(first is second)
        return first + 2 * second

    def given() -> tuple[Tensor, Tensor]:
        return torch.ones(3, 3).tril(), torch.ones(3, 1)

    graph = make_fx(function)(*given())
    assert computations(graph.graph) == (1 if same[0] else 2)
    parts = given()
    wanted = weight_norm(*parts)
    change(*parts)
    torch.testing.assert_close(graph(*given()), wanted + 2 * weight_norm(*parts))
    return same[0]


def test_within_a_trace_the_same_tensor_is_given_again() -> None:
    assert second_is_first(lambda v, g: None)


@pytest.mark.parametrize("part", [0, 1])
def test_within_a_trace_a_changed_part_makes_a_new_tensor(part: int) -> None:
    def change(*parts: Tensor) -> None:
        parts[part][0].add_(2)

    assert not second_is_first(change)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_computes_as_often_as_the_docstring_of_once_says(strict: bool) -> None:
    class Example(Net):
        def forward(self, x: Tensor) -> Any:
            self.wn.recompute(self.fc)
            a, b = x @ self.fc.weight.t(), x @ self.fc.weight.t()
            with torch.no_grad():
                c = x @ self.fc.weight.t()
                self.fc.weight_g.mul_(2)
                d = x @ self.fc.weight.t()
            return a, b, c, d

    model, x = Example(), torch.randn(4, 3)
    exported = torch.export.export(model, (x,), strict=strict)
    graphs = [one.graph for one in exported.graph_module.modules() if isinstance(one, torch.fx.GraphModule)]
    assert sum(map(computations, graphs)) == 3
    first = x @ by_hand(model.fc).t()
    torch.testing.assert_close(exported.module()(x), (first, first, first, 2 * first))


def test_the_copy_that_a_backward_keeps_is_registered_once() -> None:
    assert capture.kept_copy() is capture.kept_copy()


def test_two_traces_share_nothing() -> None:
    formula, seen = capture.once(weight_norm), []

    def function(v: Tensor, g: Tensor) -> Tensor:
        seen.append(formula(v=v, g=g, dim=0, eps=0.0))
        return seen[-1] * 1

    given = torch.randn(3, 3), torch.rand(3, 1)
    graphs = [make_fx(function)(*given).graph for _ in range(2)]
    assert [computations(graph) for graph in graphs] == [1, 1]
    assert seen[0] is not seen[1]


def test_a_trace_that_is_over_is_let_go() -> None:
    gc.collect()
    before = len(capture._traces)
    make_fx(lambda v, g: capture.once(weight_norm)(v=v, g=g, dim=0, eps=0.0))(torch.ones(3, 3), torch.ones(3, 1))
    gc.collect()
    assert len(capture._traces) == before


# Pins


def test_pin_what_marks_a_function_for_dynamo_as_constant() -> None:
    """`torch.compiler.assume_constant_result` does just this, and imports Dynamo to do it."""

    def function() -> None:
        pass

    torch._dynamo.assume_constant_result(function)
    assert vars(function) == {"_dynamo_marked_constant": True}


def test_pin_dynamo_runs_what_is_marked_constant_while_it_traces() -> None:
    """`announce_to_dynamo` relies on it. If this fails, reads are no longer one node in a compiled graph."""
    runs = []

    def announce() -> None:
        runs.append(torch.compiler.is_dynamo_compiling())

    announce._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def function(x: Tensor) -> Tensor:
        announce()
        return x + 1

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    x = torch.ones(2)
    torch.testing.assert_close(compiled(x), x + 1)
    torch.testing.assert_close(compiled(x), x + 1)
    assert len(runs) == 1


def test_pin_dynamo_leaves_an_operator_in_its_graph_as_it_is() -> None:
    """So the tracer beneath runs `once` for every read. If this fails, see what Dynamo makes of operators."""
    model = Net(reads=3)
    (recipe,) = carrier.recipes_of(model.fc)
    graphs, _ = graphs_of(model, torch.randn(4, 3))
    assert [node.target for node in graphs[0].graph.nodes].count(recipe.operator.call) == 3


def test_a_formula_that_may_be_another_one_tomorrow_has_another_name_then() -> None:
    """torch keeps compiled graphs on disk, and knows the operators in them by their names alone."""
    program = """if True:
        from explicit_wn import functional
        from explicit_wn.contexts import capture
        print(capture._fingerprint(functional.weight_norm, {"dim": 0, "eps": 0.0}))
        print(capture._fingerprint(functional.weight_norm, {"dim": 1, "eps": 0.0}))
        print(capture._fingerprint(functional.spectral_norm, {"dim": 0, "eps": 0.0}))
        def formula(v): return v
        print(capture._fingerprint(formula))
    """
    first, second = (subprocess.check_output([sys.executable, "-c", program], text=True).split() for _ in range(2))
    assert first[:3] == second[:3]
    assert len({*first, second[3]}) == 5


@pytest.mark.parametrize("norm", [WeightNorm().inline, WeightNorm(eps=1e-6).apply, SpectralNorm().inline])
def test_where_a_backend_fails_the_graph_breaks_as_beside_a_plain_layer(norm: Any) -> None:
    """`nn.ReflectionPad1d(np.int64(2))` has it fail, as in the discriminators of Parallel WaveGAN."""
    padding = nn.ReflectionPad1d(np.int64(2))  # type: ignore[arg-type]
    model, x = nn.Sequential(padding, norm(nn.Conv1d(1, 4, 3)), nn.ReLU()).eval(), torch.randn(2, 1, 9)
    next(model.parameters()).data.mul_(3)
    recompute_all(model)
    wanted = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), wanted, rtol=0, atol=0)


def test_pin_the_tracer_is_the_same_throughout_a_trace_and_weakly_referable() -> None:
    """`once` keys what it knows by it. If this fails, `once` needs another thing that lives as long as a trace."""
    seen = []

    def function(x: Tensor) -> Tensor:
        for _ in range(2):
            mode = get_proxy_mode()
            assert mode is not None
            seen.append(weakref.ref(mode.tracer)())
        return x + 1

    assert get_proxy_mode() is None
    make_fx(function)(torch.ones(2))
    assert seen[0] is seen[1]
    assert seen[0] is not None


TRANSFORMS: list[Callable[..., Any]] = [
    torch.func.grad,
    torch.func.hessian,
    lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    lambda f: lambda x: torch.func.vmap(lambda scale: f(scale * x))(torch.ones(2)),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_pin_functorch_tells_whether_a_transform_runs(transform: Callable[..., Any]) -> None:
    """While one does, nothing is stored: it would be a wrapper that is dead afterwards."""
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(capture.is_transformed())
        return x.square().sum()

    assert not capture.is_transformed()
    transform(function)(torch.ones(4, 3))
    assert seen
    assert all(seen)
    with torch.autograd.forward_ad.dual_level():
        assert capture.is_transformed()
    assert not capture.is_transformed()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("fails", [False, True])
def test_functorch_leaves_nothing_in_the_module(transform: Callable[..., Any], fails: bool) -> None:
    model, x = Net(reads=1), torch.randn(4, 3)
    model(x)
    with torch.no_grad():
        model.fc.weight_g.mul_(2)
    seen = []

    def loss(x: Tensor) -> Tensor:
        seen.append(1)
        value = model(x).square().sum()
        if fails:
            raise ArithmeticError
        return value

    with pytest.raises(ArithmeticError) if fails else contextlib.nullcontext():
        transform(loss)(x)
    assert seen
    assert carrier.store_of(model.fc) == {}
    torch.testing.assert_close(model.fc.weight, by_hand(model.fc))
    torch.autograd.grad(model.fc(x).sum(), model.fc.weight_g)


def test_a_weight_is_fresh_within_a_transform_that_does_not_know_the_parts() -> None:
    model, x = Net(reads=1), torch.randn(4, 3)
    model(x)
    with torch.no_grad():
        model.fc.weight_g.mul_(2)
    found = torch.func.grad(lambda x: model(x).sum())(x)
    torch.testing.assert_close(found, by_hand(model.fc).sum(0).expand(4, 3))


@pytest.mark.parametrize("strict", [False, True])
def test_pin_export_counts_as_compiling(strict: bool) -> None:
    """`capturing` relies on it: in export, too, nothing may be stored."""

    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if capture.capturing() else x

    assert not capture.capturing()
    exported = torch.export.export(Asking(), (torch.ones(2),), strict=strict)
    assert exported.module()(torch.ones(2)).tolist() == [2.0, 2.0]


def test_pin_tracing_with_torch_jit_is_not_compiling() -> None:
    """There, `recompute` stores as in eager mode, and the tracer records it."""
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(capture.capturing())
        return x + 1

    torch.jit.trace(function, torch.ones(2))
    assert not any(seen)


def test_the_store_is_empty_of_fake_tensors_after_an_export() -> None:
    model, x = Net(), torch.randn(4, 3)
    carrier.store_of(model.fc).clear()
    torch.export.export(model, (x,))
    assert type(model.fc.weight) is Tensor
    torch.testing.assert_close(model(x), expected(model, x))
