"""On a GPU a model gives in every context what it gives on the CPU; a recompute is one kernel, and nothing waits.

Every model's parts are changed behind the stored weight before it is asked, and the answer is that of a plain model on
the CPU whose weights were computed there. `python -m pytest -m gpu` runs all that needs a GPU.
"""

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from captured import close, has_compiler, moved, on_cpu_and_gpu, on_gpu, stale, torchs_own_warnings
from layers import SUBJECTS, Net, Subject, change_parts, loss_of, norm_of, subject, weight_of
from norms_by_hand import NORMS
from torch import Tensor, nn

import explicit_wn
from explicit_wn import SpectralNorm, WeightNorm

all_subjects = pytest.mark.parametrize("which", SUBJECTS, ids=str)
pytestmark = [pytest.mark.usefixtures("fresh_dynamo", "in_single_precision"), *torchs_own_warnings]


def check(run: Callable[..., Tensor], which: Subject, module: nn.Module, device: str, **tolerance: float) -> None:
    """Whether `run` gives what the parts of `module` make it give."""
    output = run(*moved(which.inputs(), device))
    assert output.device.type == device
    close(output, which.expected(module), **tolerance)


def check_gradients(run: Callable[..., Tensor], which: Subject, module: nn.Module, device: str) -> None:
    module.zero_grad()
    loss_of(run(*moved(which.inputs(), device))).backward()
    expected = which.expected_gradients(copy.deepcopy(module).cpu())
    for name, parameter in module.named_parameters(remove_duplicate=False):
        assert parameter.grad is not None
        close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)


def train_by_hand(which: Subject, module: nn.Module, steps: int, rate: float) -> None:
    """What `steps` of gradient descent make of the parameters of `module`, which is on the CPU."""
    for _ in range(steps):
        gradients = which.expected_gradients(module)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.sub_(rate * gradients[name])


@on_gpu
@pytest.mark.parametrize("context", ["eager", "scripted", pytest.param("compiled", marks=has_compiler)])
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains_as_on_the_cpu(norm: str, context: str, device: str) -> None:
    on_cpu = Net(NORMS[norm].make(), nn.Conv1d(4, 6, 3))
    model = copy.deepcopy(on_cpu).to(device)
    contexts = {"scripted": torch.jit.script, "compiled": partial(torch.compile, fullgraph=True)}
    run = contexts.get(context, lambda model: model)(model)
    x = torch.randn(5, 4, 8)
    for _ in range(3):
        expected, output = on_cpu(x), run(x.to(device))
        close(output, expected)
        for net, answer in (on_cpu, expected), (model, output):
            net.zero_grad()
            loss_of(answer).backward()
        for parameter, other in zip(on_cpu.parameters(), model.parameters(), strict=True):
            close(other.grad, parameter.grad, rtol=1e-3, atol=1e-4)
            with torch.no_grad():
                parameter.sub_(0.1 * parameter.grad)
                other.copy_(parameter)


# Eager mode


@on_gpu
@all_subjects
def test_every_layer_computes_and_differentiates(which: Subject, device: str) -> None:
    model = stale(which, device)
    for seed in (2, 3):
        change_parts(model, seed)
        check(model, which, model, device)
        check_gradients(model, which, model, device)


@on_gpu
@all_subjects
def test_a_model_that_moves_takes_its_weight_along(which: Subject, device: str) -> None:
    model = which.model()
    check(model, which, model, "cpu")
    check(model.to(device), which, model, device)
    change_parts(model, seed=2)
    check(model.cpu(), which, model, "cpu")
    change_parts(model, seed=3)
    check(model.to(device), which, model, device)


@on_gpu
def test_a_stored_weight_is_on_the_device_of_its_parts(device: str) -> None:
    layer = WeightNorm().apply(nn.Conv1d(4, 6, 3))
    change_parts(layer, seed=1)
    layer.to(device)
    assert layer.weight.device.type == layer.weight_v.device.type == device
    close(layer.weight, weight_of(layer.weight_g, layer.weight_v, 0).detach().cpu())
    layer.to(torch.float64)
    assert layer.weight.dtype == torch.float64
    layer.to("meta")
    assert layer.weight.is_meta


@on_gpu
@all_subjects
def test_copies_and_files_compute_their_own(which: Subject, device: str) -> None:
    model = stale(which, device)
    file = io.BytesIO()
    torch.save(model, file)
    expected = which.expected(model)
    copied = copy.deepcopy(model)
    change_parts(copied, seed=2)
    check(copied, which, copied, device)
    change_parts(model, seed=3)
    for place in device, "cpu":
        file.seek(0)
        loaded = torch.load(file, map_location=place, weights_only=False)
        close(loaded(*moved(which.inputs(), place)), expected)
    model.load_state_dict(copied.cpu().state_dict())
    check(model, which, copied, device)


@on_gpu
@pytest.mark.parametrize("verb", ["cached", "fold", "remove"])
@pytest.mark.parametrize("kind", ["Conv2d_channels_last", "LSTM", "many_modules"])
def test_verbs_over_the_model(kind: str, verb: str, device: str) -> None:
    which = subject(kind, "inlined")
    model = stale(which, device)
    expected = which.expected(model)
    if verb == "cached":
        with explicit_wn.cached(model):
            change_parts(model, seed=2)
            close(model(*moved(which.inputs(), device)), expected)
        check(model, which, model, device)
    else:
        names = explicit_wn.fold(model) if verb == "fold" else [remove(*found) for found in explicit_wn.normed(model)]
        assert names == list(which.normed)
        close(model(*moved(which.inputs(), device)), expected)


def remove(name: str, module: nn.Module, norm: Any) -> str:
    norm.remove(module, norm.name)
    return name


# torch's own norms, on the same device


class Weight(nn.Module):
    """A layer whose output is its weight times a number."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 3, None])
def test_the_weight_and_its_gradients_are_torchs_to_the_last_bit(
    dim: int | None, dtype: torch.dtype, device: str
) -> None:
    theirs = Weight((64, 33, 5, 2)).to(device, dtype)
    ours = WeightNorm(dim=dim).inline(copy.deepcopy(theirs))
    torch.nn.utils.parametrizations.weight_norm(theirs, dim=-1 if dim is None else dim)
    parts = theirs.parametrizations["weight"]
    x = torch.linspace(0.5, 1.5, ours.weight_v.numel(), device=device).to(dtype).view(ours.weight_v.shape)
    with torch.no_grad():
        parts.original0.mul_(1.5)
        ours.weight_g.copy_(parts.original0)
    for layer in theirs, ours:
        layer(x).sum().backward()
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.weight_g.grad, parts.original0.grad)
    assert torch.equal(ours.weight_v.grad, parts.original1.grad)


@on_cpu_and_gpu
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_a_weight_without_entries_has_gradients_of_0(dim: int | None, device: str) -> None:
    v = torch.empty(0 if dim != 0 else 3, 5 if dim == 1 else 0, 3, device=device, requires_grad=True)
    g = torch.ones(() if dim is None else [n if d == dim else 1 for d, n in enumerate(v.shape)], device=device)
    explicit_wn.functional.weight_norm(v, g.requires_grad_(), dim).sum().backward()
    assert not g.grad.any()


@on_gpu
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("dim", [0, 1, 2, 3, None])
def test_the_weight_of_every_dim_is_the_formulas(dim: int | None, eps: float, device: str) -> None:
    layer = WeightNorm(dim=dim, eps=eps).inline(Weight((64, 33, 5, 2)).to(device))
    change_parts(layer, seed=1)
    g, v = (part.detach().cpu().double().requires_grad_() for part in (layer.weight_g, layer.weight_v))
    expected = g * v / norm_of(v, dim)
    x = torch.linspace(0.5, 1.5, v.numel()).view(v.shape)
    (expected * x.double()).sum().backward()
    output = layer(x.to(device))
    output.sum().backward()
    close(output, (expected.detach() * x).float())
    close(layer.weight_g.grad, g.grad.float(), rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]
    close(layer.weight_v.grad, v.grad.float(), rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]


@on_gpu
@pytest.mark.parametrize("context", ["eager", pytest.param("compiled", marks=has_compiler)])
def test_spectral_norm_trains_as_torchs_hook_does(context: str, device: str) -> None:
    theirs = torch.nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)).to(device)
    ours = SpectralNorm().inline(nn.Conv2d(3, 8, 3)).to(device)
    ours.load_state_dict(theirs.state_dict())
    runs = [theirs, torch.compile(ours, fullgraph=True) if context == "compiled" else ours]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (theirs, ours)]
    for batch in torch.randn(4, 2, 3, 5, 5).to(device):
        for run, optimizer in zip(runs, optimizers, strict=True):
            optimizer.zero_grad()
            run(batch).square().mean().backward()
            optimizer.step()
    for name, value in theirs.state_dict().items():
        close(ours.state_dict()[name], value.cpu())
    close(ours.eval()(batch), theirs.eval()(batch).detach().cpu())


# Autocast


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(16, 8), lambda: nn.Conv1d(16, 8, 3)], ids=["Linear", "Conv1d"])
def test_under_autocast_it_trains_as_torchs_parametrization_does(
    make: Callable[[], nn.Module], dtype: torch.dtype, device: str
) -> None:
    plain = nn.Sequential(make(), nn.Tanh())
    theirs, ours = copy.deepcopy(plain).to(device), copy.deepcopy(plain).to(device)
    torch.nn.utils.parametrizations.weight_norm(theirs[0])
    WeightNorm().inline(ours[0])
    shape = (4, 16) if isinstance(plain[0], nn.Linear) else (4, 16, 9)
    losses: list[list[float]] = []
    for model in theirs, ours:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**8, enabled=dtype == torch.float16)
        losses.append([])
        for step in range(6):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(device)
            with torch.autocast(device, dtype):
                output = model(x)
            assert output.dtype == dtype
            loss = (output.float() - 0.3).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < 0.9 * losses[1][0]
    assert ours[0].weight_v.dtype == ours[0].weight_v.grad.dtype == torch.float32


# TorchScript and export


@on_gpu
@all_subjects
def test_in_torchscript_the_weight_is_fresh(which: Subject, device: str) -> None:
    model = stale(which, device)
    inputs = moved(which.inputs(), device)
    for run, places in (torch.jit.script(model), [device, "cpu"]), (torch.jit.trace(model, inputs), [device]):
        for seed in (2, 3):
            change_parts(run, seed)
            check(run, which, run, device)
        file = io.BytesIO()
        torch.jit.save(run, file)
        for place in places:  # a trace stays where it was made: it holds the device of an RNN's first state
            file.seek(0)
            loaded = torch.jit.load(file, map_location=place)
            change_parts(loaded, seed=4)
            close(loaded(*moved(which.inputs(), place)), which.expected(loaded))


@on_gpu
@all_subjects
def test_a_frozen_script_gives_what_the_model_gave(which: Subject, device: str) -> None:
    model = stale(which, device).eval()
    frozen = torch.jit.freeze(explicit_wn.script(model))
    for _ in range(3):  # TorchScript optimizes in between
        check(frozen, which, model, device)


@on_gpu
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("which", [which for which in SUBJECTS if not which.recurrent], ids=str)
def test_an_exported_program_computes_from_its_own_parts(which: Subject, strict: bool, device: str) -> None:
    model = stale(which, device)
    exported = torch.export.export(model, moved(which.inputs(), device), strict=strict)
    module = exported.module()
    change_parts(module, seed=2)
    check(module, which, module, device)


# torch.compile, in its modes

compiled_models = pytest.mark.parametrize(
    ("kind", "form"), [("Conv1d_groups", "explicit"), ("two_dims", "inlined"), ("many_modules", "explicit")]
)


@on_gpu
@has_compiler
@compiled_models
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_a_compiled_model_follows_its_parts(mode: str, kind: str, form: str, device: str) -> None:
    which = subject(kind, form)
    model = stale(which, device)
    compiled = torch.compile(model, fullgraph=True, mode=mode)

    def run(*inputs: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        output: Tensor = compiled(*inputs)
        return output.clone()  # the next call of a CUDA graph writes into the same memory

    for seed in (2, 3, 4, 5):  # the graph is recorded at the second call
        change_parts(model, seed)
        with torch.no_grad():
            check(run, which, model, device)
    for seed in (6, 7, 8, 9):
        change_parts(model, seed)
        check_gradients(run, which, model, device)
    check(model, which, model, device)


# CUDA graphs

graphed_models = pytest.mark.parametrize(
    "which",
    [which for which in SUBJECTS if which.kind in ("Linear", "Linear_dim_1", "Conv1d_groups", "loop", "two_names")],
    ids=str,
)


def on_a_side_stream(run: Callable[[], Any], times: int = 3) -> None:
    """Warms up what a CUDA graph will capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(stream)


@on_gpu
@graphed_models
def test_a_cuda_graph_of_a_forward_recomputes_at_every_replay(which: Subject, device: str) -> None:
    model = stale(which, device)
    inputs = moved(which.inputs(), device)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        on_a_side_stream(lambda: model(*inputs))
        with torch.cuda.graph(graph):
            output = model(*inputs)
    for seed in (2, 3):
        change_parts(model, seed)
        graph.replay()
        close(output, which.expected(model))
    change_parts(model, seed=4)
    check(model, which, model, device)


@on_gpu
@graphed_models
def test_a_cuda_graph_of_training_steps_trains(which: Subject, device: str) -> None:
    model = stale(which, device)
    by_hand = copy.deepcopy(model).cpu()
    start = copy.deepcopy(model.state_dict())
    inputs = moved(which.inputs(), device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(model(*inputs)).backward()
        optimizer.step()

    on_a_side_stream(step)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            parameter.copy_(start[name])
    for _ in range(5):
        graph.replay()
    train_by_hand(which, by_hand, steps=5, rate=0.01)
    for name, parameter in model.named_parameters():
        close(parameter, by_hand.get_parameter(name).detach(), rtol=1e-3, atol=1e-4)
    check(model, which, model, device)


@on_gpu
@graphed_models
def test_a_graphed_callable_computes_and_differentiates(which: Subject, device: str) -> None:
    model = stale(which, device)
    graphed = torch.cuda.make_graphed_callables(model, moved(which.inputs(), device))
    for seed in (2, 3):
        change_parts(model, seed)
        check(graphed, which, model, device)
        check_gradients(graphed, which, model, device)


@on_gpu
def test_a_cuda_graph_advances_spectral_norm_at_every_replay(device: str) -> None:
    theirs = torch.nn.utils.spectral_norm(nn.Linear(4, 3)).to(device)
    ours = SpectralNorm().inline(nn.Linear(4, 3)).to(device)
    x = torch.randn(2, 4, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        on_a_side_stream(lambda: ours(x))
        with torch.cuda.graph(graph):
            output = ours(x)
        for name, value in ours.state_dict().items():
            value.copy_(theirs.state_dict()[name])
        for _ in range(3):
            graph.replay()
            close(output, theirs(x).cpu())
    for name, value in theirs.state_dict().items():
        close(ours.state_dict()[name], value.cpu())


# Kernels


def events_of(run: Callable[[], Any], device: str) -> list[str]:
    """The names of the kernels that `run` launches; on the CPU, of torch's operators."""
    on_device = device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_device else [])]
    run()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        if on_device:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
    return [event.name for event in profile.events() if event.device_type == kind]


def weight_norms(events: list[str]) -> int:
    """How many weights were computed: the fused kernel, or the operator that comes to it."""
    return len([name for name in events if "weight_norm_fwd" in name or name == "aten::_weight_norm_interface"])


profiles = pytest.mark.filterwarnings("ignore:.*[Pp]rofiler")


@pytest.fixture
def profiler(device: str) -> None:
    x = torch.ones(3, device=device)
    if not events_of(lambda: x + 1, device):
        pytest.skip("the profiler sees no kernels here")


@on_gpu
@profiles
@pytest.mark.usefixtures("profiler")
@pytest.mark.parametrize("training", [False, True])
def test_a_recompute_is_one_kernel(training: bool, device: str) -> None:
    wn = WeightNorm()
    layer = wn.apply(nn.Linear(256, 128)).to(device)
    with torch.set_grad_enabled(training):
        events = events_of(lambda: wn.recompute(layer), device)
    assert weight_norms(events) == 1
    if device == "cuda":
        assert len(events) == 1, events


class ReadsOften(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.fc = self.wn.apply(nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        for _ in range(16):
            x = torch.tanh(self.fc(x))
        return x


@on_gpu
@profiles
@pytest.mark.usefixtures("profiler")
@pytest.mark.parametrize("context", ["eager", "aot_eager", "script", "freeze"])
def test_sixteen_reads_after_one_recompute_are_one_kernel(context: str, device: str) -> None:
    model = ReadsOften().to(device).eval()
    contexts: dict[str, Callable[[], Any]] = {
        "eager": lambda: model,
        "aot_eager": lambda: torch.compile(model, backend="aot_eager", fullgraph=True),
        "script": lambda: explicit_wn.script(model),
        "freeze": lambda: torch.jit.freeze(explicit_wn.script(model)),
    }
    run, x = contexts[context](), torch.randn(2, 64, device=device)
    with torch.no_grad():
        for _ in range(3):
            run(x)
        events = events_of(lambda: run(x), device)
    assert weight_norms(events) == (0 if context == "freeze" else 1)
    if context in ("eager", "aot_eager"):  # TorchScript may fuse them
        assert len([name for name in events if "tanh" in name]) >= 16


@on_gpu
@pytest.mark.parametrize("norm", [WeightNorm(), WeightNorm(eps=1e-6), WeightNorm(dim=1), SpectralNorm()], ids=repr)
def test_a_training_step_waits_for_nothing(norm: Any, device: str) -> None:
    layer = norm.inline(nn.Conv1d(4, 6, 3)).to(device)
    x = torch.randn(2, 4, 9, device=device)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
