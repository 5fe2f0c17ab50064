"""The teaching tools: `steps`, `detect_stale` and `data_dependent_init`."""

import copy
import gc
import inspect
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from layers import make_stale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from explicit_wn import (
    SpectralNorm,
    StaleWeightWarning,
    WeightNorm,
    apply_all,
    cached,
    carrier,
    data_dependent_init,
    detect_stale,
    recompute_all,
    report,
    steps,
)
from explicit_wn.carrier import weight
from explicit_wn.reparametrization import Reparametrization
from explicit_wn.teaching import StaleWeightError

SECOND_BACKWARD = "Trying to backward through the graph a second time"


def by_hand(module: nn.Module, dim: int | None = 0, eps: float = 0.0) -> Tensor:
    """g · v / max(‖v‖, eps), from the parts as they are now."""
    g, v = module.weight_g, module.weight_v
    others = [index for index in range(v.dim()) if index != dim]
    return g * v / v.square().sum(others, keepdim=dim is not None).sqrt().clamp_min(eps)


# steps


@attrs.define(slots=False, eq=False, on_setattr=None, repr=False)
class Halves(Reparametrization):
    """A norm that knows nothing of `steps`: w = scale · (a + b)."""

    name: str = "weight"
    scale: float = 2.0
    buffer_parts = ("b",)

    @staticmethod
    def formula(a: Tensor, b: Tensor, scale: float) -> Tensor:
        return scale * (a + b)

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        return {"a": weight / self.scale, "b": torch.zeros_like(weight)}


def halves_steps(a: Tensor, b: Tensor, scale: float, name: str) -> Iterator[tuple[str, str, str, Any]]:
    yield "s", "the <scale>", f"scale of {name}", scale
    yield "a+b", "the sum", "a + b", a + b
    yield "w", "the weight", "s · (a+b)", scale * (a + b)


class ExplainedHalves(Halves):
    """The same with steps of its own."""

    steps = staticmethod(halves_steps)


def test_an_unknown_weight_is_refused_with_the_names_of_those_there_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2), WeightNorm().apply(nn.Linear(2, 2)))
    for name in ("0.weight", "weight", "nowhere.weight"):
        with pytest.raises(ValueError, match=f"{name!r} of this Sequential; .* one makes: '1.weight'. .*convert"):
            steps(model, name)
    with pytest.raises(ValueError, match="'bias' of this Linear; the weights that one makes: 'weight'"):
        steps(model[1], "bias")
    with pytest.raises(ValueError, match="'weight' of this Linear; the weights that one makes: none"):
        steps(model[0], "weight")


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_the_steps_of_weight_norm_compute_the_weight_of_now(dim: int | None) -> None:
    conv = WeightNorm(dim=dim).apply(nn.Conv1d(3, 4, 2))
    make_stale(conv)
    shown = steps(conv, "weight")
    g, v, others = conv.weight_g, conv.weight_v, [index for index in range(3) if index != dim]
    length = v.square().sum(others, keepdim=dim is not None).sqrt()
    expected = {"v": v, "‖v‖": length, "v/‖v‖": v / length, "g": g, "w": by_hand(conv, dim)}
    assert [step.symbol for step in shown] == list(expected)
    for step in shown:
        torch.testing.assert_close(step.value, expected[step.symbol].detach())
        assert step.shape == tuple(expected[step.symbol].shape)
    assert f"dim={dim}" in shown["‖v‖"].expression
    assert shown["v"].expression == "parameter weight_v"
    assert shown[-1] is shown["w"]
    assert len(shown) == 5


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_given_the_gradient_of_the_weight_every_step_has_its_own(dim: int | None) -> None:
    conv = WeightNorm(dim=dim).apply(nn.Conv1d(3, 4, 2))
    make_stale(conv)
    gradient, others = torch.randn(4, 3, 2), [index for index in range(3) if index != dim]
    shown = {step.symbol: step.gradient for step in steps(conv, gradient=gradient)}
    g, v = conv.weight_g.detach(), conv.weight_v.detach()
    length = v.square().sum(others, keepdim=dim is not None).sqrt()
    of_g = (gradient * v / length).sum(others, keepdim=dim is not None)  # the paper's equation 3
    of_v = g / length * gradient - g * of_g / length**2 * v
    of_length = -(gradient * g * v / length**2).sum(others, keepdim=dim is not None)
    expected = {"v": of_v, "‖v‖": of_length, "v/‖v‖": gradient * g, "g": of_g, "w": gradient}
    for symbol, value in expected.items():
        torch.testing.assert_close(shown[symbol], value, msg=symbol)
    assert conv.weight_g.grad is conv.weight_v.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_steps_with_gradients_leave_the_parameters_alone_and_show_a_column(mode: Callable[[], Any]) -> None:
    layer = SpectralNorm().apply(nn.Linear(3, 2))
    seen: list[Tensor] = []
    layer.weight_orig.register_hook(seen.append)
    with mode():
        shown = steps(layer, gradient=torch.ones(2, 3))
    assert seen == []
    assert shown["u"].gradient is None
    w0, (u, v) = layer.weight_orig.detach().clone().requires_grad_(), layer.buffers()
    (w0 / (u @ w0 @ v)).sum().backward()
    torch.testing.assert_close(shown["w₀"].gradient, w0.grad)
    assert shown.cells()[0][-1] == "gradient"
    assert steps(layer).cells()[0][-1] == "value"
    with pytest.raises(ValueError, match="the gradient of a weight has the shape of the weight, 2×3, not 3×2"):
        steps(layer, gradient=torch.ones(3, 2))


def test_a_norm_without_steps_of_its_own_has_gradients_of_its_parts() -> None:
    layer = Halves().apply(nn.Linear(3, 2))
    shown = steps(layer, gradient=torch.ones(2, 3))
    torch.testing.assert_close(shown["a"].gradient, torch.full((2, 3), 2.0))
    assert shown["b"].gradient is None
    assert steps(ExplainedHalves().apply(nn.Linear(3, 2)), gradient=torch.ones(2, 3))["s"].gradient is None


def test_an_eps_is_a_step_of_its_own() -> None:
    fc = nn.Linear(3, 2)
    with torch.no_grad():
        fc.weight[0] = 1e-3
    WeightNorm(eps=0.5).apply(fc)
    make_stale(fc)
    with torch.no_grad():
        fc.weight_v[0] = 1e-3
    shown = steps(fc)
    assert shown["n"].value[0] == 0.5
    assert "0.5" in shown["n"].expression
    assert shown["v/n"].expression == "v / n"
    torch.testing.assert_close(shown["w"].value, by_hand(fc, eps=0.5).detach())


@pytest.mark.parametrize(("make", "dim"), [(lambda: nn.Conv2d(2, 3, 2), 0), (lambda: nn.ConvTranspose2d(2, 3, 2), 1)])
def test_the_steps_of_spectral_norm_compute_sigma_and_change_nothing(make: Callable[[], nn.Module], dim: int) -> None:
    conv = SpectralNorm().apply(make()).train()
    with torch.no_grad():
        conv.weight_orig.mul_(3)
    before = copy.deepcopy(conv.state_dict())
    shown = steps(conv)
    matrix = conv.weight_orig.detach().transpose(0, dim).flatten(1)
    sigma = conv.weight_u @ matrix @ conv.weight_v
    assert [step.symbol for step in shown] == ["w₀", "W", "u", "v", "σ", "w"]
    torch.testing.assert_close(shown["W"].value, matrix)
    torch.testing.assert_close(shown["σ"].value, sigma)
    torch.testing.assert_close(shown["w"].value, conv.weight_orig.detach() / sigma)
    for key, value in conv.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_the_steps_of_a_spectral_normed_vector_are_its_length_and_the_quotient() -> None:
    fc = SpectralNorm("bias").apply(nn.Linear(3, 4))
    with torch.no_grad():
        fc.bias_orig.copy_(torch.tensor([3.0, 0.0, 4.0, 0.0]))
    shown = steps(fc, "bias")
    assert [step.symbol for step in shown] == ["w₀", "σ", "w"]
    assert shown["σ"].value == 5
    torch.testing.assert_close(shown["w"].value, torch.tensor([0.6, 0.0, 0.8, 0.0]))


def test_a_norm_without_steps_shows_parts_formula_and_weight() -> None:
    fc = Halves(scale=4.0).apply(nn.Linear(2, 3))
    with torch.no_grad():
        fc.weight_a.add_(1)
        fc.weight_b.add_(2)
    shown = steps(fc)
    assert [step.symbol for step in shown] == ["a", "b", "w"]
    assert [step.expression for step in shown] == ["parameter weight_a", "buffer weight_b", "formula(a, b, scale=4.0)"]
    torch.testing.assert_close(shown["w"].value, (4 * (fc.weight_a + fc.weight_b)).detach())


def test_a_norm_with_steps_shows_those() -> None:
    fc = ExplainedHalves().apply(nn.Linear(2, 3))
    with torch.no_grad():
        fc.weight_b.add_(2)
    shown = steps(fc)
    assert [step.symbol for step in shown] == ["s", "a+b", "w"]
    assert shown["s"].expression == "scale of weight"
    assert shown["s"].shape == ()
    torch.testing.assert_close(shown["w"].value, (2 * (fc.weight_a + fc.weight_b)).detach())
    assert "the &lt;scale&gt;" in shown._repr_html_()


def test_a_weight_deep_in_a_model_is_found_by_its_qualified_name() -> None:
    layer = WeightNorm().apply(nn.Linear(2, 3))
    model = nn.Sequential(nn.ModuleDict({"a": layer}), SpectralNorm().apply(nn.Linear(3, 3)))
    make_stale(layer)
    torch.testing.assert_close(steps(model, "0.a.weight")["w"].value, by_hand(layer).detach())
    assert steps(model, "1.weight")["σ"].shape == ()
    shared = nn.Sequential(layer, layer)
    assert torch.equal(steps(shared, "1.weight")["w"].value, steps(shared, "0.weight")["w"].value)


@pytest.mark.parametrize("way", ["apply", "inline"])
def test_steps_neither_read_nor_refresh_the_stored_weight(way: str) -> None:
    fc = getattr(WeightNorm(), way)(nn.Linear(3, 2))
    stale = carrier.store_of(fc)["weight"]
    make_stale(fc)
    with detect_stale():
        steps(fc)
    assert carrier.store_of(fc)["weight"] is stale


def test_steps_are_copies_without_gradient() -> None:
    fc = WeightNorm().apply(nn.Linear(3, 2))
    shown = steps(fc)
    before = shown["v"].value.clone()
    make_stale(fc)
    assert torch.equal(shown["v"].value, before)
    assert not any(step.value.requires_grad for step in shown)


def test_the_table_is_aligned_and_shows_every_step() -> None:
    shown = steps(WeightNorm().apply(nn.Linear(5, 3)))
    lines = str(shown).splitlines()
    assert str(shown) == repr(shown)
    assert lines[0].split() == ["symbol", "what", "it", "is", "expression", "shape", "value"]
    starts = [lines[0].index(title) for title in ("symbol", "what it is", "expression", "shape", "value")]
    assert [rule.start() for rule in re.finditer("-+", lines[1])] == starts
    assert len(lines) == 2 + 5 * 3
    first_lines = lines[2::3]
    for step, line in zip(shown, first_lines, strict=True):
        assert line.startswith(step.symbol)
        assert line[starts[1] :].startswith(step.meaning)
        assert line[starts[2] :].startswith(step.expression)
        assert line[starts[3] :].startswith("×".join(map(str, step.shape)))
        assert f"{step.value[0, 0]:.4f}" in line[starts[4] :]
    assert all(line[: starts[4]].isspace() for line in lines[3::3] + lines[4::3])


def test_the_html_table_has_a_row_for_each_step_and_keeps_the_lines_of_a_matrix() -> None:
    html = steps(WeightNorm().apply(nn.Linear(5, 3)))._repr_html_()
    assert html.count("<tr>") == 6
    assert html.count("<th") == 5
    assert html.count("<pre>") == 5
    assert "‖v‖" in html


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (torch.tensor(2.5), "2.5000"),
        (torch.tensor([1.0, -2.0]), " 1.0000  -2.0000"),
        (torch.tensor([[1.0], [-20.0]]), "  1.0000\n-20.0000"),
        (torch.zeros(2), "0.0000  0.0000"),
        (torch.tensor([1e-7, 2e6]), "1.000e-07  2.000e+06"),
        (torch.tensor([torch.nan, torch.inf, 1.0]), "   nan     inf  1.0000"),
        (torch.tensor(1e-3, dtype=torch.float64), "0.0010"),
        (torch.tensor(1e5), "1.000e+05"),
        (torch.tensor(-1e-4), "-1.000e-04"),
        (torch.ones(6), "  ".join(["1.0000"] * 6)),
        (torch.ones(7), "  ".join(["1.0000"] * 6) + "  …"),
        (torch.ones(6, 1), "\n".join(["1.0000"] * 6)),
        (torch.ones(7, 1), "1.0000\n" * 6 + "…"),
        (torch.ones(2, 2, 2, dtype=torch.bfloat16), "\n".join(["  ".join(["1.0000"] * 4)] * 2)),
        (torch.ones(0, 2), "empty"),
        (torch.ones(2, device="meta"), "on meta"),
    ],
    ids=str,
)
def test_a_value_is_shown_in_few_characters(value: Tensor, shown: str) -> None:
    @attrs.define(slots=False, eq=False, on_setattr=None, repr=False)
    class Showing(Halves):
        steps = staticmethod(lambda a, b: [("x", "an example", "x", value)])

    cells = steps(Showing().apply(nn.Linear(2, 2))).cells()
    assert cells[1][-1] == shown


# detect_stale


class Block(nn.Module):
    """A module that may forget to recompute."""

    def __init__(self, norm: Any, forgets: bool, layer: nn.Module) -> None:
        super().__init__()
        self.wn = norm
        self.layers = nn.ModuleList([self.wn.apply(layer)])
        self.forgets = forgets

    def forward(self, x: Tensor) -> Tensor:
        if not self.forgets:
            self.wn.recompute(self.layers[0])
        return self.layers[0](x)


class Net(nn.Module):
    def __init__(self, norm: Any = None, forgets: bool = True) -> None:
        super().__init__()
        self.block = Block(norm or WeightNorm(), forgets, nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ReadsTwice(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sum() + self.net.block.layers[0].weight.sum()


X = torch.linspace(-1, 1, 12).view(4, 3)


def sgd_step(net: nn.Module, **options: Any) -> None:
    net(X).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1, **options).step()


def adam_step(net: nn.Module, **options: Any) -> None:
    net(X).square().sum().backward()
    torch.optim.Adam(net.parameters(), lr=0.1, **options).step()


def write_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data.mul_(1.5)


def change_v_of_spectral_norm(net: nn.Module) -> None:
    with torch.no_grad():
        net.block.layers[0].weight_v.neg_()


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "in place": lambda net: make_stale(net.block.layers[0]),
    "SGD": sgd_step,
    "SGD fused": lambda net: sgd_step(net, fused=True),
    "Adam foreach": lambda net: adam_step(net, foreach=True),
    "Adam fused": lambda net: adam_step(net, fused=True),
    "data": write_data,
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@every_change
def test_a_stale_read_raises_and_names_the_path_the_parameter_and_the_line_to_add(change: Callable[..., None]) -> None:
    net = Net()
    with detect_stale():
        net(X)
        change(net)
        with pytest.raises(StaleWeightError) as caught:
            net(X)
    message = str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    assert message.startswith("block.layers.0.weight of this Net is stale: weight_g and weight_v changed")
    assert "to the forward of Block:\n\n    self.wn.recompute(self.layers[0])\n" in message
    assert "inline(layer)" in message
    assert SECOND_BACKWARD in message


@every_change
def test_with_the_line_added_nothing_raises(change: Callable[..., None]) -> None:
    net = Net(forgets=False)
    with detect_stale():
        for _ in range(3):
            change(net)
            layer = net.block.layers[0]
            torch.testing.assert_close(net(X), F.linear(X, by_hand(layer), layer.bias))


@every_change
@pytest.mark.parametrize("norm", [WeightNorm, SpectralNorm])
def test_an_inlined_weight_is_never_stale(change: Callable[..., None], norm: type[Reparametrization]) -> None:
    class Inlined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Module()
            self.block.layers = nn.ModuleList([norm().inline(nn.Linear(3, 2))])

        def forward(self, x: Tensor) -> Tensor:
            return self.block.layers[0](x)

    net = Inlined()
    if norm is SpectralNorm and change is CHANGES["in place"]:
        change = change_v_of_spectral_norm
    with detect_stale():
        for _ in range(3):
            net(X)
            net.block.layers[0].weight  # noqa: B018
            change(net)
            net.block.layers[0].weight  # noqa: B018
            net(X)


def test_spectral_norm_is_watched_and_its_power_iterations_are_not_a_change() -> None:
    net = Net(SpectralNorm(), forgets=False).train()
    with detect_stale():
        for _ in range(3):
            sgd_step(net)
        net.block.forgets = True
        with pytest.raises(StaleWeightError, match="weight_orig and weight_u and weight_v changed"):
            net(X)


def test_one_stale_weight_of_an_rnn_is_named() -> None:
    lstm = nn.LSTM(3, 2)
    WeightNorm("weight_ih_l0").apply(lstm)
    WeightNorm("weight_hh_l0").apply(lstm)
    with torch.no_grad():
        lstm.weight_hh_l0_g.mul_(2)
    with detect_stale(), pytest.raises(StaleWeightError, match=r"^weight_hh_l0 of this LSTM is stale"):
        lstm(X)


def test_the_model_given_is_where_the_path_starts() -> None:
    net = nn.Sequential(Net())
    layer = net[0].block.layers[0]
    make_stale(layer)
    with detect_stale(), pytest.raises(StaleWeightError, match=r"^weight of this Linear is stale"):
        layer.weight  # noqa: B018
    with detect_stale(net), pytest.raises(StaleWeightError, match=r"^0\.block\.layers\.0\.weight of this Sequential"):
        layer.weight  # noqa: B018
    with detect_stale(nn.Linear(1, 1)), pytest.raises(StaleWeightError, match=r"^0\.block\.layers"):
        net(X)


def test_a_norm_that_no_module_holds_is_shown_with_its_settings() -> None:
    layer = WeightNorm(dim=1).apply(nn.Linear(3, 3))
    net = nn.Sequential(nn.Sequential(layer))
    make_stale(layer)
    with detect_stale(), pytest.raises(StaleWeightError) as caught:
        net(X)
    assert "where wn is WeightNorm('weight', dim=1):\n\n    wn.recompute(model[0][0])\n" in str(caught.value)


def test_of_two_norms_the_line_has_the_one_that_makes_the_weight() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sn, self.wn, self.other = SpectralNorm(), WeightNorm(), WeightNorm("bias")
            self.fc = self.wn.apply(nn.Linear(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    two = Two()
    make_stale(two.fc)
    with detect_stale(), pytest.raises(StaleWeightError, match=r"self\.wn\.recompute\(self\.fc\)"):
        two(X)


def test_a_module_that_norms_a_parameter_of_its_own_is_told_to_recompute_itself() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2, 3))
            self.wn = WeightNorm("scale")
            self.wn.apply(self)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.scale)

    own = Own()
    with torch.no_grad():
        own.scale_g.mul_(2)
    with detect_stale(), pytest.raises(StaleWeightError, match=r"^scale of this Own") as caught:
        own(X)
    assert "\n\n    self.wn.recompute(self)\n" in str(caught.value)


def test_a_weight_that_is_computed_anew_at_the_read_is_not_stale() -> None:
    net = Net()
    layer = net.block.layers[0]
    state = {key: value + 1 for key, value in net.state_dict().items()}
    plain = {key: value.clone() for key, value in nn.Linear(3, 2).state_dict(prefix="block.layers.0.").items()}
    with detect_stale(net):
        for refresh in (
            lambda: net.load_state_dict(state),
            lambda: net.load_state_dict(plain),
            lambda: net.double().float(),
            lambda: net.block.wn.assign(layer, torch.ones(2, 3)),
            lambda: recompute_all(net),
        ):
            make_stale(layer)
            refresh()
            torch.testing.assert_close(net(X), F.linear(X, by_hand(layer), layer.bias))
        make_stale(layer)
        torch.testing.assert_close(copy.deepcopy(net)(X), F.linear(X, by_hand(layer), layer.bias))


def test_parts_that_were_replaced_or_left_by_a_transform_are_computed_anew_and_not_stale() -> None:
    net = Net()
    layer = net.block.layers[0]
    with detect_stale(net):
        net(X)
        make_stale(layer)
        layer.weight_g = nn.Parameter(torch.tensor([[2.0], [3.0]]))
        torch.testing.assert_close(net(X), F.linear(X, by_hand(layer), layer.bias))
        net.block.forgets = False
        torch.func.grad(lambda x: net(x).sum())(X)
        net.block.forgets = True
        make_stale(layer)
        torch.testing.assert_close(net(X), F.linear(X, by_hand(layer), layer.bias))


def test_functional_call_grad_and_vmap_work_inside() -> None:
    net = Net(WeightNorm(dim=None, eps=1e-6), forgets=False)  # or torch warns that its kernels are slow in vmap
    parts = {name: value.detach() + 1 for name, value in net.named_parameters()}

    def loss(parts: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, parts, (x,)).square().sum()

    def twice(parts: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(ReadsTwice(net), {f"net.{name}": part for name, part in parts.items()}, (x,))

    expected = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parts, X)
    with detect_stale(net):
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parts, X)
        stacked = {name: torch.stack([value, value + 1]) for name, value in parts.items()}
        torch.func.vmap(loss, in_dims=(0, None))(stacked, X)
        torch.func.vmap(twice, in_dims=(0, None))(stacked, X)
        net(X)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_works_inside(use_reentrant: bool) -> None:
    net = Net(forgets=False)
    with detect_stale(net):
        for _ in range(2):
            x = X.clone().requires_grad_()
            checkpoint(net, x, use_reentrant=use_reentrant).square().sum().backward()
            torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert x.grad is not None


def test_compiling_and_tracing_work_inside() -> None:
    net = Net(forgets=False)
    with detect_stale(net):
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            sgd_step(compiled)
            layer = net.block.layers[0]
            torch.testing.assert_close(compiled(X), F.linear(X, by_hand(layer), layer.bias))
        traced = torch.jit.trace(net, X)
        make_stale(net.block.layers[0])
        torch.testing.assert_close(traced(X), F.linear(X, by_hand(layer), layer.bias))


def test_parts_that_are_nan_are_not_a_change() -> None:
    net = Net()
    with torch.no_grad():
        net.block.layers[0].weight_v.fill_(torch.nan)
    recompute_all(net)
    with detect_stale(net):
        net(X)
        assert net(X).isnan().any()


def test_parts_without_numbers_are_not_watched() -> None:
    net = Net().to("meta")
    with detect_stale(net):
        net(X.to("meta"))
        for _ in range(2):
            assert net.block.layers[0].weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_and_a_whole_tensor_norm_are_watched(dtype: torch.dtype) -> None:
    layer = WeightNorm(dim=None).apply(nn.Linear(3, 2).to(dtype))
    assert layer.weight_g.dim() == 0
    with detect_stale():
        layer(X.to(dtype))
        layer.weight_g.data.mul_(2)
        with pytest.raises(StaleWeightError, match="stale"):
            layer(X.to(dtype))


# the classic error


def test_outside_the_block_the_second_training_step_fails_after_a_warning_alone() -> None:
    net = Net()
    sgd_step(net)
    with pytest.warns(StaleWeightWarning), pytest.raises(RuntimeError, match=SECOND_BACKWARD) as caught:
        sgd_step(net)
    assert "recompute" not in str(caught.value)


def repeat(step: Callable[[nn.Module], Any], net: nn.Module) -> None:
    for _ in range(2):
        step(net)


def backward(net: nn.Module) -> None:
    net(X).sum().backward()


def test_the_second_training_step_is_explained() -> None:
    with pytest.raises(StaleWeightError, match=SECOND_BACKWARD), detect_stale():
        repeat(sgd_step, Net())


@pytest.mark.parametrize("first_inside", [True, False])
def test_a_second_backward_without_a_step_between_is_explained(first_inside: bool) -> None:
    net = Net()
    if not first_inside:
        backward(net)
    with pytest.raises(StaleWeightError) as caught, detect_stale():
        repeat(backward, net)
    message = str(caught.value)
    assert message.startswith(f"{SECOND_BACKWARD}: block.layers.0.weight of this Net was used again")
    assert "to the forward of Block:\n\n    self.wn.recompute(self.layers[0])\n" in message
    assert type(caught.value.__cause__) is RuntimeError
    assert SECOND_BACKWARD in str(caught.value.__cause__)


def test_every_weight_that_was_used_again_is_named_once() -> None:
    net = nn.Sequential(Net(), nn.Linear(2, 3), Net())

    def train() -> None:
        backward(net)
        net(X)
        backward(net)

    with pytest.raises(StaleWeightError) as caught, detect_stale():
        train()
    assert str(caught.value).count("0.block.layers.0.weight of this Sequential") == 1
    assert str(caught.value).count("2.block.layers.0.weight of this Sequential") == 1


def test_the_same_mistake_with_a_formula_of_plain_operations_is_explained() -> None:
    for norm in (WeightNorm(eps=1e-3), SpectralNorm(), WeightNorm(dim=None)):
        with pytest.raises(StaleWeightError, match="recompute in between"), detect_stale():
            repeat(backward, Net(norm).eval())


def test_a_second_backward_of_ones_own_is_left_as_it_is() -> None:
    net = Net(forgets=False)
    backward(net)
    with pytest.raises(RuntimeError, match=SECOND_BACKWARD) as caught, detect_stale(net):
        repeat(lambda loss: loss.backward(), net(X).sum())
    assert type(caught.value) is RuntimeError


def test_a_retained_graph_is_no_mistake() -> None:
    net = Net()
    with detect_stale(net):
        net(X).sum().backward(retain_graph=True)
        net(X).sum().backward(retain_graph=True)


def test_reading_without_gradient_after_a_backward_is_no_mistake() -> None:
    net = Net()

    def evaluate_and_err() -> None:
        with torch.no_grad():
            net(X)
        repeat(lambda loss: loss.backward(), torch.ones(1, requires_grad=True).exp())

    backward(net)
    with pytest.raises(RuntimeError) as caught, detect_stale(net):
        evaluate_and_err()
    assert type(caught.value) is RuntimeError


def test_other_errors_pass_through() -> None:
    for error in (RuntimeError("something else"), KeyError("x"), KeyboardInterrupt()):
        net = Net()

        def fail(net: nn.Module = net, error: BaseException = error) -> None:
            backward(net)
            net(X)
            raise error

        with pytest.raises(type(error)) as caught, detect_stale(net):
            fail()
        assert caught.value is error
        assert weight.on_read is None


# cached


@pytest.mark.parametrize("way", ["apply", "inline"])
def test_a_change_while_a_cached_block_holds_the_weight_raises(way: str) -> None:
    layer = getattr(WeightNorm(), way)(nn.Linear(3, 2))
    with detect_stale(layer), cached(layer):
        layer(X)
        make_stale(layer)
        with pytest.raises(StaleWeightError, match=r"cached\(model\) block holds it. Change them after the block"):
            layer(X)


def test_two_backwards_in_one_cached_block_are_explained() -> None:
    layer = WeightNorm().inline(nn.Linear(3, 2))
    with detect_stale(), cached(layer):
        backward(layer)
    with pytest.raises(StaleWeightError, match=r"cached\(model\) block holds it: one"), detect_stale(), cached(layer):
        repeat(backward, layer)


# on and off


def test_it_is_off_before_and_after_and_leaves_nothing_behind() -> None:
    net = Net()
    keys = [set(vars(module)) for module in net.modules()]
    assert weight.on_read is None
    with detect_stale(net):
        assert weight.on_read is not None
        net(X)
    assert weight.on_read is None
    assert [set(vars(module)) for module in net.modules()] == keys
    make_stale(net.block.layers[0])
    with pytest.warns(StaleWeightWarning):
        net(X)  # no error


def test_what_it_remembers_does_not_keep_old_weights_alive() -> None:
    net = Net(forgets=False)
    with detect_stale(net):
        net(X)
        old = carrier.store_of(net.block.layers[0])["weight"]
        ref = weakref.ref(old)
        del old
        net.block.wn.recompute(net.block.layers[0])
        gc.collect()
        assert ref() is None


def test_blocks_nest() -> None:
    net = Net()
    with detect_stale(net):
        net(X)
        with detect_stale():
            net(X)
        write_data(net)
        with pytest.raises(StaleWeightError, match=r"^block\.layers\.0\.weight of this Net"), detect_stale():
            net.block(X)  # the model of the outer block names it
        with pytest.raises(StaleWeightError):
            net(X)
    assert weight.on_read is None


def test_the_inner_of_two_blocks_explains_a_second_backward() -> None:
    net = Net()
    with detect_stale(), pytest.raises(StaleWeightError, match=SECOND_BACKWARD), detect_stale():
        repeat(backward, net)


def test_it_decorates_a_function() -> None:
    net = Net()

    @detect_stale(net)
    def train() -> None:
        sgd_step(net)
        sgd_step(net)

    for _ in range(2):
        with pytest.raises(StaleWeightError):
            train()
        recompute_all(net)
    assert weight.on_read is None


def in_thread(function: Callable[[], Any]) -> Any:
    """What `function` returns or raises, in a thread of its own."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return found[0]


def test_the_reads_of_other_threads_are_not_watched() -> None:
    net = Net()
    make_stale(net.block.layers[0])
    with detect_stale(net):
        assert isinstance(in_thread(lambda: net(X)), Tensor)
        with pytest.raises(StaleWeightError):
            net(X)


def test_threads_enter_and_leave_in_any_order() -> None:
    net = Net()
    make_stale(net.block.layers[0])
    entered, leave = threading.Event(), threading.Event()

    def stays_longer() -> None:
        with detect_stale(net):
            entered.set()
            leave.wait(60)
            recompute_all(net)  # what another thread computed is not used in this one
            make_stale(net.block.layers[0])
            net(X)

    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(in_same_thread(stays_longer)))
    with detect_stale(net):
        thread.start()
        entered.wait(60)
    with pytest.warns(StaleWeightWarning):
        net(X)  # this thread has left
    assert weight.on_read is not None
    leave.set()
    thread.join(60)
    assert isinstance(found[0], StaleWeightError)
    assert weight.on_read is None


def in_same_thread(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except StaleWeightError as error:
        return error


# data_dependent_init

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "Linear": (lambda: nn.Linear(6, 5), (64, 6), -1),
    "Linear, sequences": (lambda: nn.Linear(6, 5), (16, 7, 6), -1),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), (16, 4, 9), 1),
    "Conv1d, one sample": (lambda: nn.Conv1d(4, 6, 3), (4, 30), 0),
    "Conv2d": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding="valid"), (8, 3, 9, 9), 1),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (4, 2, 4, 4, 4), 1),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2), (8, 4, 9), 1),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 3), (4, 3, 5, 5), 1),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (4, 2, 3, 3, 3), 1),
}


def statistics(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    values = output.detach().double().movedim(channels, 0).flatten(1)
    return values.mean(1), values.var(1, correction=0)


def assert_standardized(output: Tensor, channels: int, tolerance: float = 1e-4) -> None:
    mean, variance = statistics(output, channels)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=tolerance)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=tolerance)


def plain_twin(model: nn.Module) -> nn.Module:
    """A model of ordinary layers, each with the weight that the formula gives."""
    twin = copy.deepcopy(model)
    for path, module in list(twin.named_modules()):
        if hasattr(module, "weight_g"):
            weight = nn.Parameter(by_hand(module, 1 if "Transpose" in type(module).__name__ else 0).detach())
            plain = copy.deepcopy(module)
            WeightNorm().remove(plain)
            plain.weight = weight
            if path:
                parent, _, name = path.rpartition(".")
                setattr(twin.get_submodule(parent), name, plain)
            else:
                twin = plain
    return twin


def preactivations(model: nn.Module, *batch: Tensor) -> dict[str, Tensor]:
    """What each layer of an ordinary model computes."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if hasattr(module, "weight"):
            module.register_forward_hook(lambda m, i, output, path=path: found.setdefault(path, output))
    model(*batch)
    return found


@pytest.mark.parametrize("way", ["apply", "inline"])
@pytest.mark.parametrize(("make", "shape", "channels"), LAYERS.values(), ids=LAYERS)
def test_every_layer_gets_mean_0_and_variance_1(
    make: Callable[[], nn.Module], shape: tuple[int, ...], channels: int, way: str
) -> None:
    layer, x = getattr(WeightNorm(dim="out"), way)(make()), 3 * torch.randn(shape) + 1
    make_stale(layer)
    v = layer.weight_v.detach().clone()
    assert data_dependent_init(layer, x) == ["weight"]
    assert_standardized(plain_twin(layer)(x), channels)
    assert_standardized(layer(x), channels)
    assert torch.equal(layer.weight_v, v)


def test_g_and_bias_are_those_of_the_paper() -> None:
    layer, x = WeightNorm().apply(nn.Linear(6, 5)), torch.randn(64, 6)
    with torch.no_grad():
        layer.weight_g.fill_(0)
    data_dependent_init(layer, x)
    v = layer.weight_v.detach()
    t = x @ (v / v.norm(dim=1, keepdim=True)).T
    deviation = t.std(0, correction=0)
    torch.testing.assert_close(layer.weight_g.detach().flatten(), 1 / deviation)
    torch.testing.assert_close(layer.bias.detach(), -t.mean(0) / deviation)


def deep_model(way: str = "inline") -> nn.Module:
    wn = WeightNorm(dim="out")
    layer = getattr(wn, way)
    return nn.Sequential(
        layer(nn.Conv1d(2, 8, 3)),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        layer(nn.ConvTranspose1d(8, 6, 3)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(54, 10),
        nn.ReLU(),
        layer(nn.Linear(10, 4)),
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_deep_model_is_standardized_layer_after_layer(training: bool) -> None:
    model, x = deep_model().train(training), torch.randn(64, 2, 9)
    for index in (0, 3, 8):
        make_stale(model[index])
    assert data_dependent_init(model, x) == ["0.weight", "3.weight", "8.weight"]
    found = preactivations(plain_twin(model), x)
    for path in ("0", "3", "8"):
        assert_standardized(found[path], 1)
    assert (statistics(found["6"], 1)[1] - 1).abs().max() > 0.1  # this one is not normed


def test_layers_that_are_recomputed_by_hand_go_in_the_order_of_the_forward() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wn = WeightNorm()
            self.last = self.wn.apply(nn.Linear(5, 3))
            self.first = self.wn.apply(nn.Linear(4, 5))

        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            self.wn.recompute(self.first)
            self.wn.recompute(self.last)
            return self.last(self.first(scale * x).relu())

    model, x = Backwards(), torch.randn(32, 4)
    for layer in (model.first, model.last):
        make_stale(layer)
    assert data_dependent_init(model, x, scale=5.0) == ["first.weight", "last.weight"]
    assert_standardized(model(x, scale=5.0), 1)
    hidden = F.linear(5 * x, by_hand(model.first), model.first.bias)
    assert_standardized(hidden, 1)


def test_what_is_no_linear_or_convolution_is_left_alone() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = WeightNorm().inline(nn.Embedding(9, 4))
            self.fc = WeightNorm().inline(nn.Linear(4, 3))
            self.seen: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(torch.is_grad_enabled())
            return self.fc(self.embedding(x))

    model, x = Mixed(), torch.arange(9)
    make_stale(model.embedding)
    before = copy.deepcopy(model.embedding.state_dict())
    assert data_dependent_init(model, x) == ["fc.weight"]
    assert_standardized(model(x), 1)
    torch.testing.assert_close(model.embedding.state_dict(), before, rtol=0, atol=0)
    assert model.seen == [False, True]


def test_a_layer_that_is_called_twice_keeps_what_the_first_call_gave() -> None:
    layer = WeightNorm().inline(nn.Linear(4, 4))
    model, x = nn.Sequential(layer, nn.ReLU(), layer), torch.randn(64, 4)
    assert data_dependent_init(model, x) == ["0.weight"]
    assert_standardized(F.linear(x, by_hand(layer), layer.bias), 1)


def test_a_weight_used_by_a_function_and_one_held_by_cached_are_initialized() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = WeightNorm().inline(nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(input=x, weight=self.fc.weight, bias=self.fc.bias)

    model, x = Functional(), torch.randn(32, 4)
    make_stale(model.fc)
    with cached(model):
        data_dependent_init(model, x)
        assert_standardized(model(x), 1)
    assert_standardized(model(x), 1)


def test_a_transformer_layer_is_initialized_on_its_fast_path_too() -> None:
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(8, 5, 8)
    names = apply_all(layer, WeightNorm())
    for module in (layer.linear1, layer.linear2):
        make_stale(module)
    assert data_dependent_init(layer.eval(), x) == names == ["linear1.weight", "linear2.weight"]
    found = preactivations(plain_twin(layer).train(), x)
    assert_standardized(found["linear1"], -1)
    assert_standardized(found["linear2"], -1)


def test_a_compiled_model_is_initialized() -> None:
    model, x = deep_model(), torch.randn(16, 2, 9)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        assert len(data_dependent_init(compiled, x)) == 3
        assert_standardized(compiled(x), 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 0.05)])
def test_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    layer, x = WeightNorm().inline(nn.Linear(6, 5).to(dtype)), (3 * torch.randn(256, 6) + 1).to(dtype)
    data_dependent_init(layer, x)
    assert_standardized(layer(x), 1, tolerance)


def everything(model: nn.Module) -> dict[str, Any]:
    """The state of a model but for the g and bias of weight-normed layers, and of torch."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = {
        f"{path} {name}": len(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if "hook" in name and value is not None and hasattr(value, "__len__")
    }
    return {
        "state": {key: value for key, value in state.items() if not key.endswith(("weight_g", "bias"))},
        "training": [module.training for module in model.modules()],
        "keys": [list(vars(module)) for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "ids": [id(parameter) for parameter in (*model.parameters(), *model.buffers())],
        "hooks": hooks,
        "grads": [parameter.grad for parameter in model.parameters()],
        "random": torch.get_rng_state(),
        "modes": torch.overrides._get_current_function_mode_stack(),
        "on_read": weight.on_read,
    }


def assert_same(found: dict[str, Any], before: dict[str, Any]) -> None:
    torch.testing.assert_close(found.pop("state"), before.pop("state"), rtol=0, atol=0)
    assert torch.equal(found.pop("random"), before.pop("random"))
    assert found == before


class Counting(nn.Module):
    """Puts another buffer in the place of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_otherwise_what_it_was(training: bool) -> None:
    model = nn.Sequential(
        WeightNorm().inline(nn.Linear(4, 6)),
        nn.BatchNorm1d(6),
        nn.Dropout(0.5),
        Counting(),
        SpectralNorm().inline(nn.Linear(6, 6)),
        nn.ReLU(),
        WeightNorm().inline(nn.Linear(6, 3)),
    ).train(training)
    x = torch.randn(64, 4)
    before = everything(model)
    data_dependent_init(model, x)
    assert_same(everything(model), before)
    assert {row.state for row in report(model).rows} == {"fresh"}
    with detect_stale():
        model(x)


def refused(model: nn.Module, *batch: Any, match: str, error: type[Exception] = ValueError) -> None:
    """`data_dependent_init` raises, and nothing at all has changed."""
    before, state = everything(model), copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        data_dependent_init(model, *batch)
    assert_same(everything(model), before)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_a_model_without_weight_normed_layers_is_refused() -> None:
    for model in (nn.Linear(2, 2), SpectralNorm().inline(nn.Linear(2, 2)), nn.Sequential()):
        refused(model, torch.ones(4, 2), match="this (Linear|Sequential) has no weight-normed.*apply_all")


def behind(layer: nn.Module) -> nn.Module:
    """A good layer, and one that cannot be initialized after it."""
    return nn.Sequential(WeightNorm().inline(nn.Linear(4, 4)), layer)


LATER = torch.arange(32.0).view(8, 4).sin()


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (lambda: WeightNorm().inline(nn.Linear(4, 3, bias=False)), r"initialize 1 \(Linear\): it has no bias.*=True"),
        (lambda: WeightNorm(dim=1).inline(nn.Linear(4, 3)), r'\(Linear\): its g belongs to dim=1 .* 0; .*dim="out"'),
        (lambda: WeightNorm(dim=None).inline(nn.Linear(4, 3)), "its g belongs to dim=None"),
        (lambda: WeightNorm().inline(nn.ConvTranspose1d(4, 4, 1)), r"dim=0 and its output channels are dim 1"),
        (
            lambda: WeightNorm(dim="out").inline(nn.ConvTranspose1d(4, 4, 1, groups=2)),
            "its 2 groups share each g; make it with groups=1",
        ),
        (
            lambda: WeightNorm("bias").inline(WeightNorm().inline(nn.Linear(4, 3))),
            "its bias is not a parameter of its own, but computed",
        ),
    ],
    ids=["no bias", "dim=1", "dim=None", "ConvTranspose dim=0", "groups", "normed bias"],
)
def test_a_layer_that_cannot_have_mean_0_and_variance_1_is_refused(layer: Callable[[], nn.Module], match: str) -> None:
    refused(behind(layer()), LATER, match=match)


def test_channels_that_do_not_vary_are_refused_by_number() -> None:
    model = behind(WeightNorm().inline(nn.Linear(4, 7)))
    refused(model, torch.ones(8, 4), match=r"initialize 0 \(Linear\): over the 8 values of each, .* \[0, 1, 2, 3\]")
    refused(model, LATER[:1], match="over the 1 values of each")
    model.insert(1, nn.Threshold(1e9, 0.5))
    refused(model, LATER, match=r"initialize 2 \(Linear\).*channels \[0, 1, 2, 3, 4\] and 2 more do not vary")
    model[2] = WeightNorm().inline(nn.Linear(4, 5))
    refused(model, LATER, match=r"initialize 2 \(Linear\).*channels \[0, 1, 2, 3, 4\] do not vary")


def test_channels_that_vary_by_rounding_alone_are_refused() -> None:
    model, batch = behind(WeightNorm().inline(nn.Linear(4, 3))), torch.full((8, 4), 1000.0)
    batch[:4, 0] += 5e-4
    with torch.no_grad():
        model[0].weight_v.fill_(1)
    assert (F.linear(batch, by_hand(model[0])).std(0) > 0).all()
    refused(model, batch, match=r"initialize 0 \(Linear\).* \[0, 1, 2, 3\] do not vary")


def test_one_dead_channel_is_refused_by_its_number() -> None:
    model = behind(WeightNorm(eps=1e-6).inline(nn.Linear(4, 3)))
    with torch.no_grad():
        model[1].weight_v[2] = 0
    refused(model, LATER, match=r"initialize 1 \(Linear\).*channels \[2\] do not vary")


def test_values_that_are_not_finite_are_refused() -> None:
    model = behind(WeightNorm().inline(nn.Linear(4, 3)))
    for value in (torch.nan, torch.inf):
        batch = LATER.clone()
        batch[0, 0] = value
        refused(model, batch, match="are not finite")


def test_a_layer_that_the_batch_does_not_reach_is_refused() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = (WeightNorm().inline(nn.Linear(4, 3)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    refused(TwoHeads(), LATER, match="on this batch the model did not call unused in eager mode")


def test_a_weight_that_is_used_without_its_bias_is_refused() -> None:
    class Unbiased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = WeightNorm().inline(nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.fc.weight)

    refused(Unbiased(), LATER, match=r"initialize fc \(Linear\): the model uses its weight without its bias")


@pytest.mark.parametrize("error", [TypeError, KeyboardInterrupt])
def test_an_error_in_the_forward_leaves_everything_as_it_was(error: type[BaseException]) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3)
            raise error("in the middle")

    model = nn.Sequential(WeightNorm().inline(nn.Linear(4, 4)), nn.BatchNorm1d(4), Fails())
    refused(model, LATER, match="in the middle", error=error)  # type: ignore[arg-type]


def test_after_an_error_the_stored_weights_are_fresh() -> None:
    class Explicit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wn = WeightNorm()
            self.fc = self.wn.apply(nn.Linear(4, 4))
            self.dead = self.wn.apply(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.wn.recompute(self.fc)
            self.wn.recompute(self.dead)
            return self.dead(0 * self.fc(x))

    model = Explicit()
    refused(model, LATER, match="dead")
    torch.testing.assert_close(model.fc.weight, by_hand(model.fc))
    torch.testing.assert_close(model.dead.weight, by_hand(model.dead))


def test_the_public_functions_have_signatures_that_read_well() -> None:
    assert list(inspect.signature(steps).parameters) == ["module", "name", "gradient"]
    assert list(inspect.signature(detect_stale).parameters) == ["model"]
    assert list(inspect.signature(data_dependent_init).parameters) == ["model", "batch", "keywords"]
