"""A fixed-point layer uses one weight thirty times per forward. How often is it computed, and what does that cost?

Run: python examples/deep_equilibrium.py
"""

import argparse
import contextlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from explicit_wn import WeightNorm, recompute_all

ITERATIONS = 30


class FixedPoint(nn.Module):
    """z = tanh(W·z + U·x), found by iterating. Rows of W that are short enough make it converge."""

    def __init__(self, width: int, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)  # every spelling of the norm starts from the same weights
        self.state, self.inputs = nn.Linear(width, width), nn.Linear(width, width)
        with torch.no_grad():
            self.state.weight.copy_(0.4 * nn.functional.normalize(torch.randn(width, width), dim=1))
        norm(self.state)
        norm(self.inputs)

    def forward(self, x: Tensor) -> Tensor:
        z, injected = torch.zeros_like(x), self.inputs(x)
        for _ in range(ITERATIONS):
            z = torch.tanh(self.state(z) + injected)
        return z


class ExplicitFixedPoint(FixedPoint):
    """The same with explicit norms: one call makes every weight fresh, and thirty uses cost nothing more."""

    def forward(self, x: Tensor) -> Tensor:
        recompute_all(self)
        return super().forward(x)


def hook(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecated it in favour of the parametrization
        return nn.utils.weight_norm(layer)


Ways = dict[str, tuple[nn.Module, Callable[[], AbstractContextManager[None]]]]


def ways(width: int) -> Ways:
    """The same layer in every spelling, and what is around each forward of it."""
    nothing = contextlib.nullcontext
    return {
        "no norm, for scale": (FixedPoint(width, lambda layer: layer), nothing),
        "explicit_wn, recompute_all once": (ExplicitFixedPoint(width, WeightNorm().apply), nothing),
        "torch's hook": (FixedPoint(width, hook), nothing),
        "torch's parametrization": (FixedPoint(width, parametrizations.weight_norm), nothing),
        "torch's, in parametrize.cached()": (FixedPoint(width, parametrizations.weight_norm), parametrize.cached),
    }


OURS = "explicit_wn, recompute_all once"


def train(model: nn.Module, x: Tensor) -> Tensor:
    """Forward and backward, through all the iterations."""
    model.zero_grad()
    output: Tensor = model(x)
    output.square().mean().backward()
    return output.detach()


@torch.no_grad()
def infer(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = model(x)
    return output


def measure(candidates: Ways, step: Callable[[nn.Module, Tensor], Tensor], x: Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds per step, the median. The ways take turns, so that whatever else runs here disturbs all alike."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for done in range(rounds + 1):
        for name, (model, around) in candidates.items():
            begun = time.perf_counter()
            with around():
                step(model, x)
            if done:  # the first round only warms up
                taken[name].append(1000 * (time.perf_counter() - begun))
        if time.perf_counter() - started > 2:
            show_progress(step.__name__, done / rounds)
    clear_progress()
    return {name: statistics.median(values) for name, values in taken.items()}


def show_progress(what: str, share: float) -> None:
    if sys.stderr.isatty():
        print(f"\r  timing {what:5} [{'#' * round(30 * share):30}] {share:4.0%}", end="", file=sys.stderr, flush=True)


def clear_progress() -> None:
    if sys.stderr.isatty():
        print(f"\r{'':60}\r", end="", file=sys.stderr, flush=True)


class CountWeights(TorchDispatchMode):
    """Counts how often a normed weight is computed within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket is torch.ops.aten._weight_norm_interface
        return func(*args, **(kwargs or {}))


def weights_computed(model: nn.Module, around: Callable[[], AbstractContextManager[None]], x: Tensor) -> int:
    """In one forward: W is used thirty times, and U once."""
    with CountWeights() as counted, around():
        infer(model, x)
    return counted.count


def gradient_of_direction(model: nn.Module) -> Tensor:
    """The gradient of v, which every spelling keeps somewhere else."""
    if parametrize.is_parametrized(model.state):
        return model.state.parametrizations.weight.original1.grad
    return model.state.weight_v.grad


def by_hand(plain: nn.Module) -> Tensor:
    """The gradient of v from that of w = g · v / ‖v‖, where g = ‖v‖ as it is here: what is orthogonal to v."""
    direction, gradient = nn.functional.normalize(plain.state.weight, dim=1), plain.state.weight.grad
    return (gradient - direction * (direction * gradient).sum(dim=1, keepdim=True)).detach()


def show_differences(candidates: Ways, x: Tensor) -> None:
    plain = candidates["no norm, for scale"][0]
    expected = train(plain, x)
    reference = by_hand(plain)
    print(f"\n{'largest relative difference':35} {'output':>9} {'gradient of v':>15}")
    for name, (model, around) in candidates.items():
        if model is plain:
            continue
        with around():
            output = train(model, x)
        off = [(output - expected, expected), (gradient_of_direction(model) - reference, reference)]
        shown = [f"{(difference.abs().max() / scale.abs().max()).item():.1e}" for difference, scale in off]
        print(f"  {name:33} {shown[0]:>9} {shown[1]:>15}")
    print("  from the layer without a norm, which has the same weight; the gradient by hand from its own")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()

    torch.set_num_threads(1)  # fewer surprises from what else runs on the machine
    print(f"z = tanh(W·z + U·x), iterated {ITERATIONS} times, with W and U weight-normed")
    print(f"torch {torch.__version__}, one thread, width {options.width}, batch {options.batch}")
    print(f"the median of {options.rounds} steps, and how it compares with explicit_wn\n")
    candidates, x = ways(options.width), torch.randn(options.batch, options.width)
    training, inference = (measure(candidates, step, x, options.rounds) for step in (train, infer))
    print(f"{'':35} {'weights':>9} {'training':>15} {'inference':>16}")
    print(f"{'':35} {'computed':>9} {'ms per step':>15} {'ms per step':>16}")
    for name, (model, around) in candidates.items():
        columns = [f"{times[name]:8.2f} {times[name] / times[OURS]:5.2f}×" for times in (training, inference)]
        print(f"  {name:33} {weights_computed(model, around, x):9} {columns[0]:>15} {columns[1]:>16}")
    show_differences(candidates, x)


if __name__ == "__main__":
    main()
