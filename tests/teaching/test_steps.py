"""steps: every norm's computation of now, with its gradients, and how the table shows it."""

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
from layers import by_hand, make_stale
from torch import Tensor, nn

from explicit_wn import SpectralNorm, WeightNorm, carrier, detect_stale, steps
from explicit_wn.reparametrization import Reparametrization


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
    expected = {"v": v, "‖v‖": length, "v/‖v‖": v / length, "g": g, "w": by_hand(conv, dim=dim)}
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
    with pytest.raises(KeyError, match="no step is called 'sigma'; the steps are w₀, W, u, v, σ, w"):
        shown["sigma"]
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


def test_its_signature_reads_well() -> None:
    assert list(inspect.signature(steps).parameters) == ["module", "name", "gradient"]
