"""Weight norm over all dimensions but one in the middle, as for the output channels of a ConvTranspose.

torch's kernel is fused for the first and the last dim only; for one between them it takes several times as long. On a
GPU the formula as it stands is faster: three kernels. On a CPU the weight is seen as a matrix whose rows are the
dimensions before `dim`, and summed over the rows first, in long stretches of memory; the gradient is written out, in
fewer passes over the weight than autograd makes. A compiler for a CPU makes its own passes, and is given sums that it
takes along the memory. What is left is bound by memory: v is read twice for the weight, and v and the gradient are read
twice for the gradients.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..contexts import capture


def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """`g * v / ‖v‖`, with the norm over every dimension but `dim`, as autograd and TorchScript can take it."""
    if not v.is_cpu:
        return _formula(v, g, dim)
    matrix = _as_matrix(v, dim)
    scale = g.flatten() / _over_rest(matrix * matrix, g).sqrt()
    return (matrix * _over_columns(scale, matrix)).view_as(v)


def _formula(v: Tensor, g: Tensor, dim: int) -> Tensor:
    others = list(range(v.dim()))
    others.remove(dim)
    norm: Tensor = torch.linalg.vector_norm(v, 2, others, keepdim=True)
    return v * (g / norm)


def _for_a_compiler(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """The formula, with sums that inductor takes of several rows at a time, where it would go down each column.

    How many rows there are is part of such a graph, which a compiler makes anew where that changes, and nobody else.
    """
    rows, at_a_time = math.prod(v.shape[:dim]), 16
    is_fixed = capture.capturing() and type(rows) is int and type(v).__name__ != "DTensor"
    if not is_fixed or not v.is_cpu or v.element_size() < 4 or rows % at_a_time != 0:
        return _formula(v, g, dim)
    sums = v.reshape(rows // at_a_time, at_a_time, -1).square().sum(1)
    norm = sums.view(rows // at_a_time, g.numel(), -1).sum((0, 2)).sqrt()
    return v * (g / norm.view_as(g))


def _as_matrix(v: Tensor, dim: int) -> Tensor:
    """What comes before `dim` as rows, `dim` and what comes after it as columns."""
    return v.flatten(0, dim - 1).flatten(1)


def _over_rest(matrix: Tensor, g: Tensor) -> Tensor:
    """The sum for each entry of `g`."""
    return matrix.sum(0).view(g.numel(), -1).sum(1)


def _sum_of_products(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """`_over_rest(a * b, g)`, in blocks of rows, one after the other, whose products stay in the cache."""
    rows = max(1, _IN_A_BLOCK // a.size(1))
    blocks = zip(torch.split(a, rows), torch.split(b, rows), strict=True)
    first, second = next(blocks)
    products = first * second
    for first, second in blocks:
        products[: first.size(0)].addcmul_(first, second)
    return _over_rest(products, g)


_IN_A_BLOCK = 1 << 18
"""How many numbers: few enough for the cache, enough to be worth a call."""


def _over_columns(scale: Tensor, matrix: Tensor) -> Tensor:
    """Each entry of `scale` for all the columns that belong to it."""
    return scale.unsqueeze(1).expand(-1, matrix.size(1) // scale.numel()).reshape(-1)


class _WeightNorm(torch.autograd.Function):
    """The same with its gradient."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dim: int) -> Tensor:
        matrix = _as_matrix(v, dim)
        norm = _sum_of_products(matrix, matrix, g).sqrt()
        ctx.dim = dim
        ctx.save_for_backward(v, g, norm)
        return (matrix * _over_columns(g.flatten() / norm, matrix)).view_as(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        v, g, norm = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a gradient of the gradient, which is autograd's affair
            wanted = [part for part, needed in zip((v, g), ctx.needs_input_grad[:2], strict=True) if needed]
            found = iter(torch.autograd.grad(weight_norm(v, g, ctx.dim), wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None
        matrix, grad = _as_matrix(v, ctx.dim), _as_matrix(grad.contiguous(), ctx.dim)
        grad_g, scale = _sum_of_products(grad, matrix, g) / norm, g.flatten() / norm
        grad_v = grad * _over_columns(scale, matrix)
        grad_v.addcmul_(matrix, _over_columns(grad_g * scale / norm, matrix), value=-1)
        return grad_v.view_as(v), grad_g.view_as(g), None


def weight_norm_in_eager_mode(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """The fastest of them for whoever asks."""
    if torch.compiler.is_exporting():
        return torch._weight_norm(v, g, dim)  # one node, which each runtime takes to pieces in its own way
    if capture.is_captured(v):  # a compiler would take that to pieces badly, and do twice the work
        return _for_a_compiler(v, g, dim)
    if not v.is_cpu or capture.is_transformed():
        return weight_norm(v, g, dim)
    result: Tensor = _WeightNorm.apply(v, g, dim)  # type: ignore[no-untyped-call]
    return result
