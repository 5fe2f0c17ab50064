"""State dicts without a model: against formulas, and loaded into the modules that torch and we make."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from explicit_wn import SpectralNorm, WeightNorm, checkpoint

State = dict[str, Any]
SPELLINGS = ["hook", "parametrization", "ours"]


@attrs.frozen
class Case:
    """A layer with a norm, which `normed` puts on it in any spelling."""

    make: Callable[[], nn.Module]
    name: str = "weight"
    dim: int | None = 0
    spectral: bool = False

    def normed(self, spelling: str) -> nn.Module:
        if spelling == "plain":
            return self.make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return self._norm(spelling)(self.make())

    def _norm(self, spelling: str) -> Callable[[Any], nn.Module]:
        name, dim = self.name, self.dim
        if spelling == "ours":
            norm = SpectralNorm(name, dim=dim) if self.spectral else WeightNorm(name, dim=dim)
            return norm.inline
        where = nn.utils if spelling == "hook" else parametrizations
        make = where.spectral_norm if self.spectral else where.weight_norm
        return lambda module: make(module, name, dim=dim)


def weight_by_hand(g: Tensor, v: Tensor, dim: int | None) -> Tensor:
    others = [d for d in range(v.dim()) if d != dim]
    squares = v.pow(2).sum(others, keepdim=dim is not None) if others else v.pow(2)
    return g * v / squares.sqrt()


def sigma_by_hand(w: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    return u @ w.movedim(dim, 0).flatten(1) @ v


def changed(state: State) -> State:
    """The same with other numbers; those of u and v are singular vectors of nothing."""
    return {key: torch.randn_like(value) + 2 for key, value in state.items()}


CASES = {
    "Conv1d": Case(lambda: nn.Conv1d(4, 6, 3)),
    "ConvTranspose1d": Case(lambda: nn.ConvTranspose1d(4, 6, 3), dim=1),
    "Conv2d": Case(lambda: nn.Conv2d(4, 6, 3)),
    "Linear": Case(lambda: nn.Linear(4, 6)),
    "square Linear": Case(lambda: nn.Linear(5, 5), dim=1),
    "Linear of one output": Case(lambda: nn.Linear(4, 1)),
    "scalar g": Case(lambda: nn.Linear(4, 6), dim=None),
    "LSTM": Case(lambda: nn.LSTM(3, 5), name="weight_hh_l0"),
    "Embedding": Case(lambda: nn.Embedding(7, 3)),
    "a bias": Case(lambda: nn.Linear(3, 4), name="bias"),
    "bfloat16": Case(lambda: nn.Conv1d(4, 6, 3).bfloat16()),
    "half": Case(lambda: nn.Linear(4, 6).half()),
    "double": Case(lambda: nn.Conv1d(4, 6, 3).double(), dim=2),
    "spectral Linear": Case(lambda: nn.Linear(4, 6), spectral=True),
    "spectral Conv1d": Case(lambda: nn.Conv1d(4, 6, 3), spectral=True),
    "spectral ConvTranspose1d": Case(lambda: nn.ConvTranspose1d(4, 6, 3), dim=1, spectral=True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def expected(case: Case, state: State, spelling: str) -> Tensor:
    """The weight by its formula, from the parts as torch names them."""
    key = f"parametrizations.{case.name}." if spelling == "parametrization" else f"{case.name}_"
    if not case.spectral:
        names = ("original0", "original1") if spelling == "parametrization" else ("g", "v")
        return weight_by_hand(*(state[key + name].double() for name in names), case.dim)
    names = ("original", "0._u", "0._v") if spelling == "parametrization" else ("orig", "u", "v")
    w, u, v = (state[key + name].double() for name in names)
    assert case.dim is not None
    return w / sigma_by_hand(w, u, v, case.dim)


@each_case
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fold_is_the_formula_and_loads_into_the_plain_layer(case: Case, spelling: str) -> None:
    state = changed(case.normed(spelling).state_dict())
    before = copy.deepcopy(state)
    folded = checkpoint.fold(state)
    plain = case.make()
    plain.load_state_dict(folded)
    weight = plain.get_parameter(case.name)
    tolerance = {"rtol": 4 * torch.finfo(weight.dtype).eps, "atol": 1e-6 if weight.dtype != torch.float64 else 1e-12}
    torch.testing.assert_close(folded[case.name].double(), expected(case, state, spelling), **tolerance)
    torch.testing.assert_close(weight.detach(), folded[case.name], rtol=0, atol=0)
    torch.testing.assert_close(state, before, rtol=0, atol=0)
    assert folded[case.name].dtype == weight.dtype


@each_case
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("to", SPELLINGS)
def test_what_is_respelled_loads_there_and_makes_the_same_weight(case: Case, spelling: str, to: str) -> None:
    state = changed(case.normed(spelling).state_dict())
    respelled = checkpoint.respell(state, to)
    target = case.normed(to).eval()
    target.load_state_dict(respelled)
    assert set(respelled) == set(target.state_dict())
    back = checkpoint.respell(respelled, spelling)
    assert {key: id(value) for key, value in back.items()} == {key: id(value) for key, value in state.items()}
    run(target)
    weight = getattr(target, case.name).detach()
    torch.testing.assert_close(
        weight, checkpoint.fold(state)[case.name], rtol=1e-2 if weight.itemsize < 4 else 1e-5, atol=1e-6
    )


def run(layer: nn.Module) -> None:
    """One forward, which a hook needs to compute its weight."""
    dtype = next(layer.parameters()).dtype
    width = getattr(layer, "in_channels", getattr(layer, "in_features", getattr(layer, "input_size", 0)))
    if isinstance(layer, nn.Embedding):
        layer(torch.zeros(2, 3, dtype=torch.long))
    else:
        shape = (2, width, *[5] * (layer.weight.dim() - 2)) if "Conv" in type(layer).__name__ else (2, 3, width)
        layer(torch.zeros(shape, dtype=dtype))


def test_nested_names_nested_dicts_and_other_things_stay_where_they_are() -> None:
    inner = OrderedDict(
        {"a.b.weight_g": torch.rand(3, 1), "a.b.weight_v": torch.randn(3, 2), "a.steps": torch.tensor(3)}
    )
    inner._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    inner["attention.bias_k"] = inner["attention.bias_v"] = torch.zeros(2)
    state = {"generator": inner, "epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1)}}, "param_groups": []}}
    folded = checkpoint.fold(state)
    assert list(folded) == list(state)
    assert list(folded["generator"]) == ["a.b.weight", "a.steps", "attention.bias_k", "attention.bias_v"]
    assert type(folded["generator"]) is OrderedDict
    assert folded["generator"]._metadata == {"": {"version": 1}}
    assert folded["generator"]["a.steps"] is inner["a.steps"]
    assert folded["optimizer"] == state["optimizer"]
    by_hand = weight_by_hand(inner["a.b.weight_g"], inner["a.b.weight_v"], 0)
    torch.testing.assert_close(folded["generator"]["a.b.weight"], by_hand)
    assert [row.name for row in checkpoint.report(state).rows] == ["generator.a.b.weight"]


def test_dicts_whose_names_run_together_stay_apart() -> None:
    one, other = ({"fc.weight_g": torch.rand(3, 1), "fc.weight_v": torch.randn(3, 2)} for _ in range(2))
    folded = checkpoint.fold({"a": {"b": one}, "a.b": other, "again": one})
    torch.testing.assert_close(folded["a"]["b"]["fc.weight"], weight_by_hand(*one.values(), 0))
    torch.testing.assert_close(folded["a.b"]["fc.weight"], weight_by_hand(*other.values(), 0))
    assert folded["again"] is folded["a"]["b"]


def test_what_is_there_already_is_not_overwritten() -> None:
    state = checkpoint.respell({"k_g": torch.rand(4, 1), "k_v": v}, "parametrization") | {"k_v": vector}
    with pytest.raises(ValueError, match="respell cannot take 'k': something else is there as k_v; rename that first"):
        checkpoint.respell(state, "hook")


def test_a_model_of_several_spellings_is_folded_at_once() -> None:
    model = nn.ModuleDict(
        {f"{kind} {one}".replace(" ", "_"): case.normed(one) for kind, case in CASES.items() for one in SPELLINGS}
    )
    state = changed(model.state_dict())
    folded = checkpoint.fold(state)
    plain = nn.ModuleDict(
        {f"{kind} {one}".replace(" ", "_"): case.make() for kind, case in CASES.items() for one in SPELLINGS}
    )
    plain.load_state_dict(folded)
    table = checkpoint.report(state)
    assert repr(table) == str(table)
    rows = [row for row in table.rows if row.norm]
    assert len(rows) == len(CASES) * len(SPELLINGS)
    assert not any(row.problem for row in rows)


def test_shared_parts_become_a_shared_weight_and_one_shared_part_does_not() -> None:
    g, v = torch.rand(3, 1), torch.randn(3, 2)
    state = {
        "a.weight_g": g,
        "a.weight_v": v,
        "b.weight_g": g[:],
        "b.weight_v": v,
        "c.weight_g": g + 1,
        "c.weight_v": v,
    }
    folded = checkpoint.fold(state)
    assert folded["a.weight"] is folded["b.weight"]
    torch.testing.assert_close(folded["c.weight"], weight_by_hand(g + 1, v, 0))


@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_strides_are_those_of_the_part(spectral: bool, dim: int) -> None:
    v = torch.randn(4, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    transposed = torch.randn(6, 4).t()
    for part in v, transposed:
        matrix = part.movedim(dim, 0).flatten(1)
        g = torch.rand([n if d == dim else 1 for d, n in enumerate(part.shape)])
        uv = {"weight_u": torch.randn(matrix.size(0)), "weight_v": torch.randn(matrix.size(1))}
        state = {"weight_orig": part, **uv} if spectral else {"weight_g": g, "weight_v": part}
        assert checkpoint.fold(state)["weight"].stride() == part.stride()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_g_is_the_norm_of_all_and_gets_the_shape_that_torch_wants(shape: tuple[int, ...]) -> None:
    g, v = torch.full(shape, 2.5), torch.randn(4, 3)
    state = {"weight_g": g, "weight_v": v}
    torch.testing.assert_close(checkpoint.fold(state)["weight"], 2.5 * v / v.norm())
    respelled = checkpoint.respell(state, "parametrization")
    Case(lambda: nn.Linear(3, 4, bias=False), dim=None).normed("parametrization").load_state_dict(respelled)


def test_a_flat_g_belongs_to_the_dim_of_its_length_and_is_refused_by_name_where_there_are_two() -> None:
    g, v = torch.rand(3), torch.randn(4, 3)
    state = {"fc.weight_g": g, "fc.weight_v": v}
    torch.testing.assert_close(checkpoint.fold(state)["fc.weight"], weight_by_hand(g, v, 1))
    assert checkpoint.respell(state, "hook")["fc.weight_g"].shape == (1, 3)
    square = {"fc.weight_g": g, "fc.weight_v": v[:3]}
    with pytest.raises(ValueError, match=r"'fc.weight': its g, \(3,\), may belong to dim 0 or 1 .* say which in dims "):
        checkpoint.fold(square)
    for dim in 0, 1:
        by_hand = weight_by_hand(g.reshape((3, 1) if dim == 0 else (1, 3)), v[:3], dim)
        torch.testing.assert_close(checkpoint.fold(square, dims={"fc.weight": dim})["fc.weight"], by_hand)
    with pytest.raises(ValueError, match=r"belong to dim 0 or 1, not to dim -1"):
        checkpoint.fold(square, dims={"fc.weight": -1})


@pytest.mark.parametrize("spelling", ["hook", "parametrization"])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_dim_of_a_square_spectral_norm_is_found_by_u_and_v(spelling: str, dim: int) -> None:
    case = Case(lambda: nn.Linear(16, 16), dim=dim, spectral=True)
    layer = case.normed(spelling).train()
    for _ in range(5):
        run(layer)
    state = layer.state_dict()
    orig = next(value for key, value in state.items() if "orig" in key)
    orig += 1e-3 * torch.randn_like(orig)  # a step of an optimizer after the last forward
    torch.testing.assert_close(checkpoint.fold(state)["weight"].double(), expected(case, state, spelling))


def test_a_square_spectral_norm_whose_u_and_v_fit_nothing_is_refused_by_name() -> None:
    state = changed(Case(lambda: nn.Linear(16, 16), spectral=True).normed("hook").state_dict())
    with pytest.raises(ValueError, match=r"'weight' may be normed along dim 0 or 1, and its u and v do not tell; say"):
        checkpoint.fold(state)
    by_hand = state["weight_orig"] / sigma_by_hand(state["weight_orig"], state["weight_u"], state["weight_v"], 1)
    torch.testing.assert_close(checkpoint.fold(state, dims={"weight": 1})["weight"], by_hand)


def test_a_square_spectral_norm_that_never_ran_is_refused_by_name() -> None:
    state = Case(lambda: nn.Linear(64, 64), spectral=True).normed("hook").state_dict()  # u and v are random
    with pytest.raises(ValueError, match=r"'weight' may be normed along dim 0 or 1"):
        checkpoint.fold(state)


def test_a_weight_so_near_symmetric_that_both_dims_fit_is_refused_by_name() -> None:
    w = torch.tensor([[3.0, 0.05], [0.0, 1.0]])
    u, _, v = torch.linalg.svd(w)
    with pytest.raises(ValueError, match=r"'weight' may be normed along dim 0 or 1"):
        checkpoint.fold({"weight_orig": w, "weight_u": u[:, 0], "weight_v": v[0]})


def test_a_symmetric_weight_needs_no_dim() -> None:
    w, u = torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([1.0, 0.0])
    state = {"weight_orig": w, "weight_u": u, "weight_v": u}
    torch.testing.assert_close(checkpoint.fold(state)["weight"], w / 3)


def test_a_vector_of_ours_is_divided_by_its_length() -> None:
    layer = SpectralNorm().apply(nn.LayerNorm(3))
    state = changed(layer.state_dict())
    assert [row.dim for row in checkpoint.report(state).rows] == ["0"]
    torch.testing.assert_close(checkpoint.fold(state)["weight"], state["weight_orig"] / state["weight_orig"].norm())
    parametrized = parametrizations.spectral_norm(nn.LayerNorm(3))
    parametrized.load_state_dict(checkpoint.respell(state, "parametrization"))
    torch.testing.assert_close(parametrized.weight, checkpoint.fold(state)["weight"])


g, v, vector = torch.rand(4, 1), torch.rand(4, 3), torch.rand(4)
REFUSED = {
    "g missing": ({"fc.weight_v": v}, "fc.weight_g must be there too, beside fc.weight_v"),
    "v missing": ({"fc.weight_g": g}, "fc.weight_v must be there too, beside fc.weight_g"),
    "v and orig missing": ({"fc.weight_u": vector}, "fc.weight_orig and fc.weight_v must be there too"),
    "u and v missing": ({"fc.weight_orig": v}, "fc.weight_u and fc.weight_v must be there too"),
    "original1 missing": (
        {"fc.parametrizations.weight.original0": g},
        r"fc.parametrizations.weight.original1 must be there too",
    ),
    "_v missing": (
        {"fc.parametrizations.weight.original": v, "fc.parametrizations.weight.0._u": vector},
        r"fc.parametrizations.weight.0._v must be there too",
    ),
    "two parametrizations": (
        {f"fc.parametrizations.weight.{one}": g for one in ("original0", "original1", "1._u", "1._v")},
        "are not the parts of one norm",
    ),
    "a vector's": (
        {"fc.parametrizations.weight.original": vector},
        "alone may be a vector's spectral norm or any other",
    ),
    "both norms": ({f"fc.weight_{part}": v for part in ("g", "v", "orig", "u")}, "are not the parts of one norm"),
    "g does not fit": ({"fc.weight_g": torch.rand(3, 1), "fc.weight_v": v}, r"shape \(3, 1\), which belongs to no dim"),
    "g of two dims": ({"fc.weight_g": torch.rand(4, 3), "fc.weight_v": v}, r"\(4, 3\), which belongs to no dim"),
    "g of two dims, of one number": ({"fc.weight_g": torch.rand(1, 1), "fc.weight_v": vector}, "belongs to no dim"),
    "u does not fit": (
        {"fc.weight_orig": v, "fc.weight_u": torch.rand(2), "fc.weight_v": torch.rand(3)},
        r"its u and v, \(2,\) and \(3,\), belong to no dim of its weight, \(4, 3\)",
    ),
    "plain beside": ({"fc.weight_g": g, "fc.weight_v": v, "fc.weight": v}, "there twice, as .* and as fc.weight"),
    "twice": (
        {
            **{f"fc.parametrizations.weight.original{i}": p for i, p in enumerate((g, v))},
            "fc.weight_g": g,
            "fc.weight_v": v,
        },
        "there twice, as .* and in the other spelling",
    ),
    "of torch before 1.0": (
        {"fc.weight_orig": v, "fc.weight_u": vector, "fc.weight": v},
        "torch before 1.0 wrote it, without a fc.weight_v; delete fc.weight_orig and fc.weight_u to keep fc.weight, ",
    ),
    "bar without u": ({"fc.weight_bar": v, "fc.weight_v": vector}, "fc.weight_bar, .* are not the parts of one norm"),
    "integers": ({"fc.weight_g": g, "fc.weight_v": v.char()}, "fc.weight_v is torch.int8; convert it"),
}


@pytest.mark.parametrize(("state", "why"), REFUSED.values(), ids=list(REFUSED))
@pytest.mark.parametrize("to", checkpoint.spellings.SPELLINGS)
def test_what_is_not_whole_is_refused_by_name_and_skipped_where_one_says_so(state: State, why: str, to: str) -> None:
    with pytest.raises(
        ValueError, match=f"respell cannot take 'fc.weight': .*{why}.*; or leave it as it is, by skip.$"
    ):
        checkpoint.respell(state, to)
    (problem,) = [row.problem for row in checkpoint.report(state).rows if row.problem][:1]
    assert problem
    assert checkpoint.respell(state, to, skip=["fc.weight"]) == state


def test_what_only_looks_like_parts_is_left_alone() -> None:
    pruned = nn.Linear(3, 4)
    prune.random_unstructured(pruned, "weight", 0.5)  # type: ignore[no-untyped-call]
    orthogonal = parametrizations.orthogonal(nn.Linear(3, 3))
    other = {
        "size_orig": torch.rand(2, 2),
        "k_v": torch.rand(3),
        "low_u": v,
        "low_v": v,
        "step_g": vector,
        "step_v": v,
        "_g": g,
        "x.weight_bar": v,
    }
    state = {**pruned.state_dict(prefix="p."), **orthogonal.state_dict(prefix="o."), **other}
    folded = checkpoint.fold(state)
    assert {key: id(value) for key, value in folded.items()} == {key: id(value) for key, value in state.items()}


def test_a_weight_that_would_be_nan_is_refused_by_name() -> None:
    state = {"fc.weight_g": g, "fc.weight_v": torch.zeros(4, 3)}
    with pytest.raises(ValueError, match=r"'fc\.weight' would not be finite"):
        checkpoint.fold(state)


def test_wrong_arguments_are_refused() -> None:
    state = {"fc.weight_g": g, "fc.weight_v": v}
    with pytest.raises(TypeError, match=r"fold takes a state dict, not a Linear; a model has one by state_dict\(\)"):
        checkpoint.fold(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the spellings are 'hook', 'parametrization', 'plain', 'ours'"):
        checkpoint.respell(state, "torch")
    with pytest.raises(ValueError, match="no norm of 'fc', which is in dims or skip"):
        checkpoint.fold(state, skip=["fc"])
    with pytest.raises(ValueError, match="no norm of 'weight', which is in dims or skip"):
        checkpoint.fold(state, dims={"weight": 0})
    with pytest.raises(TypeError, match="a list of names, not a str"):
        checkpoint.fold(state, skip="fc.weight")


def test_the_bar_that_many_projects_write_is_a_spectral_norm() -> None:
    w, u, v = torch.randn(4, 3, 2), torch.randn(4), torch.randn(6)
    state = {"a.module.weight_bar": w, "a.module.weight_u": u, "a.module.weight_v": v, "a.module.bias": vector}
    (row,) = checkpoint.report(state).rows
    assert (row.name, row.norm, row.spelling, row.problem) == ("a.module.weight", "SpectralNorm", "bar", "")
    by_hand = w / sigma_by_hand(w, u, v, 0)
    torch.testing.assert_close(checkpoint.fold(state)["a.module.weight"], by_hand)
    assert set(checkpoint.respell(state, "hook")) == {
        f"a.module.{n}" for n in ("weight_orig", "weight_u", "weight_v", "bias")
    }


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.spectral_norm. is deprecated:FutureWarning")
def test_what_torch_before_1_wrote_folds_once_torch_has_read_and_saved_it() -> None:
    w, u = torch.randn(4, 3), nn.functional.normalize(torch.randn(4), dim=0)
    state = {"weight_orig": w, "weight_u": u, "weight": w / 2.5, "bias": vector}
    model = nn.utils.spectral_norm(nn.Linear(3, 4))
    model.load_state_dict(state)
    torch.testing.assert_close(checkpoint.fold(model.state_dict())["weight"], w / 2.5)


def test_gradients_are_not_recorded_and_meta_tensors_fold() -> None:
    state = dict(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)).named_parameters())
    assert not checkpoint.fold(state)["weight"].requires_grad
    meta = {key: value.to("meta") for key, value in state.items()}
    assert checkpoint.fold(meta)["weight"].is_meta


def test_the_parts_of_mixed_dtypes_make_a_weight_of_vs_dtype() -> None:
    state = {"weight_g": g, "weight_v": v.bfloat16()}
    weight = checkpoint.fold(state)["weight"]
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight, weight_by_hand(g, v.bfloat16().float(), 0).bfloat16(), rtol=1e-2, atol=0)


def test_a_report_prints_what_there_is() -> None:
    state = {"a.weight_g": g, "a.weight_v": v, "b.weight": v, "c.weight_g": g}
    assert str(checkpoint.report(state)).splitlines() == [
        "name      norm        spelling  dim  shape  parts         dtype    problem",
        "--------  ----------  --------  ---  -----  ------------  -------  " + "-" * 47,
        "a.weight  WeightNorm  hook      0    4×3    g 4×1, v 4×3  float32",
        "b.weight              plain          4×3                  float32",
        "c.weight              hook           4×1    g 4×1         float32  "
        "c.weight_v must be there too, beside c.weight_g",
    ]
