"""The contexts: what compiles, captures, copies or saves a model, each with what it makes of one. And the devices."""

import copy
import io
import shutil
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from layers import Subject, change_parts
from torch import Tensor, nn

import explicit_wn

Inputs = tuple[Tensor, ...]
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
NO_COMPILER = "inductor needs a C++ compiler"


@attrs.frozen
class Captured:
    """What a context made of a model."""

    run: Callable[..., Any]
    module: nn.Module | None
    """What holds the parts that `run` computes from; None if they are folded away."""


def same(module: Any) -> Captured:
    """What runs and holds its parts itself."""
    return Captured(module, module)


def through_bytes(save: Callable[[Any, Any], Any], load: Callable[[Any], Any], what: Any) -> Any:
    file = io.BytesIO()
    save(what, file)
    file.seek(0)
    return load(file)


def reloaded(model: Any) -> Any:
    """A whole model through torch.save and torch.load."""
    return through_bytes(torch.save, lambda file: torch.load(file, weights_only=False), model)


def reloaded_script(script: Any) -> Any:
    return through_bytes(torch.jit.save, torch.jit.load, script)


def in_eager(model: nn.Module, inputs: Inputs) -> Captured:
    return same(model)


def scripted(model: nn.Module, inputs: Inputs) -> Captured:
    return same(torch.jit.script(model))


def scripted_by_us(model: nn.Module, inputs: Inputs) -> Captured:
    return same(explicit_wn.script(model))


def scripted_and_loaded(model: nn.Module, inputs: Inputs) -> Captured:
    return same(reloaded_script(torch.jit.script(model)))


def frozen(model: nn.Module, inputs: Inputs) -> Captured:
    return Captured(torch.jit.freeze(explicit_wn.script(model.eval())), None)


def frozen_and_loaded(model: nn.Module, inputs: Inputs) -> Captured:
    return Captured(reloaded_script(frozen(model, inputs).run), None)


def optimized_for_inference(model: nn.Module, inputs: Inputs) -> Captured:
    return Captured(torch.jit.optimize_for_inference(explicit_wn.script(model.eval())), None)


def traced(model: nn.Module, inputs: Inputs) -> Captured:
    # torch's check runs the model again and compares, which cannot be for a model that changes as it runs
    changes = model.training and any(True for _ in model.buffers())
    return same(torch.jit.trace(model, inputs, check_trace=not changes))


def traced_and_loaded(model: nn.Module, inputs: Inputs) -> Captured:
    return same(reloaded_script(traced(model, inputs).run))


def exported(model: nn.Module, inputs: Inputs) -> Captured:
    return same(torch.export.export(model, inputs, strict=False).module())


def exported_strictly(model: nn.Module, inputs: Inputs) -> Captured:
    return same(torch.export.export(model, inputs, strict=True).module())


def exported_and_loaded(model: nn.Module, inputs: Inputs) -> Captured:
    program = torch.export.export(model, inputs, strict=False)
    return same(through_bytes(torch.export.save, torch.export.load, program).module())


def compiled(model: nn.Module, inputs: Inputs) -> Captured:
    torch._dynamo.reset()
    return Captured(torch.compile(model, backend="aot_eager", fullgraph=True), model)


def compiled_by_inductor(model: nn.Module, inputs: Inputs) -> Captured:
    if not HAS_COMPILER:
        pytest.skip(NO_COMPILER)
    torch._dynamo.reset()
    return Captured(torch.compile(model, fullgraph=True), model)


def deep_copied(model: nn.Module, inputs: Inputs) -> Captured:
    return same(copy.deepcopy(model))


def saved_and_loaded(model: nn.Module, inputs: Inputs) -> Captured:
    return same(reloaded(model))


def fx_traced(model: nn.Module, inputs: Inputs) -> Captured:
    return same(torch.fx.symbolic_trace(model))


CONTEXTS = [
    in_eager,
    scripted,
    scripted_and_loaded,
    frozen,
    optimized_for_inference,
    traced,
    exported,
    exported_strictly,
    exported_and_loaded,
    compiled,
    deep_copied,
    saved_and_loaded,
]
"""Those that every norm goes through with every layer."""


# The devices

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
on_gpu = pytest.mark.parametrize("device", [CUDA])
on_cpu_and_gpu = pytest.mark.parametrize("device", ["cpu", CUDA])
has_compiler = pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)
torchs_own_warnings = [  # each said of plain models too
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:The tensor attributes? self\.layer\._flat_weights:UserWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:No complete tensor found in the group:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
]


def moved(inputs: Inputs, device: str) -> Inputs:
    return tuple(tensor.to(device) for tensor in inputs)


def stale(which: Subject, device: str) -> nn.Module:
    """The model on that device, with a stored weight there that is out of date."""
    model = which.model().to(device)
    model(*moved(which.inputs(), device))
    change_parts(model, seed=11)
    return model


def close(output: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(output.detach().cpu(), expected, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))
