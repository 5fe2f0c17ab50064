"""`norm_except_dim` and `weight_norm` compute the formulas and their derivatives, and the numbers of torch's own."""

import inspect
import math
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from explicit_wn import functional
from explicit_wn.functional import norm_except_dim, weight_norm

SHAPES = [(7,), (3, 4), (3, 2, 4), (2, 3, 2, 4), (2, 3, 2, 1, 4)]
SHAPES_AND_DIMS = [(shape, dim) for shape in SHAPES for dim in [*range(-len(shape), len(shape)), None]]
POWERS: list[float] = [1, 2, 3, 5, 1.0, 2.0, 2.5, 0.5, -1.0, -2, math.inf, -math.inf]
WHOLE = (None, -1)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def norm_by_hand(v: Tensor, power: float, dim: int | None) -> Tensor:
    """The definition, slice by slice."""
    if dim in WHOLE:
        return norm_of_rows(v.reshape(1, -1), power).reshape(())
    assert dim is not None
    shape = [1] * v.dim()
    shape[dim] = v.shape[dim]
    return norm_of_rows(torch.stack([piece.flatten() for piece in v.unbind(dim)]), power).reshape(shape)


def norm_of_rows(rows: Tensor, power: float) -> Tensor:
    if power == math.inf:
        return rows.abs().max(1).values
    if power == -math.inf:
        return rows.abs().min(1).values
    if power == 0:
        return (rows != 0).to(rows.dtype).sum(1)
    return (rows.abs() ** power).sum(1) ** (1 / power)


def gradients(result: Tensor, *inputs: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
    """Of a loss that weighs every element of `result` differently."""
    weights = torch.linspace(1, 2, result.numel(), dtype=torch.float64).reshape(result.shape).to(result.dtype)
    return torch.autograd.grad((result * weights).sum(), inputs, create_graph=create_graph)


@pytest.mark.parametrize("dim", [0, 1, 3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_has_the_layout_of_its_v(dtype: torch.dtype, dim: int | None) -> None:
    v = torch.randn(4, 3, 2, 2, dtype=dtype).to(memory_format=torch.channels_last)
    assert weight_norm(v, norm_except_dim(v, 2, dim), dim).stride() == v.stride()


# norm_except_dim


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS)
def test_norm_is_the_formula_of_any_power_over_every_dim_but_one(
    shape: tuple[int, ...], dim: int | None, power: float
) -> None:
    v = random(*shape)
    norm, expected = norm_except_dim(v, power, dim), norm_by_hand(v, power, dim)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(gradients(norm, v), gradients(expected, v))


@pytest.mark.parametrize("power", [0, 0.0])
@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS)
def test_norm_of_power_zero_counts_what_is_not_zero(shape: tuple[int, ...], dim: int | None, power: float) -> None:
    v = random(*shape).detach()
    v.view(-1)[::3] = 0
    torch.testing.assert_close(norm_except_dim(v, power, dim), norm_by_hand(v, 0, dim), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS)
def test_norm_is_that_of_torch_to_the_last_bit(
    shape: tuple[int, ...], dim: int | None, power: int, dtype: torch.dtype
) -> None:
    v = random(*shape, dtype=dtype)
    for_torch = -1 if dim in WHOLE else dim % len(shape)  # which knows no other negative dim, nor None
    norm, expected = norm_except_dim(v, power, dim), torch.norm_except_dim(v, power, for_torch)
    exact: dict[str, Any] = {} if dim in WHOLE and power != 2 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(norm, expected, **exact)
    torch.testing.assert_close(gradients(norm, v), gradients(expected, v), **exact)


def test_the_last_dim_of_a_large_weight_is_torchs_kernel_to_the_last_bit() -> None:
    """Only for a dim between the first and the last is there a formula of our own."""
    v = random(32, 16, 9, dtype=torch.float32)
    for dim in (0, 2):
        g = magnitude(v, dim)
        assert torch.equal(weight_norm(v, g, dim), torch._weight_norm(v, g, dim))


def test_a_power_iteration_by_its_defaults_is_one_over_the_rows_that_survives_zeros() -> None:
    orig, u, v = random(3, 4), torch.ones(3).double(), torch.ones(4).double()
    by_hand_v = orig.t() @ u / (orig.t() @ u).norm()
    by_hand_u = orig @ by_hand_v / (orig @ by_hand_v).norm()
    functional.power_iteration(1e-9 * orig, u, v)
    torch.testing.assert_close((u, v), (by_hand_u, by_hand_v))
    torch.testing.assert_close(functional.spectral_norm(orig, u, v), orig / (u @ orig @ v))
    functional.power_iteration(0 * orig, u, v)
    assert not u.any()
    assert not v.any()


@pytest.mark.parametrize("dim", [0, 1])
def test_under_vmap_a_norm_that_half_precision_cannot_hold_is_one_still(dim: int) -> None:
    v = torch.full((40_000, 2) if dim == 1 else (2, 40_000), 400.0, dtype=torch.float16)
    g = torch.ones((1, 2) if dim == 1 else (2, 1), dtype=torch.float16)
    weight = torch.func.vmap(lambda v, g: weight_norm(v, g, dim))(v[None], g[None])[0]
    torch.testing.assert_close(weight, weight_norm(v, g, dim))
    assert weight.count_nonzero() == v.numel()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)])
def test_the_magnitude_of_the_whole_is_one_number_of_no_more_dims_than_the_weight(shape: tuple[int, ...]) -> None:
    v, g = random(2, 3), torch.full(shape, 2.0).double()
    if len(shape) > v.dim():
        with pytest.raises(ValueError, match=r"wants a g of the shape \[\], not \[1, 1, 1\]"):
            weight_norm(v, g, None)
    else:
        torch.testing.assert_close(weight_norm(v, g, None), 2 * v / v.norm())


@pytest.mark.parametrize("name", [name for name in functional.__all__ if name not in ("as_matrix", "kept")])
def test_by_default_it_is_the_first_dim_and_no_eps(name: str) -> None:
    defaults = {key: one.default for key, one in inspect.signature(getattr(functional, name)).parameters.items()}
    assert defaults.get("dim", 0) == 0
    if name not in ("power_iteration", "norm_except_dim", "spectral_norm", "sigma_reparam"):
        assert defaults["eps"] == 0.0


def test_a_matrix_has_the_first_dim_as_its_rows_by_default_and_a_vector_its_length() -> None:
    weight, vector = random(3, 4, 2), 1e-3 * random(5)
    assert torch.equal(functional.as_matrix(weight), weight.flatten(1))
    torch.testing.assert_close(functional.spectral_norm(vector), vector / vector.norm())
    assert functional.spectral_norm(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_norm_takes_power_2_and_dim_0_by_default() -> None:
    v = random(3, 4)
    torch.testing.assert_close(norm_except_dim(v), norm_by_hand(v, 2, 0))


@pytest.mark.parametrize("power", [1, 2, 3, 2.5])
@pytest.mark.parametrize(
    ("shape", "dim", "expected"),
    [
        ((0,), 0, (0,)),
        ((0, 3), 0, (0, 1)),
        ((0, 3), 1, (1, 3)),
        ((3, 0), 0, (3, 1)),
        ((2, 0, 3), 1, (1, 0, 1)),
        ((2, 0, 3), 2, (1, 1, 3)),
        ((2, 0), None, ()),
        ((2, 0), -1, ()),
    ],
)
def test_norm_of_an_empty_tensor_is_zero_and_keeps_the_dim(
    shape: tuple[int, ...], dim: int | None, expected: tuple[int, ...], power: float
) -> None:
    v = torch.zeros(shape, requires_grad=True)
    norm = norm_except_dim(v, power, dim)
    assert norm.shape == expected
    assert not norm.any()
    assert gradients(norm, v)[0].shape == shape


@pytest.mark.parametrize("power", [1, 2, 3, 2.5, math.inf])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_norm_of_a_slice_of_zeros_has_a_gradient(power: float, dim: int | None) -> None:
    v = random(3, 4).detach()
    v[1], v[:, 2] = 0, 0
    v.requires_grad_()
    assert gradients(norm_except_dim(v, power, dim), v)[0].isfinite().all()


@pytest.mark.parametrize("power", [2, 3, 2.5])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_norm_passes_gradcheck_and_gradgradcheck(power: float, dim: int | None) -> None:
    v = random(2, 3, 2)
    assert torch.autograd.gradcheck(lambda v: norm_except_dim(v, power, dim), v)
    assert torch.autograd.gradgradcheck(lambda v: norm_except_dim(v, power, dim), v)


# weight_norm


def magnitude(v: Tensor, dim: int | None) -> Tensor:
    """A g of the right shape that is not the norm of `v`."""
    g = norm_by_hand(v.detach().double(), 2, dim) + 1
    return (g * torch.linspace(1, 2, g.numel(), dtype=g.dtype).reshape(g.shape)).to(v.dtype).requires_grad_()


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS)
def test_weight_is_g_v_over_the_norm(shape: tuple[int, ...], dim: int | None, eps: float) -> None:
    v = random(*shape)
    g = magnitude(v, dim)
    weight, expected = weight_norm(v, g, dim, eps), g * v / norm_by_hand(v, 2, dim)
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(gradients(weight, v, g), gradients(expected, v, g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS)
def test_weight_is_that_of_torch_to_the_last_bit(shape: tuple[int, ...], dim: int | None, dtype: torch.dtype) -> None:
    v = random(*shape, dtype=dtype)
    g = magnitude(v, dim)
    for_torch = -1 if dim in WHOLE else dim % len(shape)
    weight, expected = weight_norm(v, g, dim), torch._weight_norm(v, g, for_torch)
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(weight, v, g), gradients(expected, v, g), rtol=0, atol=0)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_weight_passes_gradcheck(dim: int | None, eps: float) -> None:
    v = random(2, 3, 2)
    assert torch.autograd.gradcheck(lambda v, g: weight_norm(v, g, dim, eps), (v, magnitude(v, dim)))


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_weight_passes_gradgradcheck(dim: int | None, eps: float) -> None:
    v = random(2, 3, 2)
    assert torch.autograd.gradgradcheck(lambda v, g: weight_norm(v, g, dim, eps), (v, magnitude(v, dim)))


def penalty_gradient(weight: Tensor, v: Tensor) -> Tensor:
    """The gradient of a gradient penalty."""
    (gradient,) = gradients(weight, v, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), v)[0]


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float64, 0.0), (torch.float32, 1e-6), (torch.float64, 1e-6)])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_a_gradient_penalty_has_the_right_gradient(dim: int | None, dtype: torch.dtype, eps: float) -> None:
    v = random(2, 3, 2, dtype=dtype)
    g = magnitude(v, dim).detach()
    expected = penalty_gradient(g * v / norm_by_hand(v, 2, dim), v)
    torch.testing.assert_close(penalty_gradient(weight_norm(v, g, dim, eps), v), expected)


@pytest.mark.parametrize("dim", [0, 2])
def test_the_kernel_of_torch_has_a_wrong_second_derivative_in_the_outer_dims(dim: int) -> None:
    """Its backward takes the norms for constants. If this fails, torch has mended it: use it for float64 too."""
    v = random(2, 3, 2)
    g = magnitude(v, dim).detach()
    expected = penalty_gradient(g * v / norm_by_hand(v, 2, dim), v)
    got = penalty_gradient(torch._weight_norm(v, g, dim), v)
    assert (got - expected).abs().max() > 0.01 * expected.abs().max()


def wrong_magnitudes(shape: tuple[int, ...], dim: int | None) -> list[tuple[int, ...]]:
    """Shapes of a g that does not belong to a v of this shape, those with as many entries among them."""
    right = list(norm_by_hand(torch.ones(shape), 2, dim).shape)
    taken = [[1, *right], [*right, 1], right[1:], [size + 1 for size in right], [2] * len(shape), right[::-1]]
    if dim in WHOLE:  # a g of one entry is right there, however many dimensions of length 1 it has
        return [(2,), tuple(2 for _ in shape), (1,) * (len(shape) + 1)]
    return [tuple(one) for one in taken if one != right]


@pytest.mark.parametrize("function", [weight_norm, torch.jit.script(weight_norm)], ids=["eager", "scripted"])
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 0.0), (torch.float64, 0.0), (torch.float16, 1e-3)])
@pytest.mark.parametrize(("shape", "dim"), [*SHAPES_AND_DIMS, ((40, 20), 0), ((20, 300, 2), 1)])
def test_a_g_of_another_shape_never_reaches_the_kernel_of_torch_which_does_not_look(
    shape: tuple[int, ...], dim: int | None, dtype: torch.dtype, eps: float, function: Any
) -> None:
    for wrong in wrong_magnitudes(shape, dim):
        with pytest.raises((ValueError, torch.jit.Error), match=re.escape(str(list(shape)))) as raised:
            function(torch.ones(shape, dtype=dtype), torch.ones(wrong, dtype=dtype), dim, eps)
        assert f"not {list(wrong)}" in str(raised.value)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 2), ((3, 4), -3), ((3,), 1), ((), 0)])
def test_a_dim_that_is_none_of_the_weight_s_is_said_to_be(shape: tuple[int, ...], dim: int, eps: float) -> None:
    with pytest.raises(
        IndexError, match=re.escape(f"dim={dim} is out of range for a weight of the shape {list(shape)}")
    ):
        weight_norm(torch.ones(shape), torch.ones(shape), dim, eps)


@pytest.mark.parametrize("function", [norm_except_dim, functional.unit_norm, functional.renorm, functional.force_norm])
def test_every_function_reports_the_dim_that_was_given(function: Any) -> None:
    for dim in -7, 5:
        with pytest.raises(IndexError, match=re.escape(f"dim={dim} is out of range for a weight of the shape [3, 4]")):
            function(torch.ones(3, 4), dim=dim)
    for other in 1.0, "out":
        with pytest.raises(TypeError, match=re.escape(f"dim is an int or None, not {other}")):
            function(torch.ones(3, 4), dim=other)
    with pytest.raises(TypeError, match=re.escape("dim is an int or None, not 1.0")):
        weight_norm(torch.ones(3, 4), torch.ones(3, 1), 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [0, 1, None])
def test_eps_is_the_smallest_norm_that_is_divided_by(dim: int | None) -> None:
    v = torch.tensor([[1.0, 2.0, 0.1], [0.1, 0.2, 0.2], [0.0, 0.0, 0.0]], dtype=torch.float64)
    g = magnitude(v, dim)
    eps = 5.0 if dim is None else 0.5  # above the only norm; above some of them
    divisor = norm_by_hand(v, 2, dim).clone()
    assert (divisor < eps).any()
    divisor[divisor < eps] = eps
    torch.testing.assert_close(weight_norm(v, g, dim, eps), g * v / divisor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_with_eps_a_slice_of_zeros_has_a_weight_and_gradients(dim: int | None, dtype: torch.dtype) -> None:
    v = torch.zeros(3, 4, dtype=dtype)
    if dim is not None:
        v.select(dim, 0).fill_(2)
    v.requires_grad_()
    g = torch.ones_like(norm_by_hand(v.detach(), 2, dim), requires_grad=True)
    weight = weight_norm(v, g, dim, eps=1e-12)
    by_v, by_g = gradients(weight, v, g)
    assert weight.isfinite().all()
    assert by_v.isfinite().all()
    assert by_g.isfinite().all()
    zeros = v == 0
    assert not weight[zeros].any()
    assert by_v[zeros].all()  # what leads it out of there: g / eps times the gradient of the weight


def test_an_eps_that_half_precision_cannot_hold_holds_all_the_same() -> None:
    v, g = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float16), torch.ones(2, 1, dtype=torch.float16)
    weight = weight_norm(v, g, eps=1e-12)
    assert weight.dtype == torch.float16
    torch.testing.assert_close(weight, torch.tensor([[0.0, 0.0], [0.6, 0.8]], dtype=torch.float16))


@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS)
def test_weight_is_that_of_torch_in_double_precision(shape: tuple[int, ...], dim: int | None) -> None:
    v = random(*shape)
    g = magnitude(v, dim)
    weight, expected = weight_norm(v, g, dim), torch._weight_norm(v, g, -1 if dim in WHOLE else dim % len(shape))
    torch.testing.assert_close(weight, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(gradients(weight, v, g), gradients(expected, v, g), rtol=1e-13, atol=1e-13)


def test_without_eps_a_slice_of_zeros_is_nan_as_in_torch() -> None:
    v, g = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.ones(2, 1)
    weight = weight_norm(v, g)
    assert weight[0].isnan().all()
    torch.testing.assert_close(weight[1], torch.tensor([0.6, 0.8]))


EMPTY = [((0,), 0), ((0, 3), 0), ((0, 3), 1), ((3, 0), 0), ((3, 0), 1), ((2, 0, 3), 1), ((2, 0, 3), 2), ((2, 0), None)]


def check_empty(shape: tuple[int, ...], dim: int | None, eps: float) -> None:
    v = torch.zeros(shape, requires_grad=True)
    g = torch.zeros(norm_except_dim(v, 2, dim).shape, requires_grad=True)
    weight = weight_norm(v, g, dim, eps)
    assert weight.shape == shape
    assert [gradient.shape for gradient in gradients(weight, v, g)] == [v.shape, g.shape]


@pytest.mark.parametrize(("shape", "dim"), EMPTY)
def test_with_eps_the_weight_of_an_empty_tensor_is_empty(shape: tuple[int, ...], dim: int | None) -> None:
    check_empty(shape, dim, eps=1e-12)


def test_without_eps_the_weight_of_an_empty_tensor_is_empty() -> None:
    # in a process of its own: torch's kernel divides by zero for some of these, which ends the process
    command = (
        "import runpy; tests = runpy.run_path({!r}); [tests['check_empty'](*case, 0.0) for case in tests['EMPTY']]"
    )
    done = subprocess.run([sys.executable, "-c", command.format(__file__)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# TorchScript


def norm_with_an_int(v: Tensor) -> Tensor:
    return functional.norm_except_dim(v, 3, 1)


def norm_with_a_float(v: Tensor) -> Tensor:
    return functional.norm_except_dim(v, 2.5, None)


def norm_with_names(v: Tensor) -> Tensor:
    return functional.norm_except_dim(v, dim=-2)


def weight_by_position(v: Tensor, g: Tensor) -> Tensor:
    return functional.weight_norm(v, g, 1)


def weight_with_eps(v: Tensor, g: Tensor) -> Tensor:
    return functional.weight_norm(v, g, dim=1, eps=100.0)


@pytest.mark.parametrize("power", [1, 2, 2.0, 2.5, math.inf, 0.0])
@pytest.mark.parametrize(("shape", "dim"), [((7,), 0), ((3, 4), 0), ((3, 2, 4), 1), ((3, 4), -2), ((3, 4), None)])
def test_norm_compiles_with_torchscript(shape: tuple[int, ...], dim: int | None, power: float) -> None:
    v = random(*shape)
    norm = torch.jit.script(norm_except_dim)(v, power, dim)
    torch.testing.assert_close(norm, norm_by_hand(v, power, dim))


@pytest.mark.parametrize(
    ("function", "power", "dim"),
    [(norm_with_an_int, 3, 1), (norm_with_a_float, 2.5, None), (norm_with_names, 2, 1)],
)
def test_norm_is_called_from_a_scripted_function(function: Any, power: float, dim: int | None) -> None:
    v = random(3, 4, 2)
    scripted = torch.jit.script(function)
    torch.testing.assert_close(scripted(v), norm_by_hand(v, power, dim))
    torch.testing.assert_close(gradients(scripted(v), v), gradients(norm_by_hand(v, power, dim), v))


@pytest.mark.parametrize("eps", [0.0, 1.5, 100.0])  # below the norms, among them, and above
@pytest.mark.parametrize(("shape", "dim"), [((7,), 0), ((3, 4), 0), ((3, 2, 4), 1), ((3, 4), -2), ((3, 4), None)])
def test_weight_compiles_with_torchscript(shape: tuple[int, ...], dim: int | None, eps: float) -> None:
    v = random(*shape)
    g = magnitude(v, dim)
    expected = g * v / norm_by_hand(v, 2, dim).clamp(min=eps)
    torch.testing.assert_close(torch.jit.script(weight_norm)(v, g, dim, eps), expected)


@pytest.mark.parametrize(("function", "eps"), [(weight_by_position, 0.0), (weight_with_eps, 100.0)])
def test_weight_is_called_from_a_scripted_function(function: Any, eps: float) -> None:
    v = random(3, 4, 2)
    g = magnitude(v, 1)
    scripted, expected = torch.jit.script(function)(v, g), g * v / norm_by_hand(v, 2, 1).clamp(min=eps)
    torch.testing.assert_close(scripted, expected)
    torch.testing.assert_close(gradients(scripted, v, g), gradients(expected, v, g))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_trace_of_a_vmap_computes_what_was_traced(eps: float, clip: float | None) -> None:
    def weights(v: Tensor, g: Tensor) -> Tensor:
        return torch.func.vmap(lambda v, g: functional.scaled_weight_norm(v, g, 0, eps, clip))(v, g)

    v, g = torch.randn(3, 5, 4), torch.rand(3, 5, 1)
    torch.testing.assert_close(torch.jit.trace(weights, (v, g))(v + 1, g), weights(v + 1, g))
