import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent

# The tests share what lies in this folder, and so do the processes that they start; the benchmark is two files
sys.path[:0] = [str(TESTS), str(TESTS / "benchmarks")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
torch.set_num_threads(1)  # the tensors are small


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
