"""The verbs that every norm shares, shown with WeightNorm, in eager mode."""

import copy
import inspect
from collections.abc import Callable
from typing import Any, Optional

import attrs
import pytest
import torch
from layers import by_hand, first_output, make_stale, read_stale
from torch import Tensor, nn

from explicit_wn import SpectralNorm, WeightNorm
from explicit_wn.reparametrization import Reparametrization

Factory = Callable[[], nn.Module]

LAYERS: dict[str, tuple[Factory, str, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(3, 2), "weight", (4, 3)),
    "bias": (lambda: nn.Linear(3, 2), "bias", (4, 3)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), "weight", (1, 2, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 3), "weight", (1, 2, 5)),
    "LSTM": (lambda: nn.LSTM(3, 2, num_layers=2), "weight_hh_l1", (4, 1, 3)),
}
every_layer = pytest.mark.parametrize(("make", "name", "shape"), LAYERS.values(), ids=LAYERS)


def plain_with(plain: nn.Module, **weights: Tensor) -> nn.Module:
    """A copy of `plain` with other weights."""
    plain = copy.deepcopy(plain)
    with torch.no_grad():
        for name, weight in weights.items():
            getattr(plain, name).copy_(weight)
    return plain


def copied(value: Any) -> Any:
    """The weight as a plain tensor."""
    return value.detach().clone()


# apply


@every_layer
def test_apply_makes_the_original_parameter_the_direction(make: Factory, name: str, shape: tuple[int, ...]) -> None:
    module = make()
    original, value = getattr(module, name), copied(getattr(module, name))
    assert WeightNorm(name).apply(module) is module
    assert getattr(module, f"{name}_v") is original
    torch.testing.assert_close(original.detach(), value, rtol=0, atol=0)
    torch.testing.assert_close(getattr(module, name), value)


@every_layer
def test_apply_leaves_the_output_as_it_was(make: Factory, name: str, shape: tuple[int, ...]) -> None:
    module, x = make(), torch.randn(shape)
    before = first_output(module, x)
    torch.testing.assert_close(first_output(WeightNorm(name).apply(module), x), before)


def test_the_parts_are_parameters_and_the_weight_is_not() -> None:
    module = WeightNorm().apply(nn.Linear(3, 2))
    assert list(dict(module.named_parameters())) == ["bias", "weight_g", "weight_v"]
    assert list(module.state_dict()) == ["bias", "weight_g", "weight_v"]
    assert not dict(module.named_buffers())
    assert not module.weight.is_leaf


def test_apply_leaves_class_name_and_isinstance_as_they_were() -> None:
    module: Any = WeightNorm().apply(nn.Conv1d(2, 3, 3))
    cls = type(module)
    assert isinstance(module, nn.Conv1d)
    assert (cls.__name__, cls.__qualname__, cls.__module__) == ("Conv1d", "Conv1d", "torch.nn.modules.conv")
    assert cls.__doc__ == nn.Conv1d.__doc__


@pytest.mark.parametrize("verb", ["apply", "inline"])
@every_layer
def test_no_hook_is_registered(make: Factory, name: str, shape: tuple[int, ...], verb: str) -> None:
    wn, module = WeightNorm(name), make()
    getattr(wn, verb)(module)
    wn.recompute(module)
    module(torch.randn(shape))
    hooks = {key: value for held in (wn, module) for key, value in vars(held).items() if key.endswith("_hooks")}
    assert len(hooks) >= 8
    assert not any(hooks.values())
    assert getattr(getattr(module, f"{name}_v"), "_backward_hooks", None) is None


@pytest.mark.parametrize("requires_grad", [True, False])
def test_requires_grad_is_kept(requires_grad: bool) -> None:
    wn, module = WeightNorm(), nn.Linear(3, 2).requires_grad_(requires_grad)
    wn.apply(module)
    assert module.weight_g.requires_grad is requires_grad
    assert module.weight_v.requires_grad is requires_grad
    assert module.weight.requires_grad is requires_grad
    assert wn.remove(module).weight.requires_grad is requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    wn, module = WeightNorm(dim=1), nn.Linear(3, 2, dtype=dtype)
    value = copied(module.weight)
    wn.apply(module)
    assert {module.weight_g.dtype, module.weight_v.dtype, module.weight.dtype} == {dtype}
    torch.testing.assert_close(copied(module.weight), value)
    assert wn.remove(module).weight.dtype is dtype


def test_device_is_kept() -> None:
    wn, module = WeightNorm(), nn.Linear(3, 2, device="meta")
    wn.apply(module)
    assert {module.weight_g.device.type, module.weight_v.device.type, module.weight.device.type} == {"meta"}
    assert wn.remove(module).weight.device.type == "meta"


@pytest.mark.parametrize("dim", [0, 1, 3, None])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_memory_format_is_kept(dim: int | None, eps: float) -> None:
    wn, module = WeightNorm(dim=dim, eps=eps), nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    wn.apply(module)
    make_stale(module)
    wn.recompute(module)
    torch.testing.assert_close(module.weight, by_hand(module, dim=dim))
    for weight in (module.weight_v, module.weight, wn.remove(module).weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()


@pytest.mark.parametrize("verb", ["apply", "inline"])
def test_name_and_dim_given_to_the_verb_hold_instead_of_the_own(verb: str) -> None:
    wn, module = WeightNorm("weight", dim=0), nn.Bilinear(2, 3, 4)
    getattr(wn, verb)(module, "weight", 2)
    getattr(wn, verb)(module, name="bias")
    assert module.weight_g.shape == (1, 1, 3)
    assert module.bias_g.shape == (4,)
    make_stale(module, "weight", "bias")
    wn.recompute(module)
    torch.testing.assert_close(module.weight, by_hand(module, "weight", 2))
    torch.testing.assert_close(module.bias, by_hand(module, "bias", 0))
    assert (wn.name, wn.dim) == ("weight", 0)


def test_apply_given_a_function_is_that_of_module() -> None:
    model = nn.Module()
    model.wn = WeightNorm()
    model.fc = model.wn.apply(nn.Linear(3, 2))
    seen: list[nn.Module] = []
    assert model.apply(seen.append) is model
    assert seen == [model.wn, model.fc, model]
    assert model.wn.apply(seen.append) is model.wn
    assert seen[3:] == [model.wn]


def test_init_code_that_goes_by_class_names_finds_normed_layers() -> None:
    def init(module: nn.Module) -> None:
        name = module.__class__.__name__
        if name.find("Conv") != -1:
            nn.init.constant_(module.get_parameter("weight_v"), 2)
        elif name.find("Linear") != -1:
            nn.init.constant_(module.get_parameter("weight"), 3)
        elif name == "LSTM":
            nn.init.constant_(module.get_parameter("weight_hh_l0_g"), 4)

    model = nn.Module()
    model.wn = WeightNorm()
    model.conv = model.wn.apply(nn.Conv1d(2, 3, 3))
    model.fc = nn.Linear(3, 2)
    model.rnn = WeightNorm("weight_hh_l0").apply(nn.LSTM(2, 3))
    model.apply(init)
    assert (model.conv.weight_v == 2).all()
    assert (model.fc.weight == 3).all()
    assert (model.rnn.weight_hh_l0_g == 4).all()


# compute_weight


@every_layer
def test_compute_weight_is_fresh_and_stores_nothing(make: Factory, name: str, shape: tuple[int, ...]) -> None:
    wn, module = WeightNorm(name), make()
    wn.apply(module)
    stored = copied(getattr(module, name))
    make_stale(module, name)
    before = dict(vars(module))
    weight = wn.compute_weight(module)
    torch.testing.assert_close(weight, by_hand(module, name))
    torch.testing.assert_close(copied(read_stale(module, name)), stored, rtol=0, atol=0)
    assert vars(module) == before


def test_compute_weight_takes_a_name_and_the_dim_that_was_recorded() -> None:
    wn, module = WeightNorm(), nn.Linear(3, 2)
    wn.apply(module, dim=1)
    wn.apply(module, name="bias")
    make_stale(module, "weight", "bias")
    torch.testing.assert_close(wn.compute_weight(module, "weight"), by_hand(module, "weight", 1))
    torch.testing.assert_close(wn.compute_weight(module, "weight", 1), by_hand(module, "weight", 1))
    torch.testing.assert_close(wn.compute_weight(module, "weight", dim=-1 + 2), by_hand(module, "weight", 1))
    torch.testing.assert_close(wn.compute_weight(module, "bias"), by_hand(module, "bias", 0))
    torch.testing.assert_close(wn.compute_weight(module), by_hand(module, "weight", 1))


def test_compute_weight_can_be_differentiated() -> None:
    wn, module = WeightNorm(), nn.Linear(3, 2)
    wn.apply(module)
    weights = torch.randn(2, 3)
    parts = module.weight_g, module.weight_v
    got = torch.autograd.grad((wn.compute_weight(module) * weights).sum(), parts)
    torch.testing.assert_close(got, torch.autograd.grad((by_hand(module) * weights).sum(), parts))


# recompute, call


def recompute(wn: WeightNorm, module: nn.Module) -> None:
    assert wn.recompute(module) is None


def call(wn: WeightNorm, module: nn.Module) -> None:
    assert wn.call(module) is module


def calling_the_object(wn: WeightNorm, module: nn.Module) -> None:
    assert wn(module) is module


every_recompute = pytest.mark.parametrize("refresh", [recompute, call, calling_the_object])


@every_recompute
@every_layer
def test_recompute_makes_the_weight_and_the_output_fresh(
    make: Factory, name: str, shape: tuple[int, ...], refresh: Callable[[WeightNorm, nn.Module], None]
) -> None:
    wn, plain, x = WeightNorm(name), make(), torch.randn(shape)
    module = wn.apply(copy.deepcopy(plain))
    make_stale(module, name)
    refresh(wn, module)
    torch.testing.assert_close(getattr(module, name), by_hand(module, name))
    torch.testing.assert_close(
        first_output(module, x), first_output(plain_with(plain, **{name: by_hand(module, name)}), x)
    )


def test_without_recompute_the_weight_stays_what_it_was() -> None:
    plain = nn.Linear(3, 2)
    module = WeightNorm().apply(copy.deepcopy(plain))
    make_stale(module)
    torch.testing.assert_close(read_stale(module).detach(), plain.weight.detach())
    weight = module.weight
    make_stale(module)
    assert module.weight is weight


@every_recompute
def test_the_gradient_reaches_the_parts(refresh: Callable[[WeightNorm, nn.Module], None]) -> None:
    wn, x = WeightNorm(), torch.randn(4, 3)
    module = wn.apply(nn.Linear(3, 2))
    for _ in range(2):
        make_stale(module)
        refresh(wn, module)
        parts = module.weight_g, module.weight_v
        got = torch.autograd.grad(module(x).square().sum(), parts)
        loss = nn.functional.linear(x, by_hand(module), module.bias).square().sum()
        torch.testing.assert_close(got, torch.autograd.grad(loss, parts))


@pytest.mark.parametrize("dim", [1, None, "out"])
def test_recompute_uses_the_dim_recorded_at_apply(dim: Any) -> None:
    wn = WeightNorm(dim=dim)
    module = wn.apply(nn.ConvTranspose1d(2, 3, 4))
    wn.dim = 0
    for other in (wn, WeightNorm(), WeightNorm(dim=2), WeightNorm(eps=1.0)):
        make_stale(module)
        other.recompute(module)
        torch.testing.assert_close(module.weight, by_hand(module, dim=1 if dim == "out" else dim))


def test_one_object_recomputes_all_that_it_was_applied_to_and_nothing_else() -> None:
    module = nn.LSTM(2, 3)
    mine, other = WeightNorm("weight_ih_l0"), WeightNorm("weight_hh_l0")
    mine.apply(module)
    mine.apply(module, name="bias_ih_l0")
    other.apply(module)
    make_stale(module, "weight_ih_l0", "bias_ih_l0", "weight_hh_l0")
    stale = copied(read_stale(module, "weight_hh_l0"))
    mine.recompute(module)
    torch.testing.assert_close(module.weight_ih_l0, by_hand(module, "weight_ih_l0"))
    torch.testing.assert_close(module.bias_ih_l0, by_hand(module, "bias_ih_l0"))
    torch.testing.assert_close(copied(module.weight_hh_l0), stale, rtol=0, atol=0)
    other.recompute(module)
    torch.testing.assert_close(module.weight_hh_l0, by_hand(module, "weight_hh_l0"))


@every_recompute
def test_an_object_of_the_same_name_recomputes_what_another_one_normed(
    refresh: Callable[[WeightNorm, nn.Module], None],
) -> None:
    module = WeightNorm("weight").apply(nn.Linear(3, 2))
    WeightNorm("weight").apply(module, name="bias")
    make_stale(module, "weight", "bias")
    refresh(WeightNorm("bias"), module)
    torch.testing.assert_close(module.bias, by_hand(module, "bias"))
    refresh(WeightNorm("weight"), module)
    torch.testing.assert_close(module.weight, by_hand(module))


def test_one_object_serves_many_modules() -> None:
    wn = WeightNorm()
    modules = [wn.apply(nn.Linear(3, 2)), wn.apply(nn.Linear(3, 2), dim=1), wn.apply(nn.Conv1d(2, 3, 3))]
    for module, dim in zip(modules, (0, 1, 0), strict=True):
        make_stale(module)
        wn.recompute(module)
        torch.testing.assert_close(module.weight, by_hand(module, dim=dim))


# remove


@every_layer
@pytest.mark.parametrize("verb", ["apply", "inline"])
def test_remove_makes_the_module_what_it_was(make: Factory, name: str, shape: tuple[int, ...], verb: str) -> None:
    wn, module = WeightNorm(name), make()
    cls, keys, names = type(module), list(vars(module)), set(dict(module.named_parameters()))
    getattr(wn, verb)(module)
    assert wn.remove(module) is module
    assert type(module) is cls
    assert list(vars(module)) == keys
    assert set(dict(module.named_parameters())) == names
    weight = getattr(module, name)
    assert type(weight) is nn.Parameter
    assert weight.is_leaf


@every_layer
def test_remove_bakes_the_parts_as_they_are_now(make: Factory, name: str, shape: tuple[int, ...]) -> None:
    wn, plain, x = WeightNorm(name), make(), torch.randn(shape)
    module = wn.apply(copy.deepcopy(plain))
    make_stale(module, name)
    expected = copied(by_hand(module, name))
    wn.remove(module)
    torch.testing.assert_close(getattr(module, name).detach(), expected)
    torch.testing.assert_close(first_output(module, x), first_output(plain_with(plain, **{name: expected}), x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: nn.Linear(3, 2), ["weight"]),
        (lambda: nn.Linear(3, 2), ["bias", "weight"]),
        (lambda: nn.LSTM(2, 3), ["weight_hh_l0"]),
        (lambda: nn.LSTM(2, 3), ["weight_ih_l0", "bias_hh_l0"]),
    ],
)
def test_remove_leaves_the_parameters_in_the_order_that_torch_leaves_them(make: Factory, names: list[str]) -> None:
    ours, hooked = make(), make()
    for name in names:
        WeightNorm(name).apply(ours)
        torch.nn.utils.weight_norm(hooked, name)
    assert list(dict(ours.named_parameters())) == list(dict(hooked.named_parameters()))
    for name in names:
        WeightNorm(name).remove(ours)
        torch.nn.utils.remove_weight_norm(hooked, name)
        assert list(dict(ours.named_parameters())) == list(dict(hooked.named_parameters()))


@pytest.mark.parametrize(("g", "v", "expected"), [(True, False, True), (False, True, True), (False, False, False)])
def test_the_baked_parameter_trains_if_a_part_did(g: bool, v: bool, expected: bool) -> None:
    wn, module = WeightNorm(), nn.Linear(3, 2)
    wn.apply(module)
    module.weight_g.requires_grad_(g)
    module.weight_v.requires_grad_(v)
    assert wn.remove(module).weight.requires_grad is expected


def test_remove_by_name_ends_that_norm_alone() -> None:
    wn, module = WeightNorm(dim=None), nn.Linear(3, 2)
    wn.apply(module, dim=0)
    wn.apply(module, name="bias")
    make_stale(module, "weight", "bias")
    expected = copied(by_hand(module, "bias", None))
    wn.remove(module, "bias")
    torch.testing.assert_close(module.bias.detach(), expected)
    assert list(dict(module.named_parameters())) == ["weight_g", "weight_v", "bias"]
    make_stale(module)
    wn.recompute(module)
    torch.testing.assert_close(module.weight, by_hand(module))
    wn.remove(module, name="weight")
    assert type(module) is nn.Linear


def test_remove_without_a_name_ends_all_that_the_object_does_there() -> None:
    wn, module = WeightNorm("weight_hh_l0"), nn.LSTM(2, 3)
    wn.apply(module)
    wn.apply(module, name="weight_ih_l0", dim=1)
    WeightNorm("bias_hh_l0").apply(module)
    make_stale(module, "weight_hh_l0", "weight_ih_l0")
    expected = copied(by_hand(module, "weight_hh_l0")), copied(by_hand(module, "weight_ih_l0", 1))
    wn.remove(module)
    torch.testing.assert_close((module.weight_hh_l0.detach(), module.weight_ih_l0.detach()), expected)
    assert {"bias_hh_l0_g", "bias_hh_l0_v"} < set(dict(module.named_parameters()))
    WeightNorm("bias_hh_l0").remove(module)
    assert type(module) is nn.LSTM


def test_remove_by_another_object_of_the_same_name_honours_the_recorded_dim() -> None:
    module = WeightNorm(dim=1).apply(nn.Linear(3, 2))
    make_stale(module)
    expected = copied(by_hand(module, dim=1))
    torch.testing.assert_close(WeightNorm("weight").remove(module).weight.detach(), expected)


def test_a_name_overridden_at_apply_is_honoured_by_remove() -> None:
    wn, module = WeightNorm("weight", dim=None), nn.Linear(3, 2)
    wn.apply(module, name="bias")
    make_stale(module, "bias")
    expected = copied(by_hand(module, "bias", None))
    torch.testing.assert_close(wn.remove(module).bias.detach(), expected)
    assert type(module) is nn.Linear


def test_a_module_can_be_normed_again_after_remove() -> None:
    module = nn.Linear(3, 2)
    for dim in (0, 1, None):
        wn = WeightNorm(dim=dim)
        wn.apply(module)
        make_stale(module)
        wn.recompute(module)
        expected = copied(by_hand(module, dim=dim))
        torch.testing.assert_close(wn.remove(module).weight.detach(), expected)


def test_an_rnn_reads_the_baked_weight_after_remove() -> None:
    module, x = nn.LSTM(3, 2), torch.randn(4, 1, 3)
    wn = WeightNorm("weight_hh_l0")
    wn.remove(wn.apply(module))
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0 * 2)
    plain = nn.LSTM(3, 2)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x)[0], plain(x)[0], rtol=0, atol=0)


# assign


@every_layer
def test_assign_is_the_inverse_of_the_formula(make: Factory, name: str, shape: tuple[int, ...]) -> None:
    wn, plain, x = WeightNorm(name), make(), torch.randn(shape)
    module = wn.apply(make())
    wanted = torch.randn_like(getattr(plain, name))
    parts = getattr(module, f"{name}_g"), getattr(module, f"{name}_v")
    assert wn.assign(module, wanted) is module
    torch.testing.assert_close(by_hand(module, name), wanted)
    torch.testing.assert_close(getattr(module, name), wanted)
    assert getattr(module, f"{name}_g") is parts[0]
    assert getattr(module, f"{name}_v") is parts[1]
    others = {key: value for key, value in module.named_parameters() if key in dict(plain.named_parameters())}
    torch.testing.assert_close(first_output(module, x), first_output(plain_with(plain, **others, **{name: wanted}), x))


def test_assign_takes_a_name() -> None:
    wn, module = WeightNorm(), nn.Linear(3, 2)
    wn.apply(module)
    wn.apply(module, name="bias")
    wanted = torch.tensor([1.0, -2.0])
    wn.assign(module, wanted, name="bias")
    torch.testing.assert_close(module.bias.detach(), wanted)
    torch.testing.assert_close(by_hand(module, "bias").detach(), wanted)
    wn.assign(module, torch.ones(2, 3))
    torch.testing.assert_close(by_hand(module, "weight").detach(), torch.ones(2, 3))
    torch.testing.assert_close(by_hand(module, "bias").detach(), wanted)


# inline


@every_layer
def test_an_inlined_layer_recomputes_in_its_own_forward(make: Factory, name: str, shape: tuple[int, ...]) -> None:
    wn, plain, x = WeightNorm(name), make(), torch.randn(shape)
    module = copy.deepcopy(plain)
    assert wn.inline(module) is module
    for _ in range(2):
        make_stale(module, name)
        torch.testing.assert_close(
            first_output(module, x), first_output(plain_with(plain, **{name: by_hand(module, name)}), x)
        )


def test_inline_in_a_sequential_trains_like_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(WeightNorm().inline(nn.Linear(3, 4)), nn.Tanh(), WeightNorm(dim=1).inline(nn.Linear(4, 2)))
    same = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    x = torch.randn(5, 3)

    def by_formula() -> Tensor:
        bias, g, v, last_bias, last_g, last_v = same
        hidden = nn.functional.linear(x, g * v / v.square().sum(1, keepdim=True).sqrt(), bias).tanh()
        return nn.functional.linear(hidden, last_g * last_v / last_v.square().sum(0, keepdim=True).sqrt(), last_bias)

    ours, theirs = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(same, 0.1)
    for _ in range(5):
        for optimizer, result in ((ours, model(x)), (theirs, by_formula())):
            optimizer.zero_grad()
            result.square().sum().backward()
            optimizer.step()
    torch.testing.assert_close([p.detach() for p in model.parameters()], [p.detach() for p in same])


class Own(nn.Module):
    """A layer with a telling signature."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor, scale: float = 2.0, *, shift: Optional[Tensor] = None) -> Tensor:
        """Scales and shifts."""
        result = nn.functional.linear(x, self.weight) * scale
        return result if shift is None else result + shift


@pytest.mark.parametrize("make", [Own, lambda: nn.ConvTranspose2d(2, 3, 3), lambda: nn.Bilinear(2, 3, 4)])
def test_an_inlined_forward_keeps_signature_defaults_and_annotations(make: Factory) -> None:
    plain: Any = make()
    module: Any = WeightNorm().inline(make())
    assert inspect.signature(module.forward) == inspect.signature(plain.forward)
    for attribute in ("__annotations__", "__doc__", "__name__", "__qualname__"):
        assert getattr(module.forward, attribute) == getattr(plain.forward, attribute)


def test_an_inlined_forward_takes_every_argument() -> None:
    module = WeightNorm().inline(Own())
    make_stale(module)
    x, shift = torch.randn(4, 3), torch.randn(2)
    linear = nn.functional.linear(x, by_hand(module))
    torch.testing.assert_close(module(x), linear * 2)
    torch.testing.assert_close(module(x, 3.0), linear * 3)
    torch.testing.assert_close(module(scale=3.0, x=x, shift=shift), linear * 3 + shift)
    with pytest.raises(TypeError, match="positional"):
        module(x, 3.0, shift)


def test_an_inlined_transposed_convolution_takes_its_output_size() -> None:
    module = WeightNorm(dim="out").inline(nn.ConvTranspose1d(2, 3, 3, stride=2))
    make_stale(module)
    x, weight = torch.randn(1, 2, 5), by_hand(module, dim=1)
    for size, padding in (([11], 0), ([12], 1)):
        expected = nn.functional.conv_transpose1d(x, weight, module.bias, stride=2, output_padding=padding)
        assert expected.shape[-1:] == torch.Size(size)
        torch.testing.assert_close(module(x, output_size=size), expected)
        torch.testing.assert_close(module(x, size), expected)


def test_an_inlined_norm_can_be_recomputed_and_removed_like_any_other() -> None:
    wn = WeightNorm()
    module = wn.inline(nn.Linear(3, 2))
    make_stale(module)
    wn.recompute(module)
    expected = by_hand(module)
    torch.testing.assert_close(module.weight, expected)
    assert type(wn.remove(module)) is nn.Linear
    assert "forward" not in vars(module)
    torch.testing.assert_close(module.weight.detach(), expected.detach())


def test_an_inlined_weight_is_fresh_wherever_it_is_read() -> None:
    module = WeightNorm().inline(nn.Linear(3, 2))
    parts = module.weight_g, module.weight_v
    with torch.no_grad():
        module(torch.randn(4, 3))
    for _ in range(2):
        make_stale(module)
        torch.testing.assert_close(module.weight, by_hand(module))
        for _ in range(2):
            got = torch.autograd.grad(module.weight.square().sum(), parts)
            torch.testing.assert_close(got, torch.autograd.grad(by_hand(module).square().sum(), parts))


def test_only_what_was_inlined_is_recomputed_in_forward() -> None:
    module = WeightNorm().inline(nn.Linear(3, 2))
    WeightNorm("bias").apply(module)
    make_stale(module, "weight", "bias")
    stale, x = copied(read_stale(module, "bias")), torch.randn(4, 3)
    torch.testing.assert_close(module(x), nn.functional.linear(x, by_hand(module), stale))


# clone, equal objects


@pytest.mark.parametrize("deep", [False, True])
def test_clone_is_an_equal_object_of_its_own(deep: bool) -> None:
    wn = WeightNorm("bias", dim=None, eps=1e-6)
    clone = wn.clone(deep)
    assert clone is not wn
    assert repr(clone) == repr(wn)
    assert type(clone) is WeightNorm
    clone.name, clone.dim, clone.eps = "weight", 1, 0.0
    assert repr(wn) == "WeightNorm('bias', dim=None, eps=1e-06)"
    assert clone.clone().clone(deep=True).dim == 1


def test_a_clone_and_a_fresh_object_act_on_what_another_one_normed() -> None:
    wn = WeightNorm("weight", dim=1)
    for other in (wn.clone(), copy.deepcopy(wn), WeightNorm("weight", dim=1), WeightNorm("weight")):
        module = wn.apply(nn.Linear(3, 2))
        make_stale(module)
        other.recompute(module)
        torch.testing.assert_close(module.weight, by_hand(module, dim=1))
        torch.testing.assert_close(other.compute_weight(module), by_hand(module, dim=1))
        other.assign(module, torch.ones(2, 3))
        torch.testing.assert_close(by_hand(module, dim=1).detach(), torch.ones(2, 3))
        assert type(other.remove(module)) is nn.Linear


def test_an_object_of_another_name_acts_on_what_is_normed_when_it_is_told_the_name() -> None:
    module, other = WeightNorm("bias", dim=0).apply(nn.Linear(3, 2)), WeightNorm("weight")
    bias = torch.tensor([1.0, -2.0])
    other.assign(module, bias, name="bias")
    torch.testing.assert_close(other.compute_weight(module, "bias").detach(), bias)
    assert type(other.remove(module, "bias")) is nn.Linear
    torch.testing.assert_close(module.bias.detach(), bias)


@pytest.mark.parametrize("norm", [WeightNorm(), SpectralNorm()], ids=repr)
def test_a_norm_takes_attributes_as_any_module_does(norm: Any) -> None:
    """attrs would check settings there as well, by a `__setattr__` of its own that registers nothing."""
    norm.helper = nn.Linear(3, 2)
    assert dict(norm.named_children()) == {"helper": norm.helper}


@pytest.mark.parametrize(
    "decorate",
    [lambda cls: cls, attrs.define, attrs.define(eq=False, on_setattr=None), attrs.define(slots=False)],
    ids=["no decorator", "the bare one", "slots", "eq"],
)
def test_a_norm_that_torch_cannot_use_says_which_line_it_wants(decorate: Callable[[type], type]) -> None:
    class Doubled(Reparametrization):
        name: str = "weight"

        @staticmethod
        def formula(half: Tensor) -> Tensor:
            return 2 * half

        def split(self, weight: Tensor) -> dict[str, Tensor]:
            return {"half": weight / 2}

    with pytest.raises(TypeError, match=r"Doubled .*@attrs.define\(slots=False, eq=False"):
        decorate(Doubled)().apply(nn.Linear(3, 2))


def test_the_name_of_a_norms_class_may_be_of_two_words() -> None:
    norm: Any = type("My Norm", (WeightNorm,), {})()
    layer = norm.apply(nn.Linear(3, 2))
    make_stale(layer)
    norm.recompute(layer)
    torch.testing.assert_close(layer.weight, by_hand(layer))
