"""What no weight norm can be faster than: which goals of speed.py cannot be met, and by how much.

`python tests/benchmarks/bounds.py` measures, in the rows where a goal is missed, beside ours and torch's spellings:

- `bare`: the shortest `recompute` that Python can say. It calls torch's kernel and keeps the weight until the next, as
  ours and the hook do, and asks for nothing: no shape, no version, no thread, no context.
- `scaled`: v times g, compiled. Whoever makes a weight reads v once and writes as much.
- `whole`: v times g by the norm of the whole v, compiled: v read once more, in the order of memory.

The times are as in speed.py: medians of one run, the models taking turns.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from benchmark_models import OURS, PEERS, PLAIN, ROWS, SPELLINGS, ExplicitChain, normed_layers
from speed import MODES, keep_memory, medians, training
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Bare(nn.Module):
    """`WeightNorm` without all that makes it one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def apply(self, layer: Any) -> None:
        layer.weight_v = nn.Parameter(layer._parameters.pop("weight").detach())
        layer.weight_g = nn.Parameter(torch.norm_except_dim(layer.weight_v.detach(), 2, self.dim))
        self.recompute(layer)

    def recompute(self, layer: Any) -> None:
        parameters, attributes = layer._parameters, layer.__dict__
        attributes.pop("weight", None)  # freed first, so that the same memory is used again
        attributes["weight"] = torch._weight_norm(parameters["weight_v"], parameters["weight_g"], self.dim)


class BareChain(ExplicitChain):
    norm = Bare


class Scaled(nn.Module):
    def __init__(self, v: Tensor) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, v.size(1), 1))

    def forward(self, v: Tensor) -> Tensor:
        return v * self.g


class Whole(Scaled):
    def forward(self, v: Tensor) -> Tensor:
        return v * (self.g / torch.linalg.vector_norm(v))


def built(model: str, spelling: str) -> tuple[nn.Module, Tensor]:
    row = ROWS[model]
    if spelling in SPELLINGS:
        return row.build(spelling, "cpu")
    if spelling == "bare":
        return BareChain(*row.explicit.args), torch.randn(row.shape)  # type: ignore[attr-defined]
    least, x = row.build(PLAIN, "cpu")
    for layer in normed_layers(least):
        parametrize.register_parametrization(layer, "weight", BOUNDS[spelling](layer.weight))
    return least, x


BOUNDS: dict[str, Callable[[Tensor], nn.Module]] = {"scaled": Scaled, "whole": Whole}
MIDDLE = [model for model in ROWS if "dim=1" in model]
MISSED: list[tuple[str, str, tuple[str, ...]]] = [
    *(
        (model, "eager inference", ("bare",))
        for model in ("10 × Linear(64)", "8 × Conv1d(256, 256, 7)", "3 × Linear(2048)")
    ),
    *((model, mode, tuple(BOUNDS)) for mode in ("compiled inference", "compiled training") for model in MIDDLE),
]


def measure(model: str, mode: str, bounds: tuple[str, ...], seconds: float) -> dict[str, float]:
    """The median of each spelling and each bound, by the better of torch's spellings."""
    how, transform, _ = MODES[mode]
    torch.compiler.reset()
    steps = {}
    with torch.set_grad_enabled(how is training):
        for spelling in (*SPELLINGS, *bounds):
            one, x = built(model, spelling)
            run = transform(one.train(how is training), x)
            run(x)
            steps[spelling] = how(run, x)
        found = medians(steps, seconds, "cpu")
    better = min(found[peer] for peer in PEERS)
    return {spelling: found[spelling] / better for spelling in (PLAIN, *OURS, *bounds)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="only those whose name holds this")
    parser.add_argument("--seconds", type=float, default=6, help="how long to measure each row; by default 6")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("By the better of torch's hook and parametrization; lower is better.")
    for model, mode, bounds in [row for row in MISSED if chosen.models in row[0]]:
        found = measure(model, mode, bounds, chosen.seconds)
        print(f"- {model}, {mode}: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in found.items()), flush=True)


if __name__ == "__main__":
    keep_memory()
    main()
