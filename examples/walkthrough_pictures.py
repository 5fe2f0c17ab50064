"""The pictures of walkthrough.ipynb, each with a text for those who do not see it."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from explicit_wn.teaching import Steps

INK, GREY, BLUE, ORANGE, GREEN = "#2b2f36", "#8b919b", "#0072b2", "#d55e00", "#009e73"
"""Colours that the colour-blind can tell apart."""

KINDS = {
    "plain": {"color": INK, "linestyle": "--"},
    "weight norm": {"color": BLUE, "linestyle": "-"},
    "weight norm + init": {"color": GREEN, "linestyle": "-"},
    "init, then folded": {"color": ORANGE, "linestyle": "-."},
}


SHADES = LinearSegmentedColormap.from_list("arms", ["#6fb1d9", "white", "#eb9e66"])


def show(figure: Figure, text: str) -> None:
    """Shows a figure; `text` is what a screen reader says, and what stands where no picture can."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90, bbox_inches="tight")
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    picture = base64.b64encode(small.getvalue()).decode()
    page = f'<img alt="{html.escape(text)}" src="data:image/png;base64,{picture}">'  # JupyterLab shows no other alt
    seen = {"image/png": picture, "text/html": page, "text/plain": text}
    display(seen, metadata={"image/png": {"alt": text}}, raw=True)


def row_of(width: float, height: float, count: int = 2, **shared: bool) -> tuple[Figure, Sequence[Axes]]:
    """A figure with `count` pictures beside each other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, **shared)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def arrow(axes: Axes, end: Tensor, color: str, start: Any = (0, 0), width: float = 0.014) -> None:
    start = torch.as_tensor(start)
    axes.quiver(*start, *(end - start), color=color, angles="xy", scale_units="xy", scale=1, width=width)


def circle(axes: Axes, radius: float) -> None:
    angle = torch.linspace(0, 2 * torch.pi, 200)
    axes.plot(radius * angle.cos(), radius * angle.sin(), color=GREY, linestyle=":")


def taken_apart(steps: Steps) -> None:
    """A row of two weights as an arrow, and the parts that make it."""
    v, unit, w = (steps[symbol].value.flatten() for symbol in ("v", "v/‖v‖", "w"))
    length, g = steps["‖v‖"].value.item(), steps["g"].value.item()
    figure, (left, right) = row_of(8.4, 3.7)
    circle(left, 1)
    arrow(left, v, GREEN)
    left.plot(*unit, marker="o", markersize=8, markerfacecolor="white", markeredgewidth=2, color=GREEN)
    left.annotate("v/‖v‖, of length 1", unit + torch.tensor([0.12, -0.16]), color=GREEN)
    left.annotate("v", v + torch.tensor([0.06, 0.02]), color=GREEN)
    left.set_title(f"v: a direction, of any length, here {length:.1f}")
    circle(right, g)
    arrow(right, w, BLUE)
    right.annotate("w", w + torch.tensor([0.06, 0.02]), color=BLUE)
    right.set_title(f"w: that direction, of length g, here {g:.1f}")
    for axes in (left, right):
        axes.set(xlim=(-1.8, 2.6), ylim=(-1.8, 1.8), aspect="equal")
    show(
        figure,
        f"Left, an arrow v of length {length:.1f}. Right, an arrow w in the same direction, of length g = {g:.1f}.",
    )


def gradient_in_two_parts(steps: Steps) -> None:
    """What pulls the weight downhill, in the part that g takes and the part that turns v; and a step of v."""
    v, unit, w = (steps[symbol].value.flatten() for symbol in ("v", "v/‖v‖", "w"))
    down_w, down_v = -0.3 * steps["w"].gradient.flatten(), -0.6 * steps["v"].gradient.flatten()
    along = -0.3 * steps["g"].gradient.flatten() * unit
    figure, (left, right) = row_of(9, 4.1, sharey=True)
    arrow(left, w, BLUE)
    arrow(left, w + down_w, INK, start=w)
    arrow(left, w + along, ORANGE, start=w, width=0.01)
    arrow(left, w + down_w, GREEN, start=w + along, width=0.01)
    for text, place, color in (
        ("w", w / 2 + torch.tensor([0.05, -0.2]), BLUE),
        ("−∇w: downhill", w + down_w + torch.tensor([-0.75, 0.1]), INK),
        ("along w: g grows", w + along + torch.tensor([0.08, 0.0]), ORANGE),
        ("across: v turns", w + along / 2 + down_w / 2 + torch.tensor([0.2, 0.1]), GREEN),
    ):
        left.annotate(text, place, color=color)
    left.set_title("the gradient of w, in two parts")
    circle(right, v.norm().item())
    arrow(right, v, INK)
    arrow(right, v + down_v, GREY)
    arrow(right, v + down_v, GREEN, start=v)
    for text, place, color in (
        ("v", v / 2 + torch.tensor([0.1, -0.15]), INK),
        ("v after\nthe step:\nlonger", v + down_v + torch.tensor([-1.3, -0.95]), "#5b616b"),
        ("−∇v: at a right\nangle to v", v + down_v / 2 + torch.tensor([0.12, 0.05]), GREEN),
    ):
        right.annotate(text, place, color=color)
    right.set_title("a step of v")
    for axes in (left, right):
        axes.set(xlim=(-0.2, 3.3), ylim=(-0.2, 2.9), aspect="equal")
    show(
        figure,
        "Left, the arrow w and what pulls it downhill, split into a part along w, which g takes, and a part across, "
        "which turns v. Right, a step of v at a right angle to v, after which v is longer.",
    )


def two_spirals(points: Tensor, arm: Tensor) -> None:
    figure, (axes,) = row_of(3.9, 3.6, 1)
    scatter(axes, points, arm)
    show(figure, "Points on two long spirals that wind around each other, one arm blue dots, the other orange squares.")


def scatter(axes: Axes, points: Tensor, arm: Tensor) -> None:
    axes.scatter(*points[arm == 0].T, s=9, color=BLUE, marker="o", linewidths=0)
    axes.scatter(*points[arm == 1].T, s=9, color=ORANGE, marker="s", linewidths=0)
    axes.set(aspect="equal", xticks=[], yticks=[])


def decisions(models: dict[str, nn.Module], points: Tensor, arm: Tensor) -> None:
    """What each model makes of the plane."""
    figure, row = row_of(10, 2.9, len(models))
    across = torch.linspace(-5, 5, 150)
    x, y = torch.meshgrid(across, across, indexing="xy")
    for axes, (name, model) in zip(row, models.items(), strict=True):
        with torch.no_grad():
            sure = model(torch.stack([x, y], dim=2).view(-1, 2)).softmax(dim=1)[:, 1].view_as(x)
        axes.imshow(sure, extent=(-5, 5, -5, 5), origin="lower", cmap=SHADES)
        scatter(axes, points, arm)
        axes.set_title(name, fontsize=10)
    show(figure, f"What each model makes of the plane, with the points of the two spirals: {', '.join(models)}.")


def loss_curves(losses: dict[str, Tensor], rates: list[float], best_of: Callable[[Tensor], int]) -> None:
    """The loss of each kind (learning rates × seeds × steps) at its best learning rate, and its end at every one."""
    figure, (left, right) = row_of(9.5, 3.8, sharey=True)
    for kind, of_kind in losses.items():
        style, best = KINDS[kind], best_of(of_kind)
        order = {"zorder": 3 if kind == "plain" else 2}
        shade = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
        curves, final = of_kind[best], of_kind[:, :, -20:].mean(dim=2).nan_to_num(1e9)
        left.plot(curves.median(dim=0).values, **style, **order, label=f"{kind}, rate {rates[best]}")
        left.fill_between(range(curves.shape[1]), curves.amin(dim=0), curves.amax(dim=0), **shade)
        right.plot(rates, final.median(dim=1).values, **style, **order, marker="o", markersize=4)
        right.fill_between(rates, final.amin(dim=1), final.amax(dim=1), **shade)
    left.set(
        yscale="log", ylim=(1e-3, 2), xlabel="step", ylabel="training loss", title="each at its best learning rate"
    )
    right.set(xscale="log", xlabel="learning rate", title="loss at the end")
    left.legend(frameon=False, fontsize=9, loc="lower left")
    show(
        figure,
        "Left, the loss over the steps: with a start from data it falls soon, without hardly. Right, the loss at the "
        "end for four learning rates.",
    )


def over_time(curves: dict[str, Tensor]) -> None:
    """Of each value (steps × neurons), a line for every neuron."""
    figure, row = row_of(9, 3, len(curves))
    for axes, (symbol, values) in zip(row, curves.items(), strict=True):
        axes.plot(values.flatten(1), color=ORANGE if symbol == "g" else GREEN, linewidth=0.8, alpha=0.7)
        axes.set(title=f"{symbol} of each neuron", xlabel="step")
    show(figure, f"{' and '.join(curves)} of each neuron of one layer, over the steps of the training.")


def sigmas(shares: list[list[float]]) -> None:
    """σ over the power iterations of several layers, as shares of the exact one."""
    figure, (axes,) = row_of(5.6, 3.4, 1)
    for index, curve in enumerate(shares):
        axes.plot(curve, color=BLUE, alpha=0.6, label=None if index else f"uᵀ · W · v, {len(shares)} layers")
    axes.axhline(1, color=INK, linestyle="--", linewidth=1, label="the exact σ")
    axes.set(xlabel="power iterations", ylabel="σ, as a share of the exact one")
    axes.legend(frameon=False, loc="lower right")
    show(figure, "The estimate of σ rises with the power iterations, and reaches the exact σ within about twenty.")
