"""The norms beside WeightNorm and SpectralNorm: their numbers, gradients, verbs, and what renorms v."""

import copy
import io
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from layers import holding
from norms_by_hand import NORMS, OTHERS, ByHand, length
from torch import Tensor, nn
from torch.autograd import gradcheck

import explicit_wn
from explicit_wn import (
    ForcedWeightNorm,
    ScaledWeightNorm,
    SigmaReparam,
    SpectralNorm,
    UnitNorm,
    WeightNorm,
    WeightStandardization,
    checkpoint,
    functional,
)

each_norm = pytest.mark.parametrize("norm", OTHERS.values(), ids=OTHERS)
RENORMED = {name: OTHERS[name] for name in ("ForcedWeightNorm", "UnitNorm")}


def parts_of(module: nn.Module, norm: ByHand, name: str = "weight") -> dict[str, Tensor]:
    return {part: getattr(module, f"{name}_{part}") for part in norm.parts}


def change(module: nn.Module, norm: ByHand) -> None:
    """Gives the trained parts other values, behind the stored weight."""
    with torch.no_grad():
        for part, value in parts_of(module, norm).items():
            if part not in norm.buffers:
                value.mul_(1.5).add_(0.4 * torch.randn_like(value))


# Numbers and gradients


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 4), 0), ((3, 4), 1), ((2, 3, 4), 0), ((2, 3, 4), 1), ((2, 3, 2, 2), 3)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weight_and_gradients_are_those_of_the_formula(
    norm: ByHand, shape: tuple[int, ...], dim: int, dtype: torch.dtype
) -> None:
    wn, module = norm.make("weight", dim), holding(torch.randn(shape, dtype=dtype)).eval()
    wn.apply(module)
    change(module, norm)
    parts = parts_of(module, norm)
    leaves = {part: value.detach().double().requires_grad_() for part, value in parts.items()}
    expected = norm.weight(**leaves, dim=dim)
    slope = torch.randn(shape, dtype=torch.float64)
    expected.backward(slope)
    wn.recompute(module)
    torch.testing.assert_close(module.weight.detach(), expected.detach().to(dtype))
    module.weight.backward(slope.to(dtype))
    for part, value in parts.items():
        if part not in norm.buffers:
            assert leaves[part].grad is not None
            torch.testing.assert_close(value.grad, leaves[part].grad.to(dtype), rtol=1e-4, atol=1e-5)
    if dtype == torch.float64:
        trained = {f"weight_{part}": value.detach().requires_grad_() for part, value in parts.items()}

        def weight(*values: Tensor) -> Any:
            return torch.func.functional_call(_Read(wn, module), _named(trained, values), ())

        assert gradcheck(weight, tuple(trained.values()))


class _Read(nn.Module):
    def __init__(self, wn: Any, layer: nn.Module) -> None:
        super().__init__()
        self.wn, self.layer = wn, layer

    def forward(self) -> Any:
        self.wn.recompute(self.layer)
        return self.layer.weight


def _named(trained: dict[str, Tensor], values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"layer.{name}": value for name, value in zip(trained, values, strict=True)}


@each_norm
def test_two_forwards_and_one_backward_give_the_gradients_of_both(norm: ByHand) -> None:
    """Where v is renormed, and u and v iterate, between them."""
    wn, layer, x = norm.make(), nn.Linear(4, 3), torch.randn(2, 4)
    wn.apply(layer)
    change(layer, norm)
    layer.zero_grad()
    weights, outputs = [], []
    for times in (1, 2):
        wn.recompute(layer)
        weights.append({part: value.detach().clone() for part, value in parts_of(layer, norm).items()})
        outputs.append(layer(times * x).square().sum())
    torch.stack(outputs).sum().backward()
    leaves = [{part: value.double().requires_grad_() for part, value in one.items()} for one in weights]
    bias = layer.bias.detach().double()
    total = sum(
        (nn.functional.linear(times * x.double(), norm.weight(**one, dim=0), bias).square().sum())
        for times, one in enumerate(leaves, start=1)
    )
    assert isinstance(total, Tensor)
    total.backward()
    for part, value in parts_of(layer, norm).items():
        if part not in norm.buffers:
            expected = sum(one[part].grad for one in leaves)  # type: ignore[misc]
            torch.testing.assert_close(value.grad, expected.float(), rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]


W = torch.tensor([[3.0, 4.0], [0.6, 0.8], [-1.0, 2.0]])
OF_TORCHDEQ: list[tuple[dict[str, Any], list[float], list[float]]] = [
    (  # apply_norm(model, "weight_norm")
        {},
        [
            5.303300857543945,
            5.303300857543945,
            1.4471458196640015,
            0.3946761190891266,
            -1.0606602430343628,
            3.181980609893799,
        ],
        [
            -0.7576141357421875,
            0.7576146125793457,
            -1.062589168548584,
            3.8961615562438965,
            13.36431884765625,
            4.454773902893066,
        ],
    ),
    (  # ..., learn_scale=False, target_norm=2.0
        {"learn_scale": False, "target_norm": 2.0},
        [
            1.4142135381698608,
            1.4142135381698608,
            1.9295275211334229,
            0.5262348055839539,
            -0.6324555277824402,
            1.8973665237426758,
        ],
        [
            -0.2020304799079895,
            0.20203053951263428,
            -1.416785717010498,
            5.194881916046143,
            7.968939781188965,
            2.656312942504883,
        ],
    ),
    (  # ..., clip=True, clip_value=0.5
        {"learn_scale": False, "target_norm": 2.0, "clip": 0.5},
        [1.4142135381698608, 1.4142135381698608, 0.550000011920929, 0.15000000596046448, -0.25, 0.75],
        [-0.2020304799079895, 0.20203053951263428, 1.5, 2.0, 2.5, 3.0],
    ),
    ({"clip": 0.5}, [1.75, 1.75, 0.550000011920929, 0.15000000596046448, -0.25, 0.75], [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]),
    (
        {"clip": 1.5},
        [5.25, 5.25, 1.4471458196640015, 0.3946761190891266, -0.75, 2.25],
        [1.5, 3.0, -1.062589168548584, 3.8961615562438965, 7.5, 9.0],
    ),
]
"""What torchdeq 0.1.0 made of W, after a step: the weight, and the gradient of v."""


@pytest.mark.parametrize(("settings", "weight", "gradient"), OF_TORCHDEQ, ids=[str(row[0]) for row in OF_TORCHDEQ])
def test_the_numbers_of_torchdeq(settings: dict[str, Any], weight: list[float], gradient: list[float]) -> None:
    wn, layer = ScaledWeightNorm(**settings), nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight.copy_(W)
        wn.apply(layer)
        layer.weight_v.add_(torch.tensor([[0.5, -0.5]]))
        if "learn_scale" not in settings:
            layer.weight_g.mul_(1.5)
    wn.recompute(layer)
    torch.testing.assert_close(layer.weight.detach().flatten(), torch.tensor(weight))
    (layer.weight * torch.arange(1.0, 7.0).view(3, 2)).sum().backward()
    torch.testing.assert_close(layer.weight_v.grad.flatten(), torch.tensor(gradient), rtol=1e-5, atol=1e-5)


STATES_OF_TORCHDEQ: dict[str, tuple[nn.Module, tuple[int, int], dict[str, tuple[int, ...]], Any, str]] = {
    "spectral, trained scale": (
        nn.Linear(4, 8),
        (48, 40),
        {"bias": (8,), "weight_orig": (8, 4), "weight_g": (8, 1), "weight_u": (8,), "weight_v": (4,)},
        SpectralNorm(),
        'Unexpected key(s) in state_dict: "weight_g"',
    ),
    "spectral": (
        nn.Linear(4, 8),
        (40, 40),
        {"bias": (8,), "weight_orig": (8, 4), "weight_u": (8,), "weight_v": (4,)},
        SpectralNorm(),
        "",
    ),
    "transposed, by its input": (
        nn.ConvTranspose1d(3, 2, 2),
        (16, 17),
        {"bias": (2,), "weight_g": (1, 2, 1), "weight_v": (3, 2, 2)},
        WeightNorm(),
        "size mismatch for weight_g: copying a param with shape torch.Size([1, 2, 1])",
    ),
    "transposed": (
        nn.ConvTranspose1d(3, 2, 2),
        (16, 16),
        {"bias": (2,), "weight_g": (1, 2, 1), "weight_v": (3, 2, 2)},
        WeightNorm(dim="out"),
        "",
    ),
}
"""A layer, how many numbers torchdeq 0.1.0 trains in it, and we; its checkpoint there; a norm, and what that says."""


@pytest.mark.parametrize(
    ("layer", "trained", "shapes", "norm", "says"), STATES_OF_TORCHDEQ.values(), ids=STATES_OF_TORCHDEQ
)
def test_the_checkpoints_of_torchdeq_load_or_say_what_does_not_fit(
    layer: nn.Module, trained: tuple[int, int], shapes: dict[str, tuple[int, ...]], norm: Any, says: str
) -> None:
    """The rows of MIGRATION's table, where torchdeq is not installed."""
    layer, state = norm.inline(copy.deepcopy(layer)), {name: torch.ones(shape) for name, shape in shapes.items()}
    there = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name not in dict(layer.named_buffers()))
    assert (there, sum(parameter.numel() for parameter in layer.parameters())) == trained
    if says:
        with pytest.raises(RuntimeError, match=re.escape(says)):
            layer.load_state_dict(state)
    else:
        layer.load_state_dict(state)
        assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == shapes


# The verbs


REFUSED = {
    "ForcedWeightNorm": "lengths from .* those of a normed weight have 1.5; scale them",
    "UnitNorm": "lengths from .* those of a normed weight have 1; scale them",
    "SpectralNorm": "its largest singular value is .* divide it by that",
    "WeightStandardization": "its slices have not the mean 0; subtract their means first",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_assign_inverts_or_refuses(kind: str) -> None:
    norm, layer = OTHERS[kind], nn.Linear(4, 3)
    wn = norm.make().apply(layer) and norm.make()
    before, any_weight = copy.deepcopy(layer.state_dict()), torch.randn(3, 4)
    if kind in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[kind]):
            wn.assign(layer, any_weight)
        assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
        any_weight = norm.make().compute_weight(norm.make().apply(nn.Linear(4, 3)).eval()).detach()
        if kind == "SpectralNorm":
            any_weight = any_weight / torch.linalg.matrix_norm(any_weight.double(), 2).float()
        with pytest.raises(ValueError, match="|".join(REFUSED.values())):
            wn.assign(layer, any_weight * 1.01 + 0.01)
    wn.assign(layer, any_weight)
    torch.testing.assert_close(wn.compute_weight(layer).detach(), any_weight)
    torch.testing.assert_close(norm.of(parts_of(layer, norm)).detach(), any_weight, rtol=1e-5, atol=1e-6)


@each_norm
def test_a_plain_weight_is_loaded_as_apply_would_take_it(norm: ByHand) -> None:
    plain, loaded = nn.Linear(4, 3), norm.make().apply(nn.Linear(4, 3))
    loaded.load_state_dict(plain.state_dict())
    applied = norm.make().apply(copy.deepcopy(plain))
    for part in set(norm.parts) - {"u", "v"}:
        torch.testing.assert_close(getattr(loaded, f"weight_{part}"), getattr(applied, f"weight_{part}"))
    torch.testing.assert_close(loaded.weight, applied.weight, rtol=0.05, atol=0.01)  # u and v begin at random


@each_norm
def test_report_names_it_convert_leaves_it_and_fold_bakes_it(norm: ByHand) -> None:
    model, x = nn.Sequential(norm.make().inline(nn.Linear(4, 3))).eval(), torch.randn(2, 4)
    change(model[0], norm)
    expected = nn.functional.linear(x, norm.of(parts_of(model[0], norm)), model[0].bias)
    row = explicit_wn.report(model).rows[0]
    assert (row.norm, row.spelling, row.dim) == (type(norm.make()).__name__, "ours", "0")
    assert all(part in row.parts for part in norm.parts)
    assert explicit_wn.convert(model) == []
    assert not explicit_wn.check(model)
    torch.testing.assert_close(model(x), expected)
    assert explicit_wn.fold(model) == ["0.weight"]
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", OTHERS)
def test_apply_keeps_the_parameter_and_the_parts_are_what_they_are(kind: str) -> None:
    norm, layer = OTHERS[kind], nn.Linear(4, 3)
    weight = layer.weight
    norm.make().apply(layer)
    whole = layer.weight_orig if "orig" in norm.parts else layer.weight_v
    assert whole is weight
    assert {name for name, _ in layer.named_buffers()} == {f"weight_{part}" for part in norm.buffers}
    assert {name for name, _ in layer.named_parameters()} == {
        "bias",
        *(f"weight_{part}" for part in norm.parts if part not in norm.buffers),
    }


def test_out_is_the_output_dimension_of_a_transposed_convolution() -> None:
    for norm in (ForcedWeightNorm(), UnitNorm(dim="out"), WeightStandardization(), SigmaReparam()):
        layer: Any = norm.apply(nn.ConvTranspose1d(2, 3, 4))
        assert layer._normed[0].norm.dim == 1
    layer = WeightStandardization().apply(nn.ConvTranspose1d(2, 3, 4))
    assert layer.weight_gain.shape == (1, 3, 1)
    torch.testing.assert_close(layer.weight.mean((0, 2)), torch.zeros(3), atol=1e-6, rtol=0)


def test_one_norm_of_the_whole_tensor() -> None:
    for norm, whole in ((UnitNorm(dim=None), 1.0), (ForcedWeightNorm(dim="whole", gain=3), 3.0)):
        layer: Any = norm.apply(nn.Linear(4, 3))
        norm.recompute(layer)
        torch.testing.assert_close(layer.weight.norm(), torch.tensor(whole))
    torch.testing.assert_close(layer.weight_v.norm(), torch.tensor(12.0).sqrt())


def test_a_vector_is_divided_by_its_length_and_multiplied_by_gamma() -> None:
    layer: Any = SigmaReparam("bias").apply(nn.Linear(4, 3))
    nn.init.constant_(layer.bias_g, 2.0)
    SigmaReparam("bias").recompute(layer)
    torch.testing.assert_close(layer.bias, 2 * layer.bias_orig / layer.bias_orig.norm())


# What is renormed


def wanted_length(kind: str, v: Tensor) -> Tensor:
    return torch.full_like(length(v, 0), 1.0 if kind == "UnitNorm" else v[0].numel() ** 0.5)


CONTEXTS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "eager": lambda model, x: model,
    "script": lambda model, x: torch.jit.script(model),
    "trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
    "trace_without_grad": lambda model, x: torch.no_grad()(torch.jit.trace)(model, x, check_trace=False),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "strict_export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "compile": lambda model, x: torch.compile(model, backend="aot_eager", fullgraph=True),
    "compile_with_inductor": lambda model, x: torch.compile(model, fullgraph=True),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_training_step_has_the_gradients_of_the_formula_in_every_context_and_renorms_v(
    kind: str, context: str
) -> None:
    if "inductor" in context and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler")
    norm, inputs = OTHERS[kind], 64  # so many that inductor computes some of the forward again for the backward
    torch.compiler.reset()
    x, model = torch.randn(2, inputs), nn.Sequential(norm.make().inline(nn.Linear(inputs, 48)))
    run = CONTEXTS[context](model, x)
    owner = model if "compile" in context else run
    tensors = {name: t for name, t in [*owner.named_parameters(), *owner.named_buffers()] if "weight_" in name}
    parts = {name.rpartition("weight_")[2]: tensor for name, tensor in tensors.items()}
    trained = [part for part in norm.parts if part not in norm.buffers]
    bias = model[0].bias.detach().double()
    for _ in range(2):
        with torch.no_grad():
            for part in trained:
                parts[part].mul_(3).add_(torch.randn_like(parts[part]))
                parts[part].grad = None
        before = {part: value.detach().clone() for part, value in parts.items()}
        output = run(x)
        output.square().sum().backward()
        leaves = {part: value.detach().double().requires_grad_() for part, value in parts.items()}
        expected = nn.functional.linear(x.double(), norm.weight(**leaves, dim=0), bias)
        expected.square().sum().backward()
        torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-4)
        for part in trained:
            assert leaves[part].grad is not None
            torch.testing.assert_close(parts[part].grad, leaves[part].grad.float(), rtol=1e-4, atol=1e-3)
        if kind in RENORMED:
            v = parts["v"]
            torch.testing.assert_close(length(v, 0), wanted_length(kind, v))
            torch.testing.assert_close(v / length(v, 0), before["v"] / length(before["v"], 0))


@pytest.mark.parametrize("context", ["eager", "script", "trace", "trace_without_grad"])
@pytest.mark.parametrize("kind", RENORMED)
def test_a_backward_may_come_after_the_next_renorm(kind: str, context: str) -> None:
    norm, x = RENORMED[kind], torch.randn(2, 4)
    layer = norm.make().inline(nn.Linear(4, 3))
    run = CONTEXTS[context](layer, x)
    output = run(x)
    v = layer.weight_v.detach().clone().requires_grad_()
    change(layer, norm)
    run(x)
    output.square().sum().backward()
    nn.functional.linear(x, norm.of({"v": v}), layer.bias).square().sum().backward()
    torch.testing.assert_close(layer.weight_v.grad, v.grad)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", RENORMED)
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_an_exported_program_in_training_mode_is_saved_and_renorms_its_own_v(kind: str, strict: bool) -> None:
    norm, x, file = RENORMED[kind], torch.randn(2, 4), io.BytesIO()
    model = nn.Sequential(norm.make().inline(nn.Linear(4, 3)))
    torch.export.save(torch.export.export(model, (x,), strict=strict), file)
    program = torch.export.load(file).module()
    v = dict(program.named_parameters())["0.weight_v"]
    v.data.mul_(3)
    weight = norm.of({"v": v.detach().clone()})
    torch.testing.assert_close(program(x), nn.functional.linear(x, weight, model[0].bias))
    torch.testing.assert_close(length(v, 0), wanted_length(kind, v))


@pytest.mark.parametrize("kind", RENORMED)
def test_evaluation_renorms_nothing_and_has_the_weight_of_the_formula(kind: str) -> None:
    norm, layer = RENORMED[kind], nn.Linear(4, 3).eval()
    wn = norm.make()
    wn.apply(layer)
    change(layer, norm)
    before = layer.weight_v.detach().clone()
    wn.recompute(layer)
    assert torch.equal(layer.weight_v, before)
    torch.testing.assert_close(layer.weight, norm.of({"v": before}))


@pytest.mark.parametrize("kind", RENORMED)
def test_v_does_not_grow_and_a_weight_norm_without_a_renorm_does(kind: str) -> None:
    sizes = {}
    for name in (kind, "WeightNorm"):
        torch.manual_seed(0)
        model = nn.Sequential(NORMS[name].make().inline(nn.Linear(4, 3)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            (model(torch.randn(8, 4)) - 1).square().mean().backward()
            optimizer.step()
        model(torch.randn(8, 4))
        sizes[name] = model[0].weight_v.norm() / (model[0].weight_v[0].numel() ** 0.5 if kind[0] == "F" else 1)
    torch.testing.assert_close(sizes[kind].detach(), torch.tensor(3.0).sqrt())


def test_standardized_without_a_gain_is_the_form_of_the_first_paper() -> None:
    ws, conv = WeightStandardization(), nn.Conv1d(2, 3, 4)
    ws.apply(conv)
    nn.init.ones_(conv.weight_gain).requires_grad_(False)
    ws.recompute(conv)
    torch.testing.assert_close(conv.weight.std((1, 2), correction=0), torch.ones(3))
    torch.testing.assert_close(conv.weight.mean((1, 2)), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
@pytest.mark.parametrize(
    ("function", "arguments", "says"),
    [
        (functional.scaled_weight_norm, ((1, 4), 0, 0.0, 0.5), "[3, 4] with dim=0 wants a g of the shape [3, 1]"),
        (functional.scaled_weight_norm, ((1, 1), 0, 0.0, 0.5), "wants a g of the shape [3, 1], not [1, 1]"),
        (functional.weight_standardization, ((1, 3),), "wants a gain of the shape [3, 1], not [1, 3]"),
        (functional.spectral_norm, ((4,), (3,)), "wants a u and a v of its lengths, not of the shapes [4]"),
        (functional.power_iteration, ((4,), (4,)), "u and a v of its lengths, not of the shapes [4] and [4]"),
        (functional.sigma_reparam, ((3, 1), (3,), (4,)), "wants a g of one number, not of the shape [3, 1]"),
        (functional.sigma_reparam, ((1,), (3,), (1, 4)), "u and a v of its lengths, not of the shapes [3] and [1, 4]"),
    ],
)
def test_the_functions_refuse_parts_that_do_not_belong_together(
    function: Any, arguments: tuple[Any, ...], says: str, scripted: bool
) -> None:
    given = [torch.rand(one) if isinstance(one, tuple) else one for one in arguments]
    if scripted and "u and a v" in says:
        says = "torch"  # which refuses to multiply them
    with pytest.raises((ValueError, torch.jit.Error, RuntimeError), match=re.escape(says)):
        (torch.jit.script(function) if scripted else function)(torch.rand(3, 4), *given)


@each_norm
def test_a_checkpoint_of_what_a_file_cannot_tell_is_to_be_loaded_into_its_model(norm: ByHand) -> None:
    state = nn.Sequential(norm.make().inline(nn.Linear(4, 3))).state_dict()
    if type(norm.make()) in (ScaledWeightNorm, SpectralNorm):
        assert checkpoint.fold(state)["0.weight"].shape == (3, 4)
    else:
        with pytest.raises(ValueError, match=r"load it into the model, and call explicit_wn\.fold\(model\)"):
            checkpoint.fold(state)


@each_norm
def test_a_norm_shows_how_it_is_made(norm: ByHand) -> None:
    made = norm.make()
    assert repr(made).startswith(f"{type(made).__name__}('weight', ")
    assert repr(eval(repr(made))) == repr(made)


def test_what_scales_a_weight_norm_is_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        ScaledWeightNorm("weight", 0, 0.0, 0.9)  # type: ignore[misc]


@pytest.mark.parametrize("given", [1, np.float64(1)], ids=["int", "float64"])
def test_a_number_is_a_float_wherever_it_comes_from(given: Any) -> None:
    for norm in ScaledWeightNorm(clip=given), ScaledWeightNorm(target_norm=given), ForcedWeightNorm(gain=given):
        layer = norm.inline(nn.Linear(2, 3))
        torch.testing.assert_close(torch.jit.script(layer).eval()(torch.ones(1, 2)), layer.eval()(torch.ones(1, 2)))


@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@each_norm
def test_an_empty_weight_is_empty_and_a_matrix_of_it_is_refused(norm: ByHand, shape: tuple[int, ...]) -> None:
    module = holding(torch.randn(shape))
    if "orig" in norm.parts:
        with pytest.raises(ValueError, match="it is empty"):
            norm.make().apply(module)
        return
    norm.make().apply(module)
    assert next(explicit_wn.normed(module))[2].call(module).weight.shape == shape  # type: ignore[union-attr]


# What is refused


@pytest.mark.parametrize("kind", ["ScaledWeightNorm", "ForcedWeightNorm", "UnitNorm", "WeightStandardization"])
def test_a_slice_without_a_direction_is_refused_and_changes_nothing(kind: str) -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    with pytest.raises(ValueError, match=r"which has no direction|has no spread"):
        NORMS[kind].make().apply(layer)
    assert type(layer) is nn.Linear
    with pytest.raises(ValueError, match="a single number, which has no spread"):
        WeightStandardization("bias").apply(layer)


def test_the_functions_are_scripted_as_they_are() -> None:
    v, g = torch.randn(3, 4), torch.rand(3, 1) + 0.5
    for function, arguments in (
        (functional.unit_norm, (v, 0)),
        (functional.forced_weight_norm, (v, 1, 0.0, 2.0)),
        (functional.scaled_weight_norm, (v, g, 0, 0.0, 0.7)),
        (functional.scaled_weight_norm, (v, g, 0, 5.0, 0.7)),
        (functional.weight_standardization, (v, g, 0)),
        (functional.sigma_reparam, (v, torch.tensor(2.0), torch.ones(3), torch.ones(4), 0)),
    ):
        torch.testing.assert_close(torch.jit.script(function)(*arguments), function(*arguments))
    for function in (functional.renorm, functional.force_norm):
        by_script, eager = v.clone(), v.clone()
        torch.jit.script(function)(by_script)
        function(eager)
        torch.testing.assert_close(by_script, eager)
        assert not torch.equal(eager, v)
