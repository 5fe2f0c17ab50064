"""Write the page that shows how weight norm works, for hands and eyes: drag, slide, and see.

Run: python examples/playground.py

Every number on the page is recorded here, from runs of the package: the page itself computes none. It takes about 10 s.
"""

import argparse
import base64
import contextlib
import copy
import inspect
import json
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from spirals import deep_model, spirals
from torch import Tensor, nn

from explicit_wn import (
    SpectralNorm,
    StaleWeightError,
    WeightNorm,
    apply_all,
    data_dependent_init,
    detect_stale,
    record,
    steps,
)

HERE = Path(__file__).parent
SOURCES = HERE / "playground"
"""The page without its numbers: a skeleton, its style, and what moves it."""

Data = dict[str, Any]


def numbers(values: Any, digits: int = 4) -> Any:
    """A tensor, or numbers in lists, rounded for the page."""
    if isinstance(values, Tensor):
        values = values.detach().tolist()
    if isinstance(values, Iterable):
        return [numbers(value, digits) for value in values]
    return round(values, digits) + 0.0 if math.isfinite(values) else None  # and no -0


# 1. Take it apart

ANGLES = range(0, 360, 5)
LENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
MAGNITUDES = [tenth / 10 for tenth in range(-10, 26)]


def apart() -> Data:
    """One layer, of which every row is one position of the sliders."""
    sliders = [torch.tensor(values, dtype=torch.float32) for values in (ANGLES, LENGTHS, MAGNITUDES)]
    positions = torch.cartesian_prod(*sliders)
    angle, length, magnitude = positions.unbind(dim=1)
    layer = WeightNorm().apply(nn.Linear(2, len(positions), bias=False))
    with torch.no_grad():
        layer.weight_v.copy_(torch.stack([angle.deg2rad().cos(), angle.deg2rad().sin()], dim=1) * length[:, None])
        layer.weight_g.copy_(magnitude[:, None])
    table = {step.symbol: step.value for step in steps(layer)}
    each = len(MAGNITUDES)  # v is the same for all of them
    return {
        "angles": list(ANGLES),
        "lengths": list(LENGTHS),
        "magnitudes": MAGNITUDES,
        "v": numbers(table["v"][::each].flatten(), 3),
        "norm": numbers(table["‖v‖"][::each].flatten(), 3),
        "unit": numbers(table["v/‖v‖"][::each].flatten(), 3),
        "w": (table["w"].flatten() * 1000).round().int().tolist(),  # in thousandths
    }


# 2. One step of descent

TARGET = torch.tensor([1.2, 2.6])
RATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
STARTS = (1.0, 2.5, 5.0)
"""The lengths of v that the descent starts with."""


def loss_of(layer: nn.Module) -> Tensor:
    """What the layer says to (1, 0) and to (0, 1), its two weights, should be the target."""
    return (layer(torch.eye(2)).flatten() - TARGET).square().sum()


def descent() -> Data:
    runs = [[descend(rate, length) for length in STARTS] for rate in RATES]
    return {"target": numbers(TARGET), "rates": RATES, "lengths": STARTS, "runs": runs}


def descend(rate: float, length: float, count: int = 12) -> list[Data]:
    """Steps of gradient descent: where each starts, its gradients, and where it would end if only a part moved."""
    layer = WeightNorm().inline(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        layer.weight_g.fill_(1.6)
        layer.weight_v.copy_(torch.tensor([[0.8, 0.6]]) * length)
    path = []
    for _ in range(count + 1):
        with record(layer) as recorded:
            loss = loss_of(layer)
            loss.backward()
        (now,) = recorded
        table = {step.symbol: step for step in now.steps()}
        only_g, after = stepped(layer, rate, "weight_g"), stepped(layer, rate, "weight_g", "weight_v")
        path.append(
            {
                "loss": numbers(loss),
                "w": numbers(now.weight[0]),
                "v": numbers(now.parts["v"][0]),
                "g": numbers(now.parts["g"].item()),
                "norm": numbers(table["‖v‖"].value.item()),
                "gradient of w": numbers(now.gradient[0]),
                "gradient of g": numbers(table["g"].gradient.item()),
                "gradient of v": numbers(table["v"].gradient[0]),
                "w of a plain layer next": numbers(stepped(plain(now.weight), rate, "weight").weight[0]),
                "w next, if only g moves": numbers(only_g.weight[0]),
                "w next": numbers(after.weight[0]),
                "v next": numbers(after.weight_v[0]),
                "norm next": numbers(steps(after)["‖v‖"].value.item()),
            }
        )
        layer = after
    return path


def plain(weight: Tensor) -> nn.Module:
    """An ordinary layer with this weight."""
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def stepped(layer: nn.Module, rate: float, *names: str) -> Any:
    """A copy of the layer after one step of gradient descent, of its parameters with these names."""
    layer = copy.deepcopy(layer)
    layer.zero_grad()
    loss_of(layer).backward()
    torch.optim.SGD([dict(layer.named_parameters())[name] for name in names], lr=rate).step()
    return layer


# 3. Stale


class Forgetful(nn.Module):
    """A model that lacks one line."""

    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.fc = self.wn.apply(nn.Linear(2, 1, bias=False))
        with torch.no_grad():
            self.fc.weight_g.fill_(1.5)
            self.fc.weight_v.copy_(torch.tensor([[2.0, 0.4]]))
        self.wn.recompute(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Mindful(Forgetful):
    """The same model, with it."""

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        return self.fc(x)


def stale() -> Data:
    """A training step, and then another forward, with and without the line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the stale reads below are what is to be shown
        return {
            "without": lived(Forgetful()),
            "with": lived(Mindful()),
            "detected": detected(),
            "second_backward": second_backward(),
            "code": {"without": code_of(Forgetful.forward), "with": code_of(Mindful.forward)},
        }


def code_of(function: Callable[..., Any]) -> str:
    return textwrap.dedent(inspect.getsource(function)).strip().replace(": Tensor) -> Tensor:", "):")


POINT, ANSWER = torch.tensor([[1.0, 1.0]]), 3.0


def step_once(model: Forgetful) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.15)
    (model(POINT) - ANSWER).square().sum().backward()
    optimizer.step()


def lived(model: Forgetful) -> list[Data]:
    """What the model holds, says and should say: when it is made, after a step, and after the next forward."""
    moments = [holds(model, model(POINT))]
    step_once(model)
    moments.append(holds(model, None))
    moments.append(holds(model, model(POINT)))
    return moments


def holds(model: Forgetful, output: Tensor | None) -> Data:
    """The weight that the layer holds, and that which its parts make."""
    true = steps(model.fc)["w"].value
    return {
        "held": numbers(model.fc.weight[0]),
        "true": numbers(true[0]),
        "says": None if output is None else numbers(output.item()),
        "should": numbers(F.linear(POINT, true).item()),
    }


def detected() -> str:
    """What `detect_stale` says of it."""
    model = Forgetful()
    step_once(model)
    try:
        with detect_stale():
            model(POINT)
    except StaleWeightError as error:
        return str(error)
    raise AssertionError("a stale read that was not seen")


def second_backward() -> str:
    """What torch says of it, one step later."""
    model = Forgetful()
    step_once(model)
    try:
        step_once(model)
    except RuntimeError as error:
        return str(error).split(" (")[0]
    raise AssertionError("a second backward through one graph")


# 4. A training run

KINDS = "plain", "weight norm", "weight norm + init", "spectral norm"
COUNT, FRAME, SIDE, REACH = 600, 20, 40, 5.0
"""How many steps are trained, which of them are shown, and the pixels and the size of the picture."""


def training() -> Data:
    torch.manual_seed(0)
    points, arm = spirals()
    runs = [{"name": kind, **trained(kind, points, arm)} for kind in KINDS]
    return {
        "points": numbers(points, 2),
        "arm": arm.tolist(),
        "frame": FRAME,
        "side": SIDE,
        "reach": REACH,
        "runs": runs,
    }


def trained(kind: str, points: Tensor, arm: Tensor) -> Data:
    torch.manual_seed(1)
    model = deep_model()
    if kind != "plain":
        apply_all(model, SpectralNorm() if kind == "spectral norm" else WeightNorm())
    if "init" in kind:
        data_dependent_init(model, points)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    frames, losses, right = [], [], []
    with record(model) if kind != "plain" else contextlib.nullcontext() as recorded:
        for step in range(COUNT + 1):
            output = model(points)
            loss = F.cross_entropy(output, arm)
            losses.append(loss.item())
            if step % FRAME == 0:
                frames.append(seen(copy.deepcopy(model)))
                right.append((output.argmax(dim=1) == arm).float().mean().item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {"loss": numbers(losses, 6), "right": numbers(right, 3), "frames": frames, "layers": layers_of(recorded)}


def seen(model: nn.Module) -> str:
    """For each pixel how sure the model is of one arm, as a byte, in base64."""
    across = torch.linspace(-REACH, REACH, SIDE)
    y, x = torch.meshgrid(-across, across, indexing="ij")
    with torch.no_grad():
        sure = model.eval()(torch.stack([x, y], dim=2).view(-1, 2)).softmax(dim=1)[:, 1]
    return base64.b64encode(bytes((sure * 255).round().int().tolist())).decode()


def layers_of(recorded: Any) -> list[Data]:
    """What was recorded of each layer at the steps that are shown, neuron by neuron."""
    if recorded is None:
        return []
    return [{"name": name, **curves_of(records[::FRAME])} for name, records in recorded.records.items()]


def curves_of(records: list[Any]) -> Data:
    tables = [one.steps() for one in records]
    symbols = ("σ",) if "orig" in records[0].parts else ("g", "‖v‖")
    curves = {symbol: torch.stack([table[symbol].value.flatten() for table in tables], dim=1) for symbol in symbols}
    return {symbol: numbers(curve, 3) for symbol, curve in curves.items()}


# 5. Power iteration

RATIOS = (0.3, 0.7, 0.9)
"""Of the two singular values: the nearer they are to each other, the longer it takes."""


def power() -> Data:
    return {"ratios": RATIOS, "runs": [iterated(ratio) for ratio in RATIOS]}


def iterated(ratio: float, count: int = 24) -> Data:
    weight = rotation(20) @ torch.diag(torch.tensor([1.6, 1.6 * ratio])) @ rotation(55).t()
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    sn = SpectralNorm(warmup=0)
    sn.apply(layer)
    with torch.no_grad():  # far from what is sought
        layer.weight_v.copy_(rotation(-25)[:, 0])
        layer.weight_u.copy_(F.normalize(weight @ layer.weight_v, dim=0))
    left, sigmas, right = torch.linalg.svd(weight)
    circle = torch.stack([rotation(angle)[:, 0] for angle in range(0, 360, 10)])
    moments = [moment(layer, circle, right[0])]
    for _ in range(count):
        sn.recompute(layer)
        moments.append(moment(layer, circle, right[0]))
    return {
        "circle": numbers(circle, 3),
        "image": numbers(F.linear(circle, weight), 3),
        "sigma": numbers(sigmas[0].item()),
        "left": numbers(left[:, 0]),
        "right": numbers(right[0]),
        "moments": moments,
    }


def rotation(degrees: float) -> Tensor:
    angle = math.radians(degrees)
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def moment(layer: nn.Module, circle: Tensor, sought: Tensor) -> Data:
    """u, v and σ as they are now, and what the layer makes of a circle."""
    table = {step.symbol: step.value for step in steps(layer)}
    return {
        "u": numbers(table["u"]),
        "v": numbers(table["v"]),
        "sigma": numbers(table["σ"].item()),
        "off": numbers(math.degrees(math.acos(min(1.0, abs(torch.dot(table["v"], sought).item())))), 2),
        "normed": numbers(F.linear(circle, table["w"]), 3),
    }


# 6. The same line everywhere


class Net(nn.Module):
    """The first module of the README."""

    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm("weight", dim=0)
        self.fc = self.wn.apply(nn.Linear(20, 40))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        return self.fc(x)


def everywhere() -> Data:
    net, x = Net(), torch.randn(8, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecated TorchScript
        scripted = torch.jit.script(net)
    exported = torch.export.export(net, (x,))
    code = {
        "python": code_of(Net.forward),
        "script": f"{scripted.code}\n{scripted.fc._recompute_normed.code}".strip(),
        "export": exported.graph_module.code.strip(),
    }
    marked = {
        "python": ["self.wn.recompute"],
        "script": ["(wn).recompute", "self.weight = _0(weight_v, weight_g, "],
        "export": ["aten._weight_norm"],
    }
    return {"torch": torch.__version__.split("+")[0], "code": code, "marked": marked}


# The page


def recorded() -> Data:
    """All that the page shows."""
    torch.set_num_threads(1)  # the models are tiny
    torch.manual_seed(0)
    sections: tuple[Callable[[], Data], ...] = (apart, descent, stale, training, power, everywhere)
    return {section.__name__: section() for section in sections}


def page_of(data: Data) -> str:
    """The skeleton with everything in it."""
    page = (SOURCES / "page.html").read_text(encoding="utf-8")
    for name in ("page.css", "page.js"):
        page = page.replace(f"{{{{ {name} }}}}", (SOURCES / name).read_text(encoding="utf-8").rstrip())
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return page.replace("{{ numbers }}", written)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=HERE / "playground.html")
    out = arguments.parse_args().out
    out.write_text(page_of(recorded()), encoding="utf-8")
    print(f"{out.name} written, {out.stat().st_size / 1e6:.2f} MB: open it in a browser")


if __name__ == "__main__":
    main()
