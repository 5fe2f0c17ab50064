"""All or nothing: what fails half-way is undone, whatever it was."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def all_or_nothing(*modules: nn.Module) -> contextlib.AbstractContextManager[None]:
    """What happens to `modules` in this block happens whole; an exception, Ctrl-C included, undoes it."""

    def copied(container: Any) -> Any:
        return container.copy() if container else ()  # most are empty

    before = [(m, type(m), dict(vars(m)), [(vars(m)[n], copied(vars(m)[n])) for n in _CONTAINERS]) for m in modules]

    def undo() -> None:
        for module, cls, attributes, contents in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in contents:
                container.clear()
                container.update(content)

    return _undone_by_an_exception(undo)


def values_or_nothing(tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager[None]:
    """What is written into `tensors` in this block is written whole; an exception, Ctrl-C included, undoes it."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def undo() -> None:
        with torch.no_grad():
            for tensor, value in before:
                if tensor.is_meta or not torch.equal(tensor, value):  # what is written counts as changed
                    tensor.copy_(value)

    return _undone_by_an_exception(undo)


@contextlib.contextmanager
def _undone_by_an_exception(undo: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except GeneratorExit:  # nothing failed in the block: Ctrl-C came before contextlib could end it
        raise
    except BaseException:
        undo()
        raise


_CONTAINERS = [name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))]
"""The attributes of every module that hold its parameters, buffers, submodules and hooks."""
