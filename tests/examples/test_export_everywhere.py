"""examples/export_everywhere.py and examples/cpp, run as their readers run them, and then with other inputs.

The example is run once, and keeps its files and the C++ program for the rest of the tests.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import printed_by
from tcn import NORMED, TemporalConvNet
from torch import Tensor, nn

import explicit_wn

EXAMPLE = Path(__file__).parents[2] / "examples" / "export_everywhere.py"

HAS_COMPILER = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
PACKAGES = "onnxruntime", "onnxscript", "openvino", "executorch", "torchao"
MISSING = [name for name in PACKAGES if not importlib.util.find_spec(name)]
RUNS_EXECUTORCH = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path; from export_everywhere import EXAMPLE, run_executorch; import torch
run_executorch(torch.export.export(torch.nn.ReLU(), (EXAMPLE,)), Path(sys.argv[2]) / "model.pte")(EXAMPLE)
"""


@functools.cache
def executorch_is_missing() -> list[str]:
    """What keeps any model from running there: its package is not there, or is made for another torch."""
    if "executorch" in MISSING:
        return ["executorch"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-c", RUNS_EXECUTORCH, EXAMPLE.parent, folder]
        failed = subprocess.run(command, capture_output=True).returncode
    return ["executorch does not work beside torch"] if failed else []


WHAT_IS_MISSING = {
    "AOTInductor package": [] if HAS_COMPILER else ["C++ compiler"],
    "ONNX Runtime": [name for name in MISSING if name.startswith("onnx")],
    "ONNX Runtime, TorchScript": [name for name in MISSING if name.startswith("onnx")],
    "OpenVINO, torch.export": [name for name in MISSING if name == "openvino"],
    "OpenVINO, TorchScript": [name for name in MISSING if name == "openvino"],
    "OpenVINO, ONNX": [name for name in MISSING if name.startswith(("onnx", "openvino"))],
    "C++, TorchScript file": [] if HAS_COMPILER and shutil.which("cmake") else ["C++ compiler|cmake"],
}
WHAT_IS_MISSING["C++, AOTInductor package"] = WHAT_IS_MISSING["C++, TorchScript file"]
FILES = {
    "TorchScript file": "scripted.pt",
    "TorchScript file, frozen": "frozen.pt",
    "torch.export file": "exported.pt2",
    "AOTInductor package": "compiled.pt2",
    "ONNX Runtime": "model.onnx",
    "ONNX Runtime, TorchScript": "scripted.onnx",
    "OpenVINO, torch.export": "openvino_export.xml",
    "OpenVINO, TorchScript": "openvino_script.xml",
    "OpenVINO, ONNX": "openvino_onnx.xml",
    "ExecuTorch program": "model.pte",
    "C++, TorchScript file": "scripted.pt",
    "C++, AOTInductor package": "compiled.pt2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the example keeps its files."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def printed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return printed_by(tmp_path_factory.mktemp("cwd"), EXAMPLE, "--folder", folder)


def rows_of(printed: str) -> dict[str, list[str]]:
    """The cells of each row: of the model with its norms, and of the folded one; or one cell, the reason."""
    lines = printed.split("\nruntime ")[1].split("\n\n")[0].splitlines()[1:]
    rows = {line[:28].strip(): line[28:] for line in lines}
    return {name: [row] if row.startswith("skipped: ") else row.split() for name, row in rows.items()}


@pytest.fixture(scope="module")
def measured(printed: str) -> dict[str, list[float]]:
    """The rows that have numbers: for the model with its norms and for the folded one, kB, difference, ms."""
    rows = rows_of(printed)
    rows["eager"] = ["0", *rows["eager"][:2], "0", *rows["eager"][2:]]
    return {name: [float(cell) for cell in row] for name, row in rows.items() if len(row) > 1}


def what_is_missing(name: str) -> list[str]:
    return executorch_is_missing() if name == "ExecuTorch program" else WHAT_IS_MISSING.get(name, [])


def need(name: str) -> None:
    if what_is_missing(name):
        pytest.skip(f"{name} cannot run here: {' and '.join(what_is_missing(name))}")


def test_every_runtime_has_its_row_and_is_skipped_only_for_what_is_not_installed(printed: str) -> None:
    rows = rows_of(printed)
    assert list(rows) == ["eager", *FILES]
    for name, row in rows.items():
        missing = what_is_missing(name)
        if missing:
            assert re.search("|".join(missing), row[0]), name
        else:
            assert len(row) == (4 if name == "eager" else 6), row


def test_every_runtime_gives_the_numbers_of_eager_mode_and_weights_one_step_old_would_show(
    printed: str, measured: dict[str, list[float]]
) -> None:
    differences = [difference for row in measured.values() for difference in (row[1], row[4])]
    assert max(differences) < 2e-5
    stale = re.search(r"of one training step ago make of it: a difference of (\S+)", printed)
    assert stale
    assert float(stale[1]) > 1e-2


def test_the_sizes_are_those_of_the_files_and_every_call_took_its_time(
    measured: dict[str, list[float]], folder: Path
) -> None:
    for name, (*normed, _, folded_size, _, folded_time) in ((n, row) for n, row in measured.items() if n in FILES):
        sizes = [round(size_of(folder / variant / FILES[name]) / 1000) for variant in ("normed", "folded")]
        assert [normed[0], folded_size] == sizes, name
        if "OpenVINO" in name or "AOTInductor" in name:
            # the one computes the weights when it converts the model; the other packs what its cache has, too
            assert abs(folded_size - normed[0]) < 0.05 * normed[0], name
        else:
            assert folded_size < normed[0], name
        assert folded_time > 0, name


def size_of(file: Path) -> int:
    numbers = file.with_suffix(".bin")
    return file.stat().st_size + (numbers.stat().st_size if numbers.exists() else 0)


def test_the_example_lists_every_norm(printed: str) -> None:
    assert printed.splitlines()[0] == f"weight norms: {', '.join(f'{name}.weight' for name in LAYERS)}"


# With other signals, and compared with the formula


LAYERS = ["encoder.0", "listener.inputs", "listener.state", "gain", "decoder"]
OTHER_SIGNALS = [(3, 200), (1, 17), (7, 96)]


def weights(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every weight: w = g · v / ‖v‖, for each output; and every bias."""
    computed = {name: part for name, part in parts.items() if name.endswith("bias")}
    for layer in LAYERS:
        g, v = parts[f"{layer}.weight_g"], parts[f"{layer}.weight_v"]
        kept = [dim for dim in range(v.dim()) if dim != (1 if layer == "decoder" else 0)]
        computed[f"{layer}.weight"] = g * v / v.square().sum(dim=kept, keepdim=True).sqrt()
    return computed


def example_by_hand(w: dict[str, Tensor], signal: Tensor) -> Tensor:
    """The example's model in plain functions of torch."""
    frames = F.relu(F.conv1d(signal, w["encoder.0.weight"], w["encoder.0.bias"], padding=4))
    hidden = cell = frames.mean(dim=2)
    for _ in range(4):
        attention = torch.einsum("ncl,nc->nl", frames, hidden).softmax(dim=1)
        seen = torch.einsum("ncl,nl->nc", frames, attention)
        gates = F.linear(seen, w["listener.inputs.weight"], w["listener.inputs.bias"])
        keep, write, show, new = (gates + F.linear(hidden, w["listener.state.weight"])).chunk(4, dim=1)
        cell = keep.sigmoid() * cell + write.sigmoid() * new.tanh()
        hidden = show.sigmoid() * cell.tanh()
    gain = F.linear(hidden, w["gain.weight"], w["gain.bias"]).sigmoid()
    return F.conv_transpose1d(frames * gain[:, :, None], w["decoder.weight"], w["decoder.bias"], stride=2, padding=3)


@pytest.fixture(scope="module")
def parts(printed: str, folder: Path) -> dict[str, Tensor]:
    """The trained g, v and biases: the only thing that is taken from the example."""
    return {name: value.detach() for name, value in torch.jit.load(folder / "normed/scripted.pt").named_parameters()}


WITHOUT_THE_PACKAGE = "import sys; sys.modules['explicit_wn'] = None  # so that importing it fails"


def in_its_own_process(code: str, file: Path, argument: object = None) -> Any:
    """The `result` that `code` makes of a file. Some packages change torch when imported, and none needs ours."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/argument.pt", f"{folder}/result.pt"]
        torch.save(argument, paths[0])
        lines = ["import torch", "file, *paths = sys.argv[1:]", "argument = torch.load(paths[0])", code]
        source = "\n".join([WITHOUT_THE_PACKAGE, *lines, "torch.save(result, paths[1])"])
        subprocess.run([sys.executable, "-W", "ignore", "-c", source, file, *paths], check=True, capture_output=True)
        return torch.load(paths[1])


ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
run = lambda signal: torch.from_numpy(session.run(None, {"signal": signal.numpy()})[0])
"""
OPENVINO = """
import openvino
compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
run = lambda signal: torch.from_numpy(compiled(signal.numpy())[0].copy())
"""
EXECUTORCH = """
from executorch.runtime import Runtime
forward = Runtime.get().load_program(file).load_method("forward")
run = lambda signal: forward.execute([signal])[0].clone()
"""
AOTINDUCTOR = """
import torch._inductor.codecache  # torch 2.10 looks for it there
run = torch._inductor.aoti_load_package(file)
"""
RUNNERS = {
    "TorchScript file": "run = torch.jit.load(file)",
    "TorchScript file, frozen": "run = torch.jit.load(file)",
    "torch.export file": "run = torch.export.load(file).module()",
    "AOTInductor package": AOTINDUCTOR,
    "ONNX Runtime": ONNX,
    "ONNX Runtime, TorchScript": ONNX,
    "OpenVINO, torch.export": OPENVINO,
    "OpenVINO, TorchScript": OPENVINO,
    "OpenVINO, ONNX": OPENVINO,
    "ExecuTorch program": EXECUTORCH,
}
RUN_ALL = "with torch.no_grad(): result = [run(signal) for signal in argument]"


@pytest.mark.parametrize("variant", ["normed", "folded"])
@pytest.mark.parametrize("name", RUNNERS)
def test_the_file_gives_the_formulas_numbers_for_other_signals_without_the_package(
    name: str, variant: str, parts: dict[str, Tensor], folder: Path
) -> None:
    need(name)
    w, signals = weights(parts), [torch.randn(count, 1, length) for count, length in OTHER_SIGNALS]
    outputs = in_its_own_process(f"{RUNNERS[name]}\n{RUN_ALL}", folder / variant / FILES[name], signals)
    for signal, output in zip(signals, outputs, strict=True):
        torch.testing.assert_close(output, example_by_hand(w, signal), atol=2e-5, rtol=0)


@pytest.mark.parametrize("layer", LAYERS)
def test_each_weight_alone_would_show_if_it_were_stale(layer: str, parts: dict[str, Tensor]) -> None:
    w, signal = weights(parts), torch.randn(2, 1, 50)
    stale = w | {f"{layer}.weight": 0.9 * w[f"{layer}.weight"]}
    assert (example_by_hand(stale, signal) - example_by_hand(w, signal)).abs().max() > 1e-3


# The C++ program


@pytest.fixture(scope="module")
def program(printed: str, folder: Path) -> Path:
    need("C++, TorchScript file")
    return folder / "cpp" / "run_models"


def save_signals(file: Path, signals: list[Tensor], expected: list[Tensor]) -> Path:
    torch.save((*signals, torch.cat([output.detach().flatten() for output in expected])), file)
    return file


def differences(program: Path, *files: Path) -> list[tuple[float, float]]:
    """How far each model is from what is expected, and from the first."""
    done = subprocess.run([program, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(\S+): (\S+) from Python, (\S+) from the first, \S+ ms per call\n", done.stdout)
    assert [name for name, _, _ in found] == [str(file) for file in files[1:]]
    return [(float(from_python), float(from_first)) for _, from_python, from_first in found]


def test_both_models_give_the_formulas_numbers_in_cpp_for_other_signals(
    program: Path, parts: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    w = weights(parts)
    inputs = [torch.randn(count, 1, length) for count, length in OTHER_SIGNALS]
    signals = save_signals(tmp_path / "signals.pt", inputs, [example_by_hand(w, signal) for signal in inputs])
    models = [folder / variant / name for variant in ("normed", "folded") for name in ("scripted.pt", "compiled.pt2")]
    found = differences(program, signals, *models)
    assert max(max(both) for both in found) < 2e-5
    assert found[0][1] == 0
    assert found[1][1] > 0  # the two are not one and the same


def make_tcn() -> tuple[nn.Module, nn.Module]:
    """A converted model, its parts changed after its last forward, and a plain one with the formula's weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hook is deprecated
        model = TemporalConvNet(torch.nn.utils.weight_norm).eval()
    explicit_wn.convert(model)
    model(torch.ones(1, 3, 16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain, state = TemporalConvNet(lambda layer: layer).eval(), model.state_dict()
    for name in NORMED:
        g, v = state.pop(f"{name}_g"), state.pop(f"{name}_v")
        state[name] = g * v / v.flatten(1).norm(dim=1).view_as(g)
    plain.load_state_dict(state)
    return model, plain


def test_a_converted_model_runs_in_cpp_and_an_old_weight_would_show(program: Path, tmp_path: Path) -> None:
    model, plain = make_tcn()
    torch.jit.save(explicit_wn.script(model), tmp_path / "now.pt")
    torch.jit.save(torch.jit.script(plain), tmp_path / "plain.pt")
    inputs = [torch.randn(2, 3, 16), torch.randn(1, 3, 29)]
    signals = save_signals(tmp_path / "signals.pt", inputs, [plain(x) for x in inputs])
    with torch.no_grad():
        model.head.weight_g.mul_(1.1)
    torch.jit.save(explicit_wn.script(model), tmp_path / "later.pt")
    now, unnormed, later = differences(
        program, signals, *(tmp_path / f"{name}.pt" for name in ("now", "plain", "later"))
    )
    assert max(now) < 1e-5
    assert max(unnormed) < 1e-5
    assert min(later) > 1e-3


@pytest.mark.parametrize("arguments", [[], ["signals.pt"], ["no such file", "model.pt"]])
def test_the_program_says_how_it_is_used(program: Path, arguments: list[str]) -> None:
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"usage: {program} signals.pt model...\n"


# In int8


READ_INT8 = """
import torchao
state = torch.load(file)
result = {name: (value.qdata, value.dequantize()) for name, value in state.items() if hasattr(value, "qdata")}
"""


def test_int8_stores_every_linear_layer_in_eight_bits_and_is_near(
    printed: str, parts: dict[str, Tensor], folder: Path
) -> None:
    if "torchao" in MISSING:
        assert "dynamic int8: skipped: No module named 'torchao'" in printed
        pytest.skip("torchao is not installed")
    linear = ["listener.inputs.weight", "listener.state.weight", "gain.weight"]
    assert f": {', '.join(linear)}\n" in printed
    sizes = re.search(r"its state_dict has (\d+) kB; in float it has (\d+) kB", printed)
    found = re.search(r"largest difference (\S+), which is (\S+)% of the largest output", printed)
    assert sizes
    assert found
    assert int(sizes[1]) < 0.4 * int(sizes[2])
    assert 1e-5 < float(found[1]) < 1e-2
    assert 0 < float(found[2]) < 1
    stored, w = in_its_own_process(READ_INT8, folder / "int8.pt"), weights(parts)
    assert list(stored) == linear
    for name, (numbers, weight) in stored.items():
        assert numbers.dtype is torch.int8
        steps = w[name].abs().amax(dim=1) / 127
        assert ((weight - w[name]).abs().amax(dim=1) <= 0.51 * steps).all(), "no weight is rounded by more than half"


# Where nothing is installed


WITHOUT = """
import runpy, sys
for name in "onnxruntime", "openvino", "executorch", "torchao":
    sys.modules[name] = None  # so that importing it fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_packages_and_a_compiler_it_says_so_and_leaves_nothing_behind(tmp_path: Path) -> None:
    cwd, empty, temporary = (tmp_path / name for name in ("cwd", "bin", "temporary"))
    for folder in cwd, empty, temporary:
        folder.mkdir()
    printed = printed_by(cwd, "-c", WITHOUT, EXAMPLE, PATH=str(empty), CXX="", TMPDIR=str(temporary))
    reasons = {name: row[0] for name, row in rows_of(printed).items() if len(row) == 1}
    no_compiler = "skipped: there is no C++ compiler (g++ or clang++)"
    assert reasons == {
        "AOTInductor package": no_compiler,
        **dict.fromkeys(
            ["ONNX Runtime", "ONNX Runtime, TorchScript"], "skipped: import of onnxruntime halted; None in sys.modules"
        ),
        **dict.fromkeys(
            [name for name in FILES if "OpenVINO" in name], "skipped: import of openvino halted; None in sys.modules"
        ),
        "ExecuTorch program": "skipped: No module named 'executorch.exir'; 'executorch' is not a package",
        "C++, TorchScript file": no_compiler,
        "C++, AOTInductor package": no_compiler,
    }
    assert "dynamic int8: skipped: import of torchao halted; None in sys.modules" in printed
    assert [file for file in temporary.iterdir() if not file.name.startswith("torchinductor")] == []
