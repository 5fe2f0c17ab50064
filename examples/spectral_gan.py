"""Train a small GAN on eight Gaussians in the plane, with SpectralNorm in its discriminator and without, and draw both.

Run: python examples/spectral_gan.py

On so small a problem both find the modes. Without the norm the weights stretch four times as much, the losses jump
about, and the score is several times as steep. It takes 20 seconds on an idle core.
"""

import argparse
import copy
import math
import time
import warnings
from pathlib import Path

import attrs
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from explicit_wn import SpectralNorm, fold

# torch deprecated TorchScript. That is for you to weigh; here the warnings would only hide the results.
warnings.filterwarnings("ignore", message=".torch.jit")

MODES, RADIUS, SPREAD = 8, 2.0, 0.1
"""How many Gaussians stand on the circle, its radius, and their standard deviation."""

BLUE, ORANGE, AMBER, INK = "#0072b2", "#d55e00", "#e69f00", "#2b2f36"
"""Colours that the colour-blind can tell apart."""


@attrs.frozen
class Run:
    """One GAN, trained."""

    name: str
    discriminator: "Discriminator"
    losses: dict[str, list[float]]
    samples: Tensor


class Generator(nn.Module):
    """Makes points of noise."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, width)
        self.point = nn.Linear(width, 2)

    def forward(self, noise: Tensor) -> Tensor:
        return self.point(F.relu(self.second(F.relu(self.first(noise)))))


class Discriminator(nn.Module):
    """Scores points, the real ones high. No layer stretches any vector, so the score can be only so steep."""

    def __init__(self, width: int = 128, steepness: float = 4.0) -> None:
        super().__init__()
        self.steepness = steepness
        self.sn = SpectralNorm()
        self.first = self.sn.apply(nn.Linear(2, width))
        self.second = self.sn.apply(nn.Linear(width, width))
        self.third = self.sn.apply(nn.Linear(width, width))
        self.score = self.sn.apply(nn.Linear(width, 1))

    def forward(self, points: Tensor) -> Tensor:
        self.sn.recompute(self.first)  # a power iteration in training mode, none in eval mode
        self.sn.recompute(self.second)
        self.sn.recompute(self.third)
        self.sn.recompute(self.score)
        hidden = F.leaky_relu(self.first(self.steepness * points), 0.2)
        hidden = F.leaky_relu(self.second(hidden), 0.2)
        hidden = F.leaky_relu(self.third(hidden), 0.2)
        return self.score(hidden).squeeze(1)


def centers() -> Tensor:
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)


def real_points(count: int) -> Tensor:
    return centers()[torch.randint(MODES, (count,))] + SPREAD * torch.randn(count, 2)


def fake_points(generator: nn.Module, count: int) -> Tensor:
    return generator(torch.randn(count, 4))


def train(generator: nn.Module, discriminator: nn.Module, steps: int, batch: int = 128) -> dict[str, list[float]]:
    """Returns the losses, step by step."""
    of_generator = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.0, 0.9))
    slower = [
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
        for optimizer in (of_generator, of_discriminator)
    ]
    losses: dict[str, list[float]] = {"discriminator": [], "generator": []}
    for _ in range(steps):
        # two forwards of the discriminator, each with power iterations of its own, and one backward
        real = discriminator(real_points(batch))
        fake = discriminator(fake_points(generator, batch).detach())
        loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        of_discriminator.zero_grad()
        loss.backward()
        of_discriminator.step()
        losses["discriminator"].append(loss.item())

        loss = -discriminator(fake_points(generator, batch)).mean()
        of_generator.zero_grad()
        loss.backward()
        of_generator.step()
        losses["generator"].append(loss.item())
        for schedule in slower:
            schedule.step()
    return losses


def shares_of(samples: Tensor) -> Tensor:
    """The share of the samples at each mode: no further from its center than three standard deviations."""
    distance, nearest = torch.cdist(samples, centers()).min(dim=1)
    return nearest[distance <= 3 * SPREAD].bincount(minlength=MODES) / len(samples)


def covered(samples: Tensor) -> int:
    """How many modes have at least a quarter of their fair share of the samples."""
    return int((shares_of(samples) >= 0.25 / MODES).sum())


def spread(points: Tensor) -> float:
    """The standard deviation, in each direction, of those points that are at a mode."""
    distance = torch.cdist(points, centers()).min(dim=1).values
    return distance[distance <= 3 * SPREAD].square().mean().div(2).sqrt().item()


def draw(runs: list[Run], path: Path) -> None:
    figure = Figure(figsize=(11, 5 * len(runs)), layout="constrained")
    for run, (left, right) in zip(runs, figure.subplots(len(runs), 2), strict=True):
        draw_losses(left, run)
        draw_samples(right, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_losses(axes: Axes, run: Run) -> None:
    for (name, values), color, style in zip(run.losses.items(), (INK, AMBER), ("-", "--"), strict=True):
        window = max(1, len(values) // 60)
        smooth = torch.tensor(values).unfold(0, window, 1).mean(dim=1)
        axes.plot(values, color=color, alpha=0.15, linewidth=0.5)
        axes.plot(range(window - 1, len(values)), smooth, color=color, linestyle=style, label=name)
    middle = sorted(value for values in run.losses.values() for value in values)
    low, high = middle[len(middle) // 500], middle[-1 - len(middle) // 500]
    axes.set_ylim(low - 0.1, high + 0.1)
    axes.set(title=f"{run.name}: hinge losses (mean of {window} steps)", xlabel="step", ylabel="loss")
    axes.legend(loc="center right")


def draw_samples(axes: Axes, run: Run) -> None:
    samples, limit = run.samples, 1.6 * RADIUS
    line = torch.linspace(-limit, limit, 120)
    x, y = torch.meshgrid(line, line, indexing="xy")
    with torch.no_grad():
        score = run.discriminator(torch.stack([x, y], dim=2).view(-1, 2)).view_as(x)
    low, high = score.min().item(), score.max().item()
    shading = axes.contourf(x, y, score, levels=20, cmap="Greys_r", vmin=2 * low - high, vmax=high)
    axes.figure.colorbar(shading, ax=axes, label="score of the discriminator", shrink=0.8)
    real = real_points(1000)
    axes.scatter(*real.T, s=9, color=BLUE, marker="o", alpha=0.6, linewidths=0, label="real")
    axes.scatter(*samples[:1000].T, s=9, color=ORANGE, marker="^", alpha=0.6, linewidths=0, label="generated")
    title = f"{covered(samples)} of {MODES} modes covered, {shares_of(samples).sum():.0%} of the samples at one"
    axes.set(title=title, aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit))
    axes.legend(loc="upper right", markerscale=3)


def compare_with_script(discriminator: Discriminator, points: Tensor) -> dict[str, float]:
    """The largest differences between the discriminator and what TorchScript makes of it."""
    scripted = torch.jit.script(copy.deepcopy(discriminator))
    differences = {}
    with torch.no_grad():
        evaluated = discriminator.eval()(points)
        differences["in eval mode"] = difference(scripted.eval()(points), evaluated)
        trained = discriminator.train()(points)
        differences["in training mode, where u and v advance"] = difference(scripted.train()(points), trained)
        pairs = zip(scripted.buffers(), discriminator.buffers(), strict=True)
        differences["u and v afterwards"] = max(difference(*pair) for pair in pairs)
        differences["for scale: between the modes"] = difference(trained, evaluated)
    return differences


def difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def report(samples: Tensor) -> None:
    shares = shares_of(samples)
    print(
        f"{covered(samples)} of {MODES} modes covered; {shares.sum():.1%} of the samples lie at one, the rest between"
    )
    print(f"share at each mode: {', '.join(f'{share:.1%}' for share in shares)}; fair would be {1 / MODES:.1%}")
    print(f"spread at a mode: {spread(samples):.3f}, of the real points {spread(real_points(4000)):.3f}")


def run_of(name: str, generator: Generator, discriminator: Discriminator, steps: int) -> Run:
    """Trains, and says what came of it."""
    torch.manual_seed(1)
    started = time.perf_counter()
    losses = train(generator, discriminator, steps)
    print(f"{name}: {steps} steps in {time.perf_counter() - started:.0f} s on one core")
    discriminator.eval()
    with torch.no_grad():
        samples = fake_points(generator, 4000)
    report(samples)

    print(f"\nlargest singular value of each weight, by SVD, {name}")
    for layer_name, layer in discriminator.named_children():
        if isinstance(layer, nn.Linear):
            print(f"  {layer_name:8} {torch.linalg.matrix_norm(layer.weight, 2):.4f}")
    print()
    return Run(name, discriminator, losses, samples)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=2500)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "spectral_gan.png")
    options = arguments.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    generator, discriminator = Generator(), Discriminator()
    folded = copy.deepcopy(discriminator)
    fold(folded)  # the same weights to start with, and no norm from there on
    runs = [
        run_of("with SpectralNorm", copy.deepcopy(generator), discriminator, options.steps),
        run_of("without", generator, folded, options.steps),
    ]

    draw(runs, options.out)
    print(f"losses and samples drawn to {options.out}")
    discriminator, samples = runs[0].discriminator, runs[0].samples

    print("\nlargest difference to torch.jit.script of the discriminator")
    for what, value in compare_with_script(discriminator, samples).items():
        print(f"  {what:40} {value:.1e}")


if __name__ == "__main__":
    main()
