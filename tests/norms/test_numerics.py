"""Numbers at the ends of what a dtype holds: what torch makes of them, what we make of them, and the truth.

`python tests/norms/test_numerics.py` prints the tables below as they are documented.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from layers import loss_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from explicit_wn import SpectralNorm, WeightNorm, functional

DOUBLE, SINGLE, BRAIN, HALF = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [DOUBLE, SINGLE, BRAIN, HALF]
inf, nan = math.inf, math.nan
DIMS = {0: (1, 4), 1: (2, 1, 2), None: (4,)}
"""Shapes with one slice of four numbers: torch's kernel is fused for the first and the last dim, not for others."""


def true_weight(g: Tensor, v: Tensor, dim: int | None, eps: float) -> Tensor:
    """g · v / max(‖v‖, eps) in double precision, in which no square is lost."""
    g, v = g.double(), v.double()
    largest = float(v.detach().abs().max())
    largest = largest if 0 < largest < inf else 1.0
    others = [index for index in range(v.dim()) if index != dim]
    norm = (v / largest).square().sum(others, keepdim=dim is not None).sqrt() * largest
    return v / norm.clamp_min(eps) * g


def torchs_weight(g: Tensor, v: Tensor, dim: int | None) -> Tensor:
    return torch._weight_norm(v, g, -1 if dim is None else dim)


def magnitude(value: float, v: Tensor, dim: int | None) -> Tensor:
    shape = () if dim is None else [size if index == dim else 1 for index, size in enumerate(v.shape)]
    return torch.full(shape, value, dtype=DOUBLE).to(v.dtype)


@attrs.frozen
class Row:
    """The weight of a slice of four equal numbers v, whose norm is 2v: the truth is g/2 unless eps is the larger."""

    dtype: torch.dtype
    v: float
    g: float
    eps: float
    torch: float | None
    """What torch has no eps for is None."""
    ours: float
    truth: float
    dim: int | None = 0

    def __str__(self) -> str:
        return f"{short(self.dtype)}-v={self.v:g}-g={self.g:g}-eps={self.eps:g}-dim={self.dim}"

    def parts(self) -> tuple[Tensor, Tensor]:
        """g and v."""
        v = torch.full(DIMS[self.dim], self.v, dtype=DOUBLE).to(self.dtype)
        return magnitude(self.g, v, self.dim), v


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


ROWS = [
    # v: squares that are 0 or infinite in the dtype, though their root would not be
    Row(SINGLE, 1e-20, 1, 0, 0.5, 0.5, 0.5),
    Row(SINGLE, 1e-30, 1, 0, inf, inf, 0.5),
    Row(SINGLE, 1e-30, 1, 1e-12, None, 1e-18, 1e-18),
    Row(SINGLE, 1e-30, 1, 1e-30, None, 1.0, 0.5),
    Row(SINGLE, 1e-45, 1, 1e-12, None, 1.4013e-33, 1.4013e-33),
    Row(SINGLE, 1e30, 1, 0, 0, 0, 0.5),
    Row(SINGLE, 1e30, 1, 1e-12, None, 0, 0.5),
    Row(DOUBLE, 1e-30, 1, 0, 0.5, 0.5, 0.5),
    Row(DOUBLE, 1e30, 1, 0, 0.5, 0.5, 0.5),
    Row(DOUBLE, 1e-200, 1, 0, inf, inf, 0.5),
    Row(DOUBLE, 1e-200, 1, 1e-12, None, 1e-188, 1e-188),
    Row(DOUBLE, 1e200, 1, 0, 0, 0, 0.5),
    Row(BRAIN, 1e-30, 1, 0, inf, inf, 0.5),
    Row(BRAIN, 1e-30, 1, 1e-12, None, 1e-18, 1e-18),
    Row(BRAIN, 1e30, 1, 0, 0, 0, 0.5),
    Row(HALF, 6e-8, 1, 0, 0.5, 0.5, 0.5),
    Row(HALF, 6e-8, 1, 0, inf, inf, 0.5, dim=1),
    Row(HALF, 6e-8, 1, 1e-12, None, 0.5, 0.5, dim=1),
    Row(HALF, 6e-8, 1, 1e-12, None, 0.5, 0.5),
    Row(HALF, 6e-8, 1, 1e-6, None, 0.0596, 0.0596),
    Row(HALF, 65504, 1, 0, 0.5, 0.5, 0.5),
    Row(HALF, 65504, 1, 0, 0, 0, 0.5, dim=1),
    Row(HALF, 65504, 1, 0, 0, 0, 0.5, dim=None),
    Row(HALF, 65504, 1, 1e-12, None, 0.5, 0.5),
    Row(HALF, 65504, 1, 1e-12, None, 0.5, 0.5, dim=1),
    Row(HALF, 65504, 1, 1e-12, None, 0.5, 0.5, dim=None),
    # v: no number at all
    Row(SINGLE, 0, 1, 0, nan, nan, nan),
    Row(SINGLE, 0, 1, 1e-12, None, 0, 0),
    Row(HALF, 0, 1, 1e-12, None, 0, 0),
    Row(SINGLE, inf, 1, 0, nan, nan, nan),
    Row(SINGLE, inf, 1, 1e-12, None, nan, nan),
    Row(SINGLE, nan, 1, 0, nan, nan, nan),
    Row(SINGLE, nan, 1, 1e-12, None, nan, nan),
    # g
    Row(SINGLE, 1, 1e-40, 0, 5e-41, 5e-41, 5e-41),
    Row(SINGLE, 1, 1e-30, 0, 5e-31, 5e-31, 5e-31),
    Row(SINGLE, 1, 1e30, 0, 5e29, 5e29, 5e29),
    Row(SINGLE, 1, inf, 0, inf, inf, inf),
    Row(SINGLE, 1, nan, 0, nan, nan, nan),
    Row(SINGLE, 1, 0, 0, 0, 0, 0),
    Row(HALF, 1, 65504, 0, 32752, 32752, 32752),
]


def close(actual: Tensor, expected: Tensor | float, tolerance: float) -> None:
    wanted = torch.as_tensor(expected, dtype=DOUBLE).expand(actual.shape)
    torch.testing.assert_close(actual.detach().double(), wanted, rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_weight_at_the_ends_of_its_dtype_is_what_the_table_says(row: Row) -> None:
    g, v = row.parts()
    tolerance = max(1e-3, 4 * torch.finfo(row.dtype).eps)
    close(true_weight(g, v, row.dim, row.eps), row.truth, tolerance)
    close(functional.weight_norm(v, g, row.dim, row.eps), row.ours, tolerance)
    if row.torch is not None:
        close(torchs_weight(g, v, row.dim), row.torch, tolerance)
    else:
        assert row.eps > 0


class Layer(nn.Module):
    """Multiplies by a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@pytest.mark.parametrize("row", [row for row in ROWS if row.eps == 0], ids=str)
def test_a_module_gives_what_torchs_parametrization_gives_to_the_last_bit(row: Row) -> None:
    g, v = row.parts()
    ours = WeightNorm(dim=row.dim).inline(Layer(torch.ones_like(v)))
    theirs: Any = parametrizations.weight_norm(Layer(torch.ones_like(v)), dim=row.dim)  # type: ignore[arg-type]
    with torch.no_grad():
        for part, value in ((ours.weight_g, g), (ours.weight_v, v)):
            part.copy_(value)
        for part, value in zip(theirs.parametrizations.weight.parameters(), (g, v), strict=True):
            part.copy_(value)
    output, expected = ours(torch.ones((), dtype=row.dtype)), theirs(torch.ones((), dtype=row.dtype))
    tolerance = 2e-16 if row.dtype == DOUBLE else 0.0  # in which ours is the formula, for its second derivatives
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=0, equal_nan=True)


# Every combination, in short


def scales_of(dtype: torch.dtype) -> list[float]:
    """From nothing to the largest number."""
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    scales = [smallest, 1e-200, 1e-30, 1e-20, 1e-12, 1e-7, 1e-4, 1.0, 300.0, 1e4, 1e20, 1e30, 1e200]
    if dtype == DOUBLE:
        scales.remove(smallest)  # for which double precision does not know the truth
    return [0.0, *(scale for scale in scales if smallest <= scale <= limits.max), limits.max]


def slices(dtype: torch.dtype, dim: int | None) -> Any:
    """v and g of every scale."""
    for scale in scales_of(dtype):
        v = torch.tensor([1.0, -0.5, 0.25, -1.0], dtype=DOUBLE).mul(scale).to(dtype).reshape(DIMS[dim])
        for size in scales_of(dtype):
            yield v, magnitude(size, v, dim)


def error_of(actual: Tensor, truth: Tensor) -> float:
    """How far it is from the truth, in units in the last place; infinite where it is no number and should be."""
    limits, rounded = torch.finfo(actual.dtype), truth.to(actual.dtype).double()
    same = (actual.double() == rounded) | (actual.isnan() & rounded.isnan())
    unit = limits.eps * rounded.abs().clamp_min(limits.smallest_normal)
    distance = ((actual.double() - rounded).abs() / unit).nan_to_num(inf, inf)
    return float(distance.masked_fill(same, 0.0).max())


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_without_eps_we_are_never_farther_from_the_truth_than_torch(dtype: torch.dtype, dim: int | None) -> None:
    for v, g in slices(dtype, dim):
        truth = true_weight(g, v, dim, 0.0)
        torchs = error_of(torchs_weight(g, v, dim), truth)
        assert error_of(functional.weight_norm(v, g, dim), truth) <= max(torchs, 2), (v, g)


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_eps_holds_at_every_scale(dtype: torch.dtype, dim: int | None, eps: float) -> None:
    """Whether or not the dtype can hold it. What remains: v whose squares overflow, g/eps that does or is lost."""
    accumulated = torch.finfo(DOUBLE if dtype == DOUBLE else SINGLE)
    seen = 0
    for v, g in slices(dtype, dim):
        quotient = float(g.max()) / eps
        if float(v.abs().max()) > math.sqrt(accumulated.max) / 2 or not (
            quotient == 0 or accumulated.smallest_normal < quotient < accumulated.max
        ):
            continue
        seen += 1
        truth = true_weight(g, v, dim, eps)
        assert error_of(functional.weight_norm(v, g, dim, eps), truth) <= 4, (v, g)
    assert seen > 40


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1e-7, 1e-3, 1.0, 1e4])
def test_with_eps_the_gradients_are_right_at_every_scale(scale: float, dtype: torch.dtype) -> None:
    eps = 1e-4 if dtype == HALF else 1e-12  # g/eps is what the gradient of v is made of, and the dtype has to hold it
    v = (scale * torch.tensor([[1.0, -2.0, 3.0], [2.0, 1.0, 0.5]], dtype=DOUBLE)).to(dtype).requires_grad_()
    g = torch.tensor([[1.0], [2.0]], dtype=dtype, requires_grad=True)
    loss_of(functional.weight_norm(v, g, 0, eps)).backward()
    true_g, true_v = (part.detach().double().requires_grad_() for part in (g, v))
    below = true_v.detach().norm(dim=1, keepdim=True) < eps
    weight = true_v / eps * true_g if bool(below.all()) else true_weight(true_g, true_v, 0, eps)
    assert bool(below.all()) or not bool(below.any())
    loss_of(weight).backward()
    for part, truth in ((g, true_g), (v, true_v)):
        assert part.grad is not None
        assert truth.grad is not None
        limits = torch.finfo(dtype)
        tolerance = 8 * limits.eps * float(truth.grad.abs().max()) + limits.smallest_normal
        torch.testing.assert_close(part.grad.double(), truth.grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("eps", [0.0, 1e-12])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=short)
def test_a_long_sum_is_not_made_in_half_precision(dtype: torch.dtype, dim: int | None, eps: float) -> None:
    """In which 1 + 1 + ... ends at 2048, or at 256, and 65504 is the largest sum."""
    v = torch.full({0: (1, 90_000), 1: (300, 1, 300), None: (90_000,)}[dim], 1.0, dtype=dtype)
    g = magnitude(300.0, v, dim)
    close(functional.weight_norm(v, g, dim, eps), 1.0, 4 * torch.finfo(dtype).eps)
    close(functional.weight_norm(30 * v, g, dim, eps), 1.0, 4 * torch.finfo(dtype).eps)


# A large weight with a middle dim, for which neither torch's kernel nor its gradient is ours

SHAPES = [(64, 3, 32), (100_000, 2, 2), (3, 2, 20_000), (8, 8, 8, 8, 8)]


def results(weigh: Callable[[Tensor, Tensor], Tensor], g: Tensor, v: Tensor) -> list[Tensor]:
    """The weight, without and with a gradient, and the gradients."""
    g, v = (part.detach().clone().requires_grad_() for part in (g, v))
    weight = weigh(g, v)
    loss_of(weight).backward()
    assert g.grad is not None
    assert v.grad is not None
    with torch.no_grad():
        return [weigh(g, v), weight.detach(), g.grad, v.grad]


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_large_weight_with_a_middle_dim_is_right_to_the_last_bits(shape: tuple[int, ...], spread: float) -> None:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    v = (spread * numbers).exp() * numbers.sign()
    g = magnitude(3.0, v, 1)
    truth = true_weight(g, v, 1, 0.0)
    weights = results(lambda g, v: functional.weight_norm(v, g, 1), g, v)[:2]
    for weight in weights:
        assert float((weight.double() - truth).abs().max() / truth.abs().max()) < 2 * torch.finfo(SINGLE).eps


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1e-13, 1e-10, 1.0, 1e15, 1e20, 1e30, inf, nan])
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=short)
def test_a_large_weight_with_a_middle_dim_ends_where_torchs_does(dtype: torch.dtype, scale: float) -> None:
    v = torch.randn(64, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype) * scale
    g = magnitude(2.0, v, 1)
    ours = results(lambda g, v: functional.weight_norm(v, g, 1), g, v)
    theirs = results(lambda g, v: torchs_weight(g, v, 1), g, v)
    for actual, expected in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)
    for actual, expected in zip(ours, theirs, strict=True):
        finite = expected.isfinite()
        assert torch.equal(actual.isfinite(), finite)
        if finite.any():
            rounding = 2e-6 if dtype == SINGLE else 1e-14
            tolerance = rounding * float(expected[finite].abs().max())
            torch.testing.assert_close(actual[finite], expected[finite], rtol=rounding, atol=tolerance)


# apply and remove


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-7, 1e-3, 1.0, 1e3])
def test_apply_with_eps_keeps_the_weight_at_every_scale(
    scale: float, eps: float, dim: int | None, dtype: torch.dtype
) -> None:
    weight = (scale * torch.tensor([[1.0, -2.0, 3.0], [2.0, 1.0, 0.5]], dtype=DOUBLE)).to(dtype)
    norm, layer = WeightNorm(dim=dim, eps=eps), Layer(weight.clone())
    magnitudes = weight.double().norm(dim=None if dim is None else 1 - dim).clamp_min(eps).to(dtype)
    if (magnitudes == 0).any():
        with pytest.raises(ValueError, match="would give NaN"):
            norm.apply(layer)
        assert torch.equal(layer.weight, weight)
        return
    norm.apply(layer)
    norm.recompute(layer)
    limits = torch.finfo(dtype)
    rounding = {"rtol": 4 * limits.eps, "atol": limits.smallest_normal * limits.eps}
    torch.testing.assert_close(layer.weight.detach(), weight, **rounding)
    torch.testing.assert_close(norm.remove(layer).weight.detach(), weight, **rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("what", [0.0, "lost squares"])
def test_without_eps_a_norm_that_would_be_zero_is_refused(what: Any, dtype: torch.dtype) -> None:
    lost = {DOUBLE: 1e-200, SINGLE: 1e-30, BRAIN: 1e-30, HALF: 0.0}[dtype]  # half precision loses none
    weight = torch.tensor([[1.0, 2.0], [1.0, 1.0]], dtype=dtype)
    weight[1] = what if isinstance(what, float) else lost
    layer = Layer(weight)
    with pytest.raises(ValueError, match=r"slices 1 .*would give NaN; initialize it, or set eps"):
        WeightNorm().apply(layer)
    assert type(layer) is Layer
    assert torch.equal(layer.weight, weight)


LARGE = {DOUBLE: 1e200, SINGLE: 1e30, BRAIN: 1e30, HALF: 65504.0}


@pytest.mark.parametrize("verb", ["apply", "inline", "assign", "load_state_dict"])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("dim", [0, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_finite_weight_whose_norm_is_infinite_is_refused(
    dtype: torch.dtype, dim: int | None, eps: float, verb: str
) -> None:
    norm, weight = WeightNorm(dim=dim, eps=eps), torch.ones(2, 3, dtype=dtype)
    layer = Layer(weight.clone())
    weight[1] = LARGE[dtype]
    if verb in ("apply", "inline"):
        layer = Layer(weight)
        with pytest.raises(ValueError, match=r"(slices 1 are|all of it is) too large: .* scale the weight down"):
            getattr(norm, verb)(layer)
        assert type(layer) is Layer
        assert torch.equal(layer.weight, weight)
        return
    norm.apply(layer)
    with pytest.raises((ValueError, RuntimeError), match=r"too large: .* scale the weight down"):
        norm.assign(layer, weight) if verb == "assign" else layer.load_state_dict({"weight": weight})
    norm.recompute(layer)
    close(layer.weight, 1.0, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bad", [inf, nan])
@pytest.mark.parametrize("eps", [0.0, 1e-12])
def test_what_is_no_number_stays_in_its_slice(eps: float, bad: float) -> None:
    weight = torch.tensor([[1.0, 2.0], [bad, 1.0], [3.0, 4.0]])
    layer = WeightNorm(eps=eps).apply(Layer(weight.clone()))
    loss_of(layer.weight[::2]).backward()
    torch.testing.assert_close(layer.weight[::2].detach(), weight[::2])
    assert layer.weight[1].isnan().any()
    for part in (layer.weight_g, layer.weight_v):
        assert part.grad[::2].isfinite().all()


# SpectralNorm

MATRIX = torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 1.0]], dtype=DOUBLE)
LEADING = 0.93968
"""The first entry of MATRIX / σ(MATRIX)."""


@attrs.frozen
class SpectralRow:
    """The first entry of MATRIX · scale after many recomputes; the truth is LEADING at every scale."""

    dtype: torch.dtype
    scale: float
    weight: float
    """The same in all three spellings."""
    refused: bool = False
    """Whether `apply` refuses it."""

    def __str__(self) -> str:
        return f"{short(self.dtype)}-{self.scale:g}"

    def matrix(self) -> Tensor:
        return (MATRIX * self.scale).to(self.dtype)


SPECTRAL_ROWS = [
    SpectralRow(SINGLE, 1.0, LEADING),
    SpectralRow(SINGLE, 1e-10, LEADING),
    SpectralRow(SINGLE, 1e15, LEADING),
    SpectralRow(SINGLE, 1e-30, inf, refused=True),
    SpectralRow(SINGLE, 1e30, inf, refused=True),
    SpectralRow(DOUBLE, 1e-10, LEADING),
    SpectralRow(DOUBLE, 1e30, LEADING),
    SpectralRow(BRAIN, 1.0, LEADING),
    SpectralRow(BRAIN, 1e15, LEADING),
    SpectralRow(BRAIN, 1e30, inf, refused=True),
    SpectralRow(HALF, 1.0, LEADING),
    SpectralRow(HALF, 1e-3, LEADING),
    SpectralRow(HALF, 1e4, LEADING),
    SpectralRow(SINGLE, 0.0, nan, refused=True),
    SpectralRow(HALF, 0.0, nan, refused=True),
    SpectralRow(SINGLE, inf, nan),
    SpectralRow(SINGLE, nan, nan),
]


def ours(layer: Layer) -> nn.Module:
    return SpectralNorm().inline(layer)


def ours_as_theirs(layer: Layer) -> nn.Module:
    return SpectralNorm(first="u").inline(layer)


def hook(layer: Layer) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.spectral_norm(layer)


def parametrization(layer: Layer) -> nn.Module:
    return parametrizations.spectral_norm(layer)


SPELLINGS = [ours, ours_as_theirs, hook, parametrization]
each_spelling = pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
Spelling = Callable[[Layer], Any]


def set_weight(module: Any, value: Tensor) -> None:
    """Gives the weight under the norm another value, in place."""
    with torch.no_grad():
        next(module.parameters()).copy_(value)


def after(module: Any, calls: int) -> Tensor:
    """The weight after so many forwards."""
    for _ in range(calls):
        output: Tensor = module(torch.ones((), dtype=next(module.parameters()).dtype))
    return output.detach()


@each_spelling
@pytest.mark.parametrize("row", SPECTRAL_ROWS, ids=str)
def test_a_spectral_norm_at_the_ends_of_its_dtype_is_torchs(row: SpectralRow, spelling: Spelling) -> None:
    module = spelling(Layer(MATRIX.to(row.dtype, copy=True)))
    set_weight(module, row.matrix())
    close(after(module, 30)[0, 0], row.weight, max(1e-3, 8 * torch.finfo(row.dtype).eps))


@pytest.mark.parametrize("row", [row for row in SPECTRAL_ROWS if row.refused], ids=str)
@pytest.mark.parametrize("spelling", [ours, ours_as_theirs])
def test_a_matrix_whose_sigma_would_be_lost_is_refused_to_begin_with(row: SpectralRow, spelling: Spelling) -> None:
    layer = Layer(row.matrix())
    with pytest.raises(ValueError, match=r"it is (zero, which has no singular vectors|too large: .* scale the weight)"):
        spelling(layer)
    assert type(layer) is Layer
    assert torch.equal(layer.weight, row.matrix())


def test_a_half_precision_matrix_is_not_too_large_while_its_sigma_is_not() -> None:
    matrix = 100 * torch.randn(700, 700, generator=torch.Generator().manual_seed(0))
    assert matrix.norm() > torch.finfo(HALF).max
    layer = SpectralNorm().apply(Layer(matrix.half()))
    assert 0.9 < torch.linalg.matrix_norm(layer.weight.detach().float(), 2) < 1.5


BAD_STEPS = {"zero": 0.0, "overflowing": 1e30, "infinite": inf, "NaN": nan}


@each_spelling
@pytest.mark.parametrize("scale", BAD_STEPS.values(), ids=BAD_STEPS)
def test_one_bad_training_step_ruins_u_and_v_for_good_in_every_spelling(scale: float, spelling: Spelling) -> None:
    """As a NaN ruins parameters. In eval mode nothing is iterated, and nothing ruined."""
    module = spelling(Layer(MATRIX.float()))
    good = after(module, 30)
    module.eval()
    set_weight(module, MATRIX.float() * scale)
    after(module, 1)
    set_weight(module, MATRIX.float())
    torch.testing.assert_close(after(module, 1), good)

    module.train()
    set_weight(module, MATRIX.float() * scale)
    after(module, 1)
    set_weight(module, MATRIX.float())
    assert not after(module, 5).isfinite().all()
    assert all(not buffer.isfinite().all() or not buffer.any() for buffer in module.buffers())


@pytest.mark.parametrize("scale", BAD_STEPS.values(), ids=BAD_STEPS)
@pytest.mark.parametrize("verb", ["assign", "load_state_dict", "remove and apply"])
def test_ruined_vectors_are_mended(verb: str, scale: float) -> None:
    norm, layer = SpectralNorm(), Layer(MATRIX.float())
    norm.inline(layer)
    set_weight(layer, MATRIX.float() * scale)
    after(layer, 1)
    wanted = (MATRIX / torch.linalg.matrix_norm(MATRIX, 2)).float()
    if verb == "assign":
        norm.assign(layer, wanted)
    elif verb == "load_state_dict":
        layer.load_state_dict({"weight": MATRIX.float()})
    else:
        norm.remove(layer)
        with torch.no_grad():
            layer.weight.copy_(MATRIX)
        norm.inline(layer)
    torch.testing.assert_close(after(layer, 20), wanted)


def tables() -> str:
    """The two tables, as Markdown."""

    def show(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    lines = ["| dtype | dim | v | g | eps | torch | ours | truth |", "|---|---|---|---|---|---|---|---|"]
    for row in ROWS:
        numbers = [show(value) for value in (row.v, row.g, row.eps, row.torch, row.ours, row.truth)]
        lines.append(f"| {short(row.dtype)} | {row.dim} | {' | '.join(numbers)} |")
    lines += ["", "| dtype | scale | hook, parametrization and ours | truth | apply |", "|---|---|---|---|---|"]
    for one in SPECTRAL_ROWS:
        truth = LEADING if 0 < one.scale < inf else nan
        numbers = [show(value) for value in (one.scale, one.weight, truth)]
        lines.append(f"| {short(one.dtype)} | {' | '.join(numbers)} | {'refuses it' if one.refused else ''} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
