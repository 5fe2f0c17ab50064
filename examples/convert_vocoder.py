"""Take somebody else's vocoder out of Python: convert its weight norms, export it, fold it. No line of it is touched.

The vocoder is SpeechT5's Hifi-GAN as `transformers` builds it, with random weights: nothing is downloaded.

Run: python examples/convert_vocoder.py
"""

import argparse
import copy
import io
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import explicit_wn

FRAMES, MORE_FRAMES = torch.randn(53, 80, generator=torch.Generator().manual_seed(1)).split([20, 33])


class Progress:
    """A line for each step when it is done, and a bar while one takes longer than two seconds."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        finished, started = threading.Event(), time.perf_counter()
        bar = threading.Thread(target=self._draw, args=(what, finished, started), daemon=True)
        bar.start()
        try:
            yield
        finally:
            finished.set()
            bar.join()
        self.done += 1
        print(f"{self.done}. {what} ({time.perf_counter() - started:.1f} s)")

    def _draw(self, what: str, finished: threading.Event, started: float) -> None:
        if not sys.stderr.isatty() or finished.wait(2):
            return
        while not finished.wait(0.1):
            bar = "#" * round(24 * self.done / self.steps)
            line = f"[{bar:24}] {self.done} of {self.steps} done; {what}, {time.perf_counter() - started:.0f} s"
            print(f"\r{line:79.79}", end="", file=sys.stderr, flush=True)
        print(f"\r{'':79}\r", end="", file=sys.stderr, flush=True)


def build_vocoder(small: bool) -> nn.Module:
    try:
        from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
    except ImportError:
        sys.exit("This example converts a model of transformers, which is not installed: pip install transformers")
    torch.manual_seed(0)
    size: dict[str, Any] = {"upsample_initial_channel": 32, "resblock_kernel_sizes": [3]} if small else {}
    if small:
        size["resblock_dilation_sizes"] = [[1, 3, 5]]
    # transformers draws weights so small that an untrained vocoder is silent, and silence is easy to reproduce
    config = SpeechT5HifiGanConfig(initializer_range=0.2 if small else 0.05, **size)
    vocoder: nn.Module = SpeechT5HifiGan(config).eval()
    vocoder.apply_weight_norm()
    return vocoder


def attempt(what: Callable[[], object]) -> str:
    """What comes of it, in a few words."""
    try:
        what()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:60]} ..."
    return "works"


def largest_difference(one: Tensor, other: Tensor) -> str:
    return f"{(one - other).abs().max().item():.1e}"


def describe(model: nn.Module) -> str:
    counts = Counter((row.norm, row.spelling) for row in explicit_wn.report(model).rows)
    return ", ".join(f"{count} weights {' '.join(filter(None, kind))}" for kind, count in counts.items())


def classes_of(model: nn.Module) -> str:
    return ", ".join(sorted({type(module).__name__ for module in model.modules() if not list(module.children())}))


def milliseconds(model: nn.Module, spectrogram: Tensor, runs: int = 5) -> float:
    """The fastest of several runs."""
    times = []
    with torch.no_grad():
        for _ in range(runs):
            started = time.perf_counter()
            model(spectrogram)
            times.append(1000 * (time.perf_counter() - started))
    return min(times)


def run(model: nn.Module, spectrogram: Tensor) -> Tensor:
    with torch.no_grad():
        samples: Tensor = model(spectrogram)
    return samples


def build(progress: Progress, small: bool) -> nn.Module:
    with progress.step("Build the vocoder"):
        vocoder = build_vocoder(small)
    samples = run(vocoder, FRAMES)
    print(f"   {sum(p.numel() for p in vocoder.parameters()):,} parameters; {describe(vocoder)}")
    print(f"   {len(FRAMES)} frames give {samples.numel()} samples between {samples.min():.2f} and {samples.max():.2f}")
    print("   as it is:")
    print(f"     its own remove_weight_norm()  {attempt(copy.deepcopy(vocoder).remove_weight_norm)}")
    print(f"     torch.save(vocoder, file)     {attempt(lambda: torch.save(vocoder, io.BytesIO()))}\n")
    return vocoder


def convert(progress: Progress, vocoder: nn.Module, expected: Tensor) -> None:
    before = {id(parameter) for parameter in vocoder.parameters()}
    with progress.step("Convert it"):
        names = explicit_wn.convert(vocoder)
    same = "the same" if {id(parameter) for parameter in vocoder.parameters()} == before else "OTHER"
    print(f"   {len(names)} norms, {names[0]} to {names[-1]}, on {same} {len(before)} Parameter objects")
    print(f"   now {describe(vocoder)}")
    print(f"   largest difference from the original: {largest_difference(run(vocoder, FRAMES), expected)}\n")


def save_and_load(progress: Progress, vocoder: nn.Module, folder: Path, expected: Tensor) -> None:
    with progress.step("Save the whole model, and load it"):
        torch.save(vocoder, folder / "vocoder.pt")
        loaded = torch.load(folder / "vocoder.pt", weights_only=False)
    print(f"   largest difference: {largest_difference(run(loaded, FRAMES), expected)}\n")


def export(progress: Progress, vocoder: nn.Module, folder: Path, expected: Tensor) -> None:
    with progress.step("Export it for any number of frames, and save that"):
        exported = torch.export.export(vocoder, (FRAMES,), dynamic_shapes=({0: torch.export.Dim("frames", max=4096)},))
        torch.export.save(exported, folder / "vocoder.pt2")
    print(f"   vocoder.pt2 has {(folder / 'vocoder.pt2').stat().st_size / 1e6:.1f} MB")
    with progress.step(f"Load the export, and run it on {len(MORE_FRAMES)} frames"):
        samples = run(torch.export.load(folder / "vocoder.pt2").module(), MORE_FRAMES)
    print(f"   largest difference: {largest_difference(samples, expected)}\n")


def fold(progress: Progress, vocoder: nn.Module, expected: Tensor) -> None:
    folded = copy.deepcopy(vocoder)
    with progress.step("Fold a copy into plain weights"):
        names = explicit_wn.fold(folded)
    print(f"   {len(names)} norms, now {describe(folded)}, in layers of the classes {classes_of(folded)}")
    print(f"   largest difference: {largest_difference(run(folded, FRAMES), expected)}")
    folded_time, converted_time = milliseconds(folded, FRAMES), milliseconds(vocoder, FRAMES)
    print(f"   {len(FRAMES)} frames in {folded_time:.1f} ms, before that in {converted_time:.1f} ms\n")


def load_checkpoint(vocoder: nn.Module, checkpoint: dict[str, Tensor], expected: Tensor) -> None:
    with torch.no_grad():
        for parameter in vocoder.parameters():
            parameter.add_(0.01)
    spoiled = largest_difference(run(vocoder, FRAMES), expected)
    vocoder.load_state_dict(checkpoint)
    print("The original's checkpoint, loaded into the converted vocoder after all its weights were changed:")
    print(f"   largest difference: {spoiled} before, {largest_difference(run(vocoder, FRAMES), expected)} after")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a vocoder of thirty thousand parameters")
    small, progress = parser.parse_args().small, Progress(steps=6)

    vocoder = build(progress, small)
    checkpoint = copy.deepcopy(vocoder.state_dict())
    expected, expected_of_more = run(vocoder, FRAMES), run(vocoder, MORE_FRAMES)
    convert(progress, vocoder, expected)
    with tempfile.TemporaryDirectory() as folder:
        save_and_load(progress, vocoder, Path(folder), expected)
        export(progress, vocoder, Path(folder), expected_of_more)
    fold(progress, vocoder, expected)
    load_checkpoint(vocoder, checkpoint, expected)


if __name__ == "__main__":
    main()
