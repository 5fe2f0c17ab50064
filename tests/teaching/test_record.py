"""`record`: what every recompute made."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from explicit_wn import SpectralNorm, WeightNorm, apply_all, cached, carrier, fold, recompute_all, record


class Net(nn.Module):
    """One weight that is recomputed by a line, one that is inlined, and a spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.lined = self.wn.apply(nn.Linear(3, 4))
        self.inlined = WeightNorm().inline(nn.Linear(4, 4))
        self.spectral = SpectralNorm().inline(nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.lined)
        return self.spectral(self.inlined(self.lined(x).tanh()).tanh())


NAMES = ["lined.weight", "inlined.weight", "spectral.weight"]


def train(model: nn.Module, steps: int) -> list[dict[str, Tensor]]:
    """Trains, and returns the parameters that each forward used and the buffers that it left."""
    optimizer, used = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(steps):
        parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
        optimizer.zero_grad()
        loss_of(model(batch())).backward()
        used.append(parameters | {name: value.clone() for name, value in model.named_buffers()})
        optimizer.step()
    return used


def batch() -> Tensor:
    return torch.linspace(-1, 1, 15).view(5, 3)


def loss_of(output: Tensor) -> Tensor:
    return (output - 1).square().sum()


def weights_by_hand(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The three weights, as leaves with the gradients that a plain network gives them."""
    weights = {
        name: state[f"{name}_g"] * state[f"{name}_v"] / state[f"{name}_v"].norm(dim=1, keepdim=True)
        for name in NAMES[:2]
    }
    orig, u, v = (state[f"spectral.weight_{part}"] for part in ("orig", "u", "v"))
    weights["spectral.weight"] = orig / (u @ orig @ v)
    x = batch()
    for name, weight in weights.items():
        weight.requires_grad_()
        x = x @ weight.t() + state[name.replace("weight", "bias")]
        x = x.tanh() if name != "spectral.weight" else x
    loss_of(x).backward()
    return weights


def test_each_step_has_the_parts_the_weight_and_its_gradient() -> None:
    net = Net()
    with record(net) as recorded:
        used = train(net, 5)
    assert [one.name for one in recorded] == [name for name in NAMES for _ in used]
    for step, state in enumerate(used):
        for name, weight in weights_by_hand(state).items():
            one = recorded[name][step]
            assert one.step == step
            torch.testing.assert_close(one.weight, weight.detach())
            torch.testing.assert_close(one.gradient, weight.grad, atol=1e-5, rtol=1e-4)
            assert one.gradient.abs().max() > 1e-3
            for part, value in one.parts.items():
                torch.testing.assert_close(value, state[f"{name}_{part}"])
            assert not any(tensor.requires_grad for tensor in (one.weight, one.gradient, *one.parts.values()))
            torch.testing.assert_close(one.steps()["w"].value, one.weight)
    g = recorded["lined.weight"][2].steps()["g"].gradient
    torch.testing.assert_close(
        g,
        (recorded["lined.weight"][2].gradient * used[2]["lined.weight_v"]).sum(1, keepdim=True)
        / used[2]["lined.weight_v"].norm(dim=1, keepdim=True),
        atol=1e-5,
        rtol=1e-4,
    )


def test_it_changes_nothing_and_ends_with_the_block() -> None:
    net, bystander = Net(), Net()
    twin = copy.deepcopy(net)
    with contextlib.suppress(KeyError), record(net) as recorded:
        train(net, 2)
        train(bystander, 2)
        train(copy.deepcopy(net), 2)
        raise KeyError
    train(twin, 2)
    assert len(recorded) == 3 * 2
    for one, other in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    train(net, 1)
    assert len(recorded) == 3 * 2
    assert all(not carrier.store_of(module).blocks for module in net.children() if module is not net.wn)
    assert "weight" not in carrier.store_of(net.inlined)


def test_blocks_nest_and_each_hears_of_its_own() -> None:
    net = Net()
    with record(net, names="lined.weight", every=2) as outer:
        train(net, 1)
        with record(net, names=NAMES[:2]) as inner:
            train(net, 4)
    assert [(one.name, one.step) for one in outer] == [("lined.weight", step) for step in (0, 2, 4)]
    assert [one.step for one in inner] == [*range(4), *range(4)]
    assert list(inner.records) == NAMES[:2]
    assert torch.equal(outer["lined.weight"][1].weight, inner["lined.weight"][1].weight)


def test_a_weight_that_is_held_is_recorded_once() -> None:
    net = Net()
    with record(net) as recorded:
        with torch.no_grad(), cached(net):
            net(batch())
            net(batch())
        assert [one.step for one in recorded] == [0, 0, 0]
        recompute_all(net)
    assert [one.step for one in recorded] == [0, 1] * 3
    assert all(one.gradient is None for one in recorded)
    assert "weight" not in carrier.store_of(net.inlined), "no longer than a block holds it"


def test_what_only_computes_is_not_a_recompute() -> None:
    net = Net().eval()
    parameters = {name: value.detach() for name, value in net.named_parameters()}

    def of(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(net, parameters, (x,)))

    with record(net) as recorded:
        torch.func.vmap(torch.func.grad(of), in_dims=(None, 0))(parameters, batch())
        net.inlined.weight.sum().backward()
        net.wn.compute_weight(net.lined)
        torch.jit.trace(net, batch())
        torch.export.export(net, (batch(),))
        for name in NAMES:
            assert all(one.step == 0 for one in recorded[name]), "the tracer runs the model once more, to compare"


def test_gradients_of_two_backwards_add_up() -> None:
    fc = WeightNorm().apply(nn.Linear(3, 2))
    wn = WeightNorm()
    with record(fc) as recorded:
        wn.recompute(fc)
        fc.weight.sum().backward(retain_graph=True)
        fc.weight.sum().backward()
    (one,) = recorded
    assert torch.equal(one.gradient, torch.full((2, 3), 2.0))


def test_a_long_run_stays_below_the_limit_and_reaches_to_its_end() -> None:
    fc = WeightNorm().inline(nn.Linear(3, 2))  # a record: 2 + 6 + 2 · 6 numbers
    for steps in (10, 11, 300):
        with record(fc, limit=200) as recorded:
            train_one(fc, steps)
        kept = [one.step for one in recorded]
        assert kept == list(range(0, steps, recorded.every))
        assert len(kept) <= 10
        assert steps <= 10 or len(kept) > 5
    assert [one.step for one in recorded][-1] > 250


def train_one(fc: nn.Module, steps: int) -> None:
    for _ in range(steps):
        fc(batch()).square().sum().backward()


def test_it_shows_as_a_table_and_stacks_what_a_teacher_plots() -> None:
    net = Net()
    with record(net) as recorded:
        pass
    assert recorded.cells()[1] == ["lined.weight", "", "", "0", ""]
    with record(net) as recorded:
        used = train(net, 3)
    assert recorded.cells()[1] == ["lined.weight", "4×3", "g 4×1, v 4×3", "3", "0 … 2"]
    lengths = torch.stack([state["lined.weight_v"].norm(dim=1, keepdim=True) for state in used])
    torch.testing.assert_close(recorded.stack("lined.weight", "‖v‖"), lengths)
    assert repr(recorded["spectral.weight"][0]).startswith("Record(step 0 of spectral.weight: orig 2×4, u 2, v 4")


def test_a_norm_may_come_off_in_the_block() -> None:
    net = Net()
    with record(net) as recorded:
        train(net, 1)
        fold(net)
        train_plain = net(batch())
    assert len(recorded) == 3
    assert train_plain.isfinite().all()


def test_nothing_of_the_model_is_kept_alive() -> None:
    net = Net()
    gone = weakref.ref(net)
    with record(net) as recorded:
        train(net, 2)
    del net
    gc.collect()
    assert gone() is None
    assert len(recorded) == 6


def test_what_cannot_be_recorded_is_refused_before_anything_happens() -> None:
    net, plain = Net(), nn.Linear(2, 2)
    for model, settings, said in (
        (plain, {}, "makes a weight of this Linear; the weights that one makes: none. WeightNorm"),
        (net, {"names": ["fc.weight"]}, "makes 'fc.weight' of this Net; the weights that one makes: 'lined.weight', "),
        (net, {"every": 0}, "every is an int of 1 or more, not 0"),
        (net, {"limit": 2.5}, "limit is an int of 1 or more, not 2.5"),
        (
            net,
            {"limit": 100},
            "one step of these 3 weights is 122 numbers, and the limit is 100. Name some of the weights",
        ),
    ):
        with pytest.raises(ValueError, match="record: ") as raised, record(model, **settings):  # type: ignore[arg-type]
            pass
        assert said in str(raised.value)
    assert not carrier.store_of(net.lined).blocks


def test_a_whole_model_is_recorded_by_the_names_of_normed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    names = apply_all(model, WeightNorm())
    with record(model) as recorded:
        train(model, 2)
    assert list(recorded.records) == names


def test_a_module_of_two_names_is_recorded_by_the_first() -> None:
    wn, layer = WeightNorm(), nn.Linear(3, 2)
    model = nn.ModuleDict({"a": wn.apply(layer), "b": layer})
    with record(model) as recorded:
        wn.recompute(layer)
    assert list(recorded.records) == ["a.weight"]
    with pytest.raises(ValueError, match=r"makes 'b.weight' of this ModuleDict"), record(model, ["b.weight"]):
        pass
