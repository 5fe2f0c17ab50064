"""A norm of one's own, weight standardization, in the protocol that WeightNorm and SpectralNorm follow.

Everything above `class Net` is the norm: its formula, its settings and its parts. What it then can do comes with the
protocol: train, script, freeze, export, compile, copy, save, load and fold.

Run: python examples/custom_norm.py
"""

import copy
import io
import warnings
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import explicit_wn
from explicit_wn import settings
from explicit_wn.reparametrization import Reparametrization

# torch deprecated TorchScript. That is for you to weigh; here the warnings would only hide the table.
warnings.filterwarnings("ignore", message=".torch.jit")


def standardize(v: Tensor, dim: int = 0, eps: float = 1e-5) -> Tensor:
    """(v - mean) / std, both taken over every dimension but `dim`. TorchScript compiles this, too."""
    others = list(range(v.dim()))
    others.remove(dim)
    std, mean = torch.std_mean(v, others, unbiased=False, keepdim=True)
    return (v - mean) / std.clamp_min(eps)


@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
class WeightStandardization(Reparametrization):
    """w = (v - mean(v)) / std(v), for each output of a layer (Qiao et al., 2019, https://arxiv.org/abs/1903.10520)."""

    name: str = "weight"
    dim: int | str | None = "out"
    eps: float = attrs.field(default=1e-5, validator=settings.positive_eps)

    formula = staticmethod(standardize)
    default_dim = "out"

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        return {"v": weight}

    def objection(self, weight: Tensor) -> str | None:
        return "each of its slices is a single number, which has no spread" if weight.dim() < 2 else None

    def no_inverse(self, weight: Tensor) -> str | None:
        if torch.allclose(standardize(weight, self.dim, self.eps), weight, atol=1e-4):
            return None
        return "its slices have not the mean 0 and the variance 1; pass standardize(weight)"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ws = WeightStandardization()
        self.up = self.ws.apply(nn.ConvTranspose1d(3, 8, 4))  # whose output dimension is 1
        self.out = self.ws.apply(nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.ws.recompute(self.up)
        self.ws.recompute(self.out)
        return self.out(F.relu(self.up(x)).mean(dim=2))


def by_hand(model: Net, x: Tensor) -> Tensor:
    """The same network in plain functions of torch: what every answer is compared with."""
    v = model.up.weight_v
    weight = (v - v.mean(dim=(0, 2), keepdim=True)) / v.var(dim=(0, 2), keepdim=True, unbiased=False).sqrt()
    hidden = F.relu(F.conv_transpose1d(x, weight, model.up.bias)).mean(dim=2)
    v = model.out.weight_v
    weight = (v - v.mean(dim=1, keepdim=True)) / v.var(dim=1, keepdim=True, unbiased=False).sqrt()
    return F.linear(hidden, weight, model.out.bias)


def train_a_step(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    before = F.cross_entropy(model(x), labels)
    before.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    print(f"trained a step: the loss was {before:.4f} and is {F.cross_entropy(model(x), labels):.4f}")


def saved_and_loaded(save: Any, load: Any, what: Any) -> Any:
    file = io.BytesIO()
    save(what, file)
    file.seek(0)
    return load(file)


def ways_out(model: Net, x: Tensor) -> dict[str, Any]:
    scripted = torch.jit.script(model)
    exported = torch.export.export(model, (x,))
    loaded = Net()
    loaded.load_state_dict(model.state_dict())
    folded = copy.deepcopy(model)
    explicit_wn.fold(folded)
    return {
        "eager": model,
        "copy.deepcopy": copy.deepcopy(model),
        "load_state_dict into a new model": loaded,
        "torch.jit.script": scripted,
        "torch.jit.script, saved and loaded": saved_and_loaded(torch.jit.save, torch.jit.load, scripted),
        "explicit_wn.script, frozen": torch.jit.freeze(explicit_wn.script(copy.deepcopy(model).eval())),
        "torch.jit.trace": torch.jit.trace(model, x),
        "torch.export": exported.module(),
        "torch.export, saved and loaded": saved_and_loaded(torch.export.save, torch.export.load, exported).module(),
        "explicit_wn.fold": folded,
    }


def main() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(16, 3, 10)
    print(model, end="\n\n")
    train_a_step(model, x, labels=torch.arange(16) % 2)
    with torch.no_grad():
        for layer in (model.up, model.out):
            layer.weight_v.mul_(3).add_(torch.rand_like(layer.weight_v))  # the stored weights are stale now
        stale = F.linear(F.relu(model.up(x)).mean(dim=2), model.out.weight, model.out.bias)
        expected = by_hand(model, x)
        print("\nlargest difference from the formula")
        ways = ways_out(model, x)
        for name, way in ways.items():
            print(f"  {name:38} {(way(x) - expected).abs().max():8.1e}")
        print(f"  {'for scale: weights out of date':38} {(stale - expected).abs().max():8.1e}")
        print(f"\nfolded, it is plain:\n{ways['explicit_wn.fold']}")


if __name__ == "__main__":
    main()
