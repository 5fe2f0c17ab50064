"""For every test: this folder on the path, one thread, the same random numbers, no grad mode left behind, and `quick`.

The tests share the modules beside this file, and the processes that they start find those too. A test is `quick`
unless its file or its name says that it takes long: see TAKES_LONG before naming one. The fixtures that files of
several rooms use are here.
"""

import gc
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent

sys.path[:0] = [str(TESTS), str(TESTS / "benchmarks")]  # the benchmark is two files
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
collect_ignore = ["users_file.py"]  # type checkers read it
torch.set_num_threads(1)  # the tensors are small


TAKES_LONG = re.compile(
    r"compile|export|process|ctrl_c|between_any_two|"
    r"test_(graphs|playground|without_torchscript|benchmark|notebook|orders|distributed|gpu|docs|\w*examples|real_models|tools|faults|stateful)\.py"
)
"""What `pytest -m quick` leaves out: compilers, other processes, interruption at every line, and whole programs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not TAKES_LONG.search(item.nodeid):
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def a_quick_collector() -> Iterator[None]:
    """Which looks at what the tests make, and not at all of torch."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
