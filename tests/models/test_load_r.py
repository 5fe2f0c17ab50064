"""`load_r` loads what R's `torch_save` wrote, whole or not at all."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from layers import weight_of
from r_files import FOLDER, write_as_r
from torch import Tensor, nn
from whole_models import WEIGHT_NORMS, change_values, interrupted, unchanged

from explicit_wn import Reparametrization, SpectralNorm, WeightNorm, apply_all, fold, load_r, recompute_all

load_file = pytest.importorskip("safetensors.torch").load_file

pytestmark = pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")


def in_r(state: dict[str, Tensor], rnn: str = "rnn") -> dict[str, Tensor]:
    """A state with the names and shapes that R writes."""
    names = {name: name for name in state}
    for layer in range(9):
        for name in [name for name in names if name.startswith(f"{rnn}.") and f"_l{layer}" in name]:
            names[name] = name.replace(f"_l{layer}", f"_l{layer + 1}")
    counts = {name: value.reshape(1) for name, value in state.items() if name.endswith("num_batches_tracked")}
    return {names[name]: counts.get(name, value).detach().clone() for name, value in state.items()}


def named(**layers: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def parts(shape: tuple[int, ...], *g: int) -> dict[str, Tensor]:
    return {"weight_g": 1 + torch.rand(g), "weight_v": torch.randn(shape)}


def apply(layer: nn.Module, name: str, dim: int | None) -> nn.Module:
    module: nn.Module = WeightNorm(name, dim).apply(layer)
    return module


SPELLINGS: dict[str, Callable[..., Any]] = {
    "plain": lambda layer, name, dim: layer,
    "apply": apply,
    "inline": lambda layer, name, dim: WeightNorm(name, dim).inline(layer),
    **WEIGHT_NORMS,
}


# R's own files

MODELS = {
    "net": lambda norm: named(fc=norm(nn.Linear(20, 40), "weight", 1)),
    "cv": lambda norm: nn.Sequential(norm(nn.Conv1d(4, 6, 3), "weight", 0), nn.BatchNorm1d(6)).eval(),
    "lstm": lambda norm: named(rnn=norm(nn.LSTM(4, 3), "weight_hh_l0", 0)),
    "gru2": lambda norm: named(rnn=norm(nn.GRU(4, 3, num_layers=2), "weight_hh_l0", 0)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_module_that_r_saved_gives_r_s_output(name: str, spelling: str) -> None:
    model = MODELS[name](SPELLINGS[spelling])
    change_values(model, seed=1)
    assert load_r(model, FOLDER / f"saved-{name}.pt") is model
    of_r = load_file(FOLDER / f"saved-{name}-xy.safetensors")
    run = getattr(model, "fc", getattr(model, "rnn", model))
    output = run(of_r["x"])
    torch.testing.assert_close(output[0] if isinstance(output, tuple) else output, of_r["y"], rtol=1e-6, atol=1e-6)


def test_the_parts_are_r_s_after_it() -> None:
    model, path = MODELS["gru2"](SPELLINGS["apply"]), FOLDER / "saved-gru2.pt"
    load_r(model, str(path))
    of_r = load_file(path)
    for in_python, there in ("bias_ih_l1", "bias_ih_l2"), ("weight_hh_l0_g", "weight_hh_l1_g"):
        torch.testing.assert_close(getattr(model.rnn, in_python).detach(), of_r[f"rnn.{there}"], rtol=0, atol=0)


# Files as R would write them


@pytest.mark.parametrize("make", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_rnn_counts_its_layers_from_0(make: Any, bidirectional: bool, tmp_path: Path) -> None:
    source, target = (named(rnn=make(3, 4, num_layers=3, bidirectional=bidirectional)) for _ in range(2))
    write_as_r(tmp_path / "rnn.pt", in_r(source.state_dict()))
    load_r(target, tmp_path / "rnn.pt")
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(target.rnn(x)[0], source.rnn(x)[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_a_normed_rnn_of_two_layers_and_directions(tmp_path: Path) -> None:
    names = "weight_ih_l0_reverse", "weight_hh_l1", "weight_hh_l1_reverse"
    source, target, plain = (named(rnn=nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)) for _ in range(3))
    for name in names:
        WeightNorm(name).apply(source.rnn)
        WeightNorm(name).inline(target.rnn)
    change_values(source, seed=2)
    recompute_all(source)
    write_as_r(tmp_path / "rnn.pt", in_r(source.state_dict()))
    x = torch.randn(5, 2, 3)
    for model in target, plain:
        load_r(model, tmp_path / "rnn.pt")
        torch.testing.assert_close(model.rnn(x)[0], source.rnn(x)[0])


def test_only_an_rnn_s_names_are_counted_anew(tmp_path: Path) -> None:
    model = named(other=nn.Module())
    model.other.weight_ih_l1 = nn.Parameter(torch.randn(3))
    model.weight_ih_l2 = nn.Parameter(torch.randn(3))
    state = {name: torch.randn(3) for name in model.state_dict()}
    write_as_r(tmp_path / "other.pt", state)
    load_r(model, tmp_path / "other.pt")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name])


DIMS = {None: (), -1: (), 1: (6, 1, 1), 2: (1, 4, 1), 3: (1, 1, 3)}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dim", DIMS)
def test_every_dim_of_r_into_every_spelling(dim: int | None, spelling: str, tmp_path: Path) -> None:
    of_r = parts((6, 4, 3), *DIMS[dim]) | {"bias": torch.randn(6)}
    write_as_r(tmp_path / "conv.pt", {f"body.0.{name}": value for name, value in of_r.items()})
    in_python = WeightNorm.from_r("weight", dim).dim
    model = named(body=nn.Sequential(SPELLINGS[spelling](nn.Conv1d(4, 6, 3), "weight", in_python)))
    load_r(model, tmp_path / "conv.pt")
    x, weight = torch.randn(2, 4, 8), weight_of(of_r["weight_g"], of_r["weight_v"], in_python)
    torch.testing.assert_close(model.body(x), nn.functional.conv1d(x, weight, of_r["bias"]))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_plain_weight_is_split(spelling: str, tmp_path: Path) -> None:
    source, layer = nn.Linear(3, 4), SPELLINGS[spelling](nn.Linear(3, 4), "weight", 1)
    write_as_r(tmp_path / "fc.pt", source.state_dict())
    change_values(layer, seed=3)
    load_r(layer, tmp_path / "fc.pt")
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), source(x))
    torch.testing.assert_close(layer.weight, source.weight)


@attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)
class Squared(Reparametrization):
    """A norm with R's names for its parts, and another formula."""

    name: str = "weight"
    formula = staticmethod(lambda g, v: g * g * v)

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        return {"g": torch.full((1, 1), 2.0), "v": weight / 4}


@pytest.mark.parametrize("norm", [SpectralNorm(), Squared()], ids=lambda norm: type(norm).__name__)
def test_the_weight_goes_into_another_norm(norm: Any, tmp_path: Path) -> None:
    of_r = parts((4, 3), 4, 1) | {"bias": torch.zeros(4)}
    write_as_r(tmp_path / "fc.pt", of_r)
    layer = load_r(norm.apply(nn.Linear(3, 4)).eval(), tmp_path / "fc.pt")
    weight = weight_of(of_r["weight_g"], of_r["weight_v"], 0)
    if isinstance(norm, SpectralNorm):
        torch.testing.assert_close(layer.weight_orig.detach(), weight)
    else:
        torch.testing.assert_close(layer.weight.detach(), weight)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dim", [None, 0])
def test_one_number_is_one_number_in_whatever_shape(shape: tuple[int, ...], dim: int | None, tmp_path: Path) -> None:
    of_r = parts((1, 3), *shape) | {"bias": torch.randn(1)}
    write_as_r(tmp_path / "fc.pt", of_r)
    layer = load_r(WeightNorm(dim=dim).apply(nn.Linear(3, 1)), tmp_path / "fc.pt")
    torch.testing.assert_close(layer.weight.detach(), weight_of(of_r["weight_g"], of_r["weight_v"], None))
    plain = load_r(nn.Linear(3, 1), tmp_path / "fc.pt")
    torch.testing.assert_close(plain.weight, layer.weight)


def test_dtypes_and_requires_grad_stay_the_model_s(tmp_path: Path) -> None:
    of_r = {name: value.double() for name, value in (parts((4, 3), 4, 1) | {"bias": torch.randn(4)}).items()}
    write_as_r(tmp_path / "fc.pt", of_r)
    layer = WeightNorm().apply(nn.Linear(3, 4))
    layer.weight_v.requires_grad_(False)
    held = dict(layer.named_parameters())
    load_r(layer, tmp_path / "fc.pt")
    assert all(parameter is held[name] for name, parameter in layer.named_parameters())
    assert (layer.weight_g.dtype, layer.weight_v.requires_grad) == (torch.float32, False)
    torch.testing.assert_close(layer.weight_v, of_r["weight_v"].float())


def test_a_module_in_two_places_and_a_tied_parameter(tmp_path: Path) -> None:
    shared, tied = nn.LSTM(3, 3), nn.Linear(3, 3)
    model = named(rnn=shared, rnn_again=shared, fc=tied, other=nn.Linear(3, 3))
    model.other.weight = tied.weight
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    state |= {f"rnn_again.{name[4:]}": value for name, value in state.items() if name.startswith("rnn.")}
    state["other.weight"] = state["fc.weight"].double()  # the same numbers
    of_r = in_r(in_r(state), rnn="rnn_again")
    write_as_r(tmp_path / "model.pt", of_r)
    load_r(model, tmp_path / "model.pt")
    torch.testing.assert_close(model.rnn_again.weight_ih_l0.detach(), of_r["rnn.weight_ih_l1"])
    write_as_r(tmp_path / "torn.pt", of_r | {"other.weight": torch.zeros(3, 3)})
    refused(model, tmp_path / "torn.pt", "'fc.weight' and 'other.weight' are one tensor of the model")


class Nested(nn.Module):
    """Layers of many kinds, in modules within modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Embedding(5, 4), nn.MultiheadAttention(4, 2)
        self.pair, self.slope, self.scale = nn.Bilinear(2, 2, 2), nn.PReLU(), nn.LayerNorm(4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.BatchNorm2d(3)) for _ in range(2))
        self.cells = nn.ModuleDict({"rnn": nn.GRU(3, 2, 2, bidirectional=True, bias=False)})
        self.register_buffer("window", torch.randn(3, dtype=torch.float64))
        self.register_buffer("table", torch.randn(3), persistent=False)


def test_modules_within_modules(tmp_path: Path) -> None:
    source, target = Nested(), Nested()
    change_values(source, seed=4)
    source.blocks[0][1].num_batches_tracked.add_(7)
    expected = {name: value.clone() for name, value in source.state_dict().items()}
    write_as_r(tmp_path / "nested.pt", in_r(expected, rnn="cells.rnn"))
    load_r(target, tmp_path / "nested.pt")
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    names = apply_all(target, WeightNorm(dim="out"))
    change_values(target, seed=5)
    load_r(target, tmp_path / "nested.pt")
    assert fold(target) == names == ["blocks.0.0.weight", "blocks.1.0.weight"]
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value, expected[name])


# What does not fit


def refused(model: nn.Module, path: Path, *says: str, error: type[Exception] = ValueError) -> None:
    with unchanged(model):
        with pytest.raises(error) as raised:
            load_r(model, path)
        for part in says:
            assert part in str(raised.value)


FC = {"fc.bias": torch.zeros(4), "fc.weight_g": torch.ones(4, 1), "fc.weight_v": torch.ones(4, 4)}

MISFITS: dict[str, tuple[nn.Module, dict[str, Tensor | None], tuple[str, ...]]] = {
    "another dim": (
        named(fc=WeightNorm(dim=1).apply(nn.Linear(4, 4))),
        {},
        ("'fc.weight_g' is 4×1 in the file and 1×4 in the model", "WeightNorm.from_r('weight', 1)"),
    ),
    "NULL for a dim": (
        named(fc=WeightNorm().apply(nn.Linear(4, 4))),
        {"fc.weight_g": torch.tensor(2.0)},
        ("'fc.weight_g' is a single number in the file", "WeightNorm.from_r('weight', None)"),
    ),
    "another size": (named(fc=nn.Linear(3, 4)), {}, ("'fc.weight' is 4×4 in the file and 4×3 in the model",)),
    "another size of a plain weight": (
        named(fc=WeightNorm().apply(nn.Linear(3, 4))),
        {"fc.weight_g": None, "fc.weight_v": None, "fc.weight": torch.ones(4, 4)},
        ("'fc.weight' is 4×4 in the file and 4×3 in the model",),
    ),
    "more in the file": (
        named(fc=nn.Linear(4, 4, bias=False)),
        {"out.weight": torch.ones(1)},
        ("'fc.bias' of the file has no place", "'out.weight' of the file has no place"),
    ),
    "more in the model": (
        named(fc=nn.Linear(4, 4), out=nn.Linear(2, 2)),
        {},
        ("'out.weight' of the model is not in the file", "'out.bias' of the model"),
    ),
    "half a norm": (named(fc=nn.Linear(4, 4)), {"fc.weight_g": None}, ("'fc.weight_v' of the file has no place",)),
    "no magnitude": (
        named(fc=nn.Linear(4, 4)),
        {"fc.weight_g": torch.ones(4, 4)},
        ("'fc.weight_g' of the file, 4×4, is no magnitude of a weight 4×4",),
    ),
    "a direction of zeros": (
        named(fc=nn.Linear(4, 4)),
        {"fc.weight_v": torch.eye(4)[[0, 1, 1, 3]] * torch.tensor([[1.0], [0.0], [1.0], [1.0]])},
        ("'fc.weight_v' of the file: along dim 0, the slices 1 are zero",),
    ),
    "a weight of zeros": (
        named(fc=WeightNorm().inline(nn.Linear(4, 4))),
        {"fc.weight_g": None, "fc.weight_v": None, "fc.weight": torch.zeros(4, 4)},
        ("cannot norm 'fc.weight' of the file", "are zero"),
    ),
    "another dtype": (
        named(fc=nn.Linear(4, 4)),
        {"fc.bias": torch.zeros(4, dtype=torch.int64)},
        ("'fc.bias' is torch.int64 in the file and torch.float32 in the model",),
    ),
    "a direction of zeros in an RNN": (
        named(rnn=nn.RNN(2, 2, bias=False)),
        {
            **dict.fromkeys(FC),
            "rnn.weight_ih_l1": torch.ones(2, 2),
            "rnn.weight_hh_l1_g": torch.ones(2, 1),
            "rnn.weight_hh_l1_v": torch.zeros(2, 2),
        },
        ("no weight can be made of 'rnn.weight_hh_l1_v' of the file: along dim 0, the slices 0, 1 are zero",),
    ),
    "a layer of an RNN too many": (
        named(rnn=nn.RNN(2, 2, bias=False)),
        {
            **dict.fromkeys(FC),
            "rnn.weight_ih_l1": torch.ones(2, 2),
            "rnn.weight_hh_l1": torch.ones(2, 2),
            "rnn.weight_ih_l2": torch.ones(2, 2),
        },
        ("'rnn.weight_ih_l2' of the file has no place",),
    ),
    "an RNN that Python wrote": (
        named(rnn=nn.RNN(2, 2, bias=False)),
        {**dict.fromkeys(FC), "rnn.weight_ih_l0": torch.ones(2, 2), "rnn.weight_hh_l0": torch.ones(2, 2)},
        ("'rnn.weight_ih_l0' of the file has no place", "'rnn.weight_ih_l0' ('rnn.weight_ih_l1' in R) of the model"),
    ),
    "a lazy layer": (named(fc=nn.LazyLinear(4)), {}, ("'fc.weight' is not initialized yet",)),
    "a meta tensor": (named(fc=nn.Linear(4, 4, device="meta")), {}, ("'fc.weight' is on the meta device",)),
    "torch's spectral norm": (
        named(fc=nn.utils.spectral_norm(nn.Linear(4, 4))),
        {},
        ("'fc.weight_g' of the file has no place", "'fc.weight_orig' of the model is not in the file"),
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_named_and_changes_nothing(what: str, tmp_path: Path) -> None:
    model, changes, says = MISFITS[what]
    state = {name: value for name, value in {**FC, **changes}.items() if value is not None}
    write_as_r(tmp_path / "r.pt", state)
    refused(model, tmp_path / "r.pt", f"load_r: {tmp_path / 'r.pt'} does not fit this Module: ", *says)


def test_the_norm_of_r_is_named_only_where_it_is_the_difference(tmp_path: Path) -> None:
    write_as_r(tmp_path / "r.pt", FC)
    with pytest.raises(ValueError, match=r"'fc.weight_v' is 4×4 in the file and 5×4 in the model") as raised:
        load_r(named(fc=WeightNorm().apply(nn.Linear(4, 5))), tmp_path / "r.pt")
    assert "from_r" not in str(raised.value)


def test_what_torch_itself_refuses_half_way_changes_nothing(tmp_path: Path) -> None:
    class Refusing(nn.Linear):
        def _load_from_state_dict(self, *arguments: Any) -> None:
            super()._load_from_state_dict(*arguments)
            arguments[-1].append("not this one")

    model = named(fc=WeightNorm().apply(nn.Linear(4, 4)), out=Refusing(1, 1))
    write_as_r(tmp_path / "r.pt", {**FC, "out.weight": torch.ones(1, 1), "out.bias": torch.ones(1)})
    before = {name: value.clone() for name, value in [*model.state_dict().items(), ("weight", model.fc.weight)]}
    with pytest.raises(RuntimeError, match="not this one"):
        load_r(model, tmp_path / "r.pt")
    for name, value in [*model.state_dict().items(), ("weight", model.fc.weight)]:
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_ctrl_c_leaves_all_that_was_there_or_all_of_r_s(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        body = named(fc=WeightNorm().apply(nn.Linear(2, 3)), rnn=WeightNorm("weight_hh_l0").inline(nn.LSTM(3, 2)))
        return named(body=body, bn=nn.BatchNorm1d(2))

    def values(model: Any) -> list[Tensor]:
        return [value.clone() for value in [*model.state_dict().values(), model.body.fc.weight.detach()]]

    of_r, before = build(), values(build())
    change_values(of_r, seed=6)
    write_as_r(tmp_path / "r.pt", in_r(of_r.state_dict(), rnn="body.rnn"))
    after = values(load_r(build(), tmp_path / "r.pt"))
    for model, _ in interrupted(build, lambda model: load_r(model, tmp_path / "r.pt")):
        found = values(model)
        assert any(all(map(torch.equal, found, one)) for one in (before, after))


def test_other_files_are_refused(tmp_path: Path) -> None:
    model, path = nn.Linear(1, 1), tmp_path / "r.pt"
    refused(model, path, str(path), error=FileNotFoundError)
    path.write_bytes(b"RDX3\n")
    refused(model, path, f"load_r: {path} is no safetensors file", "torch_load", "0.12")
    write_as_r(path, {"weight": torch.ones(1, 1), "bias": torch.ones(1)})
    path.write_bytes(path.read_bytes()[:-3])
    refused(model, path, f"load_r: {path} is no safetensors file, or not all of one")
    for kind in "list", "tensor":
        write_as_r(path, {"weight": torch.ones(1, 1), "bias": torch.ones(1)}, kind=kind)
        refused(model, path, f"load_r: {path} holds a {kind}", "torch_save(module, path)")


def test_other_models_are_refused(tmp_path: Path) -> None:
    for model in "net", WeightNorm(), nn.Linear:
        with pytest.raises(TypeError, match=r"load_r wants the model first, an nn.Module in eager mode, and got"):
            load_r(model, tmp_path / "r.pt")  # type: ignore[type-var]


def test_without_safetensors_a_sentence_says_what_is_missing() -> None:
    program = """
import sys
sys.modules["safetensors"] = None
from torch import nn
from explicit_wn import load_r
try:
    load_r(nn.Linear(1, 1), "r.pt")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    says = "load_r reads with safetensors, which is not installed: pip install safetensors."
    assert re.fullmatch(re.escape(says) + "\n", done.stdout)
