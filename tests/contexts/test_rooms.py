"""A context is deleted in one piece: the package goes on without it, with constants for what the others ask of it.

Each is deleted from a copy of the package, in which a program then does what is done in eager mode.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import explicit_wn

PACKAGE = Path(explicit_wn.__file__).parent

INSTEAD = {
    "torchscript": """
        is_scripting = is_tracing = is_traced = is_scripted = lambda *_: False
        shape_of = lambda tensor: list(tensor.shape)
        methods = declarations = lambda *_: {}
        script, ATTRIBUTES = None, ()
    """,
    "capture": """
        import contextlib
        capturing = is_captured = is_transformed = lambda *_: False
        is_ordinary = is_getattr_torchs = lambda: True
        unrecorded = contextlib.nullcontext
        run_by_dynamo = lambda function: function
        operator = lambda *_: None
        kept_copy = Operator = None
    """,
}


def do_everything(without: str) -> None:
    """What each verb does to an explicit and an inlined weight, in eager mode."""
    import torch
    from torch import nn

    from explicit_wn import SpectralNorm, UnitNorm, WeightNorm, cached, contexts

    assert not hasattr(getattr(contexts, without), "torch"), "the copy is what runs"
    torch.manual_seed(0)
    x = torch.randn(5, 3)

    wn = WeightNorm()
    layer = wn.apply(nn.Linear(3, 3))
    expected = 2 * layer(x).detach() - layer.bias.detach()
    with torch.no_grad():
        layer.weight_g.mul_(2)
    wn.recompute(layer)
    torch.testing.assert_close(layer(x), expected)
    with cached(layer), torch.no_grad():
        layer.weight_g.mul_(2)
        wn.recompute(layer)
        torch.testing.assert_close(layer(x), expected)
        layer.weight_g.div_(2)
    assert type(wn.remove(layer)) is nn.Linear
    torch.testing.assert_close(layer(x), expected)

    spectral, lstm = SpectralNorm().inline(nn.Linear(3, 3)), SpectralNorm("weight_hh_l0").inline(nn.LSTM(3, 3))
    for module, u in (spectral, "weight_u"), (lstm, "weight_hh_l0_u"):
        before = getattr(module, u).clone()
        module.eval()(x)
        assert torch.equal(getattr(module, u), before)
        module.train()(x)
        assert not torch.equal(getattr(module, u), before), "a forward in training mode iterates"

    unit = UnitNorm().inline(nn.Linear(3, 3))
    for module, v in (unit, "weight_v"), (spectral, "weight_orig"), (lstm, "weight_hh_l0_orig"):
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        for _ in range(3):
            output = module(x)
            (output[0] if module is lstm else output).square().sum().backward()
            assert getattr(module, v).grad.abs().sum() > 0
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.allclose(unit.weight_v.norm(dim=1), torch.ones(3))
    unit(x)
    torch.testing.assert_close(unit.weight_v.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("room", INSTEAD)
def test_the_package_works_without(room: str, tmp_path: Path) -> None:
    contexts = tmp_path / "explicit_wn" / "contexts"
    shutil.copytree(PACKAGE, contexts.parent, ignore=shutil.ignore_patterns("__pycache__"))
    (contexts / f"{room}.py").write_text("if True:\n" + INSTEAD[room])
    if room == "torchscript":
        (contexts / "interface.py").write_text("from torch.nn import Module as WhatApplyReturns\n")
    program = [sys.executable, "-W", "error", Path(__file__).resolve(), room]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    do_everything(sys.argv[1])
