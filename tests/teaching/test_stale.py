"""detect_stale: a read of a stale weight raises, and a graph that is used twice is explained."""

import copy
import gc
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import by_hand, make_stale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from explicit_wn import SpectralNorm, StaleWeightWarning, WeightNorm, cached, carrier, detect_stale, recompute_all
from explicit_wn.carrier import weight
from explicit_wn.reparametrization import Reparametrization
from explicit_wn.teaching import StaleWeightError

SECOND_BACKWARD = "Trying to backward through the graph a second time"


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


def test_its_signature_reads_well() -> None:
    assert list(inspect.signature(detect_stale).parameters) == ["model"]
