"""A temporal convolutional network as people have written it for years, with torch's hook (Bai et al., 2018).

The norm is an argument, so that the same network can be built without one, to compare with.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Norm = Callable[[nn.Module], Any]


class Chomp(nn.Module):
    """Cuts off what the padding added at the end, so that no output sees the future."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


class TemporalBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        padding = (kernel - 1) * dilation
        self.net = nn.Sequential(
            norm(nn.Conv1d(inputs, outputs, kernel, padding=padding, dilation=dilation)),
            Chomp(padding),
            nn.ReLU(),
            norm(nn.Conv1d(outputs, outputs, kernel, padding=padding, dilation=dilation)),
            Chomp(padding),
            nn.ReLU(),
        )
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.net(x) + self.downsample(x))


class TemporalConvNet(nn.Module):
    def __init__(self, norm: Norm, inputs: int = 3, channels: tuple[int, ...] = (6, 6, 4), kernel: int = 2) -> None:
        super().__init__()
        sizes = (inputs, *channels)
        self.network = nn.Sequential(
            *(TemporalBlock(sizes[i], sizes[i + 1], kernel, 2**i, norm) for i in range(len(channels)))
        )
        self.head = norm(nn.Linear(channels[-1], 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.network(x).mean(dim=2))


NORMED = [f"network.{block}.net.{index}.weight" for block in range(3) for index in (0, 3)] + ["head.weight"]
