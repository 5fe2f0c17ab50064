"""The straight functions of `straight.py` do what the careful ones of `weight.py` do, whatever else is going on."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import attrs
import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from random_examples import drawn
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from explicit_wn import (
    ForcedWeightNorm,
    ScaledWeightNorm,
    SpectralNorm,
    UnitNorm,
    WeightNorm,
    cached,
    carrier,
    detect_stale,
    fold,
    functional,
    recompute_all,
)
from explicit_wn.carrier import Recipe, straight, weight
from explicit_wn.carrier.straight import Functions
from explicit_wn.reparametrization import Reparametrization


def careful(recipe: Recipe, base: type[nn.Module]) -> Functions:
    """`straight.functions_of`, which goes the careful way at once."""
    return Functions(
        recipe,
        recipe.name,
        lambda module: weight.recompute_recipe(module, recipe),
        lambda module: weight.advance_and_compute(module, recipe),
        lambda module: weight.read(module, recipe),
    )


@contextlib.contextmanager
def everything_careful() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(straight, "functions_of", careful)
        patch.setattr(carrier.module, "_classes", {})
        yield


NORMS: dict[str, Callable[[], Any]] = {
    "first dim": lambda: WeightNorm(),
    "last dim": lambda: WeightNorm(dim=2),
    "middle dim": lambda: WeightNorm(dim=1),
    "whole": lambda: WeightNorm(dim=None),
    "eps": lambda: WeightNorm(eps=1e-3),
    "another formula": lambda: Doubled(),
    "spectral": lambda: SpectralNorm(n_power_iterations=2),
    "of one part": lambda: Tripled(),
    "spectral, by rows": lambda: SpectralNorm(dim=1, first="u"),
}


ANOTHER_THREAD = ThreadPoolExecutor(1)  # always the same: the names of threads that are over are used again


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs() + 0.1


class Layer(nn.Conv1d):
    """Recomputes within its own forward, if it is told to."""

    norm: Any = None

    def forward(self, x: Tensor) -> Tensor:
        before = super().forward(x)
        if self.norm is not None:
            with torch.no_grad():
                next(self.parameters()).mul_(2)
            self.norm.recompute(self)
        return before + self._conv_forward(x, self.weight, self.bias)


class Subject:
    """A layer, and what may be done to it and to its weight; each returns what is to be compared."""

    def __init__(self, norm: Any, verb: str) -> None:
        torch.default_generator.manual_seed(3)  # the quick way to do it, for there are thousands
        self.norm = norm
        self.layer: Any = getattr(norm, verb)(Layer(4, 5, 3))
        self.block = contextlib.ExitStack()
        self.part = next(name for name, _ in self.layer.named_parameters() if name != "bias")

    def recompute(self) -> Any:
        return self.norm.recompute(self.layer)

    def recompute_all(self) -> Any:
        return recompute_all(self.layer)

    def read(self) -> Any:
        return self.layer.weight

    def read_again(self) -> Any:
        return self.layer.weight is self.layer.weight

    def forward(self) -> Any:
        return self.layer(torch.ones(1, 4, 6))

    def without_gradient(self) -> Any:
        with torch.no_grad():
            self.norm.recompute(self.layer)
            return self.layer(torch.ones(1, 4, 6))

    def in_inference_mode(self) -> Any:
        with torch.inference_mode():
            self.norm.recompute(self.layer)
            return self.layer(torch.ones(1, 4, 6)).sum().item()

    def change(self) -> Any:
        with torch.no_grad():
            self.layer._parameters.get(self.part, self.layer.bias).mul_(1.5)

    def another_parameter(self) -> Any:
        if self.part in self.layer._parameters:
            setattr(self.layer, self.part, nn.Parameter(self.layer._parameters[self.part].detach() * 2))

    def of_inference_mode(self) -> Any:
        with torch.inference_mode():
            self.another_parameter()
            return self.layer(torch.ones(1, 4, 6))

    def other_data(self) -> Any:
        for parameter in self.layer.parameters():
            parameter.data = parameter.data * 0.5

    def wrong_shape(self) -> Any:
        self.layer._parameters[self.part].data = torch.ones(2, 2)

    def backward(self) -> Any:
        self.norm.recompute(self.layer)
        self.layer(torch.ones(1, 4, 6)).square().sum().backward()
        return [parameter.grad for parameter in self.layer.parameters()]

    def evaluate(self) -> Any:
        self.layer.train(not self.layer.training)

    def double(self) -> Any:
        self.layer.double().float()

    def open_block(self) -> Any:
        self.block.enter_context(cached(self.layer))

    def close_block(self) -> Any:
        self.block.close()

    def functional_call(self) -> Any:
        state = {name: value.detach() * 2 for name, value in self.layer.named_parameters()}
        return torch.func.functional_call(self.layer, state, (torch.ones(1, 4, 6),))

    def within_forward(self) -> Any:
        vars(self.layer)["norm"] = self.norm
        try:
            return [self.forward(), self.layer.weight]
        finally:
            del vars(self.layer)["norm"]

    def input_gradient(self) -> Any:
        return torch.func.grad(lambda x: (self.recompute_all(), self.layer(x))[1].square().sum())(torch.ones(1, 4, 6))

    def gradient(self) -> Any:
        state = {name: value.detach() for name, value in self.layer.named_parameters()}

        def loss(state: Any) -> Tensor:
            return torch.func.functional_call(self.layer, state, (torch.ones(1, 4, 6),)).square().sum()

        return list(torch.func.grad(loss)(state).values())

    def prune(self) -> Any:
        if self.part in self.layer._parameters:
            prune.l1_unstructured(self.layer, self.part, amount=0.3)

    def parametrize(self) -> Any:
        if self.part in self.layer._parameters:
            parametrize.register_parametrization(self.layer, self.part, Positive())

    def in_another_thread(self) -> Any:
        return ANOTHER_THREAD.submit(lambda: [self.layer.weight, self.recompute()]).result()

    def watched(self) -> Any:
        with detect_stale():
            return self.layer.weight

    def traced(self) -> Any:
        with torch.no_grad():
            return torch.jit.trace(lambda x: (self.recompute(), self.layer(x))[1], torch.ones(1, 4, 6))(
                torch.zeros(1, 4, 6)
            )

    def symbolically(self) -> Any:
        graph = torch.fx.Tracer().trace(nn.Sequential(self.layer))
        return [node.name for node in graph.nodes]

    def folded(self) -> Any:
        return fold(self.layer)

    def store(self) -> Any:
        """What is stored, from which parts, and what was counted."""
        if not isinstance(self.layer, carrier.Carrier):
            return None
        own = [*self.layer._parameters.values(), *self.layer._buffers.values()]
        return [
            (name, s.value, [[x is y for y in own] for x in s.sources], s.version, s.is_stale())
            for name, s in carrier.store_of(self.layer).items()
        ]


DEEDS = [name for name in vars(Subject) if not name.startswith("_")]


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return comparable(call())
    except Exception as error:
        return type(error), str(error)


def comparable(value: Any) -> Any:
    """`value` with its tensors as their bits."""
    if isinstance(value, Tensor):
        held = value.detach().contiguous()
        return value.dtype, value.shape, value.requires_grad, held.flatten().view(torch.uint8).tolist()
    return [comparable(one) for one in value] if isinstance(value, (list, tuple)) else value


class Doubled(WeightNorm):
    """A norm with a formula of its own, for which the quick way of its base is another one."""

    formula = staticmethod(lambda v, g, dim, eps: 2 * functional.weight_norm(v, g, dim, eps))


@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
class Tripled(Reparametrization):
    name: str = "weight"
    formula = staticmethod(lambda third: 3 * third)

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        return {"third": weight / 3}


@pytest.mark.parametrize("verb", ["apply", "inline"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@hypothesis.given(deeds=st.lists(st.sampled_from(DEEDS), min_size=1, max_size=8))
@drawn(60)
def test_the_straight_way_does_what_the_careful_one_does(norm: Any, verb: str, deeds: list[str]) -> None:
    with everything_careful():
        wanted = Subject(norm(), verb)
    subject = Subject(norm(), verb)
    for deed in deeds:
        results = []
        for one in (subject, wanted):
            torch.default_generator.manual_seed(5)
            results.append([outcome(getattr(one, deed)), outcome(one.store)])
            results[-1].append(outcome(lambda: list(one.layer.state_dict().items())))  # noqa: B023
        assert results[0] == results[1]
    subject.close_block()
    wanted.close_block()


@pytest.mark.parametrize("norm", [WeightNorm, partial(ScaledWeightNorm, clip=0.9), ForcedWeightNorm, UnitNorm])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_ordinary_case_goes_the_quick_way(norm: Any, dim: int) -> None:
    layer: Any = norm(dim=dim).apply(nn.Conv1d(4, 3, 2))
    (recipe,) = carrier.recipes_of(layer)
    quick = type(recipe.norm).quick
    assert quick is not None
    given = recipe.read(layer) | dict(recipe.settings)
    value = quick(**{name: given[name] for name in inspect.signature(quick).parameters})
    if dim == 1 and norm is WeightNorm:
        assert value is None  # torch has no kernel for it
    else:
        torch.testing.assert_close(value, recipe.compute(layer))
