"""Every dim of weights of one to five dimensions, in every dtype."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import Captured, exported, scripted, traced
from layers import Dim, Net, change_parts, loss_of, norm_of, weight_of
from torch import Tensor, nn

from explicit_wn import WeightNorm

SHAPE = (2, 3, 4, 2, 3)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Weight(nn.Module):
    """A layer whose output is its weight times a number."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def dims_of(ndim: int) -> list[Dim]:
    """All of them but -1, which is refused."""
    return [*range(ndim), *range(-ndim, -1), None, "out", "whole"]


def kept(dim: Dim, ndim: int) -> int | None:
    if dim in (None, "whole"):
        return None
    return 0 if isinstance(dim, str) else dim % ndim


every_dim = pytest.mark.parametrize(("ndim", "dim"), [(ndim, dim) for ndim in range(1, 6) for dim in dims_of(ndim)])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dim
@every_dtype
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_the_parts_have_their_shapes_and_dtype_and_make_the_weight(
    eps: float, dtype: torch.dtype, ndim: int, dim: Dim
) -> None:
    layer = Weight(SHAPE[:ndim], dtype)
    original, before = layer.weight, layer.weight.detach().clone()
    WeightNorm(dim=dim, eps=eps).apply(layer)
    norm = norm_of(before.double(), kept(dim, ndim)).to(dtype)
    assert layer.weight_v is original
    assert layer.weight_g.shape == norm.shape
    assert layer.weight_g.dtype == layer.weight.dtype == dtype
    torch.testing.assert_close(layer.weight_g, norm)
    torch.testing.assert_close(layer.weight, before)


@every_dim
@every_dtype
@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("form", ["apply", "inline"])
def test_the_weight_and_its_gradients_are_right(form: str, eps: float, dtype: torch.dtype, ndim: int, dim: Dim) -> None:
    norm, layer = WeightNorm(dim=dim, eps=eps), Weight(SHAPE[:ndim], dtype)
    run: Any = Net(norm, layer) if form == "apply" else norm.inline(layer)
    change_parts(layer, seed=1)
    x = torch.tensor(2.0, dtype=dtype)
    g, v = (part.detach().double().requires_grad_() for part in (layer.weight_g, layer.weight_v))
    output, expected = run(x), 2.0 * weight_of(g, v, kept(dim, ndim), eps)
    torch.testing.assert_close(
        output.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
    )
    loss_of(output.double()).backward()
    loss_of(expected).backward()
    largest = max(float(v.grad.abs().max()), float(g.grad.abs().max()), 1.0)  # type: ignore[union-attr]
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer.weight_g.grad.double(), g.grad, rtol=tolerance, atol=tolerance * largest)
    torch.testing.assert_close(layer.weight_v.grad.double(), v.grad, rtol=tolerance, atol=tolerance * largest)


CAPTURED = [
    *((context, dtype) for context in (scripted, traced) for dtype in DTYPES),
    (exported, torch.float32),
    (exported, torch.bfloat16),
]


@every_dim
@pytest.mark.parametrize(("context", "dtype"), CAPTURED, ids=[f"{c.__name__}-{dtype}" for c, dtype in CAPTURED])
def test_the_weight_is_fresh_in_a_captured_graph(
    context: Callable[..., Captured], dtype: torch.dtype, ndim: int, dim: Dim
) -> None:
    model = Net(WeightNorm(dim=dim), Weight(SHAPE[:ndim], dtype))
    change_parts(model, seed=1)
    x = torch.tensor(2.0, dtype=dtype)
    captured = context(model, (x,)).run
    for seed in (2, 3):
        change_parts(captured, seed)
        parts = dict(captured.named_parameters())
        expected = 2.0 * weight_of(parts["fc.weight_g"], parts["fc.weight_v"], kept(dim, ndim))
        torch.testing.assert_close(
            captured(x), expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )
    change_parts(model, seed=4)
    expected = 2.0 * weight_of(model.fc.weight_g, model.fc.weight_v, kept(dim, ndim))  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


OUT = [
    (lambda: nn.Linear(3, 4), 0),
    (lambda: nn.Conv2d(3, 4, 2), 0),
    (lambda: nn.ConvTranspose1d(3, 4, 2), 1),
    (lambda: nn.ConvTranspose2d(3, 4, 2), 1),
    (lambda: nn.ConvTranspose3d(3, 4, 2), 1),
    (lambda: nn.Embedding(3, 4), 0),
    (lambda: nn.Bilinear(2, 3, 4), 0),
]


@pytest.mark.parametrize(("make", "dim"), OUT, ids=[type(make()).__name__ for make, _ in OUT])
def test_out_is_the_output_dimension(make: Callable[[], nn.Module], dim: int) -> None:
    layer: Any = WeightNorm(dim="out").apply(make())
    assert layer.weight_g.numel() == layer.weight_g.shape[dim] == layer.weight_v.shape[dim]
    torch.testing.assert_close(layer.weight_g, norm_of(layer.weight_v, dim))


@every_dtype
def test_a_change_of_dtype_reaches_the_weight(dtype: torch.dtype) -> None:
    model = Net(WeightNorm(dim=1), Weight((2, 3), torch.float32))
    change_parts(model, seed=1)
    model.to(dtype)
    assert model.fc.weight.dtype == dtype
    change_parts(model, seed=2)
    expected = weight_of(model.fc.weight_g, model.fc.weight_v, 1)  # type: ignore[arg-type]
    torch.testing.assert_close(model(torch.ones((), dtype=dtype)), expected)
