"""The example of distributed training, with real processes, against the same training written out in plain torch."""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch was built without torch.distributed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_distributed.py"
# torchrun as a module of this Python; the loopback address, since not every machine can resolve its own name
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
WARNINGS = "error,ignore:TypedStorage is deprecated:UserWarning"  # which torch 2.10 says when it saves a checkpoint


@attrs.frozen
class Row:
    """What the example says of one way to train."""

    first: float
    last: float
    apart: float
    resumed_apart: float


def table(*command: Any, folder: Path, gpu: bool = False) -> tuple[str, dict[str, Row]]:
    """What the example prints: its first line, and its rows by name. It warns of nothing and leaves nothing."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": WARNINGS}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    words = [sys.executable, *map(str, command)]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, timeout=500)
    assert ran.returncode == 0, ran.stderr
    assert gpu or ran.stderr == ""  # NCCL may have something to say
    assert list(folder.iterdir()) == []
    found = re.findall(r"^(\S.*?)((?: +[\d.]+(?:e[+-]\d\d)?){4})$", ran.stdout, re.MULTILINE)
    (title,) = re.findall(r"^torch .*$", ran.stdout, re.MULTILINE)
    return title, {name: Row(*map(float, numbers.split())) for name, numbers in found}


SINGLE = ["DDP", "FSDP2, per block", "FSDP2, per inlined layer"]
BFLOAT16 = ["DDP, autocast to bfloat16", "FSDP2, per block, bfloat16", "FSDP2, per inlined layer, bfloat16"]


@pytest.fixture(scope="module")
def example() -> Any:
    """The example, imported."""
    spec: Any = importlib.util.spec_from_file_location("train_distributed", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_distributed"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> dict[str, Row]:
    empty = tmp_path_factory.mktemp("two")
    title, rows = table(*TORCHRUN, 2, EXAMPLE, checkpoints, folder=empty)
    assert "gloo, processes: 2," in title
    return rows


# The same training by hand


@contextlib.contextmanager
def training_by_hand(example: Any) -> Iterator[tuple[dict[str, Tensor], list[float]]]:
    """Trains in plain torch for half of the steps, yields the state and the losses, and trains on at the end."""
    torch.manual_seed(0)
    state = {name: tensor.clone() for name, tensor in example.explicit().state_dict().items()}
    vectors = [state.pop("head.weight_u"), state.pop("head.weight_v")]
    leaves = {name: tensor.requires_grad_() for name, tensor in state.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=0.1, momentum=0.9)
    losses: list[float] = []

    def train(steps: range) -> None:
        for step in steps:
            points, labels = example.batch(step)
            loss = F.cross_entropy(output_by_hand(leaves, vectors, points), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    train(range(example.STEPS // 2))
    yield {**leaves, "head.weight_u": vectors[0], "head.weight_v": vectors[1]}, losses
    train(range(example.STEPS // 2, example.STEPS))


def output_by_hand(parts: dict[str, Tensor], vectors: list[Tensor], x: Tensor) -> Tensor:
    """The example's network in the formulas of its norms, on its parts; a step of power iteration changes `vectors`."""

    def linear(layer: str, x: Tensor) -> Tensor:
        g, v = parts[f"{layer}.weight_g"], parts[f"{layer}.weight_v"]
        return F.linear(x, g * v / v.square().sum(1, keepdim=True).sqrt(), parts[f"{layer}.bias"])

    for block in "blocks.0", "blocks.1":
        x = x + linear(f"{block}.down", torch.tanh(linear(f"{block}.up", x)))
    head = parts["head.weight_orig"]
    with torch.no_grad():
        vectors[1] = F.normalize(head.t() @ vectors[0], dim=0)
        vectors[0] = F.normalize(head @ vectors[1], dim=0)
    u, v = vectors
    return F.linear(x, head / (u @ head @ v), parts["head.bias"])


# What the example says


@pytest.mark.parametrize("way", SINGLE)
def test_two_processes_have_the_losses_of_one(two_processes: dict[str, Row], way: str) -> None:
    assert two_processes[way].apart < 1e-5


@pytest.mark.parametrize("way", SINGLE)
def test_the_losses_are_those_of_the_formulas(two_processes: dict[str, Row], example: Any, way: str) -> None:
    with training_by_hand(example) as (_, losses):
        pass
    row = two_processes[way]
    assert row.first == pytest.approx(losses[0], abs=1e-5)
    assert row.last == pytest.approx(losses[-1], abs=1e-5)
    assert row.last < row.first / 2


@pytest.mark.parametrize("way", SINGLE)
def test_one_process_goes_on_from_the_checkpoint_of_two(two_processes: dict[str, Row], way: str) -> None:
    assert two_processes[way].resumed_apart < 1e-5


@pytest.mark.parametrize("way", BFLOAT16)
def test_in_bfloat16_two_processes_are_as_near_to_one_as_it_is_precise(two_processes: dict[str, Row], way: str) -> None:
    row, single = two_processes[way], two_processes["DDP"]
    assert max(row.apart, row.resumed_apart) < 5e-3
    assert 1e-5 < abs(row.first - single.first) < 5e-3  # or it was no bfloat16
    assert row.last < row.first / 2


@pytest.mark.parametrize("way", SINGLE + BFLOAT16)
def test_a_process_that_knows_nothing_of_the_others_loads_the_checkpoint(
    two_processes: dict[str, Row], checkpoints: Path, example: Any, way: str
) -> None:
    torch.manual_seed(1)
    model = example.explicit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, checkpoint_id=checkpoints / way)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    with training_by_hand(example) as (expected, losses):
        assert set(model.state_dict()) == set(expected)
        for name, value in model.state_dict().items():
            tolerance = 1e-5 if way in SINGLE else 5e-2
            torch.testing.assert_close(value, expected[name].detach(), atol=tolerance, rtol=0, msg=name)
    for step in range(example.STEPS // 2, example.STEPS):
        points, labels = example.batch(step)
        loss = F.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(losses[step], abs=1e-5 if way in SINGLE else 2e-2)


def test_without_torchrun_it_is_one_process(two_processes: dict[str, Row], tmp_path: Path) -> None:
    title, rows = table(EXAMPLE, folder=tmp_path)
    assert "gloo, processes: 1," in title
    assert list(rows) == list(two_processes) == SINGLE + BFLOAT16
    for way in SINGLE:
        assert rows[way].last == pytest.approx(two_processes[way].last, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("processes", [1, 2])
def test_it_trains_on_gpus(example: Any, tmp_path: Path, processes: int) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"{processes} GPUs are needed, and there is one")
    title, rows = table(*TORCHRUN, processes, EXAMPLE, folder=tmp_path, gpu=True)
    assert f"nccl, processes: {processes}," in title
    with training_by_hand(example) as (_, losses):
        pass
    for way in SINGLE:
        assert max(rows[way].apart, rows[way].resumed_apart) < 1e-5
        assert rows[way].last == pytest.approx(losses[-1], abs=1e-4)
    for way in BFLOAT16:
        assert max(rows[way].apart, rows[way].resumed_apart) < 1e-2
        assert rows[way].last < rows[way].first / 2
