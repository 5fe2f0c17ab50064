"""Faults: an exception at every call inside a verb, and checkpoints that are cut off, corrupt, or do not fit.

`test_bad_input.py`, `test_verbs.py`, `test_fold.py` and `test_spellings.py` press Ctrl-C at every line of the package.
Here a fault strikes at every call, torch's and contextlib's own calls included, and after it: Python looks for signals
where a function begins, and a call of torch may fail at any time (memory, say).
"""

import contextlib
import copy
import gc
import io
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from layers import weight_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from whole_models import (
    PACKAGE,
    Picture,
    anatomy,
    hook_spectral_norm,
    hook_weight_norm,
    spectral_weight,
)

from explicit_wn import SpectralNorm, WeightNorm, apply_all, carrier, convert, fold
from explicit_wn.carrier import undo
from explicit_wn.models import spellings

Make = Callable[[], nn.Module]
Verb = Callable[[nn.Module], Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),  # older torch, on saving
    pytest.mark.no_cover,  # which makes calls, and objects, of its own
]


@pytest.fixture(autouse=True, scope="module")
def _compiled_once() -> None:
    """Dynamo then calls back for every module that is made or dies: so that it does, whichever tests ran before."""
    torch.compile(nn.Linear(3, 3), backend="eager")(torch.ones(1, 3))


class Fault(Exception):
    """Whatever may go wrong in a call."""


# A fault at every call

WATCHED = (PACKAGE, "<explicit_wn", nn.modules.module.__file__, nn.utils.parametrize.__file__, contextlib.__file__)

WHERE_MODULES_CHANGE = [
    module.__file__ for module in (carrier.module, carrier.loading, carrier.weight, undo, spellings, contextlib)
]

Call = tuple[str, str, int, str]


def calls_made(act: Callable[[], Any], fault_at: int | None = None) -> tuple[list[Call], BaseException | None]:
    """Runs `act` with a fault at the `fault_at`-th call that it makes: the calls so far, and what came out."""
    calls: list[Call] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        caller = frame.f_back if event == "call" else frame
        if event == "return" or caller is None or not caller.f_code.co_filename.startswith(WATCHED):
            return
        callee = frame.f_code.co_name if event == "call" else getattr(argument, "__name__", "")
        calls.append((event, caller.f_code.co_filename, caller.f_lineno, callee))
        if len(calls) - 1 == fault_at:
            raise KeyboardInterrupt if fault_at % 2 else Fault

    # Python ignores an error in what is called because an object dies: a generator that is thrown away, or Dynamo's
    # callback for every module of a process that has compiled one.
    report, sys.unraisablehook = sys.unraisablehook, lambda _: None
    sys.setprofile(profile)
    try:
        act()
    except (Fault, KeyboardInterrupt, RuntimeError) as error:  # load_state_dict makes a RuntimeError of a Fault
        assert fault_at is not None
        return calls, error
    finally:
        sys.setprofile(None)
        sys.unraisablehook = report
        torch.set_grad_enabled(True)  # a fault within torch's own no_grad leaves it as it is
    return calls, None


def chosen(calls: list[Call]) -> list[int]:
    """The first time that each call is made, the last time of those where modules are changed, and the last of all."""
    first = {call: index for index, call in reversed(list(enumerate(calls)))}
    last = {call: index for index, call in enumerate(calls) if call[1] in WHERE_MODULES_CHANGE}
    return sorted({*first.values(), *last.values(), len(calls) - 1})


def faults(make: Make, verb: Verb) -> Iterator[tuple[nn.Module, Picture, BaseException | None]]:
    """For every call inside `verb` a model of its own, struck there, how it was before, and the error."""
    verb(make())  # what is made once per process is made
    model = make()
    calls, _ = calls_made(lambda: verb(model))
    for index in chosen(calls):
        model = make()
        before = Picture(model)
        _, error = calls_made(lambda model=model: verb(model), index)
        yield model, before, error


def linear() -> nn.Module:
    class Fresh(nn.Linear):  # whose generated class has to be generated
        pass

    torch.manual_seed(0)
    return Fresh(3, 3)


def lstm() -> nn.Module:
    class Fresh(nn.LSTM):
        pass

    torch.manual_seed(0)
    return Fresh(3, 3)


def with_changed_parts(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, part in module.named_parameters():
            if name.endswith(("_g", "_orig")):
                part.mul_(2)
    return module


def spelled() -> nn.Module:
    """Layers in torch's spellings; of the ordinary class, so that nothing is generated any more once it was."""
    torch.manual_seed(0)
    layers = [
        hook_weight_norm(nn.Linear(3, 3)),
        parametrizations.weight_norm(parametrizations.spectral_norm(nn.Linear(3, 3)), "bias"),
        WeightNorm("bias").inline(hook_spectral_norm(nn.Linear(3, 3))),
    ]
    return nn.Sequential(*layers).eval()


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


VERBS: dict[str, tuple[Make, Verb]] = {
    "apply": (linear, lambda m: WeightNorm().apply(m)),
    "apply to an LSTM": (lstm, lambda m: WeightNorm("weight_hh_l0").apply(m)),
    "inline": (linear, lambda m: WeightNorm(eps=1e-6).inline(m)),
    "inline the second": (lambda: WeightNorm("bias").inline(linear()), lambda m: WeightNorm().inline(m)),
    "remove": (lambda: with_changed_parts(WeightNorm().inline(linear())), lambda m: WeightNorm().remove(m)),
    "remove one of two": (
        lambda: with_changed_parts(SpectralNorm().inline(WeightNorm("bias").inline(linear()))).eval(),
        lambda m: SpectralNorm().remove(m),
    ),
    "remove from an LSTM": (
        lambda: with_changed_parts(WeightNorm("weight_hh_l0").inline(lstm())),
        lambda m: WeightNorm("weight_hh_l0").remove(m),
    ),
    "convert": (spelled, convert),
    "fold": (spelled, fold),
    "apply_all": (two_layers, lambda m: apply_all(m, WeightNorm())),
}


def outcome(model: nn.Module, before: Picture, done: list[Any]) -> str:
    after = Picture(model)
    if after.identities == before.identities:
        same = zip(after.values, before.values, strict=True)
        return "before" if all(torch.equal(now, then) for (_, now, _), (_, then, _) in same) else "written to"
    return "after" if anatomy(model) == done else "neither"


def output_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(torch.linspace(-1, 1, 6).view(2, 3))
    return output[0] if isinstance(output, tuple) else output


@pytest.fixture
def _no_collection() -> Iterator[None]:
    """Nothing is collected within a call, where it would count as one."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize(("make", "verb"), VERBS.values(), ids=VERBS)
def test_a_fault_at_any_call_leaves_the_model_before_or_after(make: Make, verb: Verb) -> None:
    expected, done = output_of(make()), make()
    verb(done)
    kept, outcomes = [], []
    for model, before, error in faults(make, verb):
        outcomes.append(outcome(model, before, anatomy(done)))
        assert outcomes[-1] in ("before", "after"), repr(error)
        kept.append((model, before, error))
    assert len(outcomes) > 80
    assert outcomes[0] == "before"
    assert outcomes[-1] == "after"
    models = [(model, before) for model, before, _ in kept]
    del kept, error  # and with the errors all that their tracebacks held
    gc.collect()
    for index, ((model, before), was) in enumerate(zip(models, outcomes, strict=True)):
        assert outcome(model, before, anatomy(done)) == was, "what the error held went on changing the model"
        torch.testing.assert_close(output_of(model), expected)
        if was == "before" and index % 7 == 0:
            verb(model)  # nothing is left behind that stands in its way
            assert anatomy(model) == anatomy(done)
            torch.testing.assert_close(output_of(model), expected)


@pytest.mark.parametrize(("make", "verb"), VERBS.values(), ids=VERBS)
def test_the_collector_may_run_at_any_call(make: Make, verb: Verb) -> None:
    """What is held by weak references alone, like a generated class before it has an instance, must not go."""
    done, model = make(), make()
    verb(done)
    like, calls = anatomy(done), 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += 1
        gc.collect()

    gc.collect()
    gc.freeze()  # it looks at what is made from here on
    sys.setprofile(profile)
    try:
        verb(model)
    finally:
        sys.setprofile(None)
        gc.unfreeze()
    assert calls > 300
    assert anatomy(model) == like
    torch.testing.assert_close(output_of(model), output_of(done))


# Loading: what a plain module promises is that each tensor is the old one or the new one. Ours promises besides that
# every weight is what its parts make, whatever became of them.


class Target(nn.Module):
    """A weight that is recomputed, two that are inlined, and parameters that nobody norms."""

    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm(dim=1)
        self.explicit = self.wn.apply(nn.Linear(3, 4))
        self.inlined = WeightNorm().inline(nn.Linear(4, 3))
        self.spectral = SpectralNorm().inline(nn.Linear(3, 2))
        self.plain = nn.Linear(2, 2)


def target() -> Target:
    torch.manual_seed(0)
    model = Target().eval()
    for module, x in ((model.explicit, 3), (model.inlined, 4), (model.spectral, 3)):
        module(torch.ones(1, x))
    return model


def same(layer: nn.Module, dim: int = 0) -> nn.Module:
    return layer


SPELLINGS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "ours": (
        lambda layer, dim=0: WeightNorm(dim=dim).apply(layer),
        lambda layer: SpectralNorm().apply(layer),
    ),
    "hook": (lambda layer, dim=0: hook_weight_norm(layer, dim=dim), hook_spectral_norm),
    "parametrization": (
        lambda layer, dim=0: parametrizations.weight_norm(layer, dim=dim),
        parametrizations.spectral_norm,
    ),
    "plain": (same, same),
}


def source(spelling: str) -> nn.Module:
    """Another model of the same shapes, with norms in that spelling."""
    weight_norm, spectral_norm = SPELLINGS[spelling]
    torch.manual_seed(1)
    layers = {
        "explicit": weight_norm(nn.Linear(3, 4), dim=1),
        "inlined": weight_norm(nn.Linear(4, 3)),
        "spectral": spectral_norm(nn.Linear(3, 2)),
        "plain": nn.Linear(2, 2),
    }
    return nn.ModuleDict(layers).eval()


def assert_weights_are_what_their_parts_make(model: Any) -> None:
    torch.testing.assert_close(
        model.explicit.weight.detach(),
        weight_of(model.explicit.weight_g, model.explicit.weight_v, 1).detach(),
        equal_nan=True,
    )
    inlined = weight_of(model.inlined.weight_g, model.inlined.weight_v, 0).detach()
    orig, u, v = (getattr(model.spectral, f"weight_{part}").detach() for part in ("orig", "u", "v"))
    for layer, weight in ((model.inlined, inlined), (model.spectral, spectral_weight(orig, u, v, 0))):
        x = torch.randn(2, layer.in_features)
        with torch.no_grad():
            expected = nn.functional.linear(x, weight.to(layer.bias), layer.bias)
            torch.testing.assert_close(layer(x), expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def identities(model: nn.Module) -> list[Any]:
    """Which objects the model is made of, but for the weights that it has stored."""
    return [identity for identity in Picture(model).identities if not identity[1].startswith("_normed_store[")]


def are_equal(tensors: dict[str, Tensor], wanted: dict[str, Tensor], layer: str = "") -> bool:
    """Whether the tensors are the wanted ones, of one layer or all of them."""
    return all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items() if name.startswith(layer))


every_spelling = pytest.mark.parametrize("spelling", SPELLINGS)


@every_spelling
def test_a_fault_at_any_call_of_a_load_leaves_each_normed_module_as_before_or_as_after(spelling: str) -> None:
    """And each tensor of the others, one of which torch may have been in the middle of."""
    state = source(spelling).state_dict()

    def load(model: nn.Module) -> None:
        torch.manual_seed(2)  # a plain weight has no u and v: they are drawn
        model.load_state_dict(state)

    old, loaded = target().state_dict(), target()
    load(loaded)
    new, untouched, done = loaded.state_dict(), 0, 0
    for model, before, error in faults(target, load):
        assert identities(model) == [i for i in before.identities if not i[1].startswith("_normed_store[")], error
        tensors = model.state_dict()
        assert list(tensors) == list(old)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, old[name]) or torch.equal(tensor, new[name]), name
        for layer in ("explicit", "inlined", "spectral"):
            assert are_equal(tensors, old, layer) or are_equal(tensors, new, layer), (layer, error)
        untouched += are_equal(tensors, old)
        done += are_equal(tensors, new)
        assert_weights_are_what_their_parts_make(model)
        load(model)
        assert are_equal(model.state_dict(), new)
        assert_weights_are_what_their_parts_make(model)
    assert untouched > 10
    assert done >= 1


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@every_spelling
def test_a_file_that_is_cut_off_anywhere_is_an_error_and_changes_nothing(spelling: str) -> None:
    model, data = target(), saved(source(spelling).state_dict())
    before = Picture(model)
    for length in (*range(0, len(data), len(data) // 40), len(data) - 100, len(data) - 22, len(data) - 1):
        with pytest.raises((RuntimeError, EOFError, ValueError)):
            model.load_state_dict(torch.load(io.BytesIO(data[:length]), weights_only=True))
        assert Picture(model).identities == before.identities
    assert outcome(model, before, []) == "before"
    model.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    assert_weights_are_what_their_parts_make(model)


def test_a_whole_model_that_is_cut_off_anywhere_is_an_error() -> None:
    data = saved(target())
    for length in range(0, len(data), len(data) // 40):
        with pytest.raises((RuntimeError, EOFError, ValueError)):
            torch.load(io.BytesIO(data[:length]), weights_only=False)
    assert_weights_are_what_their_parts_make(torch.load(io.BytesIO(data), weights_only=False))


@every_spelling
def test_bytes_that_changed_on_the_way_are_an_error_or_leave_weights_that_their_parts_make(spelling: str) -> None:
    """torch compares no checksums: a changed number goes in, a changed name or shape does not."""
    good, refused = saved(source(spelling).state_dict()), 0
    begin = good.index(b"data.pkl")
    end = good.index(b"PK", begin)  # the pickle: names, shapes, dtypes and order
    for position in range(begin, end, 17):
        data = bytearray(good)
        data[position] ^= 0x11
        model = target()
        before = identities(model)
        try:
            model.load_state_dict(torch.load(io.BytesIO(bytes(data)), weights_only=True))
        except Exception:  # of all kinds, from torch's reading of the file
            refused += 1
        assert identities(model) == before
        assert_weights_are_what_their_parts_make(model)
    assert refused > 20


def missing(tensor: Tensor) -> None:
    return None


def wrong_shape(tensor: Tensor) -> Tensor:
    return torch.ones(*(size + 1 for size in tensor.shape), 2)


def double(tensor: Tensor) -> Tensor:
    return tensor.double() + 1


def integers(tensor: Tensor) -> Tensor:
    return torch.arange(1, tensor.numel() + 1).view(tensor.shape)


def not_a_number(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, float("nan"))


def no_tensor(tensor: Tensor) -> str:
    return "weight"


@every_spelling
@pytest.mark.parametrize("spoil", [missing, wrong_shape, double, integers, not_a_number, no_tensor])
def test_a_state_dict_that_does_not_fit_is_refused_where_torch_refuses_it_and_the_other_modules_are_loaded(
    spelling: str, spoil: Callable[[Tensor], Any]
) -> None:
    for key in source(spelling).state_dict():
        state = source(spelling).state_dict()
        value = spoil(state.pop(key))
        state |= {} if value is None else {key: value}
        if value is None and spelling == "hook" and key == "spectral.weight_v":
            continue  # torch's hook makes it of the others, as its first checkpoints had none

        theirs, ours = source(spelling), target()
        objects, before = identities(ours), copy.deepcopy(ours.state_dict())
        errors = [error_of(model.load_state_dict, state) for model in (theirs, ours)]
        assert identities(ours) == objects
        assert_weights_are_what_their_parts_make(ours)
        if spelling == "plain" and key.endswith("weight") and key != "plain.weight" and spoil in (integers, no_tensor):
            assert "Error(s) in loading state_dict" in str(errors[1])  # of integers no direction can be made
        else:
            assert type(errors[0]) is type(errors[1]), (key, errors)
        names_differ = "Missing key" in str(errors[1])  # which torch tells in the end, when all is loaded
        layer = key.partition(".")[0]
        is_undone = layer != "plain" and errors[1] is not None and not names_differ
        for name in ("plain.bias", "explicit.bias", "inlined.bias"):  # as much as torch loads
            if name != key and not (is_undone and name.startswith(layer)):
                assert torch.equal(ours.get_parameter(name), state[name])
        if is_undone:
            assert are_equal(ours.state_dict(), before, layer)


def test_a_load_by_assignment_that_does_not_fit_assigns_nothing_to_a_normed_module() -> None:
    layer = WeightNorm().apply(nn.Linear(3, 2))
    objects, before = identities(layer), copy.deepcopy(layer.state_dict())
    state = {"bias": torch.ones(2), "weight_g": torch.ones(2, 1), "weight_v": torch.ones(3, 3)}
    with pytest.raises(RuntimeError, match="size mismatch for weight_v"):
        layer.load_state_dict(state, assign=True)
    assert identities(layer) == objects
    assert are_equal(layer.state_dict(), before)
    torch.testing.assert_close(layer.weight, weight_of(before["weight_g"], before["weight_v"], 0))


def error_of(function: Callable[..., Any], argument: Any) -> Exception | None:
    try:
        function(argument)
    except Exception as error:
        return error
    return None
