"""Safety: checkpoints that need no trust, pickles that run nothing else, and names and settings that are no code."""

import builtins
import enum
import io
import linecache
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from layers import Net, by_hand, weight_of
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.utils import parametrizations
from whole_models import (
    hook_spectral_norm,
    hook_weight_norm,
    spectral_weight,
    unchanged,
)

from explicit_wn import Reparametrization, SpectralNorm, WeightNorm, convert, normed

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


# Code that must not run, and whether it did

MARK = "explicit_wn_ran_what_it_was_given"
CODE = f"setattr(__import__('builtins'), {MARK!r}, True)"
LEADS_OUT = f"a\n{CODE}\nif 1:\n    if 1:\n        if 1:\n            0 #"  # of the function that is generated


@pytest.fixture(autouse=True)
def _nothing_runs() -> Iterator[None]:
    yield
    ran = vars(builtins).pop(MARK, False)
    assert not ran


def test_the_code_that_must_not_run_would_be_noticed() -> None:
    eval(CODE)
    assert vars(builtins).pop(MARK)


# State dicts


def exponential(log: Tensor, mode: str, limit: float) -> Tensor:
    return log.exp().clamp_max(limit) if mode == "limited" else log.exp()


@attrs.define(slots=False, eq=False, on_setattr=None, repr=False)
class Exponential(Reparametrization):
    """A norm of somebody's own, with settings of every kind."""

    name: str = "weight"
    mode: str = "limited"
    limit: float = 100.0

    formula = staticmethod(exponential)

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        return {"log": weight.abs().clamp_min(1e-3).log()}


def in_torchs_spellings() -> nn.Module:
    return nn.Sequential(
        hook_weight_norm(nn.Linear(3, 2)),
        parametrizations.weight_norm(nn.Conv1d(2, 3, 2), dim=None),
        hook_spectral_norm(nn.Linear(2, 2)),
        parametrizations.spectral_norm(nn.Linear(3, 2)),
    )


def converted() -> nn.Module:
    model = in_torchs_spellings()
    convert(model)
    return model


def lstm() -> nn.Module:
    return nn.Sequential(WeightNorm("weight_hh_l0").inline(SpectralNorm("weight_ih_l0").inline(nn.LSTM(3, 2))))


STATES: dict[str, Callable[[], nn.Module]] = {
    "WeightNorm": lambda: Net(WeightNorm(dim=1)),
    "WeightNorm of the whole": lambda: WeightNorm(dim=None, eps=1e-6).inline(nn.Linear(3, 2)),
    "WeightNorm in half precision": lambda: WeightNorm().inline(nn.Linear(3, 2)).bfloat16(),
    "SpectralNorm": lambda: SpectralNorm().apply(nn.Linear(3, 2)),
    "SpectralNorm of a vector": lambda: SpectralNorm("bias").inline(nn.Linear(3, 2)),
    "a norm of one's own": lambda: Exponential().inline(nn.Linear(3, 2)),
    "LSTM": lstm,
    "converted": converted,
}
every_state = pytest.mark.parametrize("make", STATES.values(), ids=STATES)


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.1)


def saved(thing: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_weights_are_what_their_parts_make(model: nn.Module) -> None:
    state, checked = model.state_dict(), 0
    for path, module, norm in normed(model.eval()):
        norm.recompute(module)
        if isinstance(norm, WeightNorm):
            expected = weight_of(state[f"{path}_g"], state[f"{path}_v"], norm.dim, norm.eps)  # type: ignore[arg-type]
        elif isinstance(norm, Exponential):
            expected = state[f"{path}_log"].exp()
        elif f"{path}_u" not in state:
            expected = nn.functional.normalize(state[f"{path}_orig"], dim=0)
        else:
            expected = spectral_weight(*(state[f"{path}_{part}"] for part in ("orig", "u", "v")), norm.dim)  # type: ignore[attr-defined]
        tolerance = 1e-2 if expected.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(getattr(module, norm.name).detach(), expected, rtol=tolerance, atol=tolerance)
        checked += 1
    assert checked


@every_state
def test_every_state_dict_loads_weights_only_and_names_nothing_of_ours(make: Callable[[], nn.Module]) -> None:
    model, fresh = make(), make()
    change(model)
    optimizer = torch.optim.Adam(model.parameters())
    file = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    named = globals_named(pickles_in(file))
    assert named
    assert all(module.split(".")[0] in ("torch", "collections") for module, _ in named)
    fresh.load_state_dict(torch.load(file, weights_only=True)["model"])
    assert_same_state(fresh, model)
    assert_weights_are_what_their_parts_make(fresh)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@every_state
def test_a_state_dict_that_went_through_a_distributed_checkpoint_loads_weights_only(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model, fresh = make(), make()
    change(model)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "distributed", no_dist=True)
    dcp_to_torch_save(tmp_path / "distributed", tmp_path / "one.pt")
    fresh.load_state_dict(torch.load(tmp_path / "one.pt", weights_only=True)["model"])
    assert_same_state(fresh, model)
    assert_weights_are_what_their_parts_make(fresh)


# Whole models


def pickles_in(file: io.BytesIO) -> bytes:
    """The pickle in a file of torch.save."""
    with zipfile.ZipFile(file) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        data = archive.read(name)
    file.seek(0)
    return data


def globals_named(data: bytes) -> set[tuple[str, str]]:
    """Everything that unpickling `data` would look up, and nothing is run to know it."""
    named = set()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            module, name = argument.split(" ", 1)
            named.add((module, name))
        elif opcode.name == "STACK_GLOBAL":
            raise AssertionError("torch.save writes an older protocol")
    return named


OF_OURS = {
    ("explicit_wn.carrier.module", "rebuild"),
    ("explicit_wn.carrier.recipe", "recipe_from"),
    ("explicit_wn.norms.weight_norm", "WeightNorm"),
}


class PlainNet(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.fc = norm(nn.Linear(3, 2))
        self.lstm = norm(nn.LSTM(3, 2), "weight_hh_l0")


def no_norm(module: nn.Module, name: str = "weight") -> nn.Module:
    return module


@pytest.mark.parametrize("verb", ["apply", "inline"])
def test_the_pickle_of_a_whole_model_names_what_a_plain_one_names_and_three_things_of_ours(verb: str) -> None:
    plain = globals_named(pickles_in(saved(PlainNet(no_norm))))
    model = PlainNet(getattr(WeightNorm(), verb))
    model.fc(torch.ones(1, 3))
    ours = globals_named(pickles_in(saved(model)))
    assert ours - plain == OF_OURS
    assert ours - OF_OURS <= plain


OTHERS = [
    "builtins\neval",
    "builtins\ndict",
    "os\nsystem",
    "collections\nOrderedDict",
    "torch\nTensor",
    "torch.nn\nmodules",
]


@pytest.mark.parametrize("other", OTHERS, ids=[other.replace("\n", ".") for other in OTHERS])
@pytest.mark.parametrize("instead_of", ["torch.nn.modules.linear\nLinear", "explicit_wn.norms.weight_norm\nWeightNorm"])
def test_bytes_that_name_another_class_are_refused_before_anything_is_made(other: str, instead_of: str) -> None:
    data = pickle.dumps(WeightNorm().apply(nn.Linear(3, 2)), protocol=2)
    assert data.count(f"c{instead_of}\n".encode()) == 1
    assert type(pickle.loads(data)).__name__ == "Linear"
    known = set(linecache.cache)
    with pytest.raises((TypeError, ValueError)):
        pickle.loads(data.replace(f"c{instead_of}\n".encode(), f"c{other}\n".encode()))
    assert set(linecache.cache) == known


@pytest.mark.parametrize("name", [f"weight;{CODE}", f"weight\n{CODE}", "weight'", "class", "", "weight.g"])
def test_bytes_that_name_another_parameter_are_refused(name: str) -> None:
    data = pickle.dumps(WeightNorm("bias").apply(nn.Linear(3, 2)), protocol=2)
    good, bad = (b"X" + len(n.encode()).to_bytes(4, "little") + n.encode() for n in ("bias", name))
    assert good in data
    known = set(linecache.cache)
    with pytest.raises(ValueError, match=r"identifier|the module that owns"):
        pickle.loads(data.replace(good, bad))
    assert set(linecache.cache) == known


# Names


class Layer(nn.Module):
    """A module with one parameter, of any name that torch takes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return x


NO_IDENTIFIERS = [
    *(
        "a b",
        "a-b",
        "1a",
        "a'",
        'a"',
        "a\\",
        "a#",
        "a\n",
        "a\r",
        "a\t",
        "a\0",
        "a;b",
        "a:b",
        "a=b",
        "a)",
        "a[0]",
        "{a}",
    ),
    *("'''", '"""', "\n", " ", "a\u2028b", "a\u200b", "²", "ⅷ x", "💥", "\ud800"),
    *(
        CODE,
        f"a = 0\n    {CODE}\n    b",
        f"a'\n{CODE}#",
        f'a"""\n{CODE}\n"""',
        f"a:\n{CODE}",
        f"{{{CODE}}}",
        f"a\\\n{CODE}",
    ),
]
KEYWORDS = ["class", "None", "True", "lambda", "if", "async", "await", "global"]
TAKEN = [
    *("_normed", "_normed_store", "_normed_recompute", "_normed_base", "_normed_of_the_future"),
    *("_recompute_normed", "_forward_of_base", "_was_told_to_recompute"),
    *("__slots__", "__del__", "__len__", "__iter__", "__bool__", "__deepcopy__", "__wrapped__", "__foo", "__x__"),
    *("__jit_ignored_attributes__", "__constants__", "__prepare_scriptable__", "__torch_function__"),
]
NOT_AS_PYTHON_READS_THEM = ["ﬁ", "ſ", "ª", "ℂ", "𝐰", "ﬀ_1", "e\u0301"]


@pytest.mark.parametrize("verb", ["apply", "inline"])
@pytest.mark.parametrize("name", [*NO_IDENTIFIERS, *KEYWORDS, *TAKEN, *NOT_AS_PYTHON_READS_THEM], ids=ascii)
def test_a_name_that_cannot_stand_in_source_is_refused_and_nothing_is_changed_or_written(name: str, verb: str) -> None:
    module = Layer(name)
    known = set(linecache.cache)
    with unchanged(module), pytest.raises(ValueError, match="cannot norm"):
        getattr(WeightNorm(name), verb)(module)
    assert set(linecache.cache) == known


# torch's own register_parameter refuses these; whoever puts them in its place gets the same from us
ATTRIBUTES = ["forward", "_apply", "state_dict", "__class__", "__dict__", "__doc__", "__module__"]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_name_that_every_module_uses_is_refused(name: str) -> None:
    module = Layer("weight")
    module._parameters[name] = module._parameters.pop("weight")
    with unchanged(module), pytest.raises(ValueError, match="cannot norm"):
        WeightNorm(name).apply(module)


HARMLESS = [
    *(
        "label",
        "self",
        "x",
        "is_scripting",
        "recompute",
        "weight_norm_0",
        "module",
        "torch",
        "print",
        "exec",
        "builtins",
    ),
    *("match", "case", "_", "_x", "é", "变量", "вес", "name", "eps", "dim", "g", "v", "kind", "w" * 300),
]


@pytest.mark.parametrize("verb", ["apply", "inline"])
@pytest.mark.parametrize("name", HARMLESS)
def test_any_other_name_works_in_eager_mode_and_in_torchscript(name: str, verb: str) -> None:
    net = Net(WeightNorm(name), Layer(name), verb)
    change(net)
    expected = by_hand(net.fc, name)
    net(torch.ones(1))
    torch.testing.assert_close(getattr(net.fc, name), expected)
    scripted = torch.jit.script(net)
    change(net)
    scripted(torch.ones(1))
    expected = by_hand(net.fc, name)
    torch.testing.assert_close(getattr(scripted.fc, name), expected)
    WeightNorm(name).remove(net.fc)
    assert type(net.fc) is Layer


class Lying(str):
    """A str that says what it is asked to say."""

    __slots__ = ()

    def isidentifier(self) -> bool:
        return True

    def __repr__(self) -> str:
        return CODE

    def __format__(self, specification: str) -> str:
        return CODE

    __str__ = __repr__


@pytest.mark.parametrize("verb", ["apply", "inline"])
@pytest.mark.parametrize("name", [LEADS_OUT, f"a;{CODE}", "a b", "class"], ids=ascii)
def test_a_name_is_what_it_holds_and_not_what_it_says(name: str, verb: str) -> None:
    module = Layer(name)
    known = set(linecache.cache)
    with pytest.raises(ValueError):
        getattr(WeightNorm(Lying(name)), verb)(module)
    assert type(module) is Layer
    assert set(linecache.cache) == known


def test_a_str_that_lies_about_itself_writes_no_code() -> None:
    module = nn.Linear(3, 2)
    layer = WeightNorm(Lying("weight")).apply(module)
    change(layer)
    WeightNorm().recompute(layer)
    torch.testing.assert_close(layer.weight, weight_of(layer.weight_g, layer.weight_v, 0))
    torch.jit.script(layer)


# Classes


HOSTILE = ["a b", "a'", 'a"""', "a\n" + CODE, f"'{CODE}#", "a\\", "<x>", "class", "", "\u2028", "💥", f"{{{CODE}}}"]


def class_with(attribute: str, value: str) -> type[nn.Module]:
    class Local(nn.Linear):
        pass

    setattr(Local, attribute, value)
    return Local


@pytest.mark.parametrize("attribute", ["__name__", "__qualname__", "__module__", "__doc__"])
@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_a_class_may_be_called_anything(attribute: str, value: str) -> None:
    cls = class_with(attribute, value)
    for verb in ("apply", "inline"):
        layer: Any = getattr(WeightNorm(), verb)(cls(3, 2))
        assert getattr(type(layer), attribute) == value
        change(layer)
        WeightNorm().recompute(layer)
        torch.testing.assert_close(layer.weight, weight_of(layer.weight_g, layer.weight_v, 0))
        assert type(WeightNorm().remove(layer)) is cls


# Settings and norms


@pytest.mark.parametrize("value", [*HOSTILE, "limited", "a\0", "'''", '"', "\\'", "%s{}"], ids=ascii)
def test_a_setting_may_be_any_text_and_reaches_the_formula_as_it_is(value: str) -> None:
    layer = Exponential(mode=value, limit=0.25).inline(nn.Linear(3, 2))
    change(layer)
    expected = layer.weight_log.exp()
    if value == "limited":
        assert (expected > 0.25).any()
        expected = expected.clamp_max(0.25)
    x = torch.randn(4, 3)
    for run in (layer, torch.jit.script(layer)):
        torch.testing.assert_close(run(x), nn.functional.linear(x, expected, layer.bias))
    twin = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(twin(x), layer(x))


class Text(str, enum.Enum):
    LIMITED = "limited"
    V = "v"


SETTINGS: dict[str, tuple[Callable[[], Any], float]] = {
    "infinite": (lambda: Exponential(limit=float("inf")), float("inf")),
    "NumPy's float": (lambda: Exponential(limit=np.float64(0.25)), 0.25),
    "a whole number": (lambda: Exponential(limit=0), 0.0),
    "an enum": (lambda: Exponential(mode=Text.LIMITED, limit=0.25), 0.25),
    "a str that lies": (lambda: Exponential(mode=Lying("limited"), limit=0.25), 0.25),
}


@pytest.mark.parametrize(("norm", "limit"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_of_any_kind_is_its_value(norm: Callable[[], Any], limit: float) -> None:
    layer = norm().inline(nn.Linear(3, 2))
    change(layer)
    x = torch.randn(4, 3)
    expected = nn.functional.linear(x, layer.weight_log.exp().clamp_max(limit), layer.bias)
    for run in (layer, torch.jit.script(layer)):
        torch.testing.assert_close(run(x), expected)


def test_settings_of_our_norms_may_be_numpys_and_enums() -> None:
    for norm in (WeightNorm(eps=np.float64(1e-6)), SpectralNorm(first=Text.V, eps=np.float64(1e-6))):
        torch.jit.script(norm.inline(nn.Linear(3, 2)))


@pytest.mark.parametrize(
    "value", [[CODE], {CODE: 1}, b"x", 1j, object(), torch.ones(1), lambda: 0], ids=lambda v: type(v).__name__
)
def test_a_setting_that_is_neither_number_nor_text_is_refused(value: Any) -> None:
    module = nn.Linear(3, 2)
    known = set(linecache.cache)
    with unchanged(module), pytest.raises((TypeError, ValueError)):
        Exponential(mode=value).apply(module)
    assert set(linecache.cache) == known


@pytest.mark.parametrize("part", [LEADS_OUT, "a b", "a\n", "class", Lying("a b"), Lying(LEADS_OUT), 3], ids=ascii)
def test_a_part_that_is_no_identifier_is_refused(part: Any) -> None:
    @attrs.define(slots=False, eq=False, on_setattr=None, repr=False)
    class Odd(Exponential):
        def split(self, weight: Tensor) -> dict[str, Tensor]:
            return {part: weight}

    module = nn.Linear(3, 2)
    known = set(linecache.cache)
    with unchanged(module), pytest.raises((TypeError, ValueError)):
        Odd().apply(module)
    assert set(linecache.cache) == known


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_norm_and_its_formula_may_be_called_anything(name: str) -> None:
    def formula(log: Tensor, mode: str, limit: float) -> Tensor:
        return log.exp()

    formula.__name__ = formula.__qualname__ = name
    cls = attrs.define(slots=False, eq=False, on_setattr=None, repr=False)(
        type("Odd", (Exponential,), {"formula": staticmethod(formula)})
    )
    cls.__name__ = cls.__qualname__ = cls.kind = name
    layer: Any = cls().inline(nn.Linear(3, 2))
    change(layer)
    cls().recompute(layer)
    torch.testing.assert_close(layer.weight, layer.weight_log.exp())
