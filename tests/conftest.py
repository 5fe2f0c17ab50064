"""For every test: this folder on the path, one thread, the same random numbers, no grad mode left behind, and `quick`.

The tests share the modules beside this file, and the processes that they start find those too. A test is `quick`
unless its file or its name says that it takes long (see TAKES_LONG before naming one) or it starts a process. The
fixtures that several files use are here.
"""

import functools
import gc
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parent

sys.path[:0] = [str(TESTS), str(TESTS / "benchmarks")]  # the benchmark is two files
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
collect_ignore = ["users_file.py"]  # type checkers read it
torch.set_num_threads(1)  # the tensors are small


TAKES_LONG = re.compile(
    r"compile|inductor|wherever_torch_captures|export|process|ctrl_c|between_any_two|"
    r"test_(graphs|playground|without_torchscript|benchmark|notebook|orders|distributed|gpu|dynamic_shapes|docs|\w*examples|real_models|tools|faults|stateful)\.py"
)
"""What `pytest -m quick` leaves out: compilers, other processes, interruption at every line, and whole programs."""


@functools.cache
def starts_a_process(test: Any) -> bool:
    """Whether a test, or a function that it calls by name, says `subprocess`."""
    test = inspect.unwrap(test)
    called = [test.__globals__.get(name) for name in test.__code__.co_names]
    return any("subprocess" in inspect.getsource(one) for one in (test, *filter(inspect.isfunction, called)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        test = getattr(item, "function", None)  # a doctest has none
        if not TAKES_LONG.search(item.nodeid) and not (test and starts_a_process(test)):
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes longer than many a test: it looks at the stack
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def in_single_precision() -> Iterator[None]:
    """Convolutions on a GPU compute in TensorFloat32 otherwise, which is no nearer to the CPU than 1e-3."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def a_quick_collector() -> Iterator[None]:
    """Which looks at what the tests make, and not at all of torch."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
