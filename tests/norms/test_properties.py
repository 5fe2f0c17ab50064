"""What holds for any weight: every shape, dim, dtype, layout and eps, beside the formulas in double precision."""

import copy
import math
from typing import Any

import attrs
import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from layers import loss_of
from random_examples import drawn
from torch import Tensor, nn
from whole_models import unchanged

from explicit_wn import SpectralNorm, WeightNorm, functional

Dim = int | str | None
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "strided", "channels_last", "expanded"]


# The formulas, in double precision


def power_norm(v: Tensor, power: float, dim: int | None) -> Tensor:
    """The p-norm of `v` over every dimension but `dim`."""
    v = v.double().abs()
    kept = v.reshape(1, v.numel()) if dim is None else v.movedim(dim, 0)
    kept = kept.reshape(kept.shape[0], math.prod(kept.shape[1:]))
    if power == math.inf:
        norms = kept.amax(1) if kept.shape[1] else kept.sum(1)
    else:
        norms = kept.pow(power).sum(1).pow(1 / power)
    return norms.reshape(shape_of_norm(tuple(v.shape), dim))


def shape_of_norm(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    return () if dim is None else tuple(size if index == dim else 1 for index, size in enumerate(shape))


def weight_of(g: Tensor, v: Tensor, dim: int | None, eps: float) -> Tensor:
    """g · v / max(‖v‖, eps)"""
    return g.double() * v.double() / power_norm(v, 2, dim).clamp_min(eps)


def matrix_of(weight: Tensor, dim: int) -> Tensor:
    return weight.double().movedim(dim, 0).reshape(weight.shape[dim], -1)


def sigma_of(weight: Tensor, dim: int) -> Tensor:
    """The largest singular value."""
    return torch.linalg.svdvals(matrix_of(weight, dim))[0]


def close(actual: Tensor, expected: Tensor, ulps: float = 4, scale: float = 1.0) -> None:
    """Within so many units in the last place of `actual`, of the largest value that takes part if `scale` says so."""
    tolerance = ulps * torch.finfo(actual.dtype).eps
    smallest = torch.finfo(actual.dtype).smallest_normal
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale + smallest)


# What is drawn


class Layer(nn.Module):
    """Holds a parameter."""

    def __init__(self, weight: Tensor, requires_grad: bool) -> None:
        nn.Module.__init__(self)
        self.other = nn.Parameter(torch.ones(2))
        self.kernel = nn.Parameter(weight, requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel * x


class Transposed(Layer, nn.ConvTranspose2d):
    """What "out" knows as a transposed convolution."""


def laid_out(weight: Tensor, layout: str) -> Tensor:
    """The same numbers, otherwise in memory; "expanded" makes the last dimension one number."""
    if layout == "transposed":
        return weight.mT.contiguous().mT if weight.dim() > 1 else weight
    if layout == "strided":
        return weight.repeat_interleave(2, -1)[..., ::2]
    if layout == "channels_last" and weight.dim() in (4, 5):
        last = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
        return weight.contiguous(memory_format=last)
    if layout == "expanded" and weight.shape[-1] > 0:
        return weight[..., :1].expand(weight.shape)
    return weight


@attrs.frozen
class Case:
    """A weight, and which norm is taken of it."""

    weight: Tensor
    layout: str
    dim: Dim
    eps: float
    transposed: bool
    requires_grad: bool
    seed: int

    def layer(self) -> Any:
        """A new layer with this weight."""
        weight = laid_out(self.weight.clone(), self.layout)
        assert torch.equal(weight, self.weight)
        return (Transposed if self.transposed else Layer)(weight, self.requires_grad)

    @property
    def kept(self) -> int | None:
        """The dimension that is kept."""
        if self.dim == "out":
            return 1 if self.transposed and self.weight.dim() > 1 else 0
        return self.dim if self.dim is None else self.dim % self.weight.dim()  # type: ignore[operator]

    @property
    def row(self) -> int:
        """The dimension that SpectralNorm takes for the rows."""
        return self.kept if self.dim is not None else int(self.transposed and self.weight.dim() > 1)  # type: ignore

    def numbers(self, shape: Any, more: int = 0) -> Tensor:
        """Random numbers, none near zero."""
        return random_numbers(tuple(shape), self.seed + more).to(self.weight.dtype)


def random_numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers + 0.5 * numbers.sign()


@st.composite
def cases(draw: Any, spectral: bool = False) -> Case:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    if draw(st.integers(0, 9)) == 0 and not spectral:
        sizes[draw(st.integers(0, len(sizes) - 1))] = 0
    shape = tuple(sizes)
    ndim, dtype, layout = len(shape), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    seed = draw(st.integers(0, 2**20))
    scale = draw(st.sampled_from([1.0, 1e-2, 1e2]))
    weight = (scale * random_numbers(shape, seed)).to(dtype)
    if draw(st.integers(0, 5)) == 0 and not spectral:
        weight = weight.flatten().index_fill(0, torch.arange(weight.numel() // 2), 0.0).reshape(shape)
    weight = laid_out(weight, "expanded").clone() if layout == "expanded" else weight
    return Case(
        weight=weight,
        layout=layout,
        dim=draw(st.sampled_from([None, "out", *range(ndim), *range(-ndim, 0 if spectral else -1)])),
        eps=draw(st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 0.1, 10.0])),
        transposed=draw(st.booleans()),
        requires_grad=draw(st.booleans()),
        seed=seed,
    )


def has_no_direction(weight: Tensor, dim: int | None, eps: float) -> bool:
    """Whether a slice has the magnitude 0 in the precision of the weight."""
    norm = power_norm(weight, 2, dim).to(weight.dtype)
    smallest = torch.tensor(eps, dtype=torch.float64).to(weight.dtype)
    return weight.numel() > 0 and bool((torch.maximum(norm, smallest) == 0).any())


def is_expanded(tensor: Tensor) -> bool:
    """Whether two entries are one number in memory, which torch does not write to."""
    return tensor.numel() > 0 and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def normed(case: Case, verb: str = "apply") -> tuple[WeightNorm, Any] | None:
    """The layer with its norm, or None for what is refused: that is said once, and the layer is untouched."""
    norm, layer = WeightNorm("kernel", case.dim, case.eps), case.layer()
    if has_no_direction(case.weight, case.kept, case.eps):
        with unchanged(layer), pytest.raises(ValueError, match="has no direction"):
            getattr(norm, verb)(layer)
        return None
    getattr(norm, verb)(layer)
    return norm, layer


def with_new_parts(case: Case) -> tuple[WeightNorm, Any] | None:
    """A normed layer whose parts are no longer those of its stored weight."""
    both = normed(case)
    if both:
        layer, new = both[1], case.numbers(case.weight.shape, 1)
        if is_expanded(layer.kernel_v):
            layer.kernel_v = nn.Parameter(laid_out(new, "expanded"), case.requires_grad)
        with torch.no_grad():
            layer.kernel_g.copy_(case.numbers(layer.kernel_g.shape, 2))
            if not is_expanded(layer.kernel_v):
                layer.kernel_v.copy_(new)
    return both


# WeightNorm


@drawn(150)
@hypothesis.given(cases(), st.sampled_from(["apply", "inline"]))
def test_apply_recompute_remove_gives_the_weight_back(case: Case, verb: str) -> None:
    both = normed(case, verb)
    if both is None:
        return
    norm, layer = both
    original = layer.kernel_v
    assert sorted(layer.state_dict()) == ["kernel_g", "kernel_v", "other"]
    assert layer.kernel_g.shape == shape_of_norm(tuple(case.weight.shape), case.kept)
    norm.recompute(layer)
    close(layer.kernel, case.weight)
    assert layer.kernel.requires_grad == layer.kernel_g.requires_grad == original.requires_grad == case.requires_grad
    norm.remove(layer)
    close(layer.kernel, case.weight)
    plain = case.layer()
    assert type(layer) is type(plain)
    assert sorted(vars(layer)) == sorted(vars(plain))
    assert isinstance(layer.kernel, nn.Parameter)
    assert layer.kernel.requires_grad == case.requires_grad
    assert layer.kernel.dtype == case.weight.dtype
    assert sorted(layer.state_dict()) == ["kernel", "other"]
    if case.layout == "channels_last" and case.weight.dim() == 4:
        assert layer.kernel.is_contiguous(memory_format=torch.channels_last)


@drawn(150)
@hypothesis.given(cases(), st.booleans())
def test_the_weight_is_that_of_double_precision(case: Case, by_forward: bool) -> None:
    both = with_new_parts(case)
    if both is None:
        return
    norm, layer = both
    expected = weight_of(layer.kernel_g.detach(), layer.kernel_v.detach(), case.kept, case.eps)
    norm.recompute(layer)
    close((layer(1.0) if by_forward else layer.kernel).detach(), expected)
    close(norm.compute_weight(layer).detach(), expected)


@drawn(150)
@hypothesis.given(cases())
def test_the_gradients_are_those_of_double_precision(case: Case) -> None:
    case = attrs.evolve(case, requires_grad=True)
    both = with_new_parts(case)
    if both is None:
        return
    norm, layer = both
    g, v = (part.detach().double().requires_grad_() for part in (layer.kernel_g, layer.kernel_v))
    loss_of(weight_of(g, v, case.kept, case.eps)).backward()
    norm.recompute(layer)
    loss_of(layer.kernel.double()).backward()
    quotients = (g / power_norm(v, 2, case.kept).clamp_min(case.eps)).detach().abs().flatten()
    terms = max(1.0, *quotients.nan_to_num().tolist(), 1.0) * math.sqrt(
        v.numel()
    )  # as large as the terms of the gradients' sums
    assert g.grad is not None
    assert v.grad is not None
    for part, reference in ((layer.kernel_g, g.grad), (layer.kernel_v, v.grad)):
        assert part.grad.dtype == part.dtype
        close(part.grad, reference, ulps=16, scale=terms)


@drawn(100)
@hypothesis.given(cases(), st.sampled_from(DTYPES))
def test_what_is_assigned_is_read(case: Case, dtype: torch.dtype) -> None:
    both = normed(case)
    if both is None:
        return
    norm, layer = both
    wanted = case.numbers(case.weight.shape, 1).to(dtype)
    identities, before = list(map(id, layer.parameters())), copy.deepcopy(layer.state_dict())
    if is_expanded(layer.kernel_v):
        with pytest.raises(RuntimeError, match="single memory location"):
            norm.assign(layer, wanted)
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
        assert list(map(id, layer.parameters())) == identities
        return
    norm.assign(layer, wanted)
    close(layer.kernel, wanted.to(case.weight.dtype))
    close(
        weight_of(layer.kernel_g, layer.kernel_v, case.kept, case.eps).to(case.weight.dtype),
        wanted.to(case.weight.dtype),
    )
    assert list(map(id, layer.parameters())) == identities


POWERS = st.one_of(st.sampled_from([1, 2, 3, 4, 0.5, 1.5, 2.0, math.inf]), st.floats(0.5, 8))


@drawn(150)
@hypothesis.given(cases(), POWERS)
def test_the_norm_of_any_power_is_that_of_double_precision(case: Case, power: float) -> None:
    v = case.layer().kernel.detach()
    hypothesis.assume(v.numel() > 0 or power < math.inf)  # there is no largest entry of none, says torch
    norm = functional.norm_except_dim(v, power, case.kept)
    assert norm.dtype == v.dtype
    assert norm.shape == shape_of_norm(tuple(v.shape), case.kept)
    expected = power_norm(v, power, case.kept)
    hypothesis.assume(
        (expected == 0).logical_or(expected.log2().abs() * power < 10).all()
    )  # powers that the dtype holds
    close(norm, expected, ulps=8)


# What is refused

UNSUITABLE = [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


@st.composite
def refusals(draw: Any) -> tuple[Any, dict[str, Any], Tensor, type[Exception], str]:
    """A norm, what its verb is given, a weight that is refused, and the error."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    kind = draw(st.sampled_from([WeightNorm, SpectralNorm]))
    weight, ndim = torch.ones(shape), len(shape)
    dims = [(d, ValueError, "out of range") for d in (ndim, ndim + 7, -ndim - 1) if d != -1]
    dims += [(True, TypeError, "dim is an int"), (0.0, TypeError, "dim is an int"), ("in", TypeError, "dim is an int")]
    dims += [(-1, ValueError, "dim=-1 means the whole tensor")] if kind is WeightNorm else []
    what = draw(st.sampled_from(["dim", "dtype", "scalar"]))
    if what == "dim":
        dim, error, words = draw(st.sampled_from(dims))
        return kind("kernel"), {"dim": dim}, weight, error, words
    if what == "dtype":
        weight = weight.to(draw(st.sampled_from(UNSUITABLE)))
        return kind("kernel"), {}, weight, ValueError, "only dense weights of float16"
    return kind("kernel"), {}, torch.ones(()), ValueError, "it is a scalar"


@drawn(150)
@hypothesis.given(refusals(), st.sampled_from(["apply", "inline"]))
def test_what_is_refused_says_why_and_changes_nothing(
    refusal: tuple[Any, dict[str, Any], Tensor, type[Exception], str], verb: str
) -> None:
    norm, options, weight, error, words = refusal
    layer = Layer(weight, requires_grad=False)
    with unchanged(layer), pytest.raises(error, match=words) as raised:
        getattr(norm, verb)(layer, **options)
    assert "'kernel' of this Layer" in str(raised.value)


# SpectralNorm


@st.composite
def spectral_cases(draw: Any) -> Case:
    """A weight whose first singular value is well above the second, so that iterations end somewhere."""
    case: Case = draw(cases(spectral=True))
    hypothesis.assume(case.layout != "expanded")
    matrix = matrix_of(case.weight, case.row)
    rows, columns = (
        random_numbers((matrix.shape[0], 1), case.seed + 5),
        random_numbers((1, matrix.shape[1]), case.seed + 6),
    )
    matrix = matrix + 3 * matrix.norm() * rows @ columns / rows.norm() / columns.norm()
    shape = case.weight.movedim(case.row, 0).shape
    return attrs.evolve(case, weight=matrix.reshape(shape).movedim(0, case.row).to(case.weight.dtype))


def spectrally_normed(case: Case, **settings: Any) -> tuple[SpectralNorm, Any]:
    torch.manual_seed(case.seed)
    norm, layer = SpectralNorm("kernel", dim=case.dim, **settings), case.layer()
    return norm, norm.apply(layer)


def normed_spectrally(weight: Tensor, dim: int) -> Tensor:
    """weight / σ, and a vector by its length."""
    weight = weight.double()
    return weight / (weight.norm() if weight.dim() == 1 else sigma_of(weight, dim))


@drawn(100)
@hypothesis.given(spectral_cases(), st.sampled_from("uv"))
def test_after_many_iterations_the_weight_is_divided_by_its_largest_singular_value(case: Case, first: str) -> None:
    norm, layer = spectrally_normed(case, first=first, warmup=0)
    before = layer.kernel_orig.detach().clone()
    for _ in range(30):
        norm.recompute(layer)
    assert torch.equal(layer.kernel_orig, before)
    close(layer.kernel.detach(), normed_spectrally(case.weight, case.row), ulps=32, scale=1.0)


@pytest.mark.filterwarnings("ignore::explicit_wn.StaleWeightWarning")
@drawn(100)
@hypothesis.given(spectral_cases(), st.booleans(), st.booleans())
def test_remove_leaves_the_weight_that_was_read(case: Case, training: bool, change: bool) -> None:
    norm, layer = spectrally_normed(case)
    layer.train(training)
    norm.recompute(layer)
    if change:
        with torch.no_grad():
            layer.kernel_orig.mul_(2)  # not recomputed: remove takes the parts as they are, and makes no iteration
    expected, vectors = norm.compute_weight(layer).detach(), [b.clone() for b in layer.buffers()]
    close(layer.kernel.detach(), expected, ulps=8)
    assert all(torch.equal(*both) for both in zip(layer.buffers(), vectors, strict=True))
    norm.remove(layer)
    assert torch.equal(layer.kernel, expected)
    assert sorted(layer.state_dict()) == ["kernel", "other"]
    assert layer.kernel.requires_grad == case.requires_grad
    assert type(layer) is type(case.layer())


@drawn(100)
@hypothesis.given(spectral_cases(), st.booleans())
def test_one_recompute_is_one_power_iteration_in_training_and_none_else(case: Case, training: bool) -> None:
    hypothesis.assume(case.weight.dim() > 1)
    norm, layer = spectrally_normed(case)
    layer.train(training)
    matrix, u, v = matrix_of(case.weight, case.row), layer.kernel_u.double(), layer.kernel_v.double()
    norm.recompute(layer)
    if training:
        v = matrix.t() @ u
        v = v / v.norm()
        u = matrix @ v
        u = u / u.norm()
    close(layer.kernel_v, v, ulps=16, scale=1.0)
    close(layer.kernel_u, u, ulps=16, scale=1.0)
    sigma = layer.kernel_u.double() @ matrix @ layer.kernel_v.double()
    close(layer.kernel.detach(), case.weight.double() / sigma, ulps=16, scale=1.0)


@drawn(100)
@hypothesis.given(spectral_cases())
def test_a_weight_whose_sigma_is_one_is_assigned_and_read(case: Case) -> None:
    norm, layer = spectrally_normed(case)
    wanted = case.numbers(case.weight.shape, 9)
    wanted = normed_spectrally(wanted, case.row).to(wanted.dtype)
    norm.assign(layer, wanted)
    close(layer.kernel.detach(), wanted, ulps=16, scale=1.0)
    assert torch.equal(layer.kernel_orig, wanted)
    if wanted.dim() > 1:
        with unchanged(layer), pytest.raises(ValueError, match="largest singular value is"):
            norm.assign(layer, 2 * wanted)
