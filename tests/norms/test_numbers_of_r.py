"""The verbs give the numbers that torch for R gives."""

import json

import pytest
import torch
from layers import read_stale
from r_files import FOLDER
from torch import Tensor, nn

from explicit_wn import WeightNorm

load_file = pytest.importorskip("safetensors.torch").load_file

LAYERS = {
    "linear": lambda: nn.Linear(5, 7),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "convt1d": lambda: nn.ConvTranspose1d(4, 6, 3),
}
NUMBERS = load_file(FOLDER / "verbs.safetensors")
NOTES = json.loads((FOLDER / "verbs.json").read_text())


def case_of(name: str) -> tuple[WeightNorm, nn.Module, dict[str, Tensor]]:
    """The norm, a layer with R's parameters, and R's numbers."""
    of_r = {key.removeprefix(f"{name}/"): value for key, value in NUMBERS.items() if key.startswith(f"{name}/")}
    kind, dtype, dim = name.split("/")
    layer = LAYERS[kind]().to(getattr(torch, dtype))
    layer.load_state_dict({"weight": of_r["orig/weight"], "bias": of_r["orig/bias"]})
    return WeightNorm.from_r("weight", None if dim == "NULL" else int(dim)), layer, of_r


def changed(layer: nn.Module, of_r: dict[str, Tensor]) -> None:
    with torch.no_grad():
        layer.weight_g.copy_(of_r["g2"])
        layer.weight_v.copy_(of_r["v2"])


def close(ours: Tensor, of_r: Tensor) -> None:
    tolerance = 64 * torch.finfo(of_r.dtype).eps
    torch.testing.assert_close(ours.detach(), of_r, rtol=tolerance, atol=tolerance * max(1.0, of_r.abs().max().item()))


def test_every_case_is_there() -> None:
    assert len(NOTES) == 38
    assert {key.rsplit("/", key.count("/") - 2)[0] for key in NUMBERS} == set(NOTES)


@pytest.mark.parametrize("name", NOTES)
def test_apply_and_remove(name: str) -> None:
    wn, layer, of_r = case_of(name)
    wn.apply(layer)
    assert list(layer.weight_g.shape) == NOTES[name]["gshape"]
    assert [key for key, _ in layer.named_parameters()] == NOTES[name]["parameters_normed"]
    close(layer.weight_g, of_r["g"])
    close(layer.weight_v, of_r["v"])
    close(layer.weight, of_r["w"])
    changed(layer, of_r)
    wn.remove(layer)
    assert [key for key, _ in layer.named_parameters()] == NOTES[name]["parameters_removed"]
    close(layer.weight, of_r["wremoved"])


@pytest.mark.parametrize("name", NOTES)
def test_recompute_compute_weight_call_and_clone(name: str) -> None:
    wn, layer, of_r = case_of(name)
    wn.apply(layer)
    changed(layer, of_r)
    close(wn.compute_weight(layer), of_r["cw"])
    close(read_stale(layer), of_r["w"])  # nothing is stored yet
    wn.clone().recompute(layer)
    close(layer.weight, of_r["wclone"])
    changed(layer, {"g2": of_r["g"], "v2": of_r["v"]})
    wn.recompute(layer)
    close(layer.weight, of_r["w"])
    changed(layer, of_r)
    close(wn.call(layer).weight, of_r["w2"])


@pytest.mark.parametrize("name", NOTES)
def test_output_and_gradients(name: str) -> None:
    wn, layer, of_r = case_of(name)
    wn.apply(layer)
    changed(layer, of_r)
    wn.recompute(layer)
    y = layer(of_r["x"])
    close(y, of_r["y"])
    ((layer.weight * of_r["C"]).sum() + y.square().sum()).backward()
    close(layer.weight_g.grad, of_r["gg"])
    close(layer.weight_v.grad, of_r["gv"])
