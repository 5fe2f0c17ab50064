"""No weight is wrong in silence: what is stale or written into in vain says so, once, at the user's line."""

import contextlib
import copy
import gc
import inspect
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from layers import Net, by_hand
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import explicit_wn
from explicit_wn import (
    LostWriteWarning,
    SpectralNorm,
    StaleWeightWarning,
    WeightNorm,
    apply_all,
    assign_all,
    cached,
    carrier,
    convert,
    fold,
    functional,
    recompute_all,
)
from explicit_wn.carrier.alarm import ENOUGH
from explicit_wn.reparametrization import Reparametrization

X = torch.linspace(-1, 1, 12).view(4, 3)


class Forgetful(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@contextlib.contextmanager
def told(*categories: type[Warning]) -> Iterator[list[Any]]:
    """Checks that the block warns exactly so, at lines of the tests, which are the user here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    caught[:] = [one for one in caught if not str(one.message).startswith("`torch.jit")]  # deprecated by torch
    assert [one.category for one in caught] == list(categories), [str(one.message) for one in caught]
    assert {Path(one.filename).name for one in caught} <= {Path(__file__).name, "layers.py"}


# A forgotten recompute


def optimizer_step(net: nn.Module) -> None:
    net(X).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an optimizer": optimizer_step,
    "nn.init": lambda net: nn.init.constant_(net.fc.weight_g, 3),
    "no_grad": lambda net: torch.no_grad()(net.fc.weight_v.add_)(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("norm", [WeightNorm, SpectralNorm])
def test_a_forgotten_recompute_warns_once_with_the_line_to_add(norm: Any, change: Callable[[Any], Any]) -> None:
    net = Forgetful(norm())
    if change is not optimizer_step and norm is SpectralNorm:
        change = lambda net: torch.no_grad()(net.fc.weight_orig.add_)(1)  # noqa: E731
    change(net)
    old = carrier.in_use(net.fc, "weight")
    with told(StaleWeightWarning) as caught:
        for _ in range(3):
            assert net.fc.weight is old
            net(X)
    message = str(caught[0].message)
    assert message.startswith("weight of this Linear is stale: ")
    assert "changed since it was last computed from them" in message
    assert caught[0].lineno == test_a_forgotten_recompute_warns_once_with_the_line_to_add.__code__.co_firstlineno + 10


def test_within_a_forward_it_names_the_path_and_the_line_of_that_forward() -> None:
    model = nn.Sequential(nn.ReLU(), Forgetful())
    nn.init.ones_(model[1].fc.weight_g)
    with told(StaleWeightWarning) as caught:
        model(X)
    assert str(caught[0].message).startswith("1.fc.weight of this Sequential is stale: ")
    assert "to the forward of Forgetful:\n\n    self.wn.recompute(self.fc)\n" in str(caught[0].message)


def test_torch_jit_trace_of_a_forgotten_recompute_warns_and_its_looking_around_does_not() -> None:
    for model in (Forgetful(), nn.Sequential(WeightNorm().apply(nn.Linear(3, 2)))):
        layer = model.fc if isinstance(model, Net) else model[0]
        with torch.no_grad():
            recompute_all(model)
        nn.init.ones_(layer.weight_g)
        with told(StaleWeightWarning):
            traced = torch.jit.trace(model, X)
        assert not torch.allclose(traced(X), nn.functional.linear(X, by_hand(layer), layer.bias))
    model = Net()
    nn.init.ones_(model.fc.weight_g)
    with told():
        torch.jit.trace(model, X)


def test_an_rnn_that_reads_its_weights_together_warns_of_each() -> None:
    wn = WeightNorm("weight_ih_l0")
    lstm = wn.apply(wn.apply(nn.LSTM(3, 2)), "weight_hh_l0")
    wn.recompute(lstm)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        nn.init.ones_(getattr(lstm, f"{name}_g"))
    with told(StaleWeightWarning, StaleWeightWarning) as caught:
        lstm(X)
        lstm(X)
    assert [str(one.message).split()[0] for one in caught] == ["weight_ih_l0", "weight_hh_l0"]


def ema(model: Any) -> nn.Module:
    """As people write it: the average is kept through `.data`."""
    average = copy.deepcopy(model)
    optimizer_step(model)
    for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
        mean.data.mul_(0.9).add_(parameter.data, alpha=0.1)
    return average


def averaged(model: Any) -> nn.Module:
    average = AveragedModel(model)
    optimizer_step(model)
    average.update_parameters(model)
    return average


def inlined(model: Any) -> nn.Module:
    optimizer_step(model)
    layer = WeightNorm().inline(nn.Linear(3, 2))
    nn.init.ones_(layer.weight_g)
    return layer


def within_cached(model: Any) -> nn.Module:
    with cached(model):
        nn.init.ones_(model.fc.weight_g)
        model(X)
    return model


def checkpointed(model: Any) -> nn.Module:
    checkpoint(model, X, use_reentrant=False).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model


def all_at_once(model: Any) -> nn.Module:
    for _ in range(2):
        recompute_all(model)
        model.fc(X).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    recompute_all(model)
    return model


def made_in_inference_mode(_: Any) -> nn.Module:
    with torch.inference_mode():
        model = Net()
        nn.init.ones_(model.fc.weight_g)
        model(X)
    return model.requires_grad_(False)


def pruned_in_inference_mode(model: Any) -> nn.Module:
    prune.l1_unstructured(model.fc, "weight_v" if isinstance(model.wn, WeightNorm) else "weight_orig", 1)
    with torch.inference_mode():
        model(X)
        model(X)
    return model


def on_another_thread(model: Any) -> nn.Module:
    thread = threading.Thread(target=optimizer_step, args=(model,))
    thread.start()
    thread.join()
    return model


def functionally(model: Any) -> nn.Module:
    nn.init.ones_(model.fc.weight_g)
    parts = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    torch.func.functional_call(model, parts, (X,))
    return model


def clipped(model: Any) -> nn.Module:
    optimizer_step(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return model


def shown(model: Any) -> nn.Module:
    WeightNorm("bias").apply(model.fc)
    nn.init.ones_(model.fc.bias_g)
    repr(model)
    WeightNorm("bias").recompute(model.fc)
    return model


def threaded_otherwise(model: Any) -> nn.Module:
    """The sums of a long row are taken in another order."""
    layer = WeightNorm().inline(nn.Linear(200_000, 1))
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(2, threads))
    layer.weight.mean().item()
    torch.set_num_threads(threads)
    layer(torch.ones(1, 200_000))
    return model


INNOCENT = [
    threaded_otherwise,
    shown,
    optimizer_step,
    ema,
    averaged,
    inlined,
    within_cached,
    checkpointed,
    all_at_once,
    made_in_inference_mode,
    pruned_in_inference_mode,
    on_another_thread,
    functionally,
    clipped,
]


@pytest.mark.parametrize("use", INNOCENT)
@pytest.mark.parametrize("norm", [WeightNorm, SpectralNorm])
def test_no_false_alarm(norm: Any, use: Callable[[Any], Any]) -> None:
    model = Net(norm())
    if norm is SpectralNorm:
        model.fc.register_parameter("weight_g", nn.Parameter(torch.ones(())))
    with told():
        result = use(model) or model
        with torch.no_grad():
            result(X)
            result(X)


# Writes that are lost


def init_weights(module: nn.Module) -> None:
    """Hifi-GAN's habit."""
    if type(module).__name__.startswith("Linear"):
        module.weight.data.normal_(0.0, 0.01)


def with_init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.01)


def with_reset(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.reset_parameters()


def with_copy(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        with torch.no_grad():
            module.weight.copy_(torch.ones_like(module.weight))


def by_setting_data(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data = torch.full_like(module.weight.data, 2.0)


def by_swapping_rows(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data = module.weight.data.flip(0)


def by_swapping_columns(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data = module.weight.data.flip(1)


def loaded(form: str) -> Any:
    model = Net() if form == "apply" else nn.Sequential(WeightNorm().inline(nn.Linear(3, 2)))
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    return model


def made_by(form: str) -> Any:
    if form == "apply":
        return Net()
    if form == "convert":
        model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
        convert(model)
        return model
    model = nn.Sequential(nn.Linear(3, 2))
    apply_all(model, SpectralNorm() if form == "spectral" else WeightNorm())
    return model


def layer_of(model: Any) -> Any:
    return model.fc if isinstance(model, Net) else model[0]


def reading_twice(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data.copy_(torch.randn_like(module.weight) * 0.01)


def reading_thrice(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data.uniform_(-1 / module.weight.size(1), 1 / module.weight.size(1))


def reading_four_times(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.data.uniform_(-1 / module.weight.size(1), module.weight.size(1) / len(module.weight))


WRITES = [
    reading_four_times,
    reading_thrice,
    reading_twice,
    init_weights,
    with_init,
    with_reset,
    with_copy,
    by_setting_data,
    by_swapping_rows,
    by_swapping_columns,
]
FORMS = ["apply", "inline", "spectral", "convert", "loaded apply", "loaded inline"]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("form", FORMS)
def test_an_initialization_after_norming_warns_at_the_first_forward(form: str, write: Any) -> None:
    model: Any = loaded(form.split()[1]) if "loaded" in form else made_by(form)
    layer = layer_of(model)
    weight = layer.weight.detach().clone()
    with told(LostWriteWarning) as caught:
        model.apply(write)
        model(X)
        model(X)
    assert "assign_all(model, init)" in str(caught[0].message)
    line = "self.wn.assign(self.fc, weight)" if isinstance(model, Net) else "wn.assign(model[0], weight)"
    assert str(caught[0].message).endswith(f"\n\n    {line}")
    if form != "spectral":  # whose u and v go on
        torch.testing.assert_close(layer.weight.detach(), weight)
    with told():
        assign_all(model, write)
        model(X)


ROUTES: dict[str, Callable[[Any], Any]] = {
    "to": lambda model: model.to(torch.float64),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "script": torch.jit.script,
    "fold": fold,
    "state_dict": lambda model: model.state_dict(),
    "read again": lambda model: layer_of(model).weight if not isinstance(model, Net) else model(X),
    "inference": lambda model: torch.inference_mode()(model)(X),
    "cached": lambda model: cached(model).__enter__(),
    "AveragedModel": AveragedModel,
    "compile": lambda model: torch.compile(model, backend="eager", fullgraph=True)(X),
    "export": lambda model: torch.export.export(model, (X,)),
    "strict export": lambda model: torch.export.export(model, (X,), strict=True),
    "make_fx": lambda model: make_fx(lambda x: model(x))(X),
}


@pytest.mark.parametrize("write", [init_weights, with_init])
@pytest.mark.parametrize("form", ["apply", "inline"])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_wherever_the_weight_goes_next_the_write_is_told(route: Callable[[Any], Any], form: str, write: Any) -> None:
    torch._dynamo.reset()
    model = made_by(form)
    model.apply(write)
    with told(LostWriteWarning):
        route(model)
        route(model)


class Tied(nn.Module):
    """As language models are: the weight of the embedding is that of the last layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = WeightNorm().inline(nn.Embedding(5, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.linear(self.embedding(tokens), self.embedding.weight)


def test_what_a_forward_reads_is_not_summed() -> None:
    """It is read in every step, and on a GPU to compare sums is to wait."""
    model = Tied()
    model(torch.arange(3))
    assert carrier.store_of(model.embedding)["weight"].seal is None
    model.embedding.weight.data.mul_(2)
    assert carrier.store_of(model.embedding)["weight"].seal is not None
    with told(LostWriteWarning):
        model(torch.arange(3))


def test_a_weight_of_one_number_is_watched_as_well() -> None:
    model = WeightNorm().inline(nn.Linear(1, 1))
    model.weight.data.add_(1)
    with told(LostWriteWarning):
        model(torch.ones(1, 1))


def test_what_is_compiled_tells_of_its_own_weights_alone() -> None:
    torch._dynamo.reset()
    model, other = made_by("inline"), made_by("inline")
    other.apply(init_weights)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    layer_of(model).weight.sum().item()  # handed out, and not written into
    with told():
        compiled(X)
    with told(LostWriteWarning):
        other(X)


def test_a_write_between_two_forwards_is_told_where_a_counter_shows_it() -> None:
    model = Net()
    for _ in range(2):
        optimizer_step(model)
    with torch.no_grad():
        model(X)
        model.fc.weight.clamp_(-0.01, 0.01)
    with told(LostWriteWarning):
        optimizer_step(model)
        optimizer_step(model)


def test_what_is_written_and_then_assigned_or_loaded_is_not_lost() -> None:
    model = Net()
    model.apply(init_weights)
    with told():
        model.wn.assign(model.fc, model.fc.weight.detach().clone())
        model(X)
        model.apply(with_init)
        model.load_state_dict(Net().state_dict())
        model(X)


def test_an_embedding_that_renorms_its_weight_by_itself_does_not_write_in_vain() -> None:
    model = WeightNorm().inline(nn.Embedding(5, 3, max_norm=0.5))
    with told():
        for _ in range(3):
            model(torch.tensor([0, 1]))


class InPlace(WeightNorm):
    """Changes its own result."""

    @staticmethod
    def formula(g: Tensor, v: Tensor, dim: int | None, eps: float) -> Tensor:
        return functional.weight_norm(v, g, dim, eps).mul_(2).mul_(0.5)


@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
class View(Reparametrization):
    """Is a view of its part, whose versions it shares."""

    name: str = "weight"

    @staticmethod
    def formula(t: Tensor) -> Tensor:
        return t.t()

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        return {"t": weight.detach().t().clone()}


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy])
@pytest.mark.parametrize("norm", [InPlace, View])
def test_a_result_that_counts_writes_of_its_own_is_no_write(norm: Any, copied: Callable[[Any], Any]) -> None:
    model = copied(Net(norm()))
    with told():
        for _ in range(3):
            optimizer_step(model)
            model(X)
            model.fc.weight.sum().item()
    if norm is InPlace:
        with torch.no_grad():
            model.fc.weight.mul_(2)
        with told(LostWriteWarning):
            model(X)


def test_what_is_looked_at_and_not_used_is_not_stale() -> None:
    lstm = WeightNorm("weight_hh_l0").apply(nn.LSTM(3, 2))
    wn, layer = WeightNorm("weight"), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    linear = wn.apply(encoder.layers[0].linear1)
    nn.init.ones_(lstm.weight_hh_l0_g)
    nn.init.ones_(linear.weight_g)
    encoder.layers[0].forward = lambda x, **options: x  # which recomputes, say; what is before it only looks
    with told(), torch.no_grad():
        lstm.flatten_parameters()
        _ = lstm.all_weights, inspect.getmembers(lstm)
        encoder(torch.ones(1, 2, 4))
    with told(StaleWeightWarning, StaleWeightWarning):
        _ = lstm.weight_hh_l0, linear.weight


def test_a_write_within_a_cached_block_is_told_at_its_end() -> None:
    model = made_by("inline")
    with told(LostWriteWarning), cached(model):
        nn.init.normal_(layer_of(model).weight)


def test_whoever_looks_and_looks_is_not_watched_for_ever() -> None:
    layer = WeightNorm().inline(nn.Linear(3, 2))
    for _ in range(ENOUGH - 1):  # one read was that of `inline`
        layer.weight.sum().item()
        assert carrier.store_of(layer)["weight"].seal is not None
    layer.weight.sum().item()
    assert carrier.store_of(layer)["weight"].seal is None
    layer.weight.sum().item()  # with the one before goes what that had kept
    assert carrier.store_of(layer)["weight"].earlier == ()


def test_no_second_weight_is_kept_after_the_first_forward() -> None:
    model = nn.Sequential(WeightNorm().inline(nn.Linear(3, 2)))
    handed_out = weakref.ref(model[0].weight)
    assert handed_out() is not None  # until the first forward
    model(X)
    gc.collect()
    assert handed_out() is None
    assert not carrier.store_of(model[0])


def test_as_an_error_it_is_raised_each_time_and_nothing_is_dropped() -> None:
    model = Net()
    model.apply(with_init)
    written = model.fc.weight
    with warnings.catch_warnings():
        warnings.simplefilter("error", LostWriteWarning)
        for _ in range(2):
            with pytest.raises(LostWriteWarning, match=r"fc\.weight of this Net was written into, and that is lost"):
                model(X)
            assert model.fc.weight is written


@pytest.mark.parametrize("category", [StaleWeightWarning, LostWriteWarning])
def test_the_usual_means_silence_them(category: type[Warning]) -> None:
    assert issubclass(category, UserWarning)
    model = Forgetful()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", category)
        nn.init.ones_(model.fc.weight)
        nn.init.ones_(model.fc.weight_g)
        model(X)
        model.wn.recompute(model.fc)
    assert [one.category for one in caught] == [{StaleWeightWarning, LostWriteWarning}.difference({category}).pop()]
    assert category.__name__ in explicit_wn.__all__
