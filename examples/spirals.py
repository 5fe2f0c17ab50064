"""Two long spirals, and a model that is to tell them apart: the problem of the walkthrough and of the playground."""

import torch
from torch import Tensor, nn


def spirals(count: int = 400) -> tuple[Tensor, Tensor]:
    """Points of the plane, and to which of the two arms each belongs."""
    radius, arm = 0.3 + 4 * torch.rand(count).sqrt(), torch.randint(2, (count,))
    angle = torch.pi * (radius + arm)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return points + 0.05 * torch.randn(count, 2), arm


def deep_model() -> nn.Sequential:
    """Five Linear layers, without any norm."""
    layers: list[nn.Module] = [nn.Linear(2, 32), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(32, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 2))
