"""How fast weight norm is, both as `recompute` in a forward and inlined, beside torch's hook and parametrization.

`python tests/benchmarks/speed.py` measures everything and prints the tables and which goals are missed; `--quick` takes
less than a minute, the options below measure less. `--out tests/benchmarks` writes speed.json and speed.png there.

Every number comes of one process and one run: a median of at least 7 rounds in which the spellings take turns, so that
whatever else the machine does meanwhile falls on all of them. Before a row is measured, all spellings must compute the
same. On Linux the program starts itself anew with an allocator that keeps the memory it has: where glibc gives it back
in a step and takes it again in the next, the kernel clears those pages each time, which spelling is struck is chance,
and it may double a time.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler, which measures the memory, talks

import torch
from benchmark_models import OURS, PEERS, PLAIN, ROWS, SPELLINGS
from torch import Tensor, nn

from explicit_wn import WeightNorm, cached, script

Step = Callable[[], Any]


# How a model is run


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
    return torch.compile(model)


def scripted(model: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        # what is of transformers has a configuration, which TorchScript cannot compile
        traced = any(hasattr(module, "config") for module in model.modules())
        return torch.jit.trace(model, x) if traced else script(model)


WITHOUT_PEERS = (PLAIN, *OURS)
MODES: dict[str, tuple[Callable[[nn.Module, Tensor], Step], Callable[[nn.Module, Tensor], Any], tuple[str, ...]]] = {
    "eager inference": (inference, as_it_is, SPELLINGS),
    "eager training": (training, as_it_is, SPELLINGS),
    "compiled inference": (inference, compiled, SPELLINGS),
    "compiled training": (training, compiled, SPELLINGS),
    "scripted inference": (inference, scripted, WITHOUT_PEERS),
    "cached inference": (inference, as_it_is, WITHOUT_PEERS),
}
MEMORY, LAUNCHES = "memory of eager training", "kernel launches of eager training"


# Measuring


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Step, repeats: int, device: str) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def medians(steps: dict[str, Step], seconds: float, device: str) -> dict[str, float]:
    """The median seconds of each step, the steps taking turns, in an order drawn anew each round, for `seconds`."""
    for step in steps.values():
        seconds_of(step, 3, device)
    slowest = max(seconds_of(step, 3, device) for step in steps.values())
    repeats = max(1, round(0.002 / slowest))  # samples of about 2 ms
    taken: dict[str, list[float]] = {name: [] for name in steps}
    order, draw = list(steps), random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[order[0]]) < 7:
        draw.shuffle(order)
        for name in order:
            taken[name].append(seconds_of(steps[name], repeats, device))
    return {name: statistics.median(values) for name, values in taken.items()}


def check_same(outputs: dict[str, Tensor], what: str) -> None:
    """Refuses to compare spellings that do not compute the same; a norm that was forgotten is 10 % off."""
    expected = outputs[PLAIN]
    for spelling, output in outputs.items():
        off = float((output - expected).abs().max() / expected.abs().max())
        if not off < 0.005:  # nan, too
            raise AssertionError(f"{what}: {spelling} is {off:.1%} off what the model without a norm computes.")


def measure(model: str, mode: str, seconds: float, device: str) -> dict[str, float]:
    """The median of each spelling for one model in one mode."""
    how, transform, spellings = MODES[mode]
    steps, outputs = {}, {}
    if transform is compiled:
        torch.compiler.reset()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled("training" in mode))
        for spelling in spellings:
            built, x = ROWS[model].build(spelling, device)
            built.train("training" in mode)
            if "cached" in mode and spelling in OURS:
                stack.enter_context(cached(built))
            run = transform(built, x)
            outputs[spelling] = run(x).detach()
            steps[spelling] = how(run, x)
        check_same(outputs, f"{model}, {mode}")
        return medians(steps, seconds, device)


def bytes_held(step: Step, device: str) -> float:
    """The most bytes that two steps hold at a time, beyond the parameters."""
    if device == "cuda":
        gc.collect()  # what else was freed meanwhile would count as given back by the step
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        return float(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
        step()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = highest = 0.0
    for _, change in memory:
        held += change
        highest = max(highest, held)
    return highest


def kernel_launches(step: Step, device: str) -> float:
    """How many kernels a step launches on the GPU, whoever launches them: torch, cuDNN or cuBLAS."""
    step()
    step()  # cuDNN has chosen its algorithms
    synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        synchronize(device)
    return float(sum(event.count for event in profiler.key_averages() if "LaunchKernel" in event.key))


def count(model: str, of: Callable[[Step, str], float], device: str) -> dict[str, float]:
    """What `of` finds in an eager training step of each spelling."""
    found = {}
    for spelling in SPELLINGS:
        found[spelling] = of(training(*ROWS[model].build(spelling, device)), device)
    return found


def measure_calls(seconds: float, device: str) -> list[dict[str, Any]]:
    """One `recompute` of a small layer beside torch's kernel, and one read of the weight beside a plain layer's."""
    wn = WeightNorm()
    fc: Any = wn.apply(nn.Linear(48, 48)).to(device)
    plain = nn.Linear(48, 48).to(device)

    def recompute() -> None:
        wn.recompute(fc)

    def kernel() -> None:
        torch._weight_norm(fc.weight_v, fc.weight_g, 0)

    def recomputed_weight() -> None:
        fc.weight  # noqa: B018

    def parameter() -> None:
        plain.weight  # noqa: B018

    rows = []
    for call, grad, ours, other in (
        ("recompute, no_grad", False, recompute, kernel),
        ("recompute, with grad", True, recompute, kernel),
        ("reading the weight", True, recomputed_weight, parameter),
    ):
        with torch.set_grad_enabled(grad):
            recompute()
            torch.testing.assert_close(fc.weight, torch._weight_norm(fc.weight_v, fc.weight_g, 0))
            found = medians({"ours": ours, other.__name__: other}, seconds, device)
        above = (found["ours"] - found[other.__name__]) * 1e6
        rows.append({"call": call, "beside": other.__name__, "medians": found, "microseconds above": above})
    return rows


# What is shown


def as_row(model: str, mode: str, threads: int, found: dict[str, float]) -> dict[str, Any]:
    """The medians of a model in a mode, each by the plain module, and ours by the better of the two peers."""
    by_plain = {name: value / found[PLAIN] for name, value in found.items() if name != PLAIN}
    by_peer = {form: found[form] / min(found[peer] for peer in PEERS) for form in OURS if PEERS[0] in found}
    head = {"model": model, "mode": mode, "threads": threads}
    return {**head, "medians": found, "by plain": by_plain, "by better peer": by_peer}


def limit(row: dict[str, Any], form: str) -> float:
    """The most that this form may take by the better peer."""
    if row["model"] == "10 × Linear(64)" and row["mode"] == "eager inference" and form == "explicit":
        return 0.97
    if "dim=1" in row["model"] and "compiled" in row["mode"]:
        return 0.85 if "inference" in row["mode"] else 0.95
    return 1.0


def goals(rows: list[dict[str, Any]], calls: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Each goal's name, what was found and the most that it may be."""
    found = []
    for row in rows:
        name = f"{row['model']}, {row['mode']}, threads={row['threads']}"
        for form, ratio in row["by better peer"].items():
            found.append((f"{name}: {form} / better peer", ratio, limit(row, form)))
        if row["mode"] == "cached inference" and row["model"] == "10 × Linear(64)":
            found += [(f"{name}: {form} / plain", row["by plain"][form], 1.15) for form in OURS]
    for call in calls:
        if call["beside"] == "kernel":
            found.append((f"{call['call']}: microseconds above the kernel", call["microseconds above"], 1.0))
    return found


def missed(found: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    return [goal for goal in found if round(goal[1], 2) > goal[2]]


def goals_report(found: list[tuple[str, float, float]]) -> str:
    lines = [f"- {name}: {value:.2f}, goal {most:.2f}" for name, value, most in missed(found)]
    return "\n".join([f"Goals met: {len(found) - len(lines)} of {len(found)}. Missed:", *(lines or ["- none"])])


def as_table(rows: list[dict[str, Any]], by: str) -> str:
    """In Markdown: the explicit form, the inlined one and, by the plain module, in brackets the better peer."""
    rows = [row for row in rows if row[by]]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    lines = ["| | " + " | ".join(modes) + " |", "| --- " * (len(modes) + 1) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        ratios = {row["mode"]: row[by] for row in rows if row["model"] == model}
        cells = []
        for mode in modes:
            found = ratios.get(mode, {})
            peers = [found[peer] for peer in PEERS if peer in found]
            brackets = f" ({min(peers):.2f})" if peers else ""
            cells.append(", ".join(f"{found[form]:.2f}" for form in OURS if form in found) + brackets)
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_report(rows: list[dict[str, Any]], calls: list[dict[str, Any]]) -> str:
    """All tables and the goals."""
    parts = []
    for threads in dict.fromkeys(row["threads"] for row in rows):
        some = [row for row in rows if row["threads"] == threads]
        parts.append(f"By the better of torch's hook and parametrization: explicit, inlined. Threads: {threads}")
        parts.append(as_table(some, "by better peer"))
        parts.append(f"By the module without a norm: explicit, inlined (the better peer). Threads: {threads}")
        parts.append(as_table(some, "by plain"))
    if calls:
        lines = ["| one call, in microseconds | ours | beside | above |", "| --- | --- | --- | --- |"]
        for call in calls:
            ours, other = (1e6 * value for value in call["medians"].values())
            cells = f"{ours:.2f} | {call['beside']} {other:.2f} | {call['microseconds above']:.2f}"
            lines.append(f"| {call['call']} | {cells} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, goals_report(goals(rows, calls))])


COLORS = {"explicit": "#1b7837", "inlined": "#7fbf7b", "hook": "#9aa5b1", "parametrization": "#c3a2c9"}


def chart(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """The ratios to the plain module as bars, a panel for each model; where a bar is cut off, its number is written."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["threads"] == rows[0]["threads"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    lines = -(-len(models) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(15, 2.1 * lines + 1.2), sharey=True, squeeze=False)
    top = 2.5
    for axis, model in zip(axes.flat, models, strict=False):
        for row in (row for row in rows if row["model"] == model):
            for place, (spelling, color) in enumerate(COLORS.items()):
                if spelling in row["by plain"]:
                    ratio, left = row["by plain"][spelling], modes.index(row["mode"]) + (place - 1.5) * 0.21
                    axis.bar(left, min(ratio, top), width=0.2, color=color)
                    if ratio > top:
                        axis.text(left, top, f"{ratio:.1f}", ha="center", va="bottom", fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(model, loc="left", fontsize=10, pad=10)
        axis.set_ylim(0, top)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xticks(range(len(modes)), [mode.replace(" ", "\n", 1) for mode in modes], fontsize=8)
        axis.set_xlim(-0.6, len(modes) - 0.4)
    for axis in axes.flat[len(models) :]:
        axis.set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.legend(handles, COLORS, loc="upper right", ncols=4, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.supylabel("time (and memory) by that of the model without a norm", fontsize=9)
    figure.tight_layout(rect=(0.01, 0, 1, 1 - 0.4 / figure.get_figheight()))  # below title and legend
    figure.savefig(path, dpi=100)


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


def cells(chosen: argparse.Namespace) -> list[tuple[str, str]]:
    """The models and modes to measure."""
    models = list(ROWS)[:2] if chosen.quick else list(ROWS)
    modes = [*MODES, MEMORY, *([LAUNCHES] if chosen.device == "cuda" else [])]
    if chosen.quick:
        modes = ["eager inference", "eager training", "cached inference"]
    found = [(model, mode) for model in models for mode in modes if chosen.models in model and chosen.modes in mode]
    return [(model, mode) for model, mode in found if chosen.skip not in f"{model}, {mode}"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the small layers and the single calls, one thread")
    parser.add_argument("--models", default="", help="only those whose name holds this; also: one call")
    parser.add_argument("--modes", default="", help="only those whose name holds this; also: memory, launches (cuda)")
    parser.add_argument("--skip", default="nothing", help='not those whose "model, mode" holds this')
    parser.add_argument("--threads", type=int, nargs="+", help="each number in turn; by default 1 2")
    parser.add_argument("--seconds", type=float, default=4, help="how long to measure each row; by default 4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="the folder for speed.json and speed.png")
    chosen = parser.parse_args(arguments)

    rows, calls = [], []
    for threads in chosen.threads or ([1] if chosen.quick else [1, 2]):
        torch.set_num_threads(threads)
        for model, mode in cells(chosen):
            if mode in MODES:
                found = measure(model, mode, chosen.seconds, chosen.device)
            else:
                found = count(model, bytes_held if mode == MEMORY else kernel_launches, chosen.device)
            rows.append(as_row(model, mode, threads, found))
            shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in rows[-1]["by plain"].items())
            print(f"{model}, {mode}, threads={threads}: {shown}", file=sys.stderr, flush=True)
    if chosen.models in "one call" and not chosen.modes:
        torch.set_num_threads(1)
        calls = measure_calls(chosen.seconds, chosen.device)
    where = f"torch {torch.__version__}, {machine(chosen.device)}, {date.today()}"
    print(f"{where}. Ratios of time (and memory); lower is better.\n\n{as_report(rows, calls)}")
    if chosen.out:
        names = [name for name, *_ in missed(goals(rows, calls))]
        found = {"where": where, "device": chosen.device, "rows": rows, "calls": calls, "goals missed": names}
        (chosen.out / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
        chart(rows, chosen.out / "speed.png", where)


if __name__ == "__main__":
    keep_memory()
    main()
