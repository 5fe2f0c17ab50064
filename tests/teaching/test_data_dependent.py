"""data_dependent_init: mean 0 and variance 1 after every layer, and what cannot have them is refused."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import by_hand, make_stale
from torch import Tensor, nn

from explicit_wn import SpectralNorm, WeightNorm, apply_all, cached, data_dependent_init, detect_stale, report
from explicit_wn.carrier import weight

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
            weight = nn.Parameter(by_hand(module, dim=1 if "Transpose" in type(module).__name__ else 0).detach())
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


def test_its_signature_reads_well() -> None:
    assert list(inspect.signature(data_dependent_init).parameters) == ["model", "batch", "keywords"]
