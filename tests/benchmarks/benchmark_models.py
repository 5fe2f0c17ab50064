"""What the benchmark measures: each model twice, without a norm and with the explicit one, in otherwise the same lines.

The class without a norm is also the one whose layers the other spellings norm from outside: `inline`, torch's hook and
torch's parametrization. Its explicit twin is what people write: it holds the norm object, applies it to its layers, and
calls `recompute` right before a layer is used. So a row compares norms, and not containers.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils import parametrizations

from explicit_wn import WeightNorm, recompute_all

PLAIN, OURS, PEERS = "plain", ("explicit", "inlined"), ("hook", "parametrization")
SPELLINGS = (PLAIN, *OURS, *PEERS)
NORMED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)


class Chain(nn.Module):
    """Layers one after the other."""

    def __init__(self, make: Callable[[], nn.Module], count: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ExplicitChain(Chain):
    norm: Callable[..., Any] = WeightNorm

    def __init__(self, make: Callable[[], nn.Module], count: int, dim: int) -> None:
        super().__init__(make, count, dim)
        self.wn = self.norm(dim=dim)
        for layer in self.layers:
            self.wn.apply(layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            self.wn.recompute(layer)
            x = layer(x)
        return x


class Branches(Chain):
    """Layers side by side, whose output need not have the shape of their input."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for layer in self.layers:
            outputs.append(layer(x))
        return torch.cat(outputs)


class ExplicitBranches(ExplicitChain):
    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for layer in self.layers:
            self.wn.recompute(layer)
            outputs.append(layer(x))
        return torch.cat(outputs)


class FixedPoint(nn.Module):
    """A deep equilibrium model (Bai et al., 2019) in small: one layer, iterated 16 times."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for _ in range(16):
            z = torch.tanh(self.fc(z) + x)
        return z


class ExplicitFixedPoint(FixedPoint):
    """Recomputes once; a hook and a parametrization do so at each of the 16 reads."""

    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.wn.apply(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        z = x
        for _ in range(16):
            z = torch.tanh(self.fc(z) + x)
        return z


class TemporalBlock(nn.Module):
    """A block of the temporal convolutional network (Bai et al., 2018), whose layers have two names, as published."""

    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        padding = (kernel - 1) * dilation
        self.conv1 = nn.Conv1d(channels, channels, kernel, padding=padding, dilation=dilation)
        self.conv2 = nn.Conv1d(channels, channels, kernel, padding=padding, dilation=dilation)
        cut = partial(nn.ConstantPad1d, (0, -padding), 0.0)
        self.net = nn.Sequential(self.conv1, cut(), nn.ReLU(), self.conv2, cut(), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.net(x) + x)


class ExplicitTemporalBlock(TemporalBlock):
    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__(channels, kernel, dilation)
        self.wn = WeightNorm()
        self.wn.apply(self.conv1)
        self.wn.apply(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.conv1)
        self.wn.recompute(self.conv2)
        return torch.relu(self.net(x) + x)


def temporal_convolutions(block: type[TemporalBlock]) -> nn.Module:
    """The network that they train on the adding problem: 8 levels of 24 channels, kernels of 7."""
    return nn.Sequential(*(block(24, 7, 2**level) for level in range(8)))


class PeriodDiscriminator(nn.Module):
    """The one of period 3 among Hifi-GAN's discriminators, called on what is real and on what was generated."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, 32, 128, 512, 1024)
        convolution = partial(nn.Conv2d, kernel_size=(5, 1), padding=(2, 0))
        self.layers = nn.ModuleList(convolution(sizes[i], sizes[i + 1], stride=(3, 1)) for i in range(4))
        self.layers.append(convolution(1024, 1024))
        self.last = nn.Conv2d(1024, 1, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.judge(x[0]), self.judge(x[1])))

    def judge(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = leaky_relu(layer(x), 0.1)
        return self.last(x)


class ExplicitPeriodDiscriminator(PeriodDiscriminator):
    """Recomputes each layer once for its two reads."""

    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        for layer in (*self.layers, self.last):
            self.wn.apply(layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            self.wn.recompute(layer)
        self.wn.recompute(self.last)
        return torch.cat((self.judge(x[0]), self.judge(x[1])))


class Vocoder(nn.Module):
    """The generator of Hifi-GAN as transformers publishes it, with a normed weight in each of its 78 layers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

        self.generator: Any = SpeechT5HifiGan(SpeechT5HifiGanConfig())

    def forward(self, x: Tensor) -> Any:
        return self.generator(x)


class ExplicitVocoder(Vocoder):
    """A model that somebody else wrote has no place for `recompute`, so `recompute_all` goes before it."""

    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        for layer in normed_layers(self):
            self.wn.apply(layer)

    def forward(self, x: Tensor) -> Any:
        recompute_all(self.generator)
        return self.generator(x)


@attrs.frozen
class Row:
    """A model without a norm, its explicit twin, the shape of their input and the dimension that the norm keeps."""

    plain: Callable[[], nn.Module]
    explicit: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dim: int = 0

    def build(self, spelling: str, device: str) -> tuple[nn.Module, Tensor]:
        """The model in that spelling and its input, the same numbers in all of them.

        The weights are changed after a first call, as an optimizer does, so that who does not recompute is wrong.
        """
        torch.manual_seed(0)
        model = self.explicit() if spelling == "explicit" else self.plain()
        for layer in normed_layers(model):
            NORMS[spelling](layer, dim=self.dim)
        model, x = model.to(device), torch.randn(self.shape).to(device)
        magnitudes = {PLAIN: "weight", "parametrization": "original0"}.get(spelling, "weight_g")
        with torch.no_grad():
            model(x)
            for layer in normed_layers(model):
                for name, parameter in layer.named_parameters():
                    if name.endswith(magnitudes):
                        parameter.mul_(1.1)
        return model, x


def normed_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, NORMED)]


def by_hook(layer: nn.Module, dim: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hook is deprecated
        return torch.nn.utils.weight_norm(layer, dim=dim)


NORMS: dict[str, Callable[..., Any]] = {
    PLAIN: lambda layer, dim: layer,
    "explicit": lambda layer, dim: layer,  # the model has done it
    "inlined": lambda layer, dim: WeightNorm(dim=dim).inline(layer),
    "hook": by_hook,
    "parametrization": lambda layer, dim: parametrizations.weight_norm(layer, dim=dim),
}


def chain(make: Callable[[], nn.Module], count: int, shape: tuple[int, ...]) -> Row:
    return Row(partial(Chain, make, count, 0), partial(ExplicitChain, make, count, 0), shape)


def middle_dim(inputs: int, outputs: int, kernel: int) -> Row:
    """Transposed convolutions with a norm for each output channel, which is their middle dimension."""
    make = partial(nn.ConvTranspose1d, inputs, outputs, kernel)
    return Row(partial(Branches, make, 4, 1), partial(ExplicitBranches, make, 4, 1), (1, inputs, 16), dim=1)


ROWS: dict[str, Row] = {
    "10 × Linear(64)": chain(partial(nn.Linear, 64, 64), 10, (16, 64)),
    "4 × Conv1d(64, 64, 3)": chain(partial(nn.Conv1d, 64, 64, 3, padding=1), 4, (1, 64, 64)),
    "8 × Conv1d(256, 256, 7)": chain(partial(nn.Conv1d, 256, 256, 7, padding=3), 8, (1, 256, 64)),
    "3 × Linear(2048)": chain(partial(nn.Linear, 2048, 2048), 3, (16, 2048)),
    "4 × ConvTranspose1d(192, 192, 5), dim=1": middle_dim(192, 192, 5),
    "4 × ConvTranspose1d(256, 256, 16), dim=1": middle_dim(256, 256, 16),
    "4 × ConvTranspose1d(512, 256, 16), dim=1": middle_dim(512, 256, 16),
    "Fixed point, 16 reads": Row(FixedPoint, ExplicitFixedPoint, (8, 512)),
    "TCN, 16 layers of two names": Row(
        partial(temporal_convolutions, TemporalBlock),
        partial(temporal_convolutions, ExplicitTemporalBlock),
        (4, 24, 400),
    ),
    "Hifi-GAN discriminator, 2 reads": Row(PeriodDiscriminator, ExplicitPeriodDiscriminator, (2, 1, 1, 683, 3)),
    "Hifi-GAN generator": Row(Vocoder, ExplicitVocoder, (1, 16, 80)),
}
