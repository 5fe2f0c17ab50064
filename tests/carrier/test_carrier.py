"""What `apply` makes of a module has no hook, and its weight is right after every copy, pickle, load and move."""

import copy
import gc
import linecache
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from captured import reloaded, through_bytes
from layers import SUBJECTS, Net, Subject, by_hand, first_output, loss_of, make_stale, read_stale
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from explicit_wn import WeightNorm, carrier, functional
from explicit_wn.carrier.recipe import recipe_from

Factory = Callable[[], nn.Module]


def dim_1() -> Net:
    return Net(WeightNorm(dim=1))


RNN_NAMES = ("weight_hh_l0", "weight_ih_l1")


def lstm(verb: str = "apply") -> nn.Module:
    module = nn.LSTM(3, 4, num_layers=2)
    for name in RNN_NAMES:
        getattr(WeightNorm(name), verb)(module)
    return module


def plain_lstm_of(module: nn.Module) -> nn.Module:
    """A plain LSTM with the weights that the parts of `module` make."""
    plain = nn.LSTM(3, 4, num_layers=2)
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(by_hand(module, name) if name in RNN_NAMES else own[name])
    return plain


# Copies


def deep(module: Any) -> Any:
    return copy.deepcopy(module)


def deep_twice(module: Any) -> Any:
    return copy.deepcopy(copy.deepcopy(module))


def deep_of_shallow(module: Any) -> Any:
    return copy.deepcopy(copy.copy(module))


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


every_copy = pytest.mark.parametrize("copied", [deep, deep_twice, deep_of_shallow, pickled, reloaded])


@every_copy
@pytest.mark.parametrize("verb", ["apply", "inline"])
def test_a_copy_after_a_forward_is_whole_and_independent(verb: str, copied: Callable[[Any], Any]) -> None:
    wn, x = WeightNorm(dim=1), torch.randn(4, 3)
    module = getattr(wn, verb)(nn.Linear(3, 2))
    make_stale(module)
    wn.recompute(module)
    module(x).sum().backward()
    expected = by_hand(module, dim=1).detach().clone()

    twin = copied(module)
    make_stale(module)
    torch.testing.assert_close(twin.weight.detach(), expected)
    torch.testing.assert_close(twin(x), nn.functional.linear(x, expected, module.bias))
    assert type(twin) is type(module)
    assert list(twin.state_dict()) == list(module.state_dict())
    for name in ("weight_g", "weight_v", "bias"):
        assert getattr(twin, name) is not getattr(module, name)
        assert isinstance(getattr(twin, name), nn.Parameter)

    make_stale(twin)
    wn.recompute(twin)
    torch.testing.assert_close(twin.weight, by_hand(twin, dim=1))
    twin(x).sum().backward()
    assert twin.weight_g.grad is not None
    assert type(wn.remove(twin)) is nn.Linear
    wn.recompute(module)
    torch.testing.assert_close(module.weight, by_hand(module, dim=1))


@every_copy
def test_the_copy_of_a_model_recomputes_its_own_layer(copied: Callable[[Any], Any]) -> None:
    model, x = dim_1(), torch.randn(4, 3)
    model(x).sum().backward()
    twin = copied(model)
    make_stale(twin.fc)
    torch.testing.assert_close(twin(x), nn.functional.linear(x, by_hand(twin.fc, dim=1), twin.fc.bias))
    torch.testing.assert_close(model(x), nn.functional.linear(x, by_hand(model.fc, dim=1), model.fc.bias))
    assert repr(twin) == repr(model)
    assert twin.wn is not model.wn


@every_copy
@pytest.mark.parametrize("verb", ["apply", "inline"])
def test_the_copy_of_an_rnn_reads_its_own_weights(verb: str, copied: Callable[[Any], Any]) -> None:
    module, x = lstm(verb), torch.randn(5, 1, 3)
    module(x)
    twin = copied(module)
    make_stale(twin, *RNN_NAMES)
    for name in RNN_NAMES:
        WeightNorm(name).recompute(twin)
    torch.testing.assert_close(twin(x)[0], plain_lstm_of(twin)(x)[0])
    for name in RNN_NAMES:
        WeightNorm(name).recompute(module)
    torch.testing.assert_close(module(x)[0], plain_lstm_of(module)(x)[0])
    for name in RNN_NAMES:
        WeightNorm(name).remove(twin)
    assert type(twin) is nn.LSTM
    plain = nn.LSTM(3, 4, num_layers=2)
    plain.load_state_dict(twin.state_dict())
    torch.testing.assert_close(twin(x)[0], plain(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2), lambda: nn.LSTM(3, 2)], ids=["Linear", "LSTM"])
def test_the_first_read_of_a_copy_computes_and_the_original_keeps_what_it_has(
    make: Callable[[], nn.Module], copied: Callable[[Any], Any]
) -> None:
    module: Any = make()
    name = "weight_hh_l0" if isinstance(module, nn.LSTM) else "weight"
    WeightNorm(name).apply(module)
    stored = getattr(module, name)
    twin = copied(module)
    make_stale(twin, name)
    torch.testing.assert_close(getattr(twin, name), by_hand(twin, name))
    shared = copied is copy.copy
    assert (read_stale(module, name) if shared else getattr(module, name)) is stored


def test_a_shallow_copy_shares_the_parts_as_that_of_a_plain_module_does() -> None:
    module, x = WeightNorm().apply(nn.Linear(3, 2)), torch.randn(4, 3)
    module(x)
    twin = copy.copy(module)
    assert twin is not module
    assert type(twin) is type(module)
    assert twin.weight_v is module.weight_v
    make_stale(module)
    WeightNorm().recompute(twin)
    torch.testing.assert_close(twin(x), nn.functional.linear(x, by_hand(module), module.bias))
    WeightNorm().recompute(module)
    torch.testing.assert_close(module(x), nn.functional.linear(x, by_hand(module), module.bias))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_holds(protocol: int) -> None:
    module = WeightNorm(dim=1).inline(nn.Linear(3, 2))
    twin = pickle.loads(pickle.dumps(module, protocol=protocol))
    assert type(twin) is type(module)
    make_stale(twin)
    torch.testing.assert_close(twin.weight, by_hand(twin, dim=1))


def test_neither_copy_nor_pickle_holds_the_stored_weight() -> None:
    small, large = nn.Linear(2, 100), WeightNorm(dim=None).apply(nn.Linear(2, 100))
    large(torch.randn(1, 2))
    assert len(pickle.dumps(large)) - len(pickle.dumps(small)) < 100 * 2 * 4 + 700
    assert not carrier.store_of(copy.deepcopy(large))


def test_a_copy_made_within_a_graph_does_not_hold_the_graph() -> None:
    module = WeightNorm().apply(nn.Linear(3, 2))
    twin = copy.deepcopy(module)
    assert twin.weight.grad_fn is not module.weight.grad_fn
    (grad,) = torch.autograd.grad(twin.weight.sum(), twin.weight_g)
    assert grad.shape == (2, 1)


FRESH = """
import sys, torch
torch.set_num_threads(1)
for name, x, parts, expected in torch.load("cases.pt", weights_only=False):
    model = torch.load(name, weights_only=False)
    before = set(sys.modules)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for part, value in parts.items():
            own[part].copy_(value)
    result = model(x)
    result = result[0] if isinstance(result, tuple) else result
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert all(own[part].grad is not None for part in parts), name
    print(name, repr(model).count("WeightNorm("))
"""

OWN_MODULE = """
from torch import nn
from explicit_wn import WeightNorm

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.norms = [WeightNorm("weight", dim=1), WeightNorm("bias", dim=None)]
        for norm in self.norms:
            norm.apply(self.fc)

    def forward(self, x):
        for norm in self.norms:
            norm.recompute(self.fc)
        return self.fc(x)
"""


def test_whole_models_load_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_layers.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_layers  # type: ignore[import-not-found]

    cases = []
    for name, model, x in (
        ("sequential", nn.Sequential(WeightNorm(dim=None).inline(nn.Linear(3, 2)), nn.Tanh()), torch.randn(4, 3)),
        ("transposed", WeightNorm(dim="out").inline(nn.ConvTranspose1d(3, 2, 3)), torch.randn(1, 3, 5)),
        ("lstm", lstm("inline"), torch.randn(4, 1, 3)),
        ("own", own_layers.Layer(), torch.randn(4, 3)),
    ):
        first_output(model, x).sum().backward()
        torch.save(model, tmp_path / name)
        parts = {key: torch.randn_like(part) for key, part in model.named_parameters() if key.endswith(("_g", "_v"))}
        cases.append((name, x, parts, expected_with(model, name, x, parts)))
    torch.save(cases, tmp_path / "cases.pt")
    done = subprocess.run([sys.executable, "-W", "error", "-c", FRESH], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["sequential", "1", "transposed", "1", "lstm", "2", "own", "2"]


def expected_with(model: nn.Module, name: str, x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """The output of `model` with other parts, without the package."""
    own = {key: parts.get(key, value).detach() for key, value in model.named_parameters()}

    def weight(prefix: str, dim: int | None) -> Tensor:
        g, v = own[f"{prefix}_g"], own[f"{prefix}_v"]
        return g * v / (v.square().sum() if dim is None else v.square().sum(others(v, dim), keepdim=True)).sqrt()

    def others(v: Tensor, dim: int) -> list[int]:
        return [d for d in range(v.dim()) if d != dim]

    if name == "sequential":
        return nn.functional.linear(x, weight("0.weight", None), own["0.bias"]).tanh()
    if name == "transposed":
        return nn.functional.conv_transpose1d(x, weight("weight", 1), own["bias"])
    if name == "own":
        return nn.functional.linear(x, weight("fc.weight", 1), weight("fc.bias", None))
    plain = nn.LSTM(3, 4, num_layers=2)
    plain.load_state_dict({key: weight(key, 0) if key in RNN_NAMES else own[key] for key in plain.state_dict()})
    return plain(x)[0].detach()


def test_a_class_that_says_how_it_is_made_is_made_so() -> None:
    made = []

    class Made(nn.Linear):
        def __new__(cls, *arguments: int) -> Any:
            made.append(arguments)
            return super().__new__(cls)

        def __getnewargs__(self) -> tuple[int, int]:
            return 3, 4

    layer, x = WeightNorm().inline(Made(5, 2)), torch.randn(1, 5)
    copied = copy.deepcopy(layer)
    assert made == [(5, 2), (3, 4)]
    make_stale(copied)
    torch.testing.assert_close(copied(x), x @ by_hand(copied).t() + copied.bias)


# Tampered data


class Naming:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class ShownAsCode:
    def __repr__(self) -> str:
        return "__import__('os').abort()"


@attrs.define
class LooksLikeANorm:
    name: str
    dim: int
    eps: float

    kind = "LooksLikeANorm"
    advance = None
    formula = staticmethod(functional.weight_norm)


RUNS_CODE = "x;'''\nif 1:\n    if 1:\n        raise SystemExit('this ran') #"
GOOD_SETTINGS = (("name", "weight"), ("dim", 0), ("eps", 0.0))


def recipe(
    norm_class: Any = WeightNorm,
    settings: Any = GOOD_SETTINGS,
    parts: Any = ("g", "v"),
    owner: Any = "weight",
    inlined: Any = False,
) -> Naming:
    return Naming(recipe_from, norm_class, settings, parts, owner, inlined)


def with_setting(name: str, value: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((key, value if key == name else good) for key, good in GOOD_SETTINGS)


def test_what_the_tampered_data_is_like_loads_untampered() -> None:
    loaded = pickle.loads(pickle.dumps(Naming(carrier.rebuild, nn.Linear, (recipe(),))))
    assert type(loaded) is type(WeightNorm().apply(nn.Linear(3, 2)))


TAMPERED = {
    "a class that is no module": Naming(carrier.rebuild, int, (recipe(),)),
    "a function for a class": Naming(carrier.rebuild, len, (recipe(),)),
    "no recipe": Naming(carrier.rebuild, nn.Linear, ()),
    "a str for a recipe": Naming(carrier.rebuild, nn.Linear, ("weight",)),
    "a norm that is no module": Naming(carrier.rebuild, nn.Linear, (recipe(norm_class=dict),)),
    "a norm that only looks like one": Naming(carrier.rebuild, nn.Linear, (recipe(norm_class=LooksLikeANorm),)),
    "a norm that is another module": Naming(carrier.rebuild, nn.Linear, (recipe(norm_class=nn.Linear),)),
    "code for a name": Naming(
        carrier.rebuild, nn.Linear, (recipe(settings=with_setting("name", RUNS_CODE), parts=("g",), owner=RUNS_CODE),)
    ),
    "a keyword for a name": Naming(carrier.rebuild, nn.Linear, (recipe(settings=with_setting("name", "class")),)),
    "a number for a name": Naming(carrier.rebuild, nn.Linear, (recipe(settings=with_setting("name", 3)),)),
    "code for a dim": Naming(carrier.rebuild, nn.Linear, (recipe(settings=with_setting("dim", ShownAsCode())),)),
    "code for an eps": Naming(carrier.rebuild, nn.Linear, (recipe(settings=with_setting("eps", ShownAsCode())),)),
    "another setting": Naming(carrier.rebuild, nn.Linear, (recipe(settings=(("name", "weight"), ("other", 1))),)),
    "code for a part": Naming(carrier.rebuild, nn.Linear, (recipe(parts=("g", RUNS_CODE)),)),
    "code for an owner": Naming(carrier.rebuild, nn.Linear, (recipe(owner=ShownAsCode()),)),
}


@pytest.mark.parametrize("data", TAMPERED.values(), ids=TAMPERED)
def test_tampered_data_is_refused_before_any_source_is_made_of_it(data: Naming) -> None:
    before = set(linecache.cache)
    with pytest.raises((TypeError, ValueError)):
        pickle.loads(pickle.dumps(data))
    assert set(linecache.cache) == before


# State dicts


def test_the_state_dict_holds_the_parts_and_not_the_weight() -> None:
    model = nn.Sequential(WeightNorm().inline(nn.Linear(3, 2)), dim_1(), lstm())
    assert list(model.state_dict()) == [
        *("0.bias", "0.weight_g", "0.weight_v"),
        *("1.fc.bias", "1.fc.weight_g", "1.fc.weight_v"),
        *("2.weight_ih_l0", "2.bias_ih_l0", "2.bias_hh_l0", "2.weight_hh_l1", "2.bias_ih_l1", "2.bias_hh_l1"),
        *("2.weight_hh_l0_g", "2.weight_hh_l0_v", "2.weight_ih_l1_g", "2.weight_ih_l1_v"),
    ]


def test_the_state_dict_goes_through_a_weights_only_load() -> None:
    source, target = WeightNorm().apply(nn.Linear(3, 2)), WeightNorm().apply(nn.Linear(3, 2))
    target.load_state_dict(through_bytes(torch.save, torch.load, source.state_dict()))
    torch.testing.assert_close(target.weight, by_hand(source))


def ours(module: nn.Module, name: str, dim: int | None) -> nn.Module:
    return WeightNorm(name, dim=dim).apply(module)


def hook(module: nn.Module, name: str, dim: int | None) -> nn.Module:
    hooked: nn.Module = torch.nn.utils.weight_norm(module, name, dim)
    return hooked


def parametrization(module: nn.Module, name: str, dim: int | None) -> nn.Module:
    return parametrizations.weight_norm(module, name, dim)


def plain(module: nn.Module, name: str, dim: int | None) -> nn.Module:
    return module


Spelling = Callable[[nn.Module, str, int | None], nn.Module]
every_spelling = pytest.mark.parametrize("spelling", [ours, hook, parametrization, plain])
every_load = pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
old_hook = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


@old_hook
@every_spelling
@every_load
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("strict", [True, False])
def test_any_spelling_loads_and_the_weight_is_fresh(
    spelling: Spelling, dim: int | None, strict: bool, assign: bool
) -> None:
    source = spelling(nn.Linear(3, 2), "weight", dim)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.rand_like(parameter))
    state = source.state_dict()
    if spelling in (plain, parametrization):
        expected = source.weight.detach().clone()
    else:
        expected = by_hand(source, dim=dim).detach().clone()

    target, x = WeightNorm(dim=dim).apply(nn.Linear(3, 2)), torch.randn(4, 3)
    target(x)
    keys = list(state)
    result = target.load_state_dict(state, strict=strict, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert list(state) == keys
    torch.testing.assert_close(target.weight.detach(), expected)
    torch.testing.assert_close(by_hand(target, dim=dim).detach(), expected)
    torch.testing.assert_close(target(x), nn.functional.linear(x, expected, source.bias))
    assert all(isinstance(part, nn.Parameter) and part.requires_grad for part in target.parameters())


@old_hook
@every_spelling
@every_load
def test_any_spelling_loads_into_the_layers_of_a_model(spelling: Spelling, assign: bool) -> None:
    source = nn.Sequential(spelling(nn.Linear(3, 4), "weight", 0), nn.Sequential(spelling(nn.Linear(4, 2), "bias", 0)))
    target = nn.Sequential(
        WeightNorm().inline(nn.Linear(3, 4)), nn.Sequential(WeightNorm("bias").inline(nn.Linear(4, 2)))
    )
    x = torch.randn(4, 3)
    if spelling is ours:
        WeightNorm().recompute(source[0])
    expected = source(x)
    target.load_state_dict(source.state_dict(), assign=assign)
    torch.testing.assert_close(target(x), expected)


@old_hook
@every_spelling
@every_load
def test_any_spelling_loads_into_an_rnn(spelling: Spelling, assign: bool) -> None:
    source, x = nn.LSTM(3, 4, num_layers=2), torch.randn(5, 1, 3)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.5)
    expected = copy.deepcopy(source)(x)[0]
    for name in RNN_NAMES:
        spelling(source, name, 0)
    target = lstm()
    target(x)
    target.load_state_dict(source.state_dict(), assign=assign)
    torch.testing.assert_close(target(x)[0], expected)


@every_load
def test_parts_that_are_loaded_are_the_parts_of_the_checkpoint(assign: bool) -> None:
    state = {"weight_g": torch.rand(2, 1), "weight_v": torch.rand(2, 3), "bias": torch.rand(2)}
    target = WeightNorm().apply(nn.Linear(3, 2))
    before = target.weight_v
    target.load_state_dict(state, assign=assign)
    for key, value in state.items():
        torch.testing.assert_close(getattr(target, key).detach(), value, rtol=0, atol=0)
    assert (target.weight_v is before) is not assign
    assert (target.weight_v.data_ptr() == state["weight_v"].data_ptr()) is assign


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": torch.ones(5, 3)}, "weight in the checkpoint is torch.float32 (5, 3), and Linear has"),
        ({"weight": torch.tensor(2.0)}, "weight in the checkpoint is torch.float32 (), and Linear has"),
        ({"weight": torch.ones(2, 3, dtype=torch.int64)}, "weight in the checkpoint is torch.int64"),
        ({"weight": 3}, 'Unexpected key(s) in state_dict: "weight"'),
        ({"weight": torch.ones(2, 3), "weight_g": torch.ones(2, 1)}, 'Missing key(s) in state_dict: "weight_v"'),
        (
            {"weight": torch.ones(2, 3), "weight_g": torch.ones(2, 1), "weight_v": torch.ones(2, 3)},
            'Unexpected key(s) in state_dict: "weight"',
        ),
        ({}, 'Missing key(s) in state_dict: "weight_g", "weight_v"'),
        ({"weight_g": torch.ones(2, 1)}, 'Missing key(s) in state_dict: "weight_v"'),
        ({"weight_g": torch.ones(3, 1), "weight_v": torch.ones(2, 3)}, "size mismatch for weight_g"),
        ({"weight": torch.tensor([[1.0] * 3, [0.0] * 3])}, "slices 1 are zero"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_checkpoint_that_does_not_fit_is_refused(change: dict[str, Any], says: str) -> None:
    target = nn.Sequential(WeightNorm().apply(nn.Linear(3, 2)))
    state = {f"0.{key}": value for key, value in {"bias": torch.ones(2), **change}.items()}
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict") as raised:
        target.load_state_dict(state)
    message = str(raised.value).replace("0.weight", "weight")
    assert says in message


def test_a_checkpoint_with_a_weight_that_cannot_be_split_is_refused_even_if_names_may_differ() -> None:
    target = WeightNorm().apply(nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="slices 0, 1 are zero"):
        target.load_state_dict({"weight": torch.zeros(2, 3)}, strict=False)


def test_a_checkpoint_goes_into_a_layer_with_parameters_that_are_none_or_not_initialized_yet() -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
    target.later = nn.parameter.UninitializedParameter()
    WeightNorm().apply(target).load_state_dict({"weight": source.weight}, strict=False)
    torch.testing.assert_close(target.weight, source.weight)


def test_a_checkpoint_without_the_layer_leaves_it_alone_if_it_may() -> None:
    target = WeightNorm().apply(nn.Linear(3, 2))
    expected = target.weight.detach().clone()
    result = target.load_state_dict({"bias": torch.ones(2)}, strict=False)
    assert sorted(result.missing_keys) == ["weight_g", "weight_v"]
    torch.testing.assert_close(target.weight.detach(), expected, rtol=0, atol=0)
    assert (target.bias == 1).all()


# Moves


@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda module: module.double(), torch.float64),
        (lambda module: module.half(), torch.float16),
        (lambda module: module.bfloat16(), torch.bfloat16),
        (lambda module: module.to(torch.float64), torch.float64),
        (lambda module: module.double().float(), torch.float32),
    ],
    ids=["double", "half", "bfloat16", "to", "there and back"],
)
@pytest.mark.parametrize("make", [dim_1, lambda: WeightNorm(dim=1).inline(nn.Linear(3, 2))])
def test_a_cast_makes_the_weight_anew(
    make: Factory, move: Callable[[nn.Module], nn.Module], dtype: torch.dtype
) -> None:
    model = make()
    layer: Any = model.fc if isinstance(model, Net) else model
    assert layer.weight.dtype == torch.float32
    make_stale(layer)
    assert move(model) is model
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(layer.weight, by_hand(layer, dim=1))
    x = torch.randn(4, 3, dtype=dtype)
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(model(x), nn.functional.linear(x, by_hand(layer, dim=1), layer.bias), **tolerance)


def test_a_cast_reaches_the_weights_of_an_rnn() -> None:
    module, x = lstm(), torch.randn(5, 1, 3, dtype=torch.float64)
    module(x.float())
    module.double()
    torch.testing.assert_close(module(x)[0], plain_lstm_of(module).double()(x)[0], rtol=1e-5, atol=1e-6)
    assert {weight.dtype for weight in module._flat_weights} == {torch.float64}


def test_the_list_of_an_inlined_rnns_weights_is_of_now() -> None:
    module = lstm("inline")
    for _ in range(2):
        nn.init.normal_(module.weight_hh_l0_g)
        weight = module._flat_weights[module._flat_weights_names.index("weight_hh_l0")]
        torch.testing.assert_close(weight, by_hand(module, "weight_hh_l0"))


def test_to_meta_and_back_empty() -> None:
    model, source = dim_1(), dim_1()
    model(torch.randn(4, 3))
    model.to("meta")
    assert model.fc.weight.device.type == "meta"
    assert model(torch.randn(4, 3, device="meta")).shape == (4, 2)
    model.to_empty(device="cpu")
    assert model.fc.weight.device.type == "cpu"
    model.load_state_dict(source.state_dict())
    x = torch.randn(4, 3)
    torch.testing.assert_close(model(x), source(x))
    torch.testing.assert_close(model.fc.weight, by_hand(source.fc, dim=1))


def test_built_on_meta_and_loaded_by_assignment() -> None:
    with torch.device("meta"):
        model = nn.Sequential(WeightNorm().inline(nn.Linear(3, 2)), lstm())
    source = nn.Sequential(WeightNorm().inline(nn.Linear(3, 2)), lstm())
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(4, 3)
    torch.testing.assert_close(model[0](x), nn.functional.linear(x, by_hand(source[0]), source[0].bias))
    torch.testing.assert_close(model[1](x)[0], plain_lstm_of(source[1])(x)[0])


def test_memory_format_moves() -> None:
    module = WeightNorm().apply(nn.Conv2d(4, 6, 3))
    module.to(memory_format=torch.channels_last)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(module.weight, by_hand(module))


def test_share_memory_and_requires_grad_reach_the_parts() -> None:
    module = WeightNorm().apply(nn.Linear(3, 2)).share_memory()
    assert module.weight_g.is_shared()
    assert module.weight_v.is_shared()
    module.requires_grad_(False)
    WeightNorm().recompute(module)
    assert not module.weight.requires_grad


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("verb", ["apply", "inline"])
def test_parameters_are_swapped_where_torch_is_asked_to(verb: str) -> None:
    module: Any = getattr(WeightNorm(), verb)(nn.Linear(3, 2))
    direction = module.weight_v
    assert module.weight.dtype == torch.float32
    module.double()
    assert module.weight_v is direction
    torch.testing.assert_close(module.weight, by_hand(module))
    source = nn.Linear(3, 2).double()
    module.load_state_dict(source.state_dict())
    assert module.weight_v is direction
    torch.testing.assert_close(module.weight.detach(), source.weight.detach())


# Reading


def test_reading_is_right_during_and_after_functional_call() -> None:
    module, x = WeightNorm().apply(nn.Linear(3, 2)), torch.randn(4, 3)
    others = {"weight_g": torch.rand(2, 1), "weight_v": torch.rand(2, 3)}
    module(x)
    expected = others["weight_g"] * others["weight_v"] / others["weight_v"].square().sum(1, keepdim=True).sqrt()
    got = torch.func.functional_call(module, others, (x,))
    torch.testing.assert_close(got, nn.functional.linear(x, expected, module.bias))
    torch.testing.assert_close(module.weight, by_hand(module))


def test_reading_is_right_after_a_part_was_replaced() -> None:
    module = WeightNorm().apply(nn.Linear(3, 2))
    for name in ("weight_g", "weight_v"):
        setattr(module, name, nn.Parameter(torch.rand_like(getattr(module, name))))
        torch.testing.assert_close(module.weight, by_hand(module))


def test_reading_is_right_after_grad_and_vmap() -> None:
    model, x = dim_1(), torch.randn(4, 3)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(model.fc.weight, by_hand(model.fc, dim=1))
    torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    torch.testing.assert_close(model.fc.weight, by_hand(model.fc, dim=1))


# Writing


def write_a_parameter(module: nn.Module) -> None:
    module.weight = nn.Parameter(torch.ones(2, 3))


def write_a_tensor(module: nn.Module) -> None:
    module.weight = torch.ones(2, 3)


def write_none(module: nn.Module) -> None:
    module.weight = None


def delete(module: nn.Module) -> None:
    del module.weight


def register(module: nn.Module) -> None:
    module.register_parameter("weight", nn.Parameter(torch.ones(2, 3)))


def register_none(module: nn.Module) -> None:
    module.register_parameter("weight", None)


@pytest.mark.parametrize("write", [write_a_parameter, write_a_tensor, write_none, delete, register, register_none])
@pytest.mark.parametrize("verb", ["apply", "inline"])
def test_setting_or_deleting_the_weight_says_what_to_do(verb: str, write: Callable[[nn.Module], None]) -> None:
    module: Any = getattr(WeightNorm(), verb)(nn.Linear(3, 2))
    weight, attributes, names = module.weight, dict(vars(module)), list(module._parameters)
    with pytest.raises(AttributeError) as raised:
        write(module)
    for text in ("'weight' of this Linear", "WeightNorm('weight', dim=0)", "assign(module, weight)", "remove(module)"):
        assert text in str(raised.value)
    assert vars(module) == attributes
    assert list(vars(module)) == list(attributes)
    assert list(module._parameters) == names
    torch.testing.assert_close(module.weight, weight, rtol=0, atol=0)


@pytest.mark.parametrize("write", [write_a_parameter, write_a_tensor, delete, register])
def test_it_says_so_where_another_tool_changed_the_class_too(write: Callable[[nn.Module], None]) -> None:
    module = WeightNorm().apply(nn.Linear(3, 2))
    parametrize.register_parametrization(module, "bias", nn.Identity())
    attributes = list(vars(module))
    with pytest.raises(AttributeError, match=r"'weight' of this Linear .* remove\(module\)"):
        write(module)
    assert list(vars(module)) == attributes


@pytest.mark.parametrize(
    "write",
    [
        lambda module: module.register_buffer("weight", torch.ones(2, 3)),
        lambda module: module.add_module("weight", nn.ReLU()),
    ],
)
def test_nothing_else_is_registered_in_place_of_the_weight(write: Callable[[nn.Module], None]) -> None:
    module = WeightNorm().apply(nn.Linear(3, 2))
    names = list(module.state_dict())
    with pytest.raises(KeyError, match="'weight' already exists"):
        write(module)
    assert list(module.state_dict()) == names
    torch.testing.assert_close(module.weight, by_hand(module))


@pytest.mark.parametrize("name", ["weight", "bias_hh_l0"])
def test_other_parameters_are_set_and_deleted_as_ever(name: str) -> None:
    module = WeightNorm("weight_ih_l0").apply(nn.LSTM(3, 2))
    module.register_parameter("weight", nn.Parameter(torch.ones(2)))
    setattr(module, name, nn.Parameter(torch.zeros(2)))
    assert not getattr(module, name).any()
    delattr(module, name)
    assert name not in module._parameters


# Hooks


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """Every collection of hooks that `module` has, by attribute."""
    return {name: value for name, value in vars(module).items() if "hook" in name and hasattr(value, "__len__")}


def global_hooks() -> dict[str, Any]:
    found = vars(torch.nn.modules.module)
    return {
        name: len(value) for name, value in found.items() if name.startswith("_global") and hasattr(value, "__len__")
    }


@pytest.mark.parametrize("which", SUBJECTS, ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_no_hook_is_registered_on_any_module_or_parameter(which: Subject) -> None:
    before = global_hooks()
    model = which.model()
    loss_of(model(*which.inputs())).backward()
    torch.jit.script(model)
    for module in model.modules():
        hooks = hooks_of(module)
        assert len(hooks) >= len(hooks_of(nn.Module()))
        assert not any(hooks.values())
        assert "state_dict" not in vars(module)
        assert "forward" not in vars(module)
    for parameter in model.parameters():
        assert not parameter._backward_hooks
        assert not getattr(parameter, "_post_accumulate_grad_hooks", None)
    assert len(before) >= 5
    assert global_hooks() == before


# The generated classes


def test_equal_norms_share_one_generated_class() -> None:
    cls = type(WeightNorm().apply(nn.Linear(3, 2)))
    assert type(WeightNorm().apply(nn.Linear(5, 7))) is cls
    assert type(WeightNorm("weight", dim=-2).apply(nn.Linear(5, 7))) is cls
    assert type(WeightNorm("weight", dim="out").apply(nn.Linear(5, 7))) is cls
    for other in (WeightNorm(dim=1), WeightNorm(eps=1e-6), WeightNorm(dim=None), WeightNorm("bias")):
        assert type(other.apply(nn.Linear(3, 2))) is not cls
    assert type(WeightNorm().inline(nn.Linear(3, 2))) is not cls
    assert type(WeightNorm().apply(nn.Bilinear(3, 2, 2))) is not cls


def test_generated_classes_of_local_classes_are_collected() -> None:
    def used() -> tuple[weakref.ref[type], weakref.ref[type]]:
        class Local(nn.Linear):
            pass

        module = WeightNorm().inline(Local(3, 2))
        module(torch.randn(4, 3)).sum().backward()
        copy.deepcopy(module)
        return weakref.ref(type(module)), weakref.ref(Local)

    references = used()
    gc.collect()
    gc.collect()  # the base is held by the class that the first one frees
    assert [reference() for reference in references] == [None, None]


def test_many_modules_and_local_classes_leave_no_more_source_behind_than_one() -> None:
    def normed() -> nn.Module:
        class Local(nn.Linear):
            pass

        return WeightNorm("bias").inline(Local(3, 2))

    normed()
    before = len(linecache.cache)
    for _ in range(5):
        normed()
    assert len(linecache.cache) == before


def test_the_generated_source_shows_in_the_errors_of_torchscript() -> None:
    scripted = torch.jit.script(WeightNorm().inline(nn.Linear(3, 2)))
    with pytest.raises(RuntimeError) as raised:
        scripted(torch.randn(4, 5))
    assert 'self._recompute_normed("inlined")' in str(raised.value)
