"""Take one model to every runtime that a PyTorch model goes to, with its weight norms in it, and then folded.

What is not installed is skipped, and the reason is printed. All of it: pip install onnxruntime onnxscript openvino
executorch, which brings torchao along, and a C++ compiler and cmake.

Run: python examples/export_everywhere.py
"""

import argparse
import contextlib
import copy
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import explicit_wn
from explicit_wn import WeightNorm

# torch deprecated TorchScript. That is for you to weigh; here the warnings would only hide the table.
warnings.filterwarnings("ignore", message=".torch.jit")
# What torch says about its own code: when it lowers an exported program, and, in torch 2.10, when it loads one.
warnings.filterwarnings("ignore", message=".isinstance.treespec, LeafSpec", category=FutureWarning)
warnings.filterwarnings("ignore", message="The given buffer is not writable")
# And about its older way to ONNX.
for message in (
    "You are using the legacy TorchScript-based ONNX export",
    "The feature will be removed",
    "Constant folding",
):
    warnings.filterwarnings("ignore", message=message)
for logger in "torch.onnx", "torch.utils.cpp_extension":  # that there is no torchvision, or no GPU
    logging.getLogger(logger).setLevel(logging.ERROR)


class Listener(nn.Module):
    """An LSTM cell, written by hand. It looks over all frames four times and remembers what it was looking for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.inputs = self.wn.apply(nn.Linear(channels, 4 * channels))
        self.state = self.wn.apply(nn.Linear(channels, 4 * channels, bias=False))

    def forward(self, frames: Tensor) -> Tensor:
        self.wn.recompute(self.inputs)  # once, for four uses
        self.wn.recompute(self.state)
        hidden = cell = frames.mean(dim=2)
        for _ in range(4):
            attention = torch.softmax((frames * hidden.unsqueeze(2)).sum(dim=1), dim=1)
            seen = (frames * attention.unsqueeze(1)).sum(dim=2)
            gates = self.inputs(seen) + self.state(hidden)
            keep, write, show, new = gates.unflatten(1, [4, -1]).unbind(1)
            cell = torch.sigmoid(keep) * cell + torch.sigmoid(write) * torch.tanh(new)
            hidden = torch.sigmoid(show) * torch.tanh(cell)
        return hidden


class Stereo(nn.Module):
    """Makes of a signal, however long, two channels of twice its sampling rate."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.wn = WeightNorm(dim="out")
        self.encoder = nn.Sequential(self.wn.inline(nn.Conv1d(1, channels, 9, padding=4)), nn.ReLU())
        self.listener = Listener(channels)
        self.gain = self.wn.apply(nn.Linear(channels, channels))
        self.decoder = self.wn.apply(nn.ConvTranspose1d(channels, 2, 8, stride=2, padding=3))

    def forward(self, signal: Tensor) -> Tensor:
        self.wn.recompute(self.gain)
        self.wn.recompute(self.decoder)
        frames = self.encoder(signal)
        gain = torch.sigmoid(self.gain(self.listener(frames)))
        return self.decoder(frames * gain.unsqueeze(2))


torch.manual_seed(0)
EXAMPLE = torch.randn(2, 1, 96)  # what the model is exported with; other numbers of signals and lengths must do as well
SIGNALS = [EXAMPLE, torch.randn(1, 1, 50), torch.randn(4, 1, 333)]
SHAPES = {"signal": {0: torch.export.Dim("count", max=16), 2: torch.export.Dim("length", min=8, max=4096)}}


def train(model: nn.Module, steps: int = 30) -> nn.Module:
    """Teaches it that the right ear hears all a little later; returns a folded copy from before the last step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        before = copy.deepcopy(model)
        signal = torch.randn(8, 1, 64)
        left = F.interpolate(signal, scale_factor=2, mode="linear")
        loss = F.mse_loss(model(signal), torch.cat([left, 0.5 * left.roll(6, dims=2)], dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    explicit_wn.fold(before)
    return before.eval()


def as_training_leaves_it(model: nn.Module) -> nn.Module:
    """A copy with the same parameters, and with weights stored that a forward computed before they got these values."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.1)
        copied(EXAMPLE)
        for parameter, value in zip(copied.parameters(), model.parameters(), strict=True):
            parameter.copy_(value)
    return copied


# Each runtime: the model goes to a file, and what comes back runs that file.

Run = Callable[[Tensor], Tensor]


class Skipped(Exception):
    """Why a runtime cannot be tried here."""


def torchscript(model: nn.Module, file: Path) -> Run:
    torch.jit.script(model).save(file)
    return torch.jit.load(file)


def torchscript_frozen(model: nn.Module, file: Path) -> Run:
    torch.jit.freeze(explicit_wn.script(model)).save(file)
    return torch.jit.load(file)


def export(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (EXAMPLE,), dynamic_shapes=SHAPES)


def export_file(model: nn.Module, file: Path) -> Run:
    torch.export.save(export(model), file)
    return torch.export.load(file).module()


def aotinductor(model: nn.Module, file: Path) -> Run:
    find_compiler()
    torch._inductor.aoti_compile_and_package(export(model), package_path=str(file))
    return torch._inductor.aoti_load_package(str(file))


def onnx(model: nn.Module, file: Path) -> Run:
    import onnxscript  # noqa: F401  (torch needs it, and would say so less clearly)

    torch.onnx.export(model, (EXAMPLE,), file, dynamo=True, dynamic_shapes=SHAPES, external_data=False, verbose=False)
    return run_onnx(file)


def onnx_of_torchscript(model: nn.Module, file: Path) -> Run:
    axes = {"signal": {0: "count", 2: "length"}}
    torch.onnx.export(model, (EXAMPLE,), file, dynamo=False, input_names=["signal"], dynamic_axes=axes)
    return run_onnx(file)


def run_onnx(file: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda signal: torch.from_numpy(session.run(None, {"signal": signal.numpy()})[0])


def openvino_of_torchscript(model: nn.Module, file: Path) -> Run:
    return openvino(torch.jit.freeze(explicit_wn.script(model)), file)  # unfrozen, it takes no convolution


def openvino_of_export(model: nn.Module, file: Path) -> Run:
    return openvino(export(model), file)


def openvino_of_onnx(model: nn.Module, file: Path) -> Run:
    return openvino(file.with_name("model.onnx"), file)


def openvino(model: object, file: Path) -> Run:
    import openvino

    openvino.save_model(openvino.convert_model(model), file, compress_to_fp16=False)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    return lambda signal: torch.from_numpy(compiled(signal.numpy())[0].copy())


def run_executorch(exported: torch.export.ExportedProgram, file: Path) -> Run:
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    file.write_bytes(to_edge_transform_and_lower(exported).to_executorch().buffer)
    forward = Runtime.get().load_program(file).load_method("forward")
    return lambda signal: forward.execute([signal])[0].clone()


def executorch(model: nn.Module, file: Path) -> Run:
    with quiet():
        try:
            run_executorch(torch.export.export(nn.ReLU(), (EXAMPLE,)), file)(EXAMPLE)
        except ImportError:
            raise
        except Exception as error:  # made for another torch, it may fail in any way
            raise Skipped(f"executorch does not work beside torch {torch.__version__}: {error}") from error
        run = run_executorch(export(model), file)
        run(EXAMPLE)
    return run


RUNTIMES = {
    "TorchScript file": (torchscript, "scripted.pt"),
    "TorchScript file, frozen": (torchscript_frozen, "frozen.pt"),
    "torch.export file": (export_file, "exported.pt2"),
    "AOTInductor package": (aotinductor, "compiled.pt2"),
    "ONNX Runtime": (onnx, "model.onnx"),
    "ONNX Runtime, TorchScript": (onnx_of_torchscript, "scripted.onnx"),
    "OpenVINO, torch.export": (openvino_of_export, "openvino_export.xml"),
    "OpenVINO, TorchScript": (openvino_of_torchscript, "openvino_script.xml"),
    "OpenVINO, ONNX": (openvino_of_onnx, "openvino_onnx.xml"),
    "ExecuTorch program": (executorch, "model.pte"),
}


# The program in C++, which loads two of those files.


def find_compiler() -> str:
    for name in os.environ.get("CXX", "g++"), "g++", "clang++":
        if shutil.which(name):
            return name
    raise Skipped("there is no C++ compiler (g++ or clang++)")


def build_cpp(folder: Path) -> Path:
    """Builds examples/cpp in `folder`; returns the program."""
    compiler = find_compiler()
    if not shutil.which("cmake"):
        raise Skipped("there is no cmake")
    settings = [f"-DTORCH={Path(torch.__file__).parent}", f"-DCMAKE_CXX_COMPILER={compiler}"]
    source = Path(__file__).parent / "cpp"
    run_command("cmake", "-S", source, "-B", folder, *settings)
    run_command("cmake", "--build", folder)
    return folder / "run_models"


def run_command(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def run_cpp(program: Path, folder: Path, expected: list[Tensor]) -> list[str]:
    """The cells of the table for the TorchScript file and for the AOTInductor package."""
    torch.save((*SIGNALS, torch.cat([output.flatten() for output in expected])), folder / "signals.pt")
    files = [folder / "scripted.pt", folder / "compiled.pt2"]
    printed = run_command(program, folder / "signals.pt", *files)
    found = re.findall(r": (\S+) from Python, \S+ from the first, (\S+) ms per call", printed)
    return [cells(file, float(difference), float(ms)) for file, (difference, ms) in zip(files, found, strict=True)]


# The table.


def cells(file: Path | None, difference: float, milliseconds: float) -> str:
    size = f"{size_of(file) / 1000:.0f}" if file else ""
    return f"{size:>8} {difference:12.1e} {milliseconds:9.2f}"


def size_of(file: Path) -> int:
    """Of the file, and of the one beside it in which OpenVINO keeps the numbers."""
    return sum(path.stat().st_size for path in {file, file.with_suffix(".bin")} if path.exists())


@torch.no_grad()
def largest_difference(run: Run, expected: list[Tensor]) -> float:
    return max((run(signal) - output).abs().max().item() for signal, output in zip(SIGNALS, expected, strict=True))


def measure(run: Run, file: Path | None, expected: list[Tensor]) -> str:
    difference, times = largest_difference(run, expected), []
    with torch.no_grad():
        for _ in range(20):
            started = time.perf_counter()
            run(SIGNALS[-1])
            times.append(1000 * (time.perf_counter() - started))
    return cells(file, difference, min(times))


def run_everywhere(model: nn.Module, folder: Path, expected: list[Tensor], program: Path | str) -> dict[str, str]:
    """The row of every runtime: its cells, or why it was skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"eager": measure(model, None, expected)}
    for name, (build, file_name) in RUNTIMES.items():
        show_progress(f"{folder.name}: {name}")
        try:
            run = build(as_training_leaves_it(model), folder / file_name)
            rows[name] = measure(run, folder / file_name, expected)
        except (Skipped, ImportError) as reason:
            rows[name] = f"skipped: {reason}".partition("\n")[0]
    in_cpp = run_cpp(program, folder, expected) if isinstance(program, Path) else 2 * [program]
    rows["C++, TorchScript file"], rows["C++, AOTInductor package"] = in_cpp
    return rows


# In int8.


def quantize(folded: nn.Module, folder: Path, expected: list[Tensor]) -> Iterator[str]:
    """Dynamic int8: the weights of Linear layers are stored in 8 bits, and what comes in is rounded to 8 at each call.

    Of the folded model, since the weight of a normed layer is computed, and nobody can replace it.
    """
    with quiet():
        import torchao
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantized = copy.deepcopy(folded)
        quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    names = [name for name, parameter in quantized.named_parameters() if type(parameter) is not nn.Parameter]
    yield f"dynamic int8 of the folded model, by torchao {torchao.__version__}: {', '.join(names)}"
    sizes = []
    for name, model in {"float.pt": folded, "int8.pt": quantized}.items():
        torch.save(model.state_dict(), folder / name)
        sizes.append((folder / name).stat().st_size / 1000)
    yield f"  its state_dict has {sizes[1]:.0f} kB; in float it has {sizes[0]:.0f} kB"
    difference = largest_difference(quantized, expected)
    largest = max(output.abs().max().item() for output in expected)
    yield f"  largest difference {difference:.1e}, which is {difference / largest:.2%} of the largest output"


# What else it takes.


def show_progress(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{what:60.60}\r", end="", file=sys.stderr, flush=True)


def clear_progress() -> None:
    if sys.stderr.isatty():
        print(f"\r{'':60}\r", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and the chatter, part of it from C++, that ExecuTorch and torchao start with."""
    stderr = os.dup(2)
    with warnings.catch_warnings(), tempfile.TemporaryFile() as chatter:
        warnings.simplefilter("ignore")
        os.dup2(chatter.fileno(), 2)
        try:
            yield
        except RuntimeError:  # the chatter says why
            os.dup2(stderr, 2)
            chatter.seek(0)
            print(chatter.read().decode(), file=sys.stderr)
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the files there")
    kept = parser.parse_args().folder
    with tempfile.TemporaryDirectory() if kept is None else contextlib.nullcontext(kept) as folder:
        compare(Path(folder))


def compare(folder: Path) -> None:
    torch.set_num_threads(1)
    model = Stereo()
    stale = train(model)
    folded = copy.deepcopy(model.eval())
    names = explicit_wn.fold(folded)
    with torch.no_grad():
        expected = [model(signal) for signal in SIGNALS]
    print(f"weight norms: {', '.join(names)}\n")

    show_progress("the C++ program")
    try:
        program: Path | str = build_cpp(folder / "cpp")
    except Skipped as reason:
        program = f"skipped: {reason}"
    normed_rows = run_everywhere(model, folder / "normed", expected, program)
    folded_rows = run_everywhere(folded, folder / "folded", expected, program)
    clear_progress()
    print_table(normed_rows, folded_rows)
    off = largest_difference(stale, expected)
    print(f"for scale, what weights of one training step ago make of it: a difference of {off:.1e}\n")
    try:
        for line in quantize(folded, folder, expected):
            print(line)
    except ImportError as reason:
        print(f"dynamic int8: skipped: {reason}")


def print_table(normed_rows: dict[str, str], folded_rows: dict[str, str]) -> None:
    shapes = [f"{len(signal)} × {signal.shape[2]}" for signal in SIGNALS]
    columns = f"{'kB':>8} {'difference':>12} {'ms':>9}"
    print(f"{'':28}{'with its norms':>31}   {'folded':>31}")
    print(f"{'runtime':28}{columns}   {columns}")
    for name, row in normed_rows.items():
        print(f"{name:28}{row if row.startswith('skipped') else f'{row}   {folded_rows[name]}'}")
    print(f"\nexported with {shapes[0]} samples; the largest difference from eager with {', '.join(shapes)} samples;")
    print(f"the fastest of 20 calls with {shapes[-1]}, on one thread, torch {torch.__version__}")


if __name__ == "__main__":
    main()
