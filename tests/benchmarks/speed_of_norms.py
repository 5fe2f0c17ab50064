"""How fast the other norms are, as `recompute` in a forward and inlined, beside the same written as a parametrization.

`python tests/benchmarks/speed_of_norms.py` measures and prints the table of tests/README.md; its options choose. Each
parametrization is what one writes who reads the paper. The spellings take turns, as in speed.py, and must compute the
same before they are measured.
"""

import argparse
from collections.abc import Callable
from functools import partial

import attrs
import torch
from benchmark_models import Chain
from speed import MODES, Step, keep_memory, medians, training
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from explicit_wn import (
    ForcedWeightNorm,
    Reparametrization,
    ScaledWeightNorm,
    SigmaReparam,
    UnitNorm,
    WeightStandardization,
)


def norm_of(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=list(range(1, v.dim())), keepdim=True)


@torch.library.custom_op("benchmark::copy", mutates_args=())
def copy(v: Tensor) -> Tensor:
    """A copy that a compiled backward keeps, where it would compute another gradient, from a v changed meanwhile."""
    return v.clone()


copy.register_fake(torch.empty_like)
copy.register_autograd(lambda ctx, gradient: gradient)


class Unit(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                v.copy_(v / norm_of(v))
            v = copy(v) if torch.compiler.is_compiling() else v
        return v / norm_of(v)


class Forced(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        root = (v.numel() / v.shape[0]) ** 0.5
        if self.training:
            with torch.no_grad():
                v.copy_(v * (root / norm_of(v)))
            v = copy(v) if torch.compiler.is_compiling() else v
        return v * (root / norm_of(v)) * (1.5 / root)


class Sigma(parametrizations._SpectralNorm):
    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.g = nn.Parameter(torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        return self.g * super().forward(weight)


class Standardized(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        others = list(range(1, weight.dim()))
        self.gain = nn.Parameter(weight.detach().std(others, correction=0, keepdim=True))

    def forward(self, v: Tensor) -> Tensor:
        std, mean = torch.std_mean(v, list(range(1, v.dim())), correction=0, keepdim=True)
        return self.gain * (v - mean) / std


class Clipped(nn.Module):
    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return v * torch.clamp(g / norm_of(v), max=0.9)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return norm_of(weight), weight


@attrs.frozen
class Peer:
    """A norm of ours and the same as a parametrization of a weight."""

    ours: Callable[[], Reparametrization]
    theirs: Callable[[Tensor], nn.Module]


NORMS: dict[str, Peer] = {
    "ScaledWeightNorm, clip": Peer(lambda: ScaledWeightNorm(clip=0.9), lambda weight: Clipped()),
    "ForcedWeightNorm": Peer(lambda: ForcedWeightNorm(gain=1.5), lambda weight: Forced()),
    "UnitNorm": Peer(lambda: UnitNorm(), lambda weight: Unit()),
    "SigmaReparam": Peer(lambda: SigmaReparam(first="u"), Sigma),
    "WeightStandardization": Peer(lambda: WeightStandardization(), Standardized),
}
MODELS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "10 × Linear(64)": (partial(nn.Linear, 64, 64), 10, (16, 64)),
    "4 × Conv1d(256, 256, 7)": (partial(nn.Conv1d, 256, 256, 7, padding=3), 4, (1, 256, 64)),
    "2 × Linear(2048)": (partial(nn.Linear, 2048, 2048), 2, (16, 2048)),
}
OURS, THEIRS = ("recompute", "inline"), "parametrization"


class Explicit(Chain):
    """Recomputes in its own forward."""

    def __init__(self, make: Callable[[], nn.Module], count: int, norm: Reparametrization) -> None:
        super().__init__(make, count, 0)
        self.norm = norm
        for layer in self.layers:
            norm.apply(layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            self.norm.recompute(layer)
            x = layer(x)
        return x


def build(peer: Peer, model: str, spelling: str) -> tuple[nn.Module, Tensor]:
    """The model in that spelling and its input, the same numbers in all of them, and weights that a step changed."""
    torch.manual_seed(0)
    make, count, shape = MODELS[model]
    built = Explicit(make, count, peer.ours()) if spelling == "recompute" else Chain(make, count, 0)
    for layer in built.eval().layers:  # a parametrization computes its weight at once, and would renorm v already
        if spelling == "inline":
            peer.ours().inline(layer)
        elif spelling == THEIRS:
            parametrize.register_parametrization(layer, "weight", peer.theirs(layer.weight))
    with torch.no_grad():
        for name, tensor in [*built.named_parameters(), *built.named_buffers()]:
            if name.endswith(("_u", "_v")) and tensor.dim() == 1:
                tensor.copy_(torch.ones_like(tensor) / tensor.numel() ** 0.5)  # ours begin at random
            elif not name.endswith("bias"):
                tensor.add_(
                    0.2 * tensor.flatten().roll(1).view_as(tensor)
                )  # another direction as well as another length
    generator = torch.Generator().manual_seed(1)
    return built, torch.randn(shape, generator=generator)


def measure(norm: str, model: str, mode: str, seconds: float) -> dict[str, float]:
    """The median of each spelling for one norm in one model and one mode."""
    how, transform, _ = MODES[mode]
    steps: dict[str, Step] = {}
    outputs = {}
    torch.compiler.reset()
    with torch.set_grad_enabled(how is training):
        for spelling in (*OURS, THEIRS):
            built, x = build(NORMS[norm], model, spelling)
            run = transform(built.train(how is training), x)
            outputs[spelling] = run(x).detach()
            steps[spelling] = how(run, x)
    for output in outputs.values():
        if not (output - outputs[THEIRS]).abs().max() < 0.005 * outputs[THEIRS].abs().max():  # nan, too
            raise AssertionError(f"{norm}, {model}, {mode}: the spellings do not compute the same.")
    return medians(steps, seconds, "cpu")


def ratios(found: dict[str, float]) -> str:
    return ", ".join(f"{found[spelling] / found[THEIRS]:.2f}" for spelling in OURS)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", default="", help="only those whose name holds this")
    parser.add_argument("--models", default="", help="only those whose name holds this")
    parser.add_argument("--modes", default="", help="only those whose name holds this")
    parser.add_argument("--seconds", type=float, default=2, help="how long to measure each cell; by default 2")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    modes = [mode for mode, (how, _, spellings) in MODES.items() if THEIRS in spellings and chosen.modes in mode]
    print("| | " + " | ".join(modes) + " |\n| --- " + "| --- " * len(modes) + "|")
    for norm in [norm for norm in NORMS if chosen.norms in norm]:
        for model in [model for model in MODELS if chosen.models in model]:
            cells = [ratios(measure(norm, model, mode, chosen.seconds)) for mode in modes]
            print(f"| {norm}, {model} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    keep_memory()
    main()
