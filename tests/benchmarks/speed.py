"""How fast weight norm is in its three spellings, beside a module without any: ratios, all of one process and one run.

`python tests/benchmarks/speed.py` measures everything and prints the table; `--out tests/benchmarks` writes it there as
`speed.json` and `speed.png`, and `--help` says how to measure less. Every number is a median of rounds in which the
spellings take turns, so that whatever else the machine does meanwhile falls on all of them. On Linux it starts itself
anew with an allocator that keeps the memory it has: where glibc gives it back in a step and takes it again in the next,
the kernel clears those pages each time, which spelling is struck is chance, and it may double a time.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler, which measures the memory, talks

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from explicit_wn import WeightNorm, cached, script

HERE = Path(__file__).parent
OURS, PEERS, PLAIN = "ours", ("hook", "parametrization"), "plain"
SPELLINGS = (PLAIN, OURS, *PEERS)
Step = Callable[[], Any]
Wrap = Callable[..., nn.Module]


# What is measured: a model, given how to norm a layer, and its input


def layers(make: Callable[[], nn.Module], count: int, dim: int, shape: tuple[int, ...]) -> Callable[[Wrap], Any]:
    """`count` layers in a row."""

    def build(norm: Wrap) -> tuple[nn.Module, Tensor]:
        return nn.Sequential(*(norm(make(), dim=dim) for _ in range(count))), torch.randn(shape)

    return build


class ReadOften(nn.Module):
    """One layer, called 16 times in a step. Where the norm is explicit, it is computed once."""

    def __init__(self, norm: Wrap) -> None:
        super().__init__()
        self.wn: Any = WeightNorm()
        self.fc: Any = self.wn.apply(nn.Linear(512, 512)) if norm is NORMS[OURS] else norm(nn.Linear(512, 512))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        for _ in range(16):
            x = torch.tanh(self.fc(x))
        return x


class ReadOftenByOthers(ReadOften):
    """The same without an explicit recompute."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(16):
            x = torch.tanh(self.fc(x))
        return x


def read_often(norm: Wrap) -> tuple[nn.Module, Tensor]:
    return (ReadOften if norm is NORMS[OURS] else ReadOftenByOthers)(norm), torch.randn(8, 512)


def hifi_gan(norm: Wrap) -> tuple[nn.Module, Tensor]:
    """The generator of transformers as it is published, with a normed weight in each of its layers."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    model: Any = SpeechT5HifiGan(SpeechT5HifiGanConfig())
    for layer in list(model.modules()):
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
            norm(layer, dim=0)
    return model, torch.randn(1, 16, 80)


MODELS: dict[str, Callable[[Wrap], tuple[nn.Module, Tensor]]] = {
    "10 × Linear(64)": layers(partial(nn.Linear, 64, 64), 10, 0, (16, 64)),
    "8 × Conv1d(256, 256, 7)": layers(partial(nn.Conv1d, 256, 256, 7, padding=3), 8, 0, (1, 256, 64)),
    "3 × Linear(2048)": layers(partial(nn.Linear, 2048, 2048), 3, 0, (16, 2048)),
    "2 × ConvTranspose1d(256, 256, 16), dim=1": layers(
        partial(nn.ConvTranspose1d, 256, 256, 16, stride=2, padding=7), 2, 1, (1, 256, 16)
    ),
    "Linear(512) read 16 times": read_often,
    "Hifi-GAN generator": hifi_gan,
}


def by_hook(layer: nn.Module, dim: int = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hook is deprecated
        return torch.nn.utils.weight_norm(layer, dim=dim)


NORMS: dict[str, Wrap] = {
    PLAIN: lambda layer, dim=0: layer,
    OURS: lambda layer, dim=0: WeightNorm(dim=dim).inline(layer),
    "hook": by_hook,
    "parametrization": lambda layer, dim=0: parametrizations.weight_norm(layer, dim=dim),
}


# How it is run


def inference(model: nn.Module, x: Tensor) -> Step:
    def step() -> None:
        with torch.no_grad():
            model(x)

    return step


def training(model: nn.Module, x: Tensor) -> Step:
    parameters = list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(x).square().mean().backward()

    return step


def as_it_is(model: nn.Module, x: Tensor) -> Any:
    return model


def compiled(model: nn.Module, x: Tensor) -> Any:
    torch.compiler.reset()
    return torch.compile(model)


def scripted(model: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so is TorchScript
        # what is of transformers has a configuration, which TorchScript cannot compile
        return torch.jit.trace(model, x) if hasattr(model, "config") else script(model)


MODES: dict[str, tuple[Callable[[nn.Module, Tensor], Step], Callable[[nn.Module, Tensor], Any], tuple[str, ...]]] = {
    "eager inference": (inference, as_it_is, SPELLINGS),
    "eager training": (training, as_it_is, SPELLINGS),
    "compiled inference": (inference, compiled, SPELLINGS),
    "compiled training": (training, compiled, SPELLINGS),
    "scripted inference": (inference, scripted, (PLAIN, OURS)),
    "cached inference": (inference, as_it_is, (PLAIN, OURS)),
}


# Measuring


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def medians(steps: dict[str, Step], seconds: float, device: str) -> dict[str, float]:
    """The median seconds of each step, the steps taking turns for `seconds` in all."""
    for step in steps.values():
        for _ in range(3):
            step()
    synchronize(device)
    began = time.perf_counter()
    for step in steps.values():
        step()
    synchronize(device)
    at_once = max(1, round(0.002 * len(steps) / (time.perf_counter() - began)))  # samples of 2 ms or more
    taken: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[PLAIN]) < 7:
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(at_once):
                step()
            synchronize(device)
            taken[name].append((time.perf_counter() - began) / at_once)
    return {name: statistics.median(values) for name, values in taken.items()}


def peak(step: Step, device: str) -> int:
    """The most bytes that two steps hold at a time, beyond the parameters."""
    if device == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
        step()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = highest = 0
    for _, change in memory:
        held += change
        highest = max(highest, held)
    return highest


@contextlib.contextmanager
def measured_as(mode: str, models: dict[str, nn.Module]) -> Iterator[None]:
    """`cached` for the mode of that name."""
    with cached(models[OURS]) if mode == "cached inference" else contextlib.nullcontext(), torch.no_grad():
        torch.set_grad_enabled("training" in mode)
        yield


def measure(model: str, mode: str, seconds: float, device: str) -> dict[str, float]:
    """The median of each spelling for one model in one mode."""
    how, transform, spellings = MODES[mode]
    steps, models = {}, {}
    for spelling in spellings:
        torch.manual_seed(0)
        built, x = MODELS[model](NORMS[spelling])
        models[spelling] = built.to(device).train("training" in mode)
        x = x.to(device)
        steps[spelling] = how(transform(models[spelling], x), x)
    with measured_as(mode, models):
        return medians(steps, seconds, device)


def measure_memory(model: str, device: str) -> dict[str, float]:
    found = {}
    for spelling in SPELLINGS:
        torch.manual_seed(0)
        built, x = MODELS[model](NORMS[spelling])
        found[spelling] = float(peak(training(built.to(device), x.to(device)), device))
    return found


# What is shown


def ratios(medians: dict[str, float]) -> dict[str, float]:
    """Everything by the plain module, and ours by the better of the two peers."""
    found = {name: value / medians[PLAIN] for name, value in medians.items() if name != PLAIN}
    if PEERS[0] in medians:
        found["ours / better peer"] = medians[OURS] / min(medians[peer] for peer in PEERS)
    return found


def as_table(rows: list[dict[str, Any]], threads: int) -> str:
    """In Markdown: ours by the plain module, and in brackets the better of the two peers."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    lines = ["| | " + " | ".join(modes) + " |", "| --- " * (len(modes) + 1) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for mode in modes:
            found = [
                row["ratios"] for row in rows if (row["model"], row["mode"], row["threads"]) == (model, mode, threads)
            ]
            peers = [ratios[peer] for ratios in found for peer in PEERS if peer in ratios]
            cells.append("".join(f"{ratios[OURS]:.2f}" for ratios in found) + (f" ({min(peers):.2f})" if peers else ""))
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chart(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """The ratios to the plain module as bars, a panel for each model."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["threads"] == rows[0]["threads"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure, axes = plt.subplots(len(models), 1, figsize=(10, 2.1 * len(models) + 1), sharex=True, squeeze=False)
    colors = {OURS: "#1b7837", "hook": "#9aa5b1", "parametrization": "#c3a2c9"}
    for axis, model in zip(axes.flat, models, strict=True):
        for row in (row for row in rows if row["model"] == model):
            for place, spelling in enumerate((OURS, *PEERS)):
                if spelling in row["ratios"]:
                    axis.bar(
                        modes.index(row["mode"]) + (place - 1) * 0.27,
                        row["ratios"][spelling],
                        width=0.25,
                        color=colors[spelling],
                    )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(model, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xticks(range(len(modes)), [mode.replace(" ", "\n", 1) for mode in modes], fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    figure.legend(handles, colors, loc="upper right", ncols=3, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.supylabel("time (and memory) by that of the plain module", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def keep_memory() -> None:
    """Starts the program anew with the allocator told so, once."""
    told = {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 32)}
    if sys.platform == "linux" and told.keys() - os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], told | os.environ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="only those whose name holds this")
    parser.add_argument("--modes", default="", help="only those whose name holds this; also: memory")
    parser.add_argument("--skip", default="nothing", help='not those whose "model, run" holds this')
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4, help="how long to measure each row")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="the folder for speed.json and speed.png")
    chosen = parser.parse_args()
    keep_memory()

    rows: list[dict[str, Any]] = []
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        for model in (name for name in MODELS if chosen.models in name):
            for mode in (*MODES, "memory of eager training"):
                if chosen.modes not in mode or chosen.skip in f"{model}, {mode}":
                    continue
                if mode in MODES:
                    found = measure(model, mode, chosen.seconds, chosen.device)
                else:
                    found = measure_memory(model, chosen.device)
                rows.append({"model": model, "mode": mode, "threads": threads, "ratios": ratios(found), **found})
                shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios(found).items())
                print(f"{model}, {mode}, {threads} threads: {shown}", flush=True)
    where = f"torch {torch.__version__}, {machine(chosen.device)}, {date.today()}"
    print(f"\nTime (and memory) by that of the plain module: ours, and in brackets the better peer. {where}")
    for threads in chosen.threads:
        print(f"\nthreads: {threads}\n\n{as_table(rows, threads)}")
    if chosen.out:
        (chosen.out / "speed.json").write_text(json.dumps({"where": where, "rows": rows}, indent=1) + "\n")
        chart(rows, chosen.out / "speed.png", where)


if __name__ == "__main__":
    main()
