"""The same small network with each norm and with none: how well it learns at which learning rate.

Two spirals are to be told apart. Each norm is trained with each learning rate and each of five seeds, which draw the
data and the weights alike for all norms. What is shown is the error on new points: its mean and standard deviation.

One small task says what a norm does to the learning rate, and not which norm is the best.

Run: python examples/norms.py
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import explicit_wn
from explicit_wn import Reparametrization, apply_all

NORMS: dict[str, Callable[[], Reparametrization] | None] = {
    "no norm": None,
    "WeightNorm": explicit_wn.WeightNorm,
    "ScaledWeightNorm(clip=1)": lambda: explicit_wn.ScaledWeightNorm(clip=1.0),
    "WeightStandardization": explicit_wn.WeightStandardization,
    "ForcedWeightNorm": explicit_wn.ForcedWeightNorm,
    "UnitNorm": explicit_wn.UnitNorm,
    "SpectralNorm": explicit_wn.SpectralNorm,
    "SigmaReparam": explicit_wn.SigmaReparam,
}
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)


def spirals(count: int) -> tuple[Tensor, Tensor]:
    """Points on two spirals that wind around each other, and which one each is on."""
    labels = torch.arange(count) % 2
    radius = torch.rand(count).sqrt()
    angle = 3 * math.pi * radius + math.pi * labels
    points = radius.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], dim=1)
    return 3 * points + 0.05 * torch.randn(count, 2), labels


def network(norm: Callable[[], Reparametrization] | None) -> nn.Sequential:
    """Normed are the two layers from hidden numbers to hidden ones: two inputs are too few to have a spread."""
    model = nn.Sequential(
        *(nn.Linear(2, 32), nn.ReLU()),
        *(nn.Linear(32, 32), nn.ReLU()),
        *(nn.Linear(32, 32), nn.ReLU()),
        nn.Linear(32, 2),
    )
    if norm is not None:
        apply_all(model, norm(), where=lambda name, module: isinstance(module, nn.Linear) and name in "24")
    return model


def error_after(norm: Callable[[], Reparametrization] | None, rate: float, seed: int, steps: int) -> float:
    """The share of new points that are told wrongly, in percent, after so many steps of SGD with momentum."""
    torch.manual_seed(seed)
    points, labels = spirals(256)
    new_points, new_labels = spirals(1000)
    model = network(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(points), labels).backward()
        optimizer.step()
    with torch.no_grad():
        wrong = model.eval()(new_points).argmax(dim=1) != new_labels
    return 100 * wrong.double().mean().item()


def train_all(steps: int, seeds: int) -> dict[str, Tensor]:
    """The errors by norm: a row for each learning rate, a column for each seed."""
    return {
        name: torch.tensor([[error_after(norm, rate, seed, steps) for seed in range(seeds)] for rate in RATES])
        for name, norm in NORMS.items()
    }


def show(errors: dict[str, Tensor]) -> None:
    print(f"{'error in %, at the learning rate':32}" + "".join(f"{rate:>12g}" for rate in RATES))
    for name, of_norm in errors.items():
        cells = [f"{rate.mean():.1f} ± {rate.std():.1f}" for rate in of_norm]
        print(f"{name:32}" + "".join(f"{cell:>12}" for cell in cells))


def draw(errors: dict[str, Tensor], path: Path) -> None:
    """A panel for each norm, and in each of them the network without a norm, in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    plain, *norms = errors
    for axes, name in zip(figure.subplots(2, 4, sharex=True, sharey=True).flat, norms, strict=False):
        for shown, color in (plain, "0.6"), (name, "tab:blue"):
            mean, std = errors[shown].mean(dim=1), errors[shown].std(dim=1)
            axes.fill_between(RATES, mean - std, mean + std, color=color, alpha=0.25, linewidth=0)
            axes.plot(RATES, mean, color=color, marker="o", markersize=3, label=shown)
        axes.set(title=name, xscale="log", ylim=(0, 60))
        axes.axhline(50, color="0.8", linewidth=0.8, linestyle=":")
    figure.axes[-1].set_axis_off()
    legend = f"grey: {plain}\nshaded: the standard deviation\nof the seeds\ndotted: chance"
    figure.axes[-1].text(0.1, 0.4, legend, transform=figure.axes[-1].transAxes)
    figure.supxlabel("learning rate")
    figure.supylabel("error on new points, in %")
    figure.savefig(path, dpi=100)
    print(f"\ndrawn to {path}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=160)
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--out", type=Path, help="where to draw the picture, a .png; needs matplotlib")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    errors = train_all(options.steps, options.seeds)
    show(errors)
    print(f"\n{options.seeds} seeds, {options.steps} steps each; {time.perf_counter() - started:.0f} s on one core")
    if options.out:
        draw(errors, options.out)


if __name__ == "__main__":
    main()
