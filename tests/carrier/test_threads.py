"""Threads: one model in many of them, weights being read, and training beside inference.

The interpreter is told to switch threads after every few instructions, so that a race has thousands of chances.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from layers import loss_of, weight_of
from torch import Tensor, nn
from whole_models import normed_weight, spectral_weight

import explicit_wn
from explicit_wn import SpectralNorm, WeightNorm, cached, carrier
from explicit_wn.carrier import Block, Store, weight
from explicit_wn.models import verbs

THREADS = 16


@pytest.fixture(autouse=True)
def _switching() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each of them returns, having begun together in a thread of its own; the first error, if there is one."""
    together = threading.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        together.wait(60)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        running = [pool.submit(begin, work) for work in works]
        return [one.result() for one in running]


def in_thread(work: Callable[[], Any]) -> Any:
    return in_threads(work)[0]


# Models, and what they compute, without the package


class Net(nn.Module):
    """A first and a middle dim, torch's kernel and ours, recomputed or inlined."""

    def __init__(self, norm: Any, verb: str) -> None:
        super().__init__()
        self.wn = norm
        self.explicit = verb == "apply"
        self.conv = getattr(norm, verb)(nn.Conv1d(2, 32, 3))
        self.up = getattr(norm, verb)(nn.ConvTranspose1d(32, 32, 7), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.explicit:
            self.wn.recompute(self.conv)
            self.wn.recompute(self.up)
        return self.up(torch.tanh(self.conv(x)))


class Recurrent(nn.Module):
    def __init__(self, norm: Any, verb: str) -> None:
        super().__init__()
        self.wn = norm
        self.explicit = verb == "apply"
        self.lstm = nn.LSTM(3, 4)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            getattr(norm, verb)(self.lstm, name)

    def forward(self, x: Tensor) -> Tensor:
        if self.explicit:
            self.wn.recompute(self.lstm)
        return self.lstm(x)[0]


def plain_net(model: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    def weight(name: str, dim: int) -> Tensor:
        if f"{name}_g" in tensors:
            return weight_of(tensors[f"{name}_g"], tensors[f"{name}_v"], dim)
        return spectral_weight(*(tensors[f"{name}_{part}"] for part in ("orig", "u", "v")), dim)

    hidden = nn.functional.conv1d(x, weight("conv.weight", 0), tensors["conv.bias"])
    return nn.functional.conv_transpose1d(torch.tanh(hidden), weight("up.weight", 1), tensors["up.bias"])


def plain_recurrent(model: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    plain = nn.LSTM(3, 4)
    state = {key: tensors.get(f"lstm.{key}") for key in plain.state_dict()}
    for name in ("weight_ih_l0", "weight_hh_l0"):
        state[name] = weight_of(tensors[f"lstm.{name}_g"], tensors[f"lstm.{name}_v"], 0)
    return torch.func.functional_call(plain, state, (x,))[0]  # type: ignore[no-any-return]


Case = tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[int, ...]]
CASES: dict[str, Case] = {
    "WeightNorm, recomputed": (lambda: Net(WeightNorm(), "apply"), plain_net, (1, 2, 5)),
    "WeightNorm, inlined": (lambda: Net(WeightNorm(), "inline"), plain_net, (1, 2, 5)),
    "SpectralNorm, recomputed": (lambda: Net(SpectralNorm(), "apply"), plain_net, (1, 2, 5)),
    "SpectralNorm, inlined": (lambda: Net(SpectralNorm(), "inline"), plain_net, (1, 2, 5)),
    "LSTM, recomputed": (lambda: Recurrent(WeightNorm("weight_ih_l0"), "apply"), plain_recurrent, (2, 1, 3)),
    "LSTM, inlined": (lambda: Recurrent(WeightNorm("weight_ih_l0"), "inline"), plain_recurrent, (2, 1, 3)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def stale(case: Case) -> nn.Module:
    """The model of a case, in eval mode, with stored weights that are out of date."""
    model = case[0]()
    model.eval()(torch.randn(*case[2]))
    change(model)
    return model


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for name, part in model.named_parameters():
            if name.endswith(("_g", "_v", "_orig")):
                part.mul_(1.5).add_(0.1)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def normed_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, norm.name) for _, module, norm in explicit_wn.normed(model)]


def weights_of(model: nn.Module, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Every normed weight of `model`, by the formula."""
    weights = []
    for path, _, norm in explicit_wn.normed(model):
        if f"{path}_g" in tensors:
            weights.append(normed_weight(tensors, path, norm.dim))
        else:
            weights.append(spectral_weight(*(tensors[f"{path}_{part}"] for part in ("orig", "u", "v")), norm.dim))
    return weights


def expected_gradients(case: Case, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    own = {name for name, _ in model.named_parameters()}
    tensors = {name: t.requires_grad_(name in own) for name, t in tensors_of(model).items()}
    loss_of(case[1](model, tensors, x)).backward()
    return {name: tensors[name].grad for name in own}


# Inference


@every_case
def test_sixteen_threads_in_inference_give_the_outputs_and_read_the_weights_of_the_formula(case: Case) -> None:
    model = stale(case)
    inputs = [torch.randn(*case[2]) for _ in range(THREADS)]
    tensors = tensors_of(model)
    expected, weights = [case[1](model, tensors, x) for x in inputs], weights_of(model, tensors)
    modes = [torch.no_grad, torch.inference_mode, torch.enable_grad]

    def work(index: int) -> None:
        for _ in range(15):
            with modes[index % 3]():
                torch.testing.assert_close(model(inputs[index]).detach(), expected[index])
                for (module, name), weight in zip(normed_of(model), weights, strict=True):
                    torch.testing.assert_close(getattr(module, name).detach(), weight, rtol=1e-4, atol=1e-5)

    in_threads(*(lambda index=index: work(index) for index in range(THREADS)))
    for module, _ in normed_of(model):
        assert not carrier.store_of(module).in_forward


@every_case
def test_cached_in_one_thread_is_used_by_sixteen(case: Case) -> None:
    model = stale(case)
    inputs = [torch.randn(*case[2]) for _ in range(THREADS)]
    tensors = tensors_of(model)
    with torch.no_grad(), cached(model):
        held = [getattr(module, name) for module, name in normed_of(model)]

        def work(index: int) -> None:
            with torch.no_grad():
                for _ in range(10):
                    torch.testing.assert_close(model(inputs[index]), case[1](model, tensors, inputs[index]))
                    assert all(a is b for a, b in zip(weights_now(model), held, strict=True))

        change(model)  # no thread sees it before the block is over
        in_threads(*(lambda index=index: work(index) for index in range(THREADS)))
    after = tensors_of(model)
    outputs = in_threads(*(lambda x=x: model(x).detach() for x in inputs))
    for x, output in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(output, case[1](model, after, x))


def weights_now(model: nn.Module) -> list[Tensor]:
    return [getattr(module, name) for module, name in normed_of(model)]


@every_case
def test_blocks_of_cached_in_many_threads_end_without_a_trace(case: Case) -> None:
    model, x = stale(case), torch.randn(*case[2])
    expected = case[1](model, tensors_of(model), x)

    def work() -> None:
        for _ in range(10):
            with torch.no_grad(), cached(model):
                torch.testing.assert_close(model(x), expected)

    in_threads(*[work] * 4)
    for module, _ in normed_of(model):
        assert not carrier.store_of(module).blocks
    change(model)
    torch.testing.assert_close(model(x).detach(), case[1](model, tensors_of(model), x))


def test_blocks_of_many_threads_begin_and_end_in_one_store() -> None:
    store = Store()

    def work() -> None:
        for _ in range(2000):
            block = Block()
            store.begin(block)
            block.active = True
            assert store.held
            store.end(block, [])

    in_threads(*[work] * 8)
    assert not store.blocks


def test_threads_that_norm_and_end_norms_of_one_class_do_not_meet() -> None:
    """They share the generated class, and make it at the same time."""

    class Layer(nn.Linear):
        pass

    def work() -> None:
        for _ in range(10):
            layer = WeightNorm().inline(Layer(3, 2))
            change(layer)
            x = torch.randn(4, 3)
            weight = weight_of(layer.weight_g, layer.weight_v, 0)
            torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
            assert type(WeightNorm().remove(layer)) is Layer

    in_threads(*[work] * THREADS)


# What one thread does between any two instructions of another


def instructions_run(act: Callable[[], Any], between: Callable[[], Any], at: int | None) -> list[tuple[CodeType, int]]:
    """Runs `act`, and `between` in another thread before the `at`-th instruction that
    `act` runs of what holds the weights."""
    instructions: list[tuple[CodeType, int]] = []

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith((weight.__file__, verbs.__file__, "<explicit_wn")):
            return None  # the formulas know no module, hence no other thread
        frame.f_trace_opcodes = True
        if event == "opcode":
            if len(instructions) == at:
                in_thread(between)
            instructions.append((frame.f_code, frame.f_lasti))
        return trace

    tracer = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(tracer)
    return instructions


def infer(model: nn.Module, x: Tensor, expected: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def infer_cached(model: nn.Module, x: Tensor, expected: Tensor) -> None:
    with torch.no_grad(), cached(model):
        torch.testing.assert_close(model(x), expected)


def step(model: nn.Module, x: Tensor, expected: dict[str, Tensor]) -> None:
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(loss_of(model(x)), parameters), strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


class OneLayer(nn.Module):
    def __init__(self, norm: Any, verb: str) -> None:
        super().__init__()
        self.wn = norm
        self.explicit = verb == "apply"
        self.fc = getattr(norm, verb)(nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.explicit:
            self.wn.recompute(self.fc)
        return self.fc(x)


def plain_layer(model: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    weight = spectral_weight(*(tensors[f"fc.weight_{part}"] for part in ("orig", "u", "v")), 0)
    return nn.functional.linear(x, weight, tensors["fc.bias"])


INTERLEAVED: dict[str, Case] = {
    "recomputed": (lambda: OneLayer(SpectralNorm(), "apply"), plain_layer, (2, 3)),
    "inlined": (lambda: OneLayer(SpectralNorm(), "inline"), plain_layer, (2, 3)),
    "LSTM, recomputed": CASES["LSTM, recomputed"],
    "LSTM, inlined": CASES["LSTM, inlined"],
}


@pytest.mark.parametrize("case", INTERLEAVED.values(), ids=INTERLEAVED)
@pytest.mark.parametrize(
    "pair",
    [
        "inference in training",
        "a cached block in training",
        "training in inference",
        "a cached block in a cached block",
    ],
)
def test_what_another_thread_does_between_any_two_instructions_is_not_seen(case: Case, pair: str) -> None:
    model, x = stale(case), torch.randn(*case[2])
    output, gradients = case[1](model, tensors_of(model), x), expected_gradients(case, model, x)
    runs = {
        "inference": lambda: infer(model, x, output),
        "a cached block": lambda: infer_cached(model, x, output),
        "training": lambda: step(model, x, gradients),
    }
    inner, outer = (runs[run] for run in pair.split(" in "))
    outer()
    instructions = instructions_run(outer, inner, None)
    first = {instruction: index for index, instruction in reversed(list(enumerate(instructions)))}
    assert len(first) > 100
    for index in first.values():
        instructions_run(outer, inner, index)
    for module, _ in normed_of(model):
        assert not carrier.store_of(module).in_forward
        assert not carrier.store_of(module).blocks


# Which thread a stored weight is for


@pytest.mark.parametrize("verb", ["apply", "inline"])
def test_a_weight_without_gradient_of_another_thread_is_not_used(verb: str) -> None:
    layer = getattr(WeightNorm(), verb)(nn.Linear(3, 2))

    def infer() -> Tensor:
        with torch.no_grad():
            WeightNorm().recompute(layer)
            return layer.weight

    assert not in_thread(infer).requires_grad
    change(layer)
    weight = layer.weight  # not what the other thread stored: of the parts as they are now, and with a gradient
    torch.testing.assert_close(weight, weight_of(layer.weight_g, layer.weight_v, 0))
    assert torch.autograd.grad(weight.sum(), [layer.weight_g, layer.weight_v])


def test_a_read_of_another_thread_leaves_what_this_one_stored() -> None:
    layer = WeightNorm().apply(nn.Linear(3, 2)).double()
    weight = layer.weight  # computed for this read, and stored
    assert layer.weight is weight
    [elsewhere] = in_threads(lambda: layer.weight)
    assert elsewhere is not weight
    assert layer.weight is weight


def test_a_graph_of_another_thread_is_not_entered() -> None:
    layer, x = WeightNorm().apply(nn.Linear(3, 2)), torch.randn(4, 3)
    WeightNorm().recompute(layer)
    mine = layer.weight
    assert in_thread(lambda: layer.weight) is not mine
    in_thread(lambda: layer(x).sum().backward())  # which would free the graph of this thread's weight
    mine.sum().backward()
    expected = 4 * torch.autograd.grad(layer.bias.sum(), layer.bias)[0]
    torch.testing.assert_close(layer.bias.grad, expected)


# Training beside inference


def train(case: Case, model: nn.Module, steps: int, change_parts: bool, done: threading.Event) -> None:
    """Steps whose gradients are compared with those of the formula; the parts change in place, if they may."""
    try:
        for _ in range(steps):
            x = torch.randn(*case[2])
            expected = expected_gradients(case, model, x)
            model.zero_grad()
            loss_of(model(x)).backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)
            if change_parts:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.01)
    finally:
        done.set()


@every_case
def test_training_beside_inference_has_whole_and_right_gradients_and_the_outputs_are_right(case: Case) -> None:
    model, done = stale(case), threading.Event()
    x = torch.randn(*case[2])
    expected = case[1](model, tensors_of(model), x)

    def infer() -> int:
        count = 0
        while not done.is_set() or count == 0:
            with torch.no_grad():
                torch.testing.assert_close(model(x), expected)
            count += 1
        return count

    in_threads(lambda: train(case, model, 20, False, done), infer, infer)


def test_an_output_beside_a_training_that_changes_one_part_is_that_of_parts_that_there_were() -> None:
    """One part alone changes, by an operation that is over at once: so there is no half of it to see."""
    layer = WeightNorm().inline(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        layer.weight_g.zero_()
        layer.weight_v.fill_(1)
    done, x = threading.Event(), torch.ones(1, 1)

    def change_g() -> None:
        try:
            for value in range(1, 400):
                with torch.no_grad():
                    layer.weight_g.fill_(value)
                loss = layer(x).sum()
                (gradient,) = torch.autograd.grad(loss, layer.weight_g)
                assert (loss.item(), gradient.item()) == (value, 1)
        finally:
            done.set()

    def infer() -> list[float]:
        seen = []
        while not done.is_set() or not seen:
            with torch.no_grad():
                seen.append(layer(x).item())
        return seen

    for seen in in_threads(change_g, infer, infer)[1:]:
        assert seen == sorted(seen)  # no weight comes back that was there before
        assert all(value in range(400) for value in seen)


def test_spectral_norms_in_training_mode_in_several_threads_recover_with_the_next_forward() -> None:
    """Their iterations race for u and v. Which numbers come of it is not promised; that there are some is."""
    layer = SpectralNorm().inline(nn.Linear(4, 3)).train()

    def work() -> None:
        for _ in range(30):
            loss_of(layer(torch.randn(2, 4))).backward()

    in_threads(*[work] * 4)
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    x = torch.randn(2, 4)
    output = layer(x)
    for vector in (layer.weight_u, layer.weight_v):
        torch.testing.assert_close(vector.norm(), torch.tensor(1.0))
    weight = spectral_weight(layer.weight_orig, layer.weight_u, layer.weight_v, 0)
    torch.testing.assert_close(output, nn.functional.linear(x, weight, layer.bias))
