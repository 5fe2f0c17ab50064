"""Train a small convolutional model, take it through every way out of Python, and see that nothing changed.

Run: python examples/quickstart.py

It takes 4 seconds on two idle cores and 20 on busy ones. Where torch starts for the first time, that alone may take
another 45.
"""

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import explicit_wn
from explicit_wn import WeightNorm

# torch deprecated TorchScript. That is for you to weigh; here the warnings would only hide the table.
warnings.filterwarnings("ignore", message=".torch.jit")


class StripesNet(nn.Module):
    """Tells which way the stripes of an image run."""

    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.edges = self.wn.apply(nn.Conv2d(1, 8, 5))
        self.stripes = self.wn.apply(nn.Conv2d(8, 16, 3, stride=2))
        self.out = self.wn.apply(nn.Linear(16, 4))

    def forward(self, images: Tensor) -> Tensor:
        self.wn.recompute(self.edges)
        self.wn.recompute(self.stripes)
        self.wn.recompute(self.out)
        features = F.relu(self.stripes(F.relu(self.edges(images))))
        return self.out(features.mean(dim=(2, 3)))


def make_images(count: int) -> tuple[Tensor, Tensor]:
    """Noisy 16x16 images of stripes, and which of four ways they run."""
    labels = torch.randint(4, (count,))
    angle = labels * torch.pi / 4 + 0.15 * torch.randn(count)
    phase, width = 2 * torch.pi * torch.rand(count), 1.5 + torch.rand(count)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    along = torch.cos(angle)[:, None, None] * columns + torch.sin(angle)[:, None, None] * rows
    images = torch.sin(along / width[:, None, None] + phase[:, None, None])
    return (images + 0.7 * torch.randn_like(images)).unsqueeze(1), labels


def train(model: nn.Module, steps: int = 250) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(1, steps + 1):
        images, labels = make_images(64)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3} of {steps}: loss {loss.item():.3f}", flush=True)


def by_hand(model: StripesNet, images: Tensor, weight_of: Callable[[nn.Module], Tensor]) -> Tensor:
    """The same network in plain functions of torch: what every answer is compared with."""
    hidden = F.relu(F.conv2d(images, weight_of(model.edges), model.edges.bias))
    hidden = F.relu(F.conv2d(hidden, weight_of(model.stripes), model.stripes.bias, stride=2))
    return F.linear(hidden.mean(dim=(2, 3)), weight_of(model.out), model.out.bias)


def formula(layer: nn.Module) -> Tensor:
    """w = g · v / ‖v‖, the norm over every dimension but the first."""
    lengths = layer.weight_v.flatten(1).norm(dim=1).view_as(layer.weight_g)
    return layer.weight_g * layer.weight_v / lengths


def ways_out(model: StripesNet, images: Tensor, folder: Path) -> dict[str, nn.Module]:
    """The model in every form that a model is used in."""
    ways: dict[str, nn.Module] = {"eager": model, "copy.deepcopy": copy.deepcopy(model)}

    torch.save(model, folder / "model.pt")
    ways["torch.save, torch.load"] = torch.load(folder / "model.pt", weights_only=False)

    ways["load_state_dict into a new model"] = StripesNet()
    ways["load_state_dict into a new model"].load_state_dict(model.state_dict())

    scripted = ways["torch.jit.script"] = torch.jit.script(model)
    scripted.save(folder / "scripted.pt")
    ways["torch.jit.script, saved and loaded"] = torch.jit.load(folder / "scripted.pt")
    ways["explicit_wn.script, frozen"] = torch.jit.freeze(explicit_wn.script(model))

    traced = ways["torch.jit.trace"] = torch.jit.trace(model, images)
    traced.save(folder / "traced.pt")
    ways["torch.jit.trace, saved and loaded"] = torch.jit.load(folder / "traced.pt")

    exported = torch.export.export(model, (images,))
    ways["torch.export"] = exported.module()
    torch.export.save(exported, folder / "exported.pt2")
    ways["torch.export, saved and loaded"] = torch.export.load(folder / "exported.pt2").module()
    return ways


def main() -> None:
    torch.manual_seed(0)
    model, started = StripesNet(), time.perf_counter()
    train(model)
    print(f"torch {torch.__version__}, trained for {time.perf_counter() - started:.1f} s")

    model.eval()
    images, labels = make_images(1000)
    with torch.no_grad():
        expected = by_hand(model, images, formula)
        # The last optimizer step changed g and v after the last forward, so the stored weights are one step old now.
        with warnings.catch_warnings():  # they say so themselves
            warnings.simplefilter("ignore", explicit_wn.StaleWeightWarning)
            stale = by_hand(model, images, lambda layer: layer.weight)
    accuracy = (expected.argmax(dim=1) == labels).float().mean()
    print(f"accuracy on new images: {accuracy:.1%}, by chance it would be 25%\n")

    with tempfile.TemporaryDirectory() as folder:
        ways = ways_out(model, images, Path(folder))
    folded = copy.deepcopy(model)
    names = explicit_wn.fold(folded)
    ways["explicit_wn.fold"] = folded

    print(f"{'largest difference from the formula':40} {'':>8}")
    for name, way in ways.items():
        with torch.no_grad():
            difference = (way(images) - expected).abs().max()
        print(f"  {name:38} {difference:8.1e}")
    print(f"  {'for scale: weights one step old':38} {(stale - expected).abs().max():8.1e}")
    print(f"\nfolded into plain parameters: {', '.join(names)}")


if __name__ == "__main__":
    main()
