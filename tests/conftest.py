import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the tests share layers.py, and so do the processes they start
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))  # the benchmark is two files, and is tested
torch.set_num_threads(1)  # the tensors are small


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
