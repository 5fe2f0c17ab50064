"""The benchmark measures what it says: all spellings of each row, which compute the same. No time is asserted."""

import argparse
import json
import math
from pathlib import Path

import benchmark_models
import bounds
import pytest
import speed
import speed_of_norms
import torch
from benchmark_models import OURS, PEERS, PLAIN, ROWS, SPELLINGS
from speed import MODES

from explicit_wn import Reparametrization, WeightNorm

SMALL = "4 × Conv1d(64, 64, 3)"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]


@pytest.mark.parametrize(
    ("model", "mode"), [(model, "eager inference") for model in ROWS] + [(SMALL, mode) for mode in list(MODES)[1:]]
)
def test_every_spelling_of_a_cell_is_measured(model: str, mode: str) -> None:
    if model == "Hifi-GAN generator":
        pytest.importorskip("transformers")
    found = speed.measure(model, mode, 0, "cpu")  # which refuses spellings that do not compute the same
    assert set(found) == {PLAIN, *OURS, *(() if "scripted" in mode or "cached" in mode else PEERS)}
    assert all(math.isfinite(value) and value > 0 for value in found.values())


@pytest.mark.parametrize("model", ROWS)
@pytest.mark.filterwarnings("ignore::explicit_wn.StaleWeightWarning")
def test_a_model_that_does_not_recompute_is_not_compared(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if model == "Hifi-GAN generator":
        pytest.importorskip("transformers")
    monkeypatch.setattr(WeightNorm, "recompute", lambda wn, module: None)
    monkeypatch.setattr(benchmark_models, "recompute_all", lambda model: None)
    outputs = {}
    for spelling in (PLAIN, "explicit"):
        built, x = ROWS[model].build(spelling, "cpu")
        with torch.no_grad():
            outputs[spelling] = built(x)
    with pytest.raises(AssertionError, match=r"explicit is .*% off what the model without a norm computes"):
        speed.check_same(outputs, model)


def test_the_report_has_every_cell_and_every_goal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("matplotlib").use("agg")
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    speed.main(["--quick", "--seconds", "0", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "speed.json").read_text())
    assert (tmp_path / "speed.png").stat().st_size > 0
    small = list(ROWS)[:2]
    modes = ["eager inference", "eager training", "cached inference"]
    assert [(row["model"], row["mode"]) for row in found["rows"]] == [
        (model, mode) for model in small for mode in modes
    ]
    assert [call["call"] for call in found["calls"]] == [
        "recompute, no_grad",
        "recompute, with grad",
        "reading the weight",
    ]
    for row in found["rows"]:
        assert set(row["by better peer"]) == set(() if "cached" in row["mode"] else OURS)
        assert set(row["by plain"]) == set(row["medians"]) - {PLAIN}
    assert "Goals met: " in capsys.readouterr().out
    # 2 models × 2 modes × 2 forms beside the peers, 2 forms cached, 2 calls beside the kernel
    assert len(speed.goals(found["rows"], found["calls"])) == 12


def test_ratios_and_goals() -> None:
    medians = dict(zip(SPELLINGS, (2.0, 3.0, 5.0, 4.0, 6.0), strict=True))  # plain, explicit, inlined, hook, parametr.
    row = speed.as_row("10 × Linear(64)", "eager inference", 1, medians)
    assert row["by plain"] == {"explicit": 1.5, "inlined": 2.5, "hook": 2.0, "parametrization": 3.0}
    assert row["by better peer"] == {"explicit": 0.75, "inlined": 1.25}
    call = {"call": "recompute", "beside": "kernel", "medians": {"ours": 5e-6, "kernel": 3e-6}, "microseconds above": 2}
    report = speed.as_report([row], [call])
    assert "| 10 × Linear(64) | 0.75, 1.25 |" in report
    assert "| 10 × Linear(64) | 1.50, 2.50 (2.00) |" in report
    assert "| recompute | 5.00 | kernel 3.00 | 2.00 |" in report
    assert "Goals met: 1 of 3." in report
    assert "inlined / better peer: 1.25, goal 1.00" in report
    limits = {mode: speed.limit({"model": "4 × …, dim=1", "mode": mode}, "explicit") for mode in MODES}
    assert (limits["compiled inference"], limits["compiled training"], limits["eager training"]) == (0.85, 0.95, 1.0)


@pytest.mark.parametrize(("device", "launches"), [("cpu", False), ("cuda", True)])
def test_everything_is_measured_unless_told_otherwise(device: str, launches: bool) -> None:
    chosen = argparse.Namespace(quick=False, device=device, models="", modes="", skip="nothing")
    modes = {*MODES, speed.MEMORY, *([speed.LAUNCHES] if launches else [])}
    assert set(speed.cells(chosen)) == {(model, mode) for model in ROWS for mode in modes}
    chosen.models, chosen.skip = "Linear", "training"
    assert not any("Conv" in model or "training" in mode for model, mode in speed.cells(chosen))


@pytest.mark.parametrize(("model", "mode", "least"), [*bounds.MISSED[:2], bounds.MISSED[3]])
def test_the_least_is_measured_beside_the_spellings(model: str, mode: str, least: tuple[str, ...]) -> None:
    found = bounds.measure(model, mode, least, seconds=0)
    assert list(found) == [PLAIN, *OURS, *least]
    assert all(math.isfinite(value) and value > 0 for value in found.values())


def test_the_barest_recompute_computes_and_keeps_the_weight() -> None:
    bare, layer = bounds.Bare(dim=0), torch.nn.Linear(3, 2)
    expected = 2 * layer.weight.detach()
    bare.apply(layer)
    with torch.no_grad():
        layer.weight_g.mul_(2)
    bare.recompute(layer)
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert layer.weight is layer.weight


def test_memory_is_that_of_the_step() -> None:
    found = speed.count(SMALL, speed.bytes_held, "cpu")
    assert set(found) == set(SPELLINGS)
    weight = 64 * 64 * 3 * 4
    assert 4 * weight < found[PLAIN] < min(found[spelling] for spelling in (*OURS, *PEERS))  # 4 gradients and more
    kept: list[torch.Tensor] = []
    for step, held in ((lambda: torch.empty(1 << 20), 1), (lambda: kept.append(torch.empty(1 << 20)), 2)):
        assert speed.bytes_held(step, "cpu") == held * 4 << 20  # what is freed in a step, and what two of them keep


@pytest.mark.filterwarnings("ignore:.*layers.[0-9].weight of this Explicit is stale")
@pytest.mark.parametrize("norm", speed_of_norms.NORMS)
@pytest.mark.parametrize("mode", ["eager inference", "eager training"])
def test_each_norm_is_measured_beside_a_parametrization_that_computes_the_same(
    norm: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "10 × Linear(64)"
    found = speed_of_norms.measure(norm, small, mode, seconds=0)
    assert set(found) == {*speed_of_norms.OURS, speed_of_norms.THEIRS}
    assert len(speed_of_norms.ratios(found).split(", ")) == 2
    if mode == "eager training":
        return  # where what was not recomputed has no gradient a second time
    monkeypatch.setattr(Reparametrization, "recompute", lambda wn, module: None)
    with pytest.raises(AssertionError, match="the spellings do not compute the same"):
        speed_of_norms.measure(norm, small, mode, seconds=0)
