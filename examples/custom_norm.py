"""A norm of one's own, weight norm whose magnitude is learned as a logarithm, in the protocol that WeightNorm follows.

Everything above `class Net` is the norm: its formula, its settings and its parts. What it then can do comes with the
protocol: train, script, freeze, export, compile, copy, save, load and fold. The docstring of `Reparametrization` says
what else a norm may define.

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
from explicit_wn import functional, settings
from explicit_wn.reparametrization import Reparametrization

# torch deprecated TorchScript. That is for you to weigh; here the warnings would only hide the table.
warnings.filterwarnings("ignore", message=".torch.jit")


def log_weight_norm(v: Tensor, s: Tensor, dim: int = 0, eps: float = 1e-6) -> Tensor:
    """exp(s) · v / ‖v‖, with the norm over every dimension but `dim`. TorchScript compiles this, too."""
    others = list(range(v.dim()))
    others.remove(dim)
    norm = torch.sqrt((v * v).sum(others, keepdim=True))
    return v * (s.exp() / norm.clamp_min(eps))


@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
class LogWeightNorm(Reparametrization):
    """w = exp(s) · v / ‖v‖: the magnitude is never negative, and a step of s changes it by a factor.

    Salimans and Kingma (2016, https://arxiv.org/abs/1602.07868) tried it beside their weight norm.
    """

    name: str = "weight"
    dim: settings.Dim = "out"
    eps: float = attrs.field(default=1e-6, validator=settings.positive_eps)

    formula = staticmethod(log_weight_norm)
    default_dim = "out"

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        return {"v": weight, "s": functional.norm_except_dim(weight, 2, self.dim).clamp_min(self.eps).log()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wn = LogWeightNorm()
        self.up = self.wn.apply(nn.ConvTranspose1d(3, 8, 4))  # whose output dimension is 1
        self.out = self.wn.apply(nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.up)
        self.wn.recompute(self.out)
        return self.out(F.relu(self.up(x)).mean(dim=2))


def by_hand(model: Net, x: Tensor) -> Tensor:
    """The same network in plain functions of torch: what every answer is compared with."""
    v, s = model.up.weight_v, model.up.weight_s
    weight = s.exp() * v / v.square().sum(dim=(0, 2), keepdim=True).sqrt()
    hidden = F.relu(F.conv_transpose1d(x, weight, model.up.bias)).mean(dim=2)
    v, s = model.out.weight_v, model.out.weight_s
    weight = s.exp() * v / v.square().sum(dim=1, keepdim=True).sqrt()
    return F.linear(hidden, weight, model.out.bias)


def train_a_step(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    before = F.cross_entropy(model(x), labels)
    before.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
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
        stale = model(x)
        for layer in (model.up, model.out):
            layer.weight_v.mul_(3).add_(torch.rand_like(layer.weight_v))  # the stored weights are stale now
        expected = by_hand(model, x)
        print("\nlargest difference from the formula")
        ways = ways_out(model, x)
        for name, way in ways.items():
            print(f"  {name:38} {(way(x) - expected).abs().max():8.1e}")
        print(f"  {'for scale: weights out of date':38} {(stale - expected).abs().max():8.1e}")
        print(f"\nfolded, it is plain:\n{ways['explicit_wn.fold']}")


if __name__ == "__main__":
    main()
