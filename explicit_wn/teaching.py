"""What helps to see the work: its steps, weights that are out of date, and the initialization of the paper."""

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import carrier
from .carrier import Stored
from .recipe import Recipe
from .reparametrization import Reparametrization
from .table import Table, shape_shown
from .torchscript import is_tracing
from .weight_norm import WeightNorm

# The computation, step by step


@attrs.frozen(eq=False)
class Step:
    """One step of a computation."""

    symbol: str
    meaning: str
    """What it is."""
    expression: str
    shape: tuple[int, ...]
    value: Tensor
    """A copy, without gradient."""


@attrs.frozen(eq=False, repr=False)
class Steps(Table):
    """The steps from the parts to the weight: a table to look at, and records to compute with."""

    records: tuple[Step, ...]

    def __getitem__(self, key: int | str) -> Step:
        if isinstance(key, str):
            return {step.symbol: step for step in self.records}[key]
        return self.records[key]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def cells(self) -> list[list[str]]:
        rows = [[s.symbol, s.meaning, s.expression, shape_shown(s.shape), _shown(s.value)] for s in self.records]
        return [["symbol", "what it is", "expression", "shape", "value"], *rows]


def steps(module: nn.Module, name: str = "weight") -> Steps:
    """How the weight `name` of `module` comes from its parts, step by step, as they are now; changes nothing.

    A norm of your own shows its parts and its weight; give its class a function `steps` to have it show more, as
    `WeightNorm` does.

    Args:
        module: a module that carries a norm, or a model that holds one.
        name: the weight; within a model its qualified name, as in `normed(model)`.

    >>> layer = WeightNorm().apply(nn.Linear(2, 2))
    >>> WeightNorm().assign(layer, torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    Linear(in_features=2, out_features=2, bias=True, weight=WeightNorm(dim=0))
    >>> steps(layer, "weight")
    symbol  what it is                    expression                    shape  value
    ------  ----------------------------  ----------------------------  -----  --------------
    v       the direction, of any length  parameter weight_v            2×2    3.0000  4.0000
                                                                               0.0000  2.0000
    ‖v‖     the length of v               norm_except_dim(v, 2, dim=0)  2×1    5.0000
                                                                               2.0000
    v/‖v‖   the direction, of length 1    v / ‖v‖                       2×2    0.6000  0.8000
                                                                               0.0000  1.0000
    g       the magnitude                 parameter weight_g            2×1    5.0000
                                                                               2.0000
    w       the weight                    g · v/‖v‖                     2×2    3.0000  4.0000
                                                                               0.0000  2.0000
    >>> steps(layer)["‖v‖"].shape
    (2, 1)
    """
    found = {
        _join(path, recipe.name): (owner, recipe)
        for path, owner in module.named_modules(remove_duplicate=False)
        for recipe in carrier.recipes_of(owner)
    }
    if name not in found:
        kind, names = carrier.base_of(module).__name__, ", ".join(map(repr, found)) or "none"
        raise ValueError(
            f"no norm of explicit_wn makes {name!r} of this {kind}; the weights that one makes: {names}. "
            "WeightNorm().apply(module) norms a weight, and convert(model) takes over the norms of torch."
        )
    return Steps(tuple(_step(*row) for row in _rows(*found[name])))


def _rows(module: nn.Module, recipe: Recipe) -> Iterator[tuple[str, str, str, Tensor]]:
    parts, explained = recipe.read(module), recipe.norm.steps
    if explained is not None:
        yield from explained(**parts, **recipe.options_of(explained))
        return
    for part, value in parts.items():
        kind = "buffer" if part in recipe.norm.buffer_parts else "parameter"
        yield part, "a part of the weight", f"{kind} {recipe.attribute(part)}", value
    options = [f"{option}={value!r}" for option, value in recipe.formula_options.items()]
    yield "w", "the weight", f"{recipe.formula.__name__}({', '.join([*parts, *options])})", recipe.compute(module)


def _step(symbol: str, meaning: str, expression: str, value: Any) -> Step:
    value = torch.as_tensor(value).detach().clone()
    return Step(symbol, meaning, expression, tuple(value.shape), value)


_MOST = 6
"""How many rows and how many columns of a value are shown."""


def _shown(value: Tensor) -> str:
    """A vector as a line, anything larger as lines of numbers, the first dimension downward."""
    if value.is_meta or value.numel() == 0:
        return "on meta" if value.is_meta else "empty"
    matrix = value.reshape(1, -1) if value.dim() < 2 else value.flatten(1)
    numbers = matrix[:_MOST, :_MOST].double().cpu()
    largest = numbers.abs().nan_to_num(0, 0).max().item()
    style = ".4f" if largest == 0 or 1e-3 <= largest < 1e5 else ".3e"
    lines = [[format(number, style) for number in row] for row in numbers.tolist()]
    width = max(len(number) for line in lines for number in line)
    more = "  …" if matrix.shape[1] > _MOST else ""
    shown = ["  ".join(number.rjust(width) for number in line) + more for line in lines]
    return "\n".join(shown + (["…"] if matrix.shape[0] > _MOST else []))


# Weights that are out of date


class StaleWeightError(RuntimeError):
    """A normed weight was read, or backpropagated through, that should have been recomputed first."""


@contextlib.contextmanager
def detect_stale(model: nn.Module | None = None) -> Iterator[None]:
    """Within this block, reading a weight whose parts changed since its last recompute raises, and says what to add.

    It is for finding a forgotten `recompute`, as `torch.autograd.detect_anomaly` is for finding a NaN. That line is
    easily missed, since the model runs: on old weights, until the second training step says "Trying to backward
    through the graph a second time". That error is explained here as well.

    What is inlined is never stale. The block compares the parts with copies of them, bit for bit, because fused
    optimizers and `.data` leave no other trace; outside of it nothing of this costs anything. It watches the reads of
    the thread that entered it, in eager mode. Blocks nest.

    Args:
        model: where the weight is looked up, to name it by its path. Without it the path starts at the outermost
            module whose method is running.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.wn = WeightNorm()
    ...         self.fc = self.wn.apply(nn.Linear(2, 1))
    ...     def forward(self, x):
    ...         return self.fc(x)  # no recompute
    >>> net = Net()
    >>> _ = nn.init.ones_(net.fc.weight_g)
    >>> with detect_stale():  # doctest: +ELLIPSIS
    ...     net(torch.ones(1, 2))
    Traceback (most recent call last):
    explicit_wn.teaching.StaleWeightError: fc.weight of this Net is stale: ...
    <BLANKLINE>
        self.wn.recompute(self.fc)
    ...
    """
    watch = _Watch(model)
    try:
        with _lock:
            _active.append(watch)
            carrier.on_read = _on_read
        _watching.set((watch, *_watching.get()))
        yield
    except RuntimeError as error:
        if watch.used_up and "Trying to backward through the graph a second time" in str(error):
            raise StaleWeightError("\n\n".join(watch.used_up)) from error
        raise
    finally:
        _watching.set(tuple(other for other in _watching.get() if other is not watch))
        with _lock:
            _active.remove(watch)
            carrier.on_read = _on_read if _active else None


@attrs.define(eq=False)
class _Watch:
    """What one `detect_stale` block has seen."""

    model: nn.Module | None
    copies: dict[tuple[int, str], tuple["weakref.ref[Stored]", list[Tensor | None]]] = attrs.field(factory=dict)
    """By module and weight: a stored weight, and the parts as they were when it was first read here."""
    used_up: dict[str, None] = attrs.field(factory=dict)
    """What to say if a backward fails: on each weight that was read again after a backward through it."""

    def has_changed(self, module: nn.Module, recipe: Recipe, stored: Stored) -> bool:
        """Whether a part is not what it was when `stored` was first read here; remembers the parts if it is now."""
        key = id(module), recipe.name
        known, copies = self.copies.get(key, (None, []))
        if known is not None and known() is stored:
            return any(map(_differ, stored.sources, copies))
        with torch.no_grad():
            self.copies[key] = weakref.ref(stored), [_bits(source) for source in stored.sources]
        return False


_lock = threading.Lock()
_active: list[_Watch] = []
"""The blocks that are open in any thread."""
_watching: ContextVar[tuple[_Watch, ...]] = ContextVar("watching", default=())
"""Those of this thread, the innermost first."""


def _on_read(module: nn.Module, recipe: Recipe) -> None:
    store, watches = carrier.store_of(module), _watching.get()
    stored = store.get(recipe.name)
    if not watches or stored is None or (recipe.inlined and not store.held) or _is_torchscript_looking():
        return
    if not carrier.is_current(stored, module, recipe):
        return  # such a read computes the weight anew
    models = [watch.model for watch in watches if watch.model is not None]
    has_changed = [watch.has_changed(module, recipe, stored) for watch in watches]
    if any(has_changed) or stored.is_stale():
        raise StaleWeightError(_on_stale(module, recipe, models))
    if torch.is_grad_enabled() and _is_used_up(stored.value.grad_fn):
        watches[0].used_up[_on_used_up(module, recipe, models)] = None


def _is_torchscript_looking() -> bool:
    """Whether torch.jit reads, which looks at every attribute of a module before it traces its forward."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_OURS, "<explicit_wn")):
        frame = frame.f_back
    reader = frame.f_globals.get("__name__", "")
    return is_tracing() or reader.startswith(("torch.jit", "torch._jit"))


_OURS = str(Path(__file__).parent)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(source: Tensor | None) -> Tensor | None:
    """A copy of a part, as integers, among which NaN equals NaN; None for what cannot be compared."""
    if source is None or type(source) not in (Tensor, nn.Parameter) or source.is_meta:
        return None
    with contextlib.suppress(RuntimeError):  # vmap on older torch
        return source.detach().view(_INTEGERS[source.element_size()]).clone()
    return None


def _differ(source: Tensor, copy: Tensor | None) -> bool:
    if copy is None:
        return False
    with contextlib.suppress(RuntimeError):  # vmap refuses to compare
        return not torch.equal(source.detach().view(copy.dtype), copy)
    return False


def _is_used_up(root: Any) -> bool:
    """Whether a backward went through the graph of a weight and threw away what that had saved."""
    nodes = [root]
    for node in nodes:
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                try:  # to read what is saved may run hooks, those of checkpointing say; to read what is gone does not
                    if getattr(getattr(node, name), "data", node) is None:
                        getattr(node, name.removeprefix("_raw"))
                except RuntimeError:
                    return True
        nodes += [before for before, _ in getattr(node, "next_functions", ()) if before not in (None, *nodes)]
    return False


# What to say about them


def _on_stale(module: nn.Module, recipe: Recipe, models: list[nn.Module]) -> str:
    name, advice = _name_and_advice(module, recipe, models)
    parts = " and ".join(recipe.attributes)
    if carrier.store_of(module).held:
        return f"{name} is stale: {parts} changed while a cached(model) block holds it. Change them after the block."
    return (
        f"{name} is stale: {parts} changed since it was last computed from them. {advice}\n\nWithout that the model "
        "goes on with the old weight, and the second training step fails with torch's error \"Trying to backward "
        'through the graph a second time".'
    )


def _on_used_up(module: nn.Module, recipe: Recipe, models: list[nn.Module]) -> str:
    name, advice = _name_and_advice(module, recipe, models)
    if carrier.store_of(module).held:
        advice = "A cached(model) block holds it: one backward is all that a block can have."
    return (
        f"Trying to backward through the graph a second time: {name} was used again after a backward through it, "
        f"without a recompute in between. {advice}"
    )


def _name_and_advice(module: nn.Module, recipe: Recipe, models: list[nn.Module]) -> tuple[str, str]:
    """What the weight is called, and which line recomputes it where."""
    model, path = _find(module, models)
    name = f"{_join(path, recipe.name)} of this {carrier.base_of(model).__name__}"
    names = path.split(".") if path else []
    norm, place = "wn", "before the model is called"
    for depth in range(len(names), -1, -1):
        owner = model.get_submodule(".".join(names[:depth]))
        held = [child for child in owner._modules if _is_norm_of(recipe, owner._modules[child])]
        if held:
            norm, place = f"self.{held[0]}", f"to the forward of {carrier.base_of(owner).__name__}"
            break
    target = "".join(f"[{n}]" if n.isdigit() else f".{n}" for n in names[depth:])
    target = ("model" if norm == "wn" else "self") + target
    which = f", where wn is {recipe.norm!r}" if norm == "wn" else ""
    line = f"Add this line {place}{which}:\n\n    {norm}.recompute({target})\n\n"
    return name, line + "or use inline(layer) in the place of apply(layer), which recomputes by itself."


def _is_norm_of(recipe: Recipe, module: nn.Module | None) -> bool:
    return isinstance(module, Reparametrization) and module.label in recipe.labels


def _find(module: nn.Module, models: list[nn.Module]) -> tuple[nn.Module, str]:
    """The path of `module`, and the model in which it has that path: a given one, or the outermost one running."""
    running: list[nn.Module] = []
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if isinstance(frame.f_locals.get("self"), nn.Module):
            running.insert(0, frame.f_locals["self"])
    for model in (*models, *running):
        for path, other in model.named_modules():
            if other is module:
                return model, path
    return module, ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# The initialization of the paper

_FUNCTIONS = [nn.functional.linear]
_FUNCTIONS += [nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d]
_FUNCTIONS += [nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d]
_OPERANDS = "input", "weight", "bias"

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def data_dependent_init(model: nn.Module, *batch: Any, **keywords: Any) -> list[str]:
    """Sets g and bias so that every pre-activation has mean 0 and variance 1 on one batch; returns the weights' names.

    The initialization of Salimans and Kingma (2016, section 3). `model(*batch, **keywords)` runs once. On its way
    through, every weight-normed Linear, Conv and ConvTranspose layer is given, for each of its output channels,
    `g = 1/σ` and `bias = -μ/σ`, where μ and σ are the mean and the standard deviation of `v/‖v‖ · x` over the batch,
    before its output goes on to the next layer. A layer that is called several times keeps what the first call gave.

    The parameters `g` and `bias` apart, the model is afterwards what it was: buffers such as BatchNorm's statistics,
    the random state of torch and the training flag, in which the model runs as it is. No hook is registered. An error
    leaves everything as it was.

    >>> model = nn.Sequential(WeightNorm().inline(nn.Linear(8, 16)), nn.ReLU(), WeightNorm().inline(nn.Linear(16, 2)))
    >>> batch = torch.randn(64, 8)
    >>> data_dependent_init(model, batch)
    ['0.weight', '2.weight']
    >>> torch.allclose(model(batch).mean(dim=0), torch.zeros(2), atol=1e-5)
    True
    >>> torch.allclose(model(batch).var(dim=0, correction=0), torch.ones(2), atol=1e-5)
    True
    """
    layers = _layers_to_initialize(model)
    if not layers:
        raise ValueError(
            f"data_dependent_init: this {type(model).__name__} has no weight-normed Linear, Conv or ConvTranspose "
            "layer. apply_all(model, WeightNorm(dim='out')) makes them so."
        )
    order: list[str] = []
    with _restored(model, layers.values()), torch.no_grad(), _uncompiled(), _Initializer(layers, order):
        model(*batch, **keywords)
        unused = ", ".join(path or type(layer).__name__ for path, layer in layers.items() if path not in order)
        if unused:
            raise ValueError(
                f"data_dependent_init: on this batch the model did not call {unused} in eager mode. Call "
                "data_dependent_init on the part of the model that does, with what that part is given."
            )
    return [_join(path, "weight") for path in order]


def _layers_to_initialize(model: nn.Module) -> dict[str, nn.Module]:
    """The weight-normed layers by path; refuses those that cannot be initialized."""
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        for recipe in carrier.recipes_of(module):
            if isinstance(module, _LAYERS) and isinstance(recipe.norm, WeightNorm) and recipe.name == "weight":
                layers[path] = module
                objection = _objection(module, recipe)
                if objection:
                    raise _cannot(path, module, objection)
    return layers


def _cannot(path: str, module: nn.Module, objection: str) -> ValueError:
    where = f"{path} ({carrier.base_of(module).__name__})" if path else f"this {carrier.base_of(module).__name__}"
    return ValueError(f"data_dependent_init cannot initialize {where}: {objection}.")


def _objection(module: nn.Module, recipe: Recipe) -> str | None:
    """Why a layer cannot have mean 0 and variance 1 in every channel, and the way out."""
    output, dim = int(isinstance(module, _TRANSPOSED)), recipe.norm.dim
    for name in ("weight_g", "weight_v", "bias"):
        if module._parameters.get(name) is None:
            if name == "bias" and getattr(module, "bias", None) is None:
                return "it has no bias to set the mean with; make it with bias=True"
            return f"its {name} is not a parameter of its own, but computed; initialize before that"
    if dim != output:
        return f'its g belongs to dim={dim} and its output channels are dim {output}; apply the norm with dim="out"'
    if module._parameters["weight_g"].numel() != module._parameters["bias"].numel():  # type: ignore[union-attr]
        return f"its {module.groups} groups share each g; make it with groups=1"
    return None


@contextlib.contextmanager
def _restored(model: nn.Module, layers: Iterable[Any]) -> Iterator[None]:
    """Undoes what happens to buffers and to the random state in this block; after an error, to g and bias as well."""
    parts = [part for layer in layers for part in (layer.weight_g, layer.bias)]
    before = [(part, part.detach().clone()) for part in parts]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(list(devices), device_type="cuda"):
            yield
    except BaseException:
        values += before
        raise
    finally:
        with torch.no_grad():
            for module, own in buffers:
                module._buffers.clear()
                module._buffers.update(own)
            for tensor, value in values:
                tensor.copy_(value)
        for module in model.modules():
            if carrier.recipes_of(module):
                carrier.store_of(module).clear()


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Has what was compiled run in eager mode; without importing Dynamo, if nothing was."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


class _Initializer(TorchFunctionMode):
    """Initializes each layer at the moment when the model first computes with its weight."""

    def __init__(self, layers: dict[str, nn.Module], order: list[str]) -> None:
        super().__init__()
        self.layers, self.order = layers, order

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _FUNCTIONS:
            given = dict(zip(_OPERANDS, args, strict=False)) | kwargs
            others = {name: value for name, value in kwargs.items() if name not in _OPERANDS}
            compute = functools.partial(function, given["input"])
            for path in self._first_used(given["weight"]):
                layer = self.layers[path]
                if given.get("bias") is not layer.bias:
                    raise _cannot(path, layer, "the model uses its weight without its bias")
                self.order.append(path)
                weight = _initialize(path, layer, lambda weight, bias: compute(weight, bias, *args[3:], **others))
                return compute(weight, layer.bias, *args[3:], **others)
        return function(*args, **kwargs)

    def _first_used(self, weight: Tensor) -> Iterator[str]:
        """The path of the layer whose weight this is, if it has not been initialized."""
        for path, layer in self.layers.items():
            if path not in self.order and carrier.in_use(layer, "weight") is weight:
                yield path


def _initialize(path: str, layer: Any, compute: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """Sets g and bias of `layer`, and returns its new weight; `compute` gives its output for a weight and a bias."""
    (recipe,) = (recipe for recipe in carrier.recipes_of(layer) if recipe.name == "weight")
    g, v = layer.weight_g, layer.weight_v
    with torch.no_grad():
        output = compute(recipe.formula(g=torch.ones_like(g), v=v, **recipe.formula_options), None)
        values = output.movedim(output.dim() - v.dim() + 1, 0).reshape(layer.bias.numel(), -1)  # the channels first
        mean, deviation = values.mean(1), values.std(1, correction=0)
        least = 4 * torch.finfo(output.dtype).eps * values.abs().amax(1)
        bad = (~(deviation > least) | deviation.isinf()).nonzero().flatten().tolist()
        if bad:
            shown = f"{bad[:5]} and {len(bad) - 5} more" if len(bad) > 5 else str(bad)
            objection = f"over the {values.shape[1]} values of each, its output channels {shown} do not vary"
            if not deviation.isfinite().all():
                objection = f"its output channels {shown} are not finite"
            raise _cannot(path, layer, f"{objection}; give another batch, or initialize v otherwise")
        g.copy_((1 / deviation).view_as(g))
        layer.bias.copy_(-mean / deviation)
        return carrier.refresh(layer, recipe)
