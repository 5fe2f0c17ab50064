"""report: a row for every weight in whatever spelling, stale told from fresh, and nothing changed."""

from collections.abc import Callable

import attrs
import pytest
import torch
from layers import change_parts
from torch import nn
from torch.nn.utils import parametrizations
from whole_models import (
    X,
    change_values,
    hook_spectral_norm,
    hook_weight_norm,
    unchanged,
)

import explicit_wn
from explicit_wn import SpectralNorm, WeightNorm, convert, fold, recompute_all, report


def mixed() -> nn.Module:
    return nn.ModuleDict(
        {
            "ours": WeightNorm(dim=None).apply(nn.Linear(4, 3)),
            "inlined": SpectralNorm().inline(nn.ConvTranspose1d(4, 3, 2)),
            "hook": hook_weight_norm(nn.Conv1d(4, 3, 2), dim=1),
            "spectral": hook_spectral_norm(nn.Linear(4, 3)),
            "deep": nn.ModuleList(
                [parametrizations.weight_norm(nn.Linear(4, 3)), parametrizations.spectral_norm(nn.Linear(4, 3))]
            ),
            "plain": nn.LSTM(4, 3),
            "orthogonal": parametrizations.orthogonal(nn.Linear(3, 3)),
            "norm": nn.LayerNorm(3),
        }
    )


def test_a_report_has_a_row_for_every_weight_in_whatever_spelling() -> None:
    model = mixed()
    model["spectral"](X)  # torch's hook computes nothing before that
    rows = {row.name: row for row in report(model).rows}
    shown = {
        name: (row.norm, row.spelling, row.dim, row.shape, row.parameters, row.state) for name, row in rows.items()
    }
    assert shown == {
        "ours.weight": ("WeightNorm", "ours", "None", (3, 4), 13, "fresh"),
        "inlined.weight": ("SpectralNorm", "ours", "1", (4, 3, 2), 24, "fresh"),
        "hook.weight": ("WeightNorm", "hook", "1", (3, 4, 2), 28, "fresh"),
        "spectral.weight": ("SpectralNorm", "hook", "0", (3, 4), 12, "fresh"),
        "deep.0.weight": ("WeightNorm", "parametrization", "0", (3, 4), 15, "fresh"),
        "deep.1.weight": ("SpectralNorm", "parametrization", "0", (3, 4), 12, "fresh"),
        "plain.weight_ih_l0": ("", "plain", "", (12, 4), 48, ""),
        "plain.weight_hh_l0": ("", "plain", "", (12, 3), 36, ""),
        "orthogonal.weight": ("Orthogonal", "parametrization", "", (3, 3), 9, "fresh"),
    }
    assert rows["ours.weight"].parts == "g number, v 3×4"
    assert rows["hook.weight"].parts == "g 1×4×1, v 3×4×2"
    assert rows["inlined.weight"].parts == "orig 4×3×2, u 3, v 8"


@pytest.mark.parametrize("training", [True, False])
def test_a_report_changes_nothing(training: bool) -> None:
    model = mixed().train(training)
    change_values(model, seed=1)
    with unchanged(model):
        report(model)


def test_a_report_tells_stale_from_fresh() -> None:
    model = mixed()
    change_values(model, seed=1)
    states = {row.name: row.state for row in report(model).rows if row.norm}
    stale = {"ours.weight", "hook.weight", "spectral.weight"}  # the others compute theirs when it is read
    assert {name for name, state in states.items() if state == "stale"} == stale
    recompute_all(model)
    model["hook"](torch.ones(1, 4, 5))
    model["spectral"](X)
    assert {row.state for row in report(model).rows if row.norm} == {"fresh"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_hooks_weight_is_fresh_after_a_forward_in_every_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(hook_weight_norm(nn.Linear(33, 65)), hook_weight_norm(nn.Linear(65, 65), dim=1)).to(dtype)
    model(torch.randn(2, 33, dtype=dtype))
    assert [row.state for row in report(model).rows] == ["fresh", "fresh"]
    change_parts(model, seed=1)
    assert [row.state for row in report(model).rows] == ["stale", "stale"]


def test_a_hooks_weight_of_nan_is_as_fresh_as_its_parts() -> None:
    layer = hook_weight_norm(nn.Linear(3, 2))
    with torch.no_grad():
        layer.weight_v.fill_(torch.nan)
    layer(torch.ones(1, 3))
    assert [row.state for row in report(layer).rows] == ["fresh"]


def test_a_hooks_weight_that_was_left_behind_by_a_cast_or_a_move_is_stale() -> None:
    for moved in (torch.float64, torch.bfloat16, torch.device("meta")):
        model = hook_weight_norm(nn.Linear(3, 2)).to(moved)
        assert [row.state for row in report(model).rows] == ["stale"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(),
        lambda: nn.ReLU(),
        lambda: nn.LazyLinear(3),
        lambda: nn.Sequential(nn.LazyConv1d(3, 1), nn.BatchNorm1d(3)),
        lambda: torch.jit.script(nn.Linear(2, 2)),
        lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))),
        lambda: torch.export.export(nn.Linear(4, 2), (X,)).module(),
        lambda: WeightNorm().inline(nn.Embedding(3, 2).to("meta")),
        lambda: hook_weight_norm(nn.Linear(3, 2).to("meta")),
        lambda: parametrizations.weight_norm(nn.Linear(3, 2).to("meta")),
        lambda: nn.ParameterList([torch.ones(2, 2)]),
        lambda: nn.EmbeddingBag(3, 2, sparse=True),
    ],
    ids=range(12),
)
def test_a_report_works_on_any_model(make: Callable[[], nn.Module]) -> None:
    text = str(report(make()))
    assert text.splitlines()[0].split() == [field.name for field in attrs.fields(explicit_wn.models.Row)]


def test_a_report_prints_as_a_table_and_shows_in_a_notebook() -> None:
    table = report(nn.ModuleDict({"a": WeightNorm().apply(nn.Linear(4, 3)), "<b>": nn.Linear(2, 1)}))
    assert str(table) == repr(table)
    assert [line.split() for line in str(table).splitlines()] == [
        ["name", "norm", "spelling", "dim", "shape", "parts", "parameters", "state"],
        ["-" * width for width in (10, 10, 8, 3, 5, 12, 10, 5)],
        ["a.weight", "WeightNorm", "ours", "0", "3×4", "g", "3×1,", "v", "3×4", "15", "fresh"],
        ["<b>.weight", "plain", "1×2", "2"],
    ]
    html = table._repr_html_()
    assert html.count("<tr>") == html.count("</tr>") == 3
    assert "&lt;b&gt;.weight" in html
    assert "<b>" not in html
    assert attrs.asdict(table.rows[0], recurse=False)["shape"] == (3, 4)


def test_a_report_shows_a_shared_module_once() -> None:
    shared = WeightNorm().apply(nn.Linear(4, 4))
    assert [row.name for row in report(nn.Sequential(shared, shared)).rows] == ["0.weight"]


def test_a_report_after_convert_and_fold_shows_what_they_did() -> None:
    model = mixed()
    names = {row.name for row in report(model).rows if row.norm in ("WeightNorm", "SpectralNorm")}
    convert(model)
    assert {row.name for row in report(model).rows if row.spelling == "ours"} == names
    fold(model)
    assert {row.spelling for row in report(model).rows if row.name in names} == {"plain"}
