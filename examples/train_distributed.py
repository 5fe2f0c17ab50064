"""Train a model on several processes in the ways that torch has, and see that it learns as it does on one.

Run: torchrun --nproc-per-node 2 examples/train_distributed.py
It takes a GPU for each process if there are as many, and the CPU otherwise. Without torchrun it is one process.
Given a folder, it leaves its checkpoints there.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from explicit_wn import SpectralNorm, WeightNorm, apply_all

WIDTH, BATCH, STEPS = 16, 64, 20
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class Block(nn.Module):
    """A block as one writes it without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class NormedBlock(Block):
    """The same with a norm. Its forward calls recompute, so FSDP2 is to shard this block, not the layers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.wn.apply(self.up)
        self.wn.apply(self.down)

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.up)
        self.wn.recompute(self.down)
        return super().forward(x)


class Net(nn.Module):
    """Two blocks, and a head with another norm, whose power iteration moves two buffers at every step."""

    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(block(), block())
        self.head = SpectralNorm().inline(nn.Linear(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def explicit() -> Net:
    return Net(NormedBlock)


def inlined() -> Net:
    model = Net(Block)
    apply_all(model.blocks, WeightNorm())
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Points, and in which of four regions they lie; the same on every process."""
    points = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
    return points, 2 * (points[:, 0] > 0) + (points[:, 1] > points[:, 2])


# How a model is given to torch. `mesh` says to which processes; to one alone, it is this one.


def ddp(model: Net, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model, process_group=mesh.get_group())


def shard_blocks(model: Net, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)  # the head


def shard_layers(model: Net, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block.up, mesh=mesh, **options)
        fully_shard(block.down, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def shard_blocks_in_bfloat16(model: Net, mesh: DeviceMesh) -> nn.Module:
    return shard_blocks(model, mesh, mp_policy=BFLOAT16)


def shard_layers_in_bfloat16(model: Net, mesh: DeviceMesh) -> nn.Module:
    return shard_layers(model, mesh, mp_policy=BFLOAT16)


def as_it_is(model: Net, mesh: DeviceMesh) -> nn.Module:
    return model


@attrs.frozen
class Way:
    """A way to train on many processes, and the way in which one process does the same."""

    name: str
    make: Callable[[], Net]
    wrap: Callable[[Net, DeviceMesh], nn.Module]
    wrap_alone: Callable[[Net, DeviceMesh], nn.Module] = as_it_is
    autocast: bool = False


WAYS = [
    Way("DDP", explicit, ddp),
    Way("FSDP2, per block", explicit, shard_blocks),
    Way("FSDP2, per inlined layer", inlined, shard_layers),
    Way("DDP, autocast to bfloat16", explicit, ddp, autocast=True),
    Way("FSDP2, per block, bfloat16", explicit, shard_blocks_in_bfloat16, shard_blocks_in_bfloat16),
    Way("FSDP2, per inlined layer, bfloat16", inlined, shard_layers_in_bfloat16, shard_layers_in_bfloat16),
]


@attrs.define
class Run:
    """A model in training on the processes of `mesh`; each takes its part of every batch."""

    way: Way
    mesh: DeviceMesh
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = attrs.field(factory=list)

    @classmethod
    def start(cls, way: Way, wrap: Callable[[Net, DeviceMesh], nn.Module], mesh: DeviceMesh, seed: int) -> "Run":
        torch.manual_seed(seed)
        model = wrap(way.make().to(mesh.device_type), mesh)
        return cls(way, mesh, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    def train(self, steps: range) -> None:
        for step in steps:
            with torch.autocast(self.mesh.device_type, torch.bfloat16, enabled=self.way.autocast):
                loss = self.loss(step)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            dist.all_reduce(loss := loss.detach(), group=self.mesh.get_group())
            self.losses.append(loss.item() / self.mesh.size())

    def loss(self, step: int) -> Tensor:
        """The mean over this process's part of the batch. All parts have one size; torch averages their gradients."""
        device, part = self.mesh.device_type, self.mesh.get_local_rank()
        points, labels = (whole.chunk(self.mesh.size())[part].to(device) for whole in batch(step))
        return F.cross_entropy(self.model(points).float(), labels)

    def save(self, folder: Path) -> None:
        dcp.save(self.state(), checkpoint_id=folder, process_group=self.mesh.get_group())

    def load(self, folder: Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder, process_group=self.mesh.get_group())
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


def furthest(losses: list[float], others: list[float]) -> float:
    return max(abs(loss - other) for loss, other in zip(losses, others, strict=True))


def compare(way: Way, together: DeviceMesh, alone: DeviceMesh, folder: Path) -> str:
    """Trains on all processes and on one, and from a checkpoint of all on one: a row of the table."""
    many = Run.start(way, way.wrap, together, seed=0)
    many.train(range(STEPS // 2))
    many.save(folder)
    many.train(range(STEPS // 2, STEPS))
    one = Run.start(way, way.wrap_alone, alone, seed=0)
    one.train(range(STEPS))
    resumed = Run.start(way, way.wrap_alone, alone, seed=1)
    resumed.load(folder)
    resumed.train(range(STEPS // 2, STEPS))
    first, last = many.losses[0], many.losses[-1]
    apart, resumed_apart = furthest(many.losses, one.losses), furthest(many.losses[STEPS // 2 :], resumed.losses)
    return f"{way.name:36}{first:8.6f}{last:10.6f}{apart:18.1e}{resumed_apart:16.1e}"


@contextlib.contextmanager
def processes() -> Iterator[tuple[DeviceMesh, DeviceMesh]]:
    """All processes together, and this one alone."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpu = torch.device("cuda", local) if torch.cuda.device_count() >= here else None
    kind = "cuda" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(gpu)
    store = None if "RANK" in os.environ else dist.HashStore()
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=count, device_id=gpu)
    try:
        own = [dist.new_group([number]) for number in range(count)][rank]
        yield DeviceMesh.from_group(dist.group.WORLD, kind), DeviceMesh.from_group(own, kind)
    finally:
        dist.destroy_process_group()


def main() -> None:
    with processes() as (together, alone), tempfile.TemporaryDirectory() as own:
        folder = [sys.argv[1] if len(sys.argv) > 1 else own]
        dist.broadcast_object_list(folder)  # all use that of the first process
        say = print if dist.get_rank() == 0 else lambda *_: None
        say(f"torch {torch.__version__}, {dist.get_backend()}, processes: {together.size()}, steps: {STEPS}\n")
        say(f"{'':36}{'loss':^18}  largest difference of the losses")
        say(f"{'':36}{'first':>8}{'last':>10}  from one process  resumed on one")
        for way in WAYS:
            say(compare(way, together, alone, Path(folder[0], way.name)))
        dist.barrier()  # until all have read what is deleted now


if __name__ == "__main__":
    main()
