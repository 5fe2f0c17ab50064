"""All that graph capture (`torch.compile`, `torch.export`, functorch) needs; nothing else in the package knows it.

While a graph is captured nothing is stored on the module: a weight is computed where it is read. `once` sees to it
that however many reads follow one `recompute`, the captured graph holds one computation.

The private torch names used here, each for want of a public one:

- `torch._C._are_functorch_transforms_active` and `torch.autograd.forward_ad._current_level`: whether a transform runs.
- `torch.fx.experimental.proxy_tensor.get_proxy_mode`: the trace that is running, whose lifetime `once` shares.
- the mark `_dynamo_marked_constant`, which is all that `torch.compiler.assume_constant_result` sets; that function
  imports Dynamo, which takes longer than importing torch.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Formula = Callable[..., Tensor]

_once: "weakref.WeakValueDictionary[Any, Formula]" = weakref.WeakValueDictionary()
_traces: "weakref.WeakKeyDictionary[Any, dict[Any, Any]]" = weakref.WeakKeyDictionary()


capturing = torch.compiler.is_compiling
"""Whether `torch.compile` or `torch.export` is reading the code that runs now."""


def is_transformed() -> bool:
    """Whether functorch or forward-mode AD runs, which want to see every operation."""
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


_getattr = torch.nn.Module.__getattr__


def is_getattr_torchs() -> bool:
    """Whether reading an attribute of a module gives what the module holds; `torch.fx` puts proxies there."""
    return torch.nn.Module.__getattr__ is _getattr


@functools.cache
def held() -> Formula:
    """A copy that the backward of a compiled graph keeps, where it would make a `clone` again.

    It would make it from a buffer that the forward has changed in place meanwhile, and get another gradient
    (https://github.com/pytorch/pytorch/pull/197039).
    """

    @torch.library.custom_op("explicit_wn::held", mutates_args=())
    def copy(tensor: Tensor) -> Tensor:
        return tensor.clone()

    @copy.register_fake
    def _fake(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor)

    @copy.register_vmap
    def _vmap(info: Any, in_dims: tuple[int | None, ...], tensor: Tensor) -> tuple[Tensor, int | None]:
        return copy(tensor), in_dims[0]

    return copy


def once(formula: Formula, changing: tuple[str, ...] = ()) -> Formula:
    """`formula`, computed once per trace for the same arguments as long as none of them is changed in place.

    Dynamo does not look inside (see `announce_to_dynamo`); the tracer beneath it runs this function for every read
    and is handed the same tensor again.
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
                arguments |= {name: held()(arguments[name]) for name in changing if name in arguments}
            made[key] = state, formula(**arguments), tensors  # the tensors are kept, so that no id is used again
        result: Tensor = made[key][1]
        return result

    if changing:
        held()  # registered now, which takes milliseconds, and not while a graph is captured
    _once[formula, changing] = computed_once
    return computed_once


def announce_to_dynamo() -> None:
    """Run by Dynamo itself, while it traces: puts the functions of `once` into its graph as they are, unread."""
    import torch._dynamo

    for function in list(_once.values()):
        torch._dynamo.allow_in_graph(function)  # type: ignore[no-untyped-call]


announce_to_dynamo._dynamo_marked_constant = True  # type: ignore[attr-defined]
