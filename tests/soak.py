"""Ten thousand cycles of everything: memory, objects and generated classes have to stay flat.

    python tests/soak.py            # about five minutes, and it exits with 1 if anything grows
    python tests/soak.py 1000       # the same with a tenth of the cycles

Linux only, for the resident memory. `test_leaks.py` runs a few cycles of each in every test run.
"""

import contextlib
import copy
import ctypes
import gc
import io
import linecache
import os
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import explicit_wn
from explicit_wn import Reparametrization, SpectralNorm, WeightNorm, cached, carrier, convert, fold

X = torch.randn(2, 8)


class Net(nn.Module):
    """A weight that is recomputed, one that is inlined, one whose dim is in the middle, and a spectral one."""

    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm(dim=1)
        self.explicit = self.wn.apply(nn.Linear(8, 8))
        self.inlined = WeightNorm(eps=1e-6).inline(nn.Linear(8, 32))
        self.middle = WeightNorm(dim="out").inline(nn.ConvTranspose1d(32, 32, 7))
        self.spectral = SpectralNorm().inline(nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.explicit)
        return self.spectral(self.middle(self.inlined(self.explicit(x)).unsqueeze(-1)))


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.explicit = self.wn.apply(nn.Linear(8, 4))
        self.inlined = SpectralNorm().inline(nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.explicit)
        return self.inlined(self.explicit(x))


# One cycle each; what they are made of is made once, by `cycles`


def in_torchs_spellings() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        hooked = nn.utils.weight_norm(nn.Linear(4, 4))
    spectral = nn.utils.spectral_norm(nn.Linear(4, 4))
    return nn.Sequential(hooked, spectral, parametrizations.weight_norm(nn.Linear(4, 4)))


def convert_and_fold() -> None:
    model = in_torchs_spellings()
    model(torch.ones(1, 4))
    assert len(convert(model)) == 3
    model(torch.ones(1, 4)).sum().backward()
    assert len(fold(model)) == 3


def apply_and_remove(layer: nn.Module) -> None:
    for norm in (WeightNorm(), SpectralNorm(), WeightNorm(dim=1, eps=1e-6)):
        norm.inline(layer)
        layer(X).sum().backward()
        norm.remove(layer)


def a_class_of_its_own() -> None:
    class Local(nn.Linear):
        pass

    layer = WeightNorm().inline(Local(8, 2))
    layer(X).sum().backward()
    WeightNorm().remove(layer)


def a_norm_of_its_own() -> None:
    @attrs.define(slots=False, eq=False, on_setattr=None, repr=False)
    class Exponential(Reparametrization):
        name: str = "weight"
        formula = staticmethod(lambda log: log.exp())

        def split(self, weight: Tensor) -> dict[str, Tensor]:
            return {"log": weight.abs().log()}

    Exponential().inline(nn.Linear(8, 2))(X).sum().backward()


def save_and_load(model: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))
    model(X)


def use_cached(model: nn.Module) -> None:
    with cached(model), cached(model.inlined):
        model(X).sum().backward()


def transform(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (X,)).square().sum())(parameters)


def in_a_thread(model: nn.Module) -> None:
    thread = threading.Thread(target=lambda: model(X))
    thread.start()
    thread.join()


def fail(layer: nn.Module) -> None:
    with contextlib.suppress(ValueError):
        WeightNorm().apply(layer)
    with contextlib.suppress(RuntimeError):
        layer(torch.ones(1, 3))


def look_for_stale(model: nn.Module) -> None:
    with explicit_wn.detect_stale(model):
        model(X)


def cycles() -> dict[str, tuple[Callable[[], Any], int]]:
    """What is done, and how many of ten thousand times: fewer where one time takes long."""
    net, eager, layer = Net(), Net().requires_grad_(False), nn.Linear(8, 2)
    normed = WeightNorm().inline(nn.Linear(8, 2))
    return {
        "recompute": (lambda: explicit_wn.recompute_all(net), 10_000),
        "read": (lambda: [module.weight for _, module, _ in explicit_wn.normed(net)], 10_000),
        "forward": (lambda: eager(X), 10_000),
        "forward and backward": (lambda: net(X).sum().backward(), 10_000),
        "apply and remove": (lambda: apply_and_remove(layer), 10_000),
        "deepcopy": (lambda: copy.deepcopy(net)(X), 10_000),
        "pickle": (lambda: pickle.loads(pickle.dumps(net))(X), 10_000),
        "state_dict": (lambda: save_and_load(net), 10_000),
        "cached": (lambda: use_cached(net), 10_000),
        "convert and fold": (convert_and_fold, 10_000),
        "build and drop": (lambda: Net()(X).sum().backward(), 10_000),
        "detect_stale": (lambda: look_for_stale(net), 10_000),
        "functorch": (lambda: transform(net), 10_000),
        "a thread": (lambda: in_a_thread(net), 10_000),
        "refused calls": (lambda: fail(normed), 10_000),
        "a base class": (a_class_of_its_own, 2_000),
        "a norm class": (a_norm_of_its_own, 2_000),
        "script": (lambda: explicit_wn.script(Scripted())(X), 1_000),  # torch.jit.freeze leaks, plain models as well
    }


# Measuring


@attrs.frozen
class Measure:
    """What there is in this process."""

    memory: int
    """Resident, in KiB."""
    objects: int
    tensors: int
    classes: int
    """Generated ones."""
    sources: int
    """Of generated classes, in `linecache`."""

    @staticmethod
    def take() -> "Measure":
        while gc.collect():  # a class is held by what the collection before frees
            pass
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # so that freed memory does not count
        everything = gc.get_objects()
        return Measure(
            memory=resident(),
            objects=len(everything),
            tensors=sum(issubclass(type(one), Tensor) for one in everything),
            classes=len(carrier.Carrier.__subclasses__()),
            sources=sum(str(name).startswith("<explicit_wn") for name in linecache.cache),
        )


def resident() -> int:
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024 if pages.exists() else 0


def grown(cycle: Callable[[], Any], count: int, first: int) -> tuple[Measure, Measure]:
    """How it is after the first cycles, when all that is kept for good is there, and how after the rest."""
    for _ in range(first):
        cycle()
    before = Measure.take()
    for _ in range(count - first):
        cycle()
    return before, Measure.take()


MEMORY = 2048
"""KiB by which the resident memory may differ: what the allocator keeps. It is 0.2 KiB for each of ten thousand."""


def growth_of(before: Measure, after: Measure) -> list[str]:
    """What grew, in words; a few objects come and go with the interpreter's own caches."""
    allowed = {"memory": MEMORY, "objects": 20, "tensors": 0, "classes": 0, "sources": 0}
    return [
        f"{name} +{getattr(after, name) - getattr(before, name)}"
        for name, most in allowed.items()
        if getattr(after, name) - getattr(before, name) > most
    ]


def main(ten_thousand: int) -> int:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".torch.jit")
    titles = ["cycle", "times", "seconds", "memory KiB", "objects", "tensors", "classes", "sources", ""]
    widths = [22, 7, 8, 18, 18, 10, 9, 9, 0]
    print("  ".join(title.ljust(width) for title, width in zip(titles, widths, strict=True)).rstrip())
    failed = False
    for name, (cycle, of_ten_thousand) in cycles().items():
        count, began = max(20, of_ten_thousand * ten_thousand // 10_000), time.perf_counter()
        before, after = grown(cycle, count, count // 10)
        grew = growth_of(before, after)
        failed |= bool(grew)
        changes = [f"{b} → {a}" for b, a in zip(attrs.astuple(before), attrs.astuple(after), strict=True)]
        row = [name, str(count), f"{time.perf_counter() - began:.1f}", *changes, ", ".join(grew) or "flat"]
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
    print("something grows" if failed else "all flat")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
