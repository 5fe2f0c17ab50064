"""What the tests of whole models share: torch's spellings of a norm, layers to norm, and a picture of a whole model.

`Picture` holds everything that a refused call must leave alone. `interrupted` is Ctrl-C, at every line of the package.
"""

import contextlib
import gc
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import torch
from layers import weight_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook
from torch.utils._python_dispatch import TorchDispatchMode

import explicit_wn
from explicit_wn import WeightNorm

PACKAGE = str(Path(explicit_wn.__file__).parent)


# torch's spellings


def hook_weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and in most of the models out there
        return nn.utils.weight_norm(module, name, dim)


hook_spectral_norm = nn.utils.spectral_norm

WEIGHT_NORMS = {"hook": hook_weight_norm, "parametrization": parametrizations.weight_norm}
SPECTRAL_NORMS = {"hook": hook_spectral_norm, "parametrization": parametrizations.spectral_norm}


def hooks_of(model: nn.Module) -> list[Any]:
    """Every hook of every kind, on every module of `model`."""
    containers = [value for module in model.modules() for key, value in vars(module).items() if key.endswith("_hooks")]
    return [hook for container in containers for hook in container.values()]


def torch_hooks_of(model: nn.Module) -> list[Any]:
    """The hooks that torch's norms put there, in whatever wrapping."""
    found = []
    for hook in hooks_of(model):
        hook = getattr(hook, "hook", hook)
        hook = getattr(hook, "fn", hook)
        origin = getattr(hook, "__module__", "")
        if isinstance(hook, (WeightNormHook, SpectralNormHook)) or origin == parametrizations.__name__:
            found.append(hook)
    return found


# Layers


class Holder(nn.Module):
    """A model around one layer, whose output is a tensor."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.layer(*inputs)
        return output[0] if isinstance(output, tuple) else output


@attrs.frozen
class Layer:
    """A kind of layer, the parameters of it that are normed, and an input for it."""

    kind: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...] = ("weight",)

    def __str__(self) -> str:
        return self.kind

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(7)
        if self.kind == "Embedding":
            return (torch.randint(5, self.shapes[0], generator=generator),)
        return tuple(torch.randn(shape, generator=generator) for shape in self.shapes)

    def model(self, norm: Callable[..., Any] | None, **options: Any) -> nn.Module:
        """The same numbers at every call."""
        torch.manual_seed(3)
        layer = self.make()
        for name in self.names if norm else ():
            norm(layer, name, **options)
        return Holder(layer)

    def expected(self, weights: dict[str, Tensor], model: nn.Module) -> Tensor:
        """What a plain layer gives with these weights, and with the other parameters of `model`."""
        plain = self.model(None).train(model.training)
        state = {f"layer.{name}": weight for name, weight in weights.items()}
        state |= {key: value for key, value in model.state_dict().items() if key in plain.state_dict()}
        plain.load_state_dict(state)
        with torch.no_grad():
            output: Tensor = plain(*self.inputs())
        return output


RNN_NAMES = ("weight_ih_l0", "weight_hh_l0")

LINEAR = Layer("Linear", lambda: nn.Linear(5, 4), ((3, 5),))
CONV1D = Layer("Conv1d", lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), ((2, 4, 7),))
LAYERS = [
    LINEAR,
    CONV1D,
    Layer("Conv2d", lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), ((2, 3, 5, 5),)),
    Layer("Conv3d", lambda: nn.Conv3d(2, 3, 2), ((1, 2, 3, 3, 3),)),
    Layer("ConvTranspose1d", lambda: nn.ConvTranspose1d(4, 3, 4, stride=2), ((2, 4, 5),)),
    Layer("ConvTranspose2d", lambda: nn.ConvTranspose2d(3, 2, 3), ((1, 3, 4, 4),)),
    Layer("Embedding", lambda: nn.Embedding(5, 3), ((2, 4),)),
    Layer("Bilinear", lambda: nn.Bilinear(3, 4, 2), ((5, 3), (5, 4))),
    Layer("LSTM", lambda: nn.LSTM(3, 4), ((5, 2, 3),), RNN_NAMES),
    Layer("GRU", lambda: nn.GRU(3, 4, bidirectional=True), ((5, 2, 3),), (*RNN_NAMES, "weight_hh_l0_reverse")),
    Layer("MultiheadAttention", lambda: nn.MultiheadAttention(4, 2), ((3, 1, 4),) * 3, ("in_proj_weight",)),
]


# The mathematics, without the package


def normed_weight(state: dict[str, Tensor], key: str, dim: int | None) -> Tensor:
    """g · v / ‖v‖ from the parts in a `state_dict`."""
    return weight_of(state[f"{key}_g"], state[f"{key}_v"], None if dim == -1 else dim)


def spectral_weight(orig: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """W / (uᵀ·W·v)."""
    matrix = orig.double().movedim(dim, 0).reshape(orig.shape[dim], -1)
    return (orig.double() / (u.double() @ matrix @ v.double())).float()


def change_values(model: nn.Module, seed: int) -> None:
    """Changes every parameter in place, whatever it is called, and keeps magnitudes away from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25 + 0.5 * torch.rand(parameter.shape, generator=generator))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple[Tensor, ...], steps: int = 3) -> None:
    for _ in range(steps):
        output = model(*inputs)
        loss = (output * torch.linspace(0.5, 1.5, output.numel()).view_as(output)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Count(TorchDispatchMode):
    """Counts the operations that run within the block, by name without overload: `aten.mm`."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


# Models that recompute by hand


X = torch.linspace(-1, 1, 12).view(3, 4)


class TwoLayers(nn.Module):
    """Recomputes by hand, one layer directly and one behind a container."""

    def __init__(self, wn: Any = None) -> None:
        super().__init__()
        self.wn = WeightNorm() if wn is None else wn
        self.first = self.wn.apply(nn.Linear(4, 5))
        self.rest = nn.Sequential(nn.Tanh(), self.wn.apply(nn.Linear(5, 2)))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.first)
        self.wn.recompute(self.rest[1])
        return self.rest(self.first(x))


def two_layers_by_hand(model: nn.Module, x: Tensor = X) -> Tensor:
    """What it gives, from its parts."""
    state = model.state_dict()
    hidden = nn.functional.linear(x, normed_weight(state, "first.weight", 0), state["first.bias"])
    return nn.functional.linear(torch.tanh(hidden), normed_weight(state, "rest.1.weight", 0), state["rest.1.bias"])


class Twice(nn.Module):
    """A layer whose weight is used twice, and a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.fc = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(torch.tanh(self.fc(x)))) @ self.scale.t()


class TwiceByHand(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.wn.apply(self.fc)
        self.wn.apply(self, name="scale")

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        self.wn.recompute(self)
        return torch.tanh(self.fc(torch.tanh(self.fc(x)))) @ self.scale.t()


def twice_by_hand(model: nn.Module, x: Tensor = X) -> Tensor:
    state = model.state_dict()
    weight = normed_weight(state, "fc.weight", 0)
    for _ in range(2):
        x = torch.tanh(nn.functional.linear(x, weight, state["fc.bias"]))
    return x @ normed_weight(state, "scale", 0).t()


# What a refused or interrupted call must leave alone


class Picture:
    """Everything in a model: classes and what they define, attributes and containers by identity, tensors by value."""

    def __init__(self, model: nn.Module) -> None:
        self.identities: list[tuple[str, str, int]] = []
        self.values: list[tuple[str, Tensor, tuple[int, bool]]] = []
        self._kept_alive: list[Any] = []
        self._seen: set[int] = set()
        for path, module in model.named_modules(remove_duplicate=False):
            self._add(path, "itself", module)
            self._add(path, "its class", type(module))
            self.identities += [(path, f"class defines {name}", 0) for name in sorted(vars(type(module)))]
            for key, value in vars(module).items():
                self._add(path, key, value)
                for name, member in _members(value):
                    self._add(path, f"{key}[{name}]", member)

    def _add(self, path: str, what: str, thing: Any) -> None:
        self._kept_alive.append(thing)
        self.identities.append((path, what, id(thing)))
        known = id(thing) in self._seen or isinstance(thing, nn.parameter.UninitializedParameter)
        if isinstance(thing, Tensor) and not known and not thing.is_meta:
            kept = thing._version, thing.requires_grad
            self.values.append((f"{path}.{what}", thing.detach().clone(), kept))
        self._seen.add(id(thing))


def _members(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, (list, tuple, set)):
        yield from enumerate(value)


def assert_unchanged(model: nn.Module, before: Picture) -> None:
    after = Picture(model)
    assert after.identities == before.identities
    for (name, value, kept), (_, expected, expected_kept) in zip(after.values, before.values, strict=True):
        assert kept == expected_kept, f"{name} was written to, or frozen"
        assert torch.equal(value, expected) or torch.allclose(value, expected, rtol=0, atol=0, equal_nan=True), name


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever the block does, or is refused, leaves all of `model` as it was."""
    before = Picture(model)
    yield
    assert_unchanged(model, before)


def anatomy(model: nn.Module) -> list[Any]:
    """What a model is made of, comparable between two models."""
    return [
        (
            path,
            [cls.__name__ for cls in type(module).__mro__],
            [(key, len(value) if isinstance(value, dict | set) else 0) for key, value in sorted(vars(module).items())],
            [
                (key, tuple(value.shape), value.requires_grad)
                for key, value in module.state_dict(keep_vars=True).items()
            ],
        )
        for path, module in model.named_modules()
    ]


def lines_run(act: Callable[[], Any], interrupt_before: int | None = None) -> list[tuple[str, int]]:
    """Runs `act`, with a Ctrl-C before the line of the package that is the `interrupt_before`-th to run."""
    lines: list[tuple[str, int]] = []

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        source = frame.f_code.co_filename
        if not source.startswith((PACKAGE, "<explicit_wn")):
            return None
        if event == "line":
            if len(lines) == interrupt_before:
                raise KeyboardInterrupt
            lines.append((source, frame.f_lineno))
        return trace

    tracer = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        assert interrupt_before is not None
    finally:
        sys.settrace(tracer)
        torch.set_grad_enabled(True)  # Python delivers no Ctrl-C between the body and the end of a `with`; this does
    return lines


def first_and_last_visits(lines: list[tuple[str, int]]) -> list[int]:
    """Where in `lines` each of them comes for the first and for the last time."""
    last = {line: index for index, line in enumerate(lines)}
    first = {line: index for index, line in reversed(list(enumerate(lines)))}
    return sorted({*first.values(), *last.values()})


def interrupted(
    build: Callable[[], nn.Module], verb: Callable[[nn.Module], Any]
) -> Iterator[tuple[nn.Module, Picture]]:
    """A model for every line of the package that `verb` runs, with `verb` interrupted there, and how it was before."""
    gc.disable()  # or a generated class that is collected has to be made again, and other lines run than were counted
    try:
        verb(build())  # what is made once per process is made
        lines = lines_run(lambda: verb(model), None) if (model := build()) else []
        for index in first_and_last_visits(lines):
            model = build()
            before = Picture(model)
            lines_run(lambda model=model: verb(model), index)
            yield model, before
    finally:
        gc.enable()


def check_ctrl_c_at_every_line(
    build: Callable[[], nn.Module], verb: Callable[[nn.Module], Any], run: Callable[[nn.Module], Tensor], lines: int
) -> None:
    """More than `lines` times: an interrupted `verb` is undone or done, and what the model gives is the same."""
    expected, done = run(build()), build()
    verb(done)
    undone = []
    for model, before in interrupted(build, verb):
        undone.append(Picture(model).identities == before.identities)
        assert undone[-1] or anatomy(model) == anatomy(done)
        torch.testing.assert_close(run(model), expected)
    assert len(undone) > lines
    assert undone[0]
    assert not undone[-1]
