"""Hazards of autograd: what may happen between a forward and its backward; and what functorch leaves behind.

`test_autograd.py` and `test_contexts.py` have the same for the many layers of `layers.py`. Here it is every norm, every
form and every kind of dim: torch's kernel, our own gradient of a middle dim, what has an eps, and SpectralNorm in
training mode, whose u and v change in place.
"""

import contextlib
import gc
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from layers import loss_of, weight_of
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from whole_models import spectral_weight

from explicit_wn import (
    ScaledWeightNorm,
    SigmaReparam,
    SpectralNorm,
    WeightNorm,
    WeightStandardization,
    cached,
    carrier,
    fold,
    normed,
    recompute_all,
    steps,
)

# Models, and what they compute, without the package


class Net(nn.Module):
    def __init__(self, norm: Any, form: str) -> None:
        super().__init__()
        self.wn = norm
        self.form = form
        layer = nn.ConvTranspose1d(32, 32, 7)  # as large as our gradient of a middle dim wants it
        self.layer = norm.inline(layer) if form == "inlined" else norm.apply(layer)

    def forward(self, x: Tensor) -> Tensor:
        if self.form != "inlined":
            self.wn.recompute(self.layer)
        return self.layer(x)

    def block(self) -> Any:
        """What a step of this form runs in."""
        return cached(self) if self.form == "cached" else contextlib.nullcontext()


NORMS: dict[str, Callable[[], Any]] = {
    "first dim": lambda: WeightNorm(dim=0),
    "middle dim": lambda: WeightNorm(dim=1),
    "last dim": lambda: WeightNorm(dim=2),
    "whole": lambda: WeightNorm(dim=None),
    "middle dim, eps": lambda: WeightNorm(dim=1, eps=1e-6),
    "spectral": lambda: SpectralNorm(dim=0),
    "spectral, middle dim": lambda: SpectralNorm(),
}
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
every_form = pytest.mark.parametrize("form", ["recomputed", "inlined", "cached"])


def build(norm: Callable[[], Any], form: str) -> Net:
    """In training mode, with a stored weight that is out of date."""
    model = Net(norm(), form)
    model(batch(9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25 + 0.5 * torch.rand_like(parameter))
    return model


def batch(seed: int) -> Tensor:
    return torch.randn(2, 32, 3, generator=torch.Generator().manual_seed(seed))


Tensors = dict[str, Tensor]


def snapshot(model: Net) -> Tensors:
    """The parts as they are now: those of the forward that has just run."""
    own = dict(model.layer.named_parameters())
    tensors = {name: tensor.detach().clone() for name, tensor in model.layer.state_dict().items()}
    return {name: tensor.requires_grad_(name in own) for name, tensor in tensors.items()}


def by_formula(model: Net, tensors: Tensors, x: Tensor) -> Tensor:
    ((_, _, norm),) = normed(model)
    if isinstance(norm, WeightNorm):
        weight = weight_of(tensors["weight_g"], tensors["weight_v"], norm.dim)  # type: ignore[arg-type]
    else:
        parts = (tensors[f"weight_{part}"] for part in ("orig", "u", "v"))
        weight = spectral_weight(*parts, norm.dim)  # type: ignore[attr-defined]
    return nn.functional.conv_transpose1d(x, weight, tensors["bias"])


def forward(model: Net, x: Tensor) -> tuple[Tensor, Tensors]:
    """The output, compared with the formula, and what it was made of."""
    output, tensors = model(x), snapshot(model)
    torch.testing.assert_close(output, by_formula(model, tensors, x), rtol=1e-4, atol=1e-4)
    return output, tensors


def expected_gradients(model: Net, *passes: tuple[Tensors, Tensor]) -> Tensors:
    """The sum over the passes."""
    total: Tensors = {}
    for tensors, x in passes:
        leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        found = torch.autograd.grad(loss_of(by_formula(model, tensors, x)), list(leaves.values()))
        total = {name: total.get(name, 0) + one for name, one in zip(leaves, found, strict=True)}
    return total


def assert_gradients(model: Net, expected: Tensors) -> None:
    assert expected.keys() == dict(model.layer.named_parameters()).keys()
    for name, parameter in model.layer.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-3)


# Between a forward and its backward


@every_norm
@every_form
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients_in_between_changes_nothing(norm: Any, form: str, mode: Any) -> None:
    model = build(norm, form)
    with model.block():
        output, tensors = forward(model, batch(1))
        with mode():
            forward(model, batch(2))
        loss_of(output).backward()
    assert_gradients(model, expected_gradients(model, (tensors, batch(1))))


@every_norm
@every_form
@pytest.mark.parametrize("backward", ["one", "the other way round"])
def test_two_forwards_and_their_backward(norm: Any, form: str, backward: str) -> None:
    model = build(norm, form)
    with model.block():
        first, before = forward(model, batch(1))
        second, after = forward(model, batch(2))
        if backward == "one":
            (loss_of(first) + loss_of(second)).backward()
        else:
            loss_of(second).backward(retain_graph=form == "cached")  # one computation for the whole block
            loss_of(first).backward()
    assert_gradients(model, expected_gradients(model, (before, batch(1)), (after, batch(2))))


@every_norm
@every_form
def test_a_graph_that_is_retained_serves_twice_with_a_forward_in_between(norm: Any, form: str) -> None:
    model = build(norm, form)
    with model.block():
        output, tensors = forward(model, batch(1))
        loss_of(output).backward(retain_graph=True)
        forward(model, batch(2))
        loss_of(output).backward()
    assert_gradients(model, expected_gradients(model, (tensors, batch(1)), (tensors, batch(1))))


@every_norm
@every_form
def test_gradients_accumulate_over_steps(norm: Any, form: str) -> None:
    model = build(norm, form)
    passes = []
    for seed in (1, 2, 3):
        with model.block():
            output, tensors = forward(model, batch(seed))
            loss_of(output).backward()
        passes.append((tensors, batch(seed)))
    assert_gradients(model, expected_gradients(model, *passes))


PARTS = [(norm, part) for norm in NORMS for part in (("orig", "u", "v") if "spectral" in norm else ("g", "v"))]


@pytest.mark.parametrize(("norm", "part"), PARTS)
@every_form
@pytest.mark.parametrize("recomputed", [False, True], ids=["", "recomputed"])
def test_a_part_that_changes_in_place_in_between_is_torchs_error_or_leaves_the_right_gradient(
    norm: str, part: str, form: str, recomputed: bool
) -> None:
    model = build(NORMS[norm], form)
    with model.block():
        output, tensors = forward(model, batch(1))
        with torch.no_grad():
            getattr(model.layer, f"weight_{part}").mul_(2).add_(0.5)
        if recomputed:
            recompute_all(model)
        try:
            loss_of(output).backward()
        except RuntimeError as error:
            outcome = str(error)
        else:
            outcome = "right"
            assert_gradients(model, expected_gradients(model, (tensors, batch(1))))
    if "spectral" in norm and part != "orig":
        assert outcome == "right"  # SpectralNorm itself changes u and v in place
    else:
        assert "modified by an inplace operation" in outcome


@every_norm
@every_form
def test_an_optimizer_step_between_forward_and_backward_is_torchs_error(norm: Any, form: str) -> None:
    model = build(norm, form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.block():
        first, second = model(batch(1)), model(batch(2))
        loss_of(first).backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss_of(second).backward()


@every_norm
@every_form
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("within", [True, False], ids=["", "backward_after_the_block"])
def test_a_checkpointed_forward_runs_again_and_gives_the_same_gradients(
    norm: Any, form: str, use_reentrant: bool, within: bool
) -> None:
    """In eval mode; in training mode SpectralNorm iterates again, as torch's does."""
    model, x = build(norm, form).eval(), batch(1).requires_grad_()
    computes_what_was_held = form == "cached" and not within and not use_reentrant
    expectation = pytest.raises(CheckpointError) if computes_what_was_held else contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        stack.enter_context(model.block())
        output = checkpoint(lambda x: model(torch.tanh(x)), x, use_reentrant=use_reentrant)
        with torch.no_grad():
            forward(model, batch(2))
        if not within:
            stack.close()
        with expectation:
            loss_of(output).backward()
    if not computes_what_was_held:
        assert_gradients(model, expected_gradients(model, (snapshot(model), torch.tanh(batch(1)))))


# A caller that holds a weight


def change_parts(model: Net) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def step(model: Net) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss_of(model(batch(3))).backward()
    optimizer.step()
    optimizer.zero_grad()


def run_without_gradients(model: Net) -> None:
    change_parts(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(batch(4))


def load(model: Net) -> None:
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})


def read_and_recompute(model: Net) -> None:
    for _ in range(3):
        change_parts(model)
        recompute_all(model)
        model.layer.weight.sum().item()


HAPPENINGS: dict[str, Callable[[Net], Any]] = {
    "steps": lambda model: [step(model) for _ in range(3)],
    "recompute": read_and_recompute,
    "inference": run_without_gradients,
    "load": load,
    "cast": lambda model: (model.double(), model.float(), model(batch(3))),
    "cached": lambda model: in_block(model),
    "fold": lambda model: (change_parts(model), fold(model), change_parts(model)),
}


def in_block(model: Net) -> None:
    change_parts(model)
    with cached(model):
        model(batch(3))
        change_parts(model)
    model(batch(3))


HELD: dict[str, Callable[[Net], Any]] = {
    "weight": lambda model: model.layer.weight,
    "view": lambda model: model.layer.weight.detach().view(-1)[::3],
    "storage": lambda model: model.layer.weight.untyped_storage(),
    "output": lambda model: model(batch(1)),
}


def content(held: Any) -> Tensor:
    tensor = held if isinstance(held, Tensor) else torch.empty(0).set_(held)
    return tensor.detach().clone()


@every_norm
@pytest.mark.filterwarnings("ignore::explicit_wn.StaleWeightWarning")  # it is read after an optimizer step
@pytest.mark.parametrize("form", ["recomputed", "inlined"])
@pytest.mark.parametrize("happening", HAPPENINGS.values(), ids=HAPPENINGS)
@pytest.mark.parametrize("gradients", [True, False], ids=["", "no_grad"])
def test_whoever_holds_a_weight_or_an_output_never_sees_it_change(
    norm: Any, form: str, happening: Callable[[Net], Any], gradients: bool
) -> None:
    """What is held is all that keeps it alive."""
    for name, hold in HELD.items():
        model = build(norm, form)
        with torch.set_grad_enabled(gradients):
            model(batch(1))
            held = hold(model)
        version, before = getattr(held, "_version", 0), content(held)
        happening(model)
        assert torch.equal(content(held), before), name
        assert getattr(held, "_version", 0) == version, name
        storage = held if name == "storage" else held.untyped_storage()
        assert model.layer.weight.untyped_storage().data_ptr() != storage.data_ptr(), name


# What functorch leaves behind


class Small(nn.Module):
    def __init__(self, norm: Any, form: str, layer: nn.Module, name: str = "weight") -> None:
        super().__init__()
        self.wn = norm
        self.explicit = form == "recomputed"
        self.layer = norm.apply(layer, name) if self.explicit else norm.inline(layer, name)
        self.double()  # torch's own kernel for single precision knows neither vmap nor forward mode

    def forward(self, x: Tensor) -> Any:
        if self.explicit:
            self.wn.recompute(self.layer)
        output = self.layer(x)
        return output[0] if isinstance(output, tuple) else output


class Failure(Exception):
    """Raised in the middle of a transform."""


Function = Callable[[Tensors, Tensor], Tensor]
func = torch.func


def forward_mode(function: Function, parameters: Tensors, x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = {n: torch.autograd.forward_ad.make_dual(p, torch.ones_like(p)) for n, p in parameters.items()}
        function(dual, x)


TRANSFORMS: dict[str, Callable[[Function, Tensors, Tensor], Any]] = {
    "functional_call": lambda f, p, x: f(p, x),
    "grad": lambda f, p, x: func.grad(f)(p, x),
    "vmap": lambda f, p, x: func.vmap(f, (None, 0))(p, torch.stack([x, x])),
    "vmap over the parts": lambda f, p, x: func.vmap(f, (0, None))({n: torch.stack([t, t]) for n, t in p.items()}, x),
    "vmap of grad": lambda f, p, x: func.vmap(func.grad(f), (None, 0))(p, torch.stack([x, x])),
    "grad of grad": lambda f, p, x: func.grad(lambda x: func.grad(lambda x: f(p, x))(x).square().sum())(x),
    "jvp": lambda f, p, x: func.jvp(lambda p: f(p, x), (p,), (p,)),
    "vjp": lambda f, p, x: func.vjp(lambda p: f(p, x), p)[1](torch.ones(())),
    "jacrev": lambda f, p, x: func.jacrev(f)(p, x),
    "jacfwd": lambda f, p, x: func.jacfwd(f)(p, x),
    "hessian": lambda f, p, x: func.hessian(f, argnums=1)(p, x),
    "forward mode": forward_mode,
}
RNN_GOES_THROUGH = ("functional_call", "grad", "vjp")  # the others torch refuses for every LSTM
MODELS: dict[str, tuple[Callable[[str], Small], tuple[int, ...]]] = {
    "first dim": (lambda form: Small(WeightNorm(), form, nn.Linear(3, 4)), (2, 3)),
    "middle dim": (lambda form: Small(WeightNorm(dim=1), form, nn.ConvTranspose1d(3, 4, 2)), (2, 3, 2)),
    "spectral": (lambda form: Small(SpectralNorm(), form, nn.Linear(3, 4)).eval(), (2, 3)),
    "LSTM": (lambda form: Small(WeightNorm(), form, nn.LSTM(3, 4), "weight_hh_l0"), (2, 1, 3)),
}
TRANSFORMED = [(t, m) for m in MODELS for t in TRANSFORMS if m != "LSTM" or t in RNN_GOES_THROUGH]


def own_tensors(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())]


def everything_stored(model: nn.Module) -> Iterator[Tensor]:
    """What the carriers of `model` hold besides their parts."""
    for module in model.modules():
        if carrier.recipes_of(module):
            store = carrier.store_of(module)
            for stored in store.values():
                yield from (stored.value, *stored.sources)
            yield from store.in_forward.values()


def assert_nothing_is_left(model: nn.Module, own: list[tuple[str, int]], attributes: list[list[str]]) -> None:
    assert own_tensors(model) == own
    assert [list(vars(module)) for module in model.modules()] == attributes
    for tensor in everything_stored(model):
        assert type(tensor) in (Tensor, nn.Parameter)
        assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined]
        assert not torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None
    for module in model.modules():
        if carrier.recipes_of(module):
            store = carrier.store_of(module)
            assert not store.in_forward
            assert not store.blocks
            assert not store.copying


@pytest.mark.usefixtures("a_quick_collector")
@pytest.mark.parametrize(("transform", "which"), TRANSFORMED)
@pytest.mark.parametrize("form", ["recomputed", "inlined"])
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("block", [contextlib.nullcontext, cached], ids=["", "cached"])
def test_a_transform_leaves_nothing_in_the_module(
    transform: str, which: str, form: str, fails: bool, block: Callable[..., Any]
) -> None:
    make, shape = MODELS[which]
    model, x = make(form), torch.randn(shape, dtype=torch.float64)
    model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    own, attributes = own_tensors(model), [list(vars(module)) for module in model.modules()]
    others = {name: parameter.detach() * 1.5 for name, parameter in model.named_parameters()}
    references = [weakref.ref(tensor) for tensor in others.values()]

    def loss(parameters: Tensors, x: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters, (x,))
        if fails:
            raise Failure
        return output.square().mean()

    with block(model):
        with pytest.raises(Failure) if fails else contextlib.nullcontext():
            TRANSFORMS[transform](loss, others, x)
        if block is cached:
            assert_own_output(model, x)
    del others, loss
    gc.collect()
    assert_nothing_is_left(model, own, attributes)
    assert [reference() is None for reference in references] == [True] * len(references), (
        "a tensor of the call lives on"
    )
    assert_own_output(model, x)
    torch.autograd.grad(model(x).sum(), list(model.parameters()))


def assert_own_output(model: Small, x: Tensor) -> None:
    layer: Any = model.layer
    state = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    ((path, _, norm),) = normed(model)
    name = path.removeprefix("layer.")
    if isinstance(norm, SpectralNorm):
        weight = spectral_weight(*(state.pop(f"{name}_{part}") for part in ("orig", "u", "v")), 0).double()
    else:
        weight = weight_of(state.pop(f"{name}_g"), state.pop(f"{name}_v"), norm.dim)  # type: ignore[attr-defined]
    plain: Any = {4: nn.Linear(3, 4), 3: nn.ConvTranspose1d(3, 4, 2), 16: nn.LSTM(3, 4)}[weight.shape[0]].double()
    plain.load_state_dict({**state, name: weight})
    expected = plain(x)
    torch.testing.assert_close(model(x), expected[0] if isinstance(expected, tuple) else expected, rtol=1e-6, atol=1e-6)


# Parts that do not belong together


def norm_of(layer: nn.Module) -> Any:
    return next(normed(layer))[2]


WAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "recompute": lambda layer, x: norm_of(layer).recompute(layer),
    "recompute_all": lambda layer, x: recompute_all(layer),
    "compute_weight": lambda layer, x: norm_of(layer).compute_weight(layer),
    "steps": lambda layer, x: steps(layer),
    "cached": lambda layer, x: cached(layer).__enter__(),
    "script": lambda layer, x: torch.jit.script(layer)(x),
    "export": lambda layer, x: torch.export.export(layer, (x,)),
    "compile": lambda layer, x: torch.compile(layer, backend="eager")(x),
}
READS: dict[str, Callable[[Any, Tensor], Any]] = {
    "forward": lambda layer, x: layer(x),
    "read": lambda layer, x: layer.weight,
    "trace": lambda layer, x: torch.jit.trace(layer, x),
}


@pytest.mark.parametrize("way", [way for way in WAYS | READS if way not in ("script", "export", "compile")])
def test_a_part_that_is_none_is_named(way: str) -> None:
    layer: Any = WeightNorm().inline(nn.Linear(20, 40))
    layer.weight_g = None
    with pytest.raises(ValueError, match="cannot compute 'weight' of this Linear: its part 'weight_g' is None"):
        (WAYS | READS)[way](layer, torch.ones(1, 20))


@pytest.mark.parametrize("by", ["another parameter", ".data"])
@pytest.mark.parametrize(
    ("verb", "way"), [*(("apply", way) for way in WAYS), *(("inline", way) for way in WAYS | READS)]
)
def test_a_g_of_another_shape_is_refused_wherever_the_weight_is_computed(verb: str, way: str, by: str) -> None:
    """torch's `_weight_norm` reads past the end of it, and Python aborts with a corrupted heap."""
    layer: Any = getattr(WeightNorm(), verb)(nn.Linear(20, 40))
    if by == ".data":
        layer.weight_g.data = torch.rand(1, 20)
    else:
        layer.weight_g = nn.Parameter(torch.rand(1, 20))
    with pytest.raises(Exception, match=r"\[40, 20\].*\[40, 1\].*\[1, 20\]"):
        (WAYS | READS)[way](layer, torch.ones(1, 20))


FITTING: dict[str, tuple[Callable[[], Any], str, tuple[int, ...], str]] = {
    "clipped": (lambda: ScaledWeightNorm(clip=0.5), "weight_g", (1, 20), "wants a g of the shape [40, 1], not [1, 20]"),
    "clipped, one": (lambda: ScaledWeightNorm(clip=0.5), "weight_g", (1, 1), "of the shape [40, 1], not [1, 1]"),
    "fixed": (lambda: ScaledWeightNorm(learn_scale=False), "weight_g", (1, 20), "of the shape [40, 1], not [1, 20]"),
    "gain": (lambda: WeightStandardization(), "weight_gain", (1, 40), "wants a gain of the shape [40, 1], not [1, 40]"),
    "gamma": (lambda: SigmaReparam(), "weight_g", (40, 1), "wants a g of one number, not of the shape [40, 1]"),
    "u": (lambda: SpectralNorm(), "weight_u", (20,), "wants a u and a v of its lengths, not of the shapes [20]"),
    "v": (lambda: SigmaReparam(), "weight_v", (1, 20), "not of the shapes [40] and [1, 20]"),
    "orig": (lambda: SpectralNorm(), "weight_orig", (20, 40), "matrix of the shape [20, 40] wants a u and a v"),
}


@pytest.mark.parametrize("verb", ["apply", "inline"])
@pytest.mark.parametrize("way", [way for way in WAYS | READS if way != "compile"])
@pytest.mark.parametrize(("norm", "part", "shape", "says"), FITTING.values(), ids=FITTING)
def test_parts_that_do_not_belong_together_are_refused_by_every_norm(
    norm: Callable[[], Any], part: str, shape: tuple[int, ...], says: str, way: str, verb: str
) -> None:
    """In training mode, where the power iterations see them first, and write nothing into u and v."""
    layer: Any = getattr(norm(), verb)(nn.Linear(20, 40))
    own: Any = layer._buffers if part in layer._buffers else layer._parameters
    own[part] = nn.Parameter(torch.rand(shape)) if part in layer._parameters else torch.rand(shape)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(Exception, match=re.escape(says)) as raised:
        (WAYS | READS)[way](layer, torch.ones(1, 20))
    if way != "export":
        assert f"{norm_of(layer)!r} cannot compute 'weight' of this Linear: " in str(raised.value)
    if not part.endswith("_g"):
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
