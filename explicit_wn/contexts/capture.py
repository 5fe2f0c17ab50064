"""All that graph capture (`torch.compile`, `torch.export`, functorch) needs.

While a graph is captured nothing is stored on the module: a weight is computed where it is read. `once` sees to it
that however many reads follow one `recompute`, the captured graph holds one computation. Dynamo does not look into it:
for `torch.compile` it is an operator of torch, for a strict export a function that is allowed in its graphs.

The private torch names used here, each for want of a public one:

- `torch._C._are_functorch_transforms_active` and `torch.autograd.forward_ad._current_level`: whether a transform runs.
- `torch.fx.experimental.proxy_tensor.get_proxy_mode`: the trace that is running, whose lifetime `once` shares.
- `torch._C._DisableTorchDispatch`: what torch itself computes with numbers by, while it traces.
- the mark `_dynamo_marked_constant`, which is all that `torch.compiler.assume_constant_result` sets; that function
  imports Dynamo, which takes longer than importing torch.
"""

import functools
import hashlib
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Formula = Callable[..., Tensor]

_PACKAGE = __name__.partition(".")[0]

_once: "weakref.WeakValueDictionary[Any, Formula]" = weakref.WeakValueDictionary()
_traces: "weakref.WeakKeyDictionary[Any, dict[Any, Any]]" = weakref.WeakKeyDictionary()


capturing = torch.compiler.is_compiling
"""Whether `torch.compile` or `torch.export` is reading the code that runs now."""


def is_captured(tensor: Tensor) -> bool:
    """Whether a compiler sees what is done to `tensor`; before torch 2.13 only its stand-in tells."""
    return capturing() or type(tensor) not in (Tensor, torch.nn.Parameter)


def is_transformed() -> bool:
    """Whether functorch or forward-mode AD runs, which want to see every operation."""
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def unrecorded() -> Any:
    """Within this block tracers and fake tensors do not see what is computed: it runs for its numbers."""
    return torch._C._DisableTorchDispatch()


_getattr = torch.nn.Module.__getattr__


def is_getattr_torchs() -> bool:
    """Whether reading an attribute of a module gives what the module holds; `torch.fx` puts proxies there."""
    return torch.nn.Module.__getattr__ is _getattr


def is_ordinary() -> bool:
    """Whether nothing of all that goes on: what runs now runs for its numbers alone.

    What `capturing`, `is_transformed` and `is_getattr_torchs` say, in one call: every recompute asks.
    """
    return not (
        capturing()
        or _forward_ad._current_level >= 0
        or _are_functorch_transforms_active()
        or _Module.__getattr__ is not _getattr
    )


_Module, _forward_ad = torch.nn.Module, torch.autograd.forward_ad
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active


@functools.cache
def kept_copy() -> Formula:
    """A copy that the backward of a compiled graph keeps, where it would make a `clone` again.

    It would make it from a buffer that the forward has changed in place meanwhile, and get another gradient
    (https://github.com/pytorch/pytorch/pull/197039).
    """

    name = "explicit_wn::kept_copy"
    _library.define("kept_copy(Tensor tensor) -> Tensor")  # a custom_op takes four times as long to call
    _library.impl("kept_copy", torch.clone, "CompositeExplicitAutograd")
    copy: Formula = torch.ops.explicit_wn.kept_copy.default

    def _vmap(info: Any, in_dims: tuple[int | None, ...], tensor: Tensor) -> tuple[Tensor, int | None]:
        return copy(tensor), in_dims[0]

    torch.library.register_fake(name, torch.empty_like, lib=_library)
    torch.library.register_vmap(name, _vmap, lib=_library)
    torch.library.register_autograd(name, lambda ctx, gradient: gradient, lib=_library)
    return copy


_library: Any = torch.library.Library("explicit_wn", "FRAGMENT")  # type: ignore[no-untyped-call]
"""What keeps the copy registered."""


def once(formula: Formula, changing: tuple[str, ...] = ()) -> Formula:
    """`formula`, computed once per trace for the same arguments as long as none of them is changed in place.

    Dynamo does not look inside (see `Operator`); the tracer beneath it runs this function for every read and is handed
    the same tensor again. In

        self.wn.recompute(self.fc)     # within a graph this stores nothing
        a = x @ self.fc.weight         # computes; the key is (formula, v, g), the state (versions, grad on)
        b = y @ self.fc.weight         # the same key in the same state: the tensor of the line before
        with torch.no_grad():
            c = z @ self.fc.weight     # another state: computes again, without a gradient
            self.fc.weight_g.mul_(2)
            d = x @ self.fc.weight     # another version of g: computes again

    an exported program holds three computations, each time that it runs. (Compiled under no_grad it has two, since `c`
    is in the state of `b` there. Compiled for training it fails as in eager mode: the backward wants the old g.) Parts
    that are `changing` (u and v, which the next iteration changes in place) go in as copies where there may be a
    backward.
    """
    known = _once.get((formula, changing))
    if known is not None:
        return known

    @functools.wraps(formula)
    def computed_once(**arguments: Any) -> Tensor:
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        trace = get_proxy_mode()
        if trace is None:
            return formula(**arguments)
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        state = (
            [t._version for t in tensors],
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(tensors[0].device.type),
        )
        key = formula, *((name, id(v) if isinstance(v, Tensor) else v) for name, v in arguments.items())
        made = _traces.setdefault(trace.tracer, {})
        if key not in made or made[key][0] != state:
            if torch.is_grad_enabled() and not torch.compiler.is_exporting():
                arguments |= {name: kept_copy()(arguments[name]) for name in changing if name in arguments}
            made[key] = state, formula(**arguments), tensors  # the tensors are kept, so that no id is used again
        result: Tensor = made[key][1]
        return result

    if changing:
        kept_copy()  # registered now, which takes milliseconds, and not while a graph is captured
    _once[formula, changing] = computed_once
    return computed_once


class Operator:
    """A formula as an operator of torch: one node in the graph of Dynamo, which the tracer beneath takes apart.

    A function that Dynamo is told to allow in its graphs would do as well, but beside one of those each failure of a
    backend is an error, where otherwise Dynamo breaks the graph.
    """

    def __init__(
        self, formula: Formula, parts: tuple[str, ...], options: dict[str, Any], changing: tuple[str, ...]
    ) -> None:
        self.formula, self.parts, self.options = once(formula, changing), parts, options
        self.changing = changing
        self.library: torch.library.Library | None = None
        self.call: Any = None

    def register(self) -> None:
        """Makes `call`, once: in a program that never compiles, nobody needs it."""
        if self.library is None:
            name = f"weight_{_fingerprint(self.formula, self.parts, self.options, self.changing)}"
            self.library = torch.library.Library("explicit_wn", "FRAGMENT")  # type: ignore[no-untyped-call]
            self.library.define(f"{name}({', '.join(f'Tensor {part}' for part in self.parts)}) -> Tensor")  # type: ignore[no-untyped-call]
            for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):  # the second is vmap's
                self.library.impl(name, self._run, key)  # type: ignore[no-untyped-call]
            self.call = getattr(torch.ops.explicit_wn, name).default

    def _run(self, *values: Tensor) -> Tensor:
        return self.formula(**dict(zip(self.parts, values, strict=True)), **self.options)


_operators: "weakref.WeakValueDictionary[Any, Operator]" = weakref.WeakValueDictionary()


def operator(
    formula: Formula, parts: tuple[str, ...], options: dict[str, Any], changing: tuple[str, ...] = ()
) -> Operator:
    """The operator that is `formula` with these options; the same one for all recipes that need it.

    `changing` are the parts that a recompute changes in place before.
    """
    key = formula, parts, repr(options), changing
    known = _operators.get(key)
    if known is None:
        known = _operators[key] = Operator(formula, parts, options, changing)
    return known


def _fingerprint(formula: Formula, *more: Any) -> str:
    """A name for what the formula computes: torch keeps compiled graphs on disk by the names of the operators in them.

    What is not of this package may be another formula in the next process, and has another name there.
    """
    code = _own_code() if formula.__module__.startswith(f"{_PACKAGE}.") else uuid.uuid4().hex
    return hashlib.sha256(f"{code} {formula.__module__} {formula.__qualname__} {more}".encode()).hexdigest()[:16]


@functools.cache
def _own_code() -> str:
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def run_by_dynamo(function: Callable[[], bool]) -> Callable[[], bool]:
    """Has Dynamo, which traces what calls `function`, run it there and then, and take the result for a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def announce_to_dynamo() -> bool:
    """Makes the operators for the graph that Dynamo traces, or allows their formulas in that of an export.

    Called in what is `run_by_dynamo`. Returns whether it is for an export, whose graph is to hold no operator of ours.
    (Dynamo of torch 2.10 takes `torch.compiler.is_exporting()` for True wherever it reads it.)
    """
    import torch._dynamo

    exporting: bool = torch.compiler.is_exporting()
    for operator in list(_operators.values()):
        if exporting:
            torch._dynamo.allow_in_graph(operator.formula)  # type: ignore[no-untyped-call]
        else:
            operator.register()
    return exporting
