"""One graph takes every size: compiled, exported, or packed by AOTInductor, and the weight in it is computed anew.

The sizes come after the graph, which may not be made again for one of them. The parts are changed before each, and the
answer is that of a plain model on the CPU whose weights were computed there.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captured import close, has_compiler, moved, on_cpu_and_gpu, on_gpu, stale, torchs_own_warnings
from layers import Subject, change_parts, loss_of, subject
from torch import Tensor, nn

from explicit_wn import SpectralNorm

pytestmark = [pytest.mark.usefixtures("fresh_dynamo", "in_single_precision"), *torchs_own_warnings]


def of_length(which: Subject, length: int) -> tuple[Tensor, ...]:
    """An input for `which` whose last dimension has another length."""
    (x,) = which.inputs()
    return (torch.randn(*x.shape[:-1], length, generator=torch.Generator().manual_seed(length)),)


def of_rows(which: Subject, rows: int) -> tuple[Tensor, ...]:
    """The same with another number of rows."""
    (x,) = which.inputs()
    return (torch.randn(rows, *x.shape[1:], generator=torch.Generator().manual_seed(rows)),)


DYNAMIC: list[Any] = [
    pytest.param(subject(kind, form), sized, dim, id=f"{kind}-{form}")
    for kind, sized, dim in [
        ("Linear", of_rows, 0),
        ("Conv1d_groups", of_length, 2),
        ("ConvTranspose1d_out", of_length, 2),
        ("Conv2d", of_length, 3),
        ("two_dims", of_rows, 0),
        ("two_names", of_rows, 0),
        ("loop", of_rows, 0),
    ]
    for form in ("explicit", "inlined")
]
dynamic = pytest.mark.parametrize(("which", "sized", "dim"), DYNAMIC)
Sized = Callable[[Subject, int], tuple[Tensor, ...]]


def check_sizes(run: Callable[..., Tensor], which: Subject, sized: Sized, module: nn.Module, device: str) -> None:
    for size in (5, 6, 9, 17):
        change_parts(module, seed=size)
        inputs = sized(which, size)
        close(run(*moved(inputs, device)), which.expected(module, inputs))


@on_cpu_and_gpu
@dynamic
def test_one_compiled_graph_takes_every_size(which: Subject, sized: Sized, dim: int, device: str) -> None:
    model = stale(which, device)
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    run(*moved(sized(which, 7), device))
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[no-untyped-call]
        check_sizes(run, which, sized, model, device)


@on_cpu_and_gpu
@dynamic
def test_a_size_marked_as_dynamic_is_not_specialized(which: Subject, sized: Sized, dim: int, device: str) -> None:
    model = stale(which, device)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    (x,) = moved(sized(which, 7), device)
    torch._dynamo.mark_dynamic(x, dim)  # refuses a graph that holds for one size only
    run(x)
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[no-untyped-call]
        check_sizes(run, which, sized, model, device)


@on_cpu_and_gpu
@dynamic
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_one_exported_program_takes_every_size(
    strict: bool, which: Subject, sized: Sized, dim: int, device: str, tmp_path: Path
) -> None:
    model = stale(which, device)
    shapes = ({dim: torch.export.Dim("size", min=4, max=64)},)
    exported = torch.export.export(model, moved(sized(which, 7), device), dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert len([target for target in targets if "weight_norm" in target]) == len(which.normed)
    check_sizes(exported.module(), which, sized, exported.module(), device)  # it shares its parts with the next one
    module = exported.module()
    check_sizes(module, which, sized, module, device)
    torch.export.save(exported, tmp_path / "exported.pt2")
    loaded = torch.export.load(tmp_path / "exported.pt2").module()
    check_sizes(loaded, which, sized, loaded, device)


@on_cpu_and_gpu
@has_compiler
@pytest.mark.parametrize("form", ["explicit", "inlined"])
def test_inductor_takes_every_size_in_training(form: str, device: str) -> None:
    which = subject("Conv1d_groups", form)
    model = stale(which, device)
    run = torch.compile(model, fullgraph=True, dynamic=True)
    run(*moved(of_length(which, 7), device))
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[no-untyped-call]
        check_sizes(run, which, of_length, model, device)
    for size in (5, 11):
        model.zero_grad()
        change_parts(model, seed=size)
        inputs = of_length(which, size)
        loss_of(run(*moved(inputs, device))).backward()
        expected = which.expected_gradients(copy.deepcopy(model).cpu(), inputs)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)


@on_cpu_and_gpu
@pytest.mark.parametrize("context", ["compile", "export"])
def test_spectral_norm_takes_every_size(context: str, device: str) -> None:
    layer = SpectralNorm().inline(nn.Conv1d(4, 6, 3)).to(device).eval()
    shapes = ({2: torch.export.Dim("length", min=4, max=64)},)
    x = torch.randn(2, 4, 7, device=device)
    run: Any = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    if context == "export":
        run = torch.export.export(layer, (x,), dynamic_shapes=shapes).module()
    run(x)
    source: Any = layer if context == "compile" else run
    for length in (5, 9, 17):
        with torch.no_grad():
            source.weight_orig.mul_(1.5).add_(0.1)
        x = torch.randn(2, 4, length, device=device)
        orig, u, v, bias = (
            part.detach().cpu() for part in (source.weight_orig, source.weight_u, source.weight_v, source.bias)
        )
        weight = orig / (u @ orig.flatten(1) @ v)
        close(run(x), nn.functional.conv1d(x.cpu(), weight, bias))


@on_gpu
@has_compiler
@pytest.mark.parametrize("form", ["explicit", "inlined"])
def test_an_aotinductor_package_computes_for_every_size(form: str, device: str, tmp_path: Path) -> None:
    if device == "cuda" and pytest.importorskip("torch.utils.cpp_extension").CUDA_HOME is None:
        pytest.skip("AOTInductor needs the CUDA toolkit")
    which = subject("Conv1d_groups", form)
    model = stale(which, device)
    shapes = ({2: torch.export.Dim("length", min=4, max=64)},)
    with torch.no_grad():
        exported = torch.export.export(model, moved(of_length(which, 7), device), dynamic_shapes=shapes)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for size in (5, 9, 17):
        inputs = of_length(which, size)
        close(run(*moved(inputs, device)), which.expected(model, inputs))
