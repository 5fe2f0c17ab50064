"""WeightNorm itself: R's own test, R's dims, the output dimension of every layer, how it reads, and its inverse."""

import copy
import re
from typing import Any

import pytest
import torch
from layers import by_hand, holding, make_stale
from torch import nn

from explicit_wn import WeightNorm

# R


def test_the_test_of_nn_utils_weight_norm_in_R() -> None:
    in_features, out_features = 20, 40
    weight_norm = WeightNorm.from_r("weight", 2)
    linear = nn.Linear(in_features, out_features)
    original = linear.weight.detach().clone()
    weight_norm.apply(linear)

    before = linear.weight.detach().clone()
    torch.testing.assert_close(before, original)
    weight_norm.recompute(linear)
    torch.testing.assert_close(linear.weight, before, rtol=0, atol=0)
    assert linear.weight_g.shape == (1, in_features)
    assert linear.weight_v.shape == (out_features, in_features)

    weight_norm.call(linear)
    torch.testing.assert_close(linear.weight, before, rtol=0, atol=0)
    assert type(linear.weight.grad_fn).__name__ == "WeightNormInterfaceBackward0"

    weight_norm.remove(linear)
    torch.testing.assert_close(linear.weight.detach(), before, rtol=0, atol=0)
    assert linear.weight.grad_fn is None
    assert linear.weight.is_leaf
    assert linear.weight.requires_grad
    assert sorted(dict(linear.named_parameters())) == ["bias", "weight"]


@pytest.mark.parametrize(
    ("dim_in_r", "dim"), [(1, 0), (2, 1), (3, 2), (None, None), (-1, None), (-2, 1), (-3, 0)], ids=str
)
def test_dims_of_R_count_from_one_and_null_or_minus_one_mean_the_whole_tensor(
    dim_in_r: int | None, dim: int | None
) -> None:
    module = WeightNorm.from_r("weight", dim_in_r).apply(nn.Conv1d(2, 3, 4))
    make_stale(module)
    WeightNorm("weight").recompute(module)
    torch.testing.assert_close(module.weight, by_hand(module, "weight", dim))
    assert module.weight_g.numel() == (1 if dim is None else module.weight.shape[dim])


def test_dim_zero_is_the_error_that_it_is_in_R() -> None:
    with pytest.raises(ValueError, match=r"R counts dimensions from 1.*the first one is 1"):
        WeightNorm.from_r("weight", 0)


# The output dimension

LAYERS = {
    "Linear": (nn.Linear(3, 5, bias=False), "weight", 0, (4, 3), -1),
    "Conv1d": (nn.Conv1d(4, 6, 3, groups=2, bias=False), "weight", 0, (2, 4, 8), 1),
    "Conv2d": (nn.Conv2d(4, 6, 3, groups=2, bias=False), "weight", 0, (2, 4, 8, 8), 1),
    "Conv3d": (nn.Conv3d(4, 6, 2, bias=False), "weight", 0, (2, 4, 4, 4, 4), 1),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3, bias=False), "weight", 1, (2, 4, 8), 1),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 6, 3, bias=False), "weight", 1, (2, 4, 5, 5), 1),
    "ConvTranspose3d": (nn.ConvTranspose3d(4, 6, 2, bias=False), "weight", 1, (2, 4, 3, 3, 3), 1),
}


@pytest.mark.parametrize(("layer", "name", "dim", "shape", "channels"), LAYERS.values(), ids=LAYERS)
def test_out_gives_every_output_channel_its_own_magnitude(
    layer: nn.Module, name: str, dim: int, shape: tuple[int, ...], channels: int
) -> None:
    wn, layer = WeightNorm(name, dim="out"), copy.deepcopy(layer)
    x = torch.randn(shape)
    expected = layer(x).detach()
    wn.apply(layer)
    magnitude = getattr(layer, f"{name}_g")
    assert magnitude.numel() == expected.shape[channels]
    with torch.no_grad():
        magnitude.select(dim, 2).mul_(3)
    wn.recompute(layer)
    expected.select(channels, 2).mul_(3)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Embedding(5, 3), "weight"),
        (nn.EmbeddingBag(5, 3), "weight"),
        (nn.Bilinear(2, 3, 4), "weight"),
        (nn.LSTM(2, 3), "weight_ih_l0"),
        (nn.GRUCell(2, 3), "weight_hh"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight"),
        (nn.PReLU(3), "weight"),
        (nn.ConvTranspose1d(4, 6, 3), "bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_out_is_the_first_dim_of_every_other_parameter(layer: nn.Module, name: str) -> None:
    shape = getattr(layer, name).shape
    layer = WeightNorm(name, dim="out").apply(copy.deepcopy(layer))
    make_stale(layer, name)
    WeightNorm(name).recompute(layer)
    torch.testing.assert_close(getattr(layer, name), by_hand(layer, name, 0))
    assert getattr(layer, f"{name}_g").shape == (shape[0], *[1] * (len(shape) - 1))


def test_out_of_a_grouped_transposed_convolution_is_dim_1_of_its_weight() -> None:
    layer = WeightNorm(dim="out").apply(nn.ConvTranspose1d(4, 6, 3, groups=2))
    assert layer.weight_g.shape == (1, 3, 1)


def test_out_holds_for_a_class_derived_from_a_transposed_convolution() -> None:
    class Upsample(nn.ConvTranspose2d):
        pass

    assert WeightNorm(dim="out").apply(Upsample(4, 6, 3)).weight_g.shape == (1, 6, 1, 1)


# How it reads


@pytest.mark.parametrize(
    ("wn", "expected"),
    [
        (WeightNorm(), "WeightNorm('weight', dim=0)"),
        (WeightNorm("weight_hh_l0", None), "WeightNorm('weight_hh_l0', dim=None)"),
        (WeightNorm("weight", dim="out"), "WeightNorm('weight', dim='out')"),
        (WeightNorm("weight", dim=1, eps=1e-6), "WeightNorm('weight', dim=1, eps=1e-06)"),
        (WeightNorm.from_r("weight", 2), "WeightNorm('weight', dim=1)"),
    ],
    ids=str,
)
def test_a_norm_reads_as_the_call_that_makes_it(wn: WeightNorm, expected: str) -> None:
    assert repr(wn) == expected
    assert repr(eval(repr(wn))) == expected


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.fc = self.wn.apply(nn.Linear(2, 3))
        self.up = WeightNorm(dim="out").inline(nn.ConvTranspose1d(2, 3, 4))
        self.whole = WeightNorm(dim=None, eps=1e-6).apply(nn.Linear(2, 3, bias=False))
        self.rnn = WeightNorm("weight_hh_l0").apply(WeightNorm("weight_ih_l0").apply(nn.LSTM(2, 3)))
        self.own = WeightNorm("scale").apply(Scale())


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def test_a_model_shows_each_norm_in_the_line_of_its_layer() -> None:
    model = Net()
    lines = [line.strip() for line in repr(model).splitlines()]
    assert lines == [
        "Net(",
        "(wn): WeightNorm('weight', dim=0)",
        "(fc): Linear(in_features=2, out_features=3, bias=True, weight=WeightNorm(dim=0))",
        "(up): ConvTranspose1d(2, 3, kernel_size=(4,), stride=(1,), weight=WeightNorm(dim=1))",
        "(whole): Linear(in_features=2, out_features=3, bias=False, weight=WeightNorm(dim=None, eps=1e-06))",
        "(rnn): LSTM(2, 3, weight_ih_l0=WeightNorm(dim=0), weight_hh_l0=WeightNorm(dim=0))",
        "(own): Scale(scale=WeightNorm(dim=0))",
        ")",
    ]


def test_a_removed_norm_shows_no_longer() -> None:
    wn = WeightNorm()
    layer = wn.apply(nn.Linear(2, 3))
    assert repr(wn.remove(layer)) == repr(nn.Linear(2, 3))


# The inverse

SHAPES_AND_DIMS = [((5,), 0), ((3, 4), 0), ((3, 4), 1), ((3, 4), None), ((2, 3, 4), 1), ((2, 3, 2, 2), -2)]


@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS)
def test_split_and_formula_are_inverses(shape: tuple[int, ...], dim: int | None) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    wn = WeightNorm(dim=dim)
    parts = wn.split(weight)
    assert parts["v"] is weight
    torch.testing.assert_close(wn.formula(**parts, dim=dim), weight)


@pytest.mark.parametrize("eps", [0.0, 1e-12])
@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS)
def test_assign_sets_the_parts_so_that_the_weight_is_what_was_given(
    shape: tuple[int, ...], dim: int | None, eps: float
) -> None:
    wn = WeightNorm(dim=dim, eps=eps)
    module = wn.apply(holding(torch.randn(shape, dtype=torch.float64)))
    parts = module.weight_g, module.weight_v
    wanted = torch.randn(shape, dtype=torch.float64)
    assert wn.assign(module, wanted) is module
    torch.testing.assert_close(module.weight, wanted)
    torch.testing.assert_close(by_hand(module, "weight", dim if dim is None else dim % len(shape), eps), wanted)
    assert module.weight_g is parts[0]
    assert module.weight_v is parts[1]
    assert all(part.requires_grad and part.is_leaf for part in parts)


def test_assign_takes_any_layout_dtype_and_history() -> None:
    wn = WeightNorm()
    module = wn.apply(nn.Linear(3, 2))
    wanted = torch.randn(3, 2, dtype=torch.float64, requires_grad=True).exp().t()
    wn.assign(module, wanted)
    assert module.weight.dtype == module.weight_v.dtype == torch.float32
    torch.testing.assert_close(module.weight, wanted.float())


def test_assign_is_seen_by_forward_and_by_the_gradient() -> None:
    wn = WeightNorm(dim=1)
    module, plain = wn.apply(nn.Linear(3, 2)), nn.Linear(3, 2)
    wn.assign(module, plain.weight)
    module.bias = plain.bias
    x = torch.randn(4, 3)
    torch.testing.assert_close(module(x), plain(x))
    module(x).sum().backward()
    assert module.weight_g.grad is not None
    assert module.weight_v.grad is not None


# eps

SMALL = torch.tensor([[3.0, 4.0], [0.003, 0.004], [0.0, 0.0]])


@pytest.mark.parametrize("verb", ["apply", "assign", "load_state_dict"])
@pytest.mark.parametrize("dim", [0, None])
def test_slices_shorter_than_eps_keep_their_weight(dim: int | None, verb: str) -> None:
    wn = WeightNorm(dim=dim, eps=0.1 if dim == 0 else 100.0)
    module: Any = wn.apply(holding(SMALL.clone() if verb == "apply" else torch.ones_like(SMALL)))
    if verb == "assign":
        wn.assign(module, SMALL)
    elif verb == "load_state_dict":
        module.load_state_dict({"weight": SMALL})
    wn.recompute(module)
    torch.testing.assert_close(module.weight, SMALL)
    torch.testing.assert_close(by_hand(module, "weight", dim, wn.eps), SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_zero_slice_with_eps_learns(dtype: torch.dtype) -> None:
    wn = WeightNorm(eps=1e-4)
    module = wn.apply(holding(SMALL.to(dtype, copy=True)))
    (module.weight.float() - 1).square().sum().backward()
    with torch.no_grad():
        for part in (module.weight_g, module.weight_v):
            assert part.grad is not None
            assert part.grad.isfinite().all()
            part -= 0.1 * part.grad
    wn.recompute(module)
    assert module.weight.isfinite().all()
    assert (module.weight[2] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_eps_that_the_refusal_of_a_zero_slice_names_lets_it_learn(dtype: torch.dtype) -> None:
    module = holding(SMALL.to(dtype, copy=True))
    with pytest.raises(ValueError, match="slices 2 are zero") as raised:
        WeightNorm().apply(module)
    named = re.search(r"set eps \((\S+), say\)", str(raised.value))
    assert named
    WeightNorm(eps=float(named[1])).apply(module)
    module.weight.float().sum().backward()
    assert module.weight_v.grad is not None
    assert (module.weight_v.grad[2] != 0).all()
    assert module.weight_v.grad.isfinite().all()
