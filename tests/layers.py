"""The models that go through every context, each with a way to its output that does not use the package.

A `Subject` builds one model in one of two forms: *explicit*, where `forward` calls `recompute`, and *inlined*. Built
around `NoNorm` the same model is a plain one, and `Subject.expected` runs that with weights computed here.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from explicit_wn import StaleWeightWarning, WeightNorm

Dim = int | str | None


class NoNorm(nn.Module):
    """Stands in a plain model where another has its WeightNorm."""

    def __init__(self, name: str = "weight", dim: Dim = 0, eps: float = 0.0) -> None:
        super().__init__()

    def apply(self, module: Any, name: str | None = None, dim: Dim = None) -> Any:
        return module

    inline = apply

    def recompute(self, module: nn.Module) -> None:
        pass

    forward = recompute


Norm = Callable[..., Any]


def norm_of(v: Tensor, dim: int | None) -> Tensor:
    """‖v‖ over every dimension but `dim`."""
    others = [index for index in range(v.dim()) if index != dim]
    if not others:
        return v.abs()
    return v.pow(2).sum(others, keepdim=dim is not None).sqrt()


def weight_of(g: Tensor, v: Tensor, dim: int | None = 0, eps: float = 0.0) -> Tensor:
    """g · v / max(‖v‖, eps), in float64."""
    return (g.double() * v.double() / norm_of(v.double(), dim).clamp_min(eps)).to(v.dtype)


def by_hand(module: nn.Module, name: str = "weight", dim: int | None = 0, eps: float = 0.0) -> Tensor:
    """`weight_of` the parts of `module` as they are now."""
    return weight_of(getattr(module, f"{name}_g"), getattr(module, f"{name}_v"), dim, eps)


def holding(weight: Tensor, name: str = "weight") -> nn.Module:
    """A module with one parameter and nothing else."""
    module = nn.Module()
    module.register_parameter(name, nn.Parameter(weight))
    return module


def make_stale(module: nn.Module, *names: str) -> None:
    """Changes g and v of these weights behind the stored ones."""
    with torch.no_grad():
        for name in names or ("weight",):
            getattr(module, f"{name}_g").mul_(2)
            getattr(module, f"{name}_v").add_(0.5)


def read_stale(module: Any, name: str = "weight") -> Any:
    """The stored weight, behind which the parts have changed: the first read of it says so."""
    with pytest.warns(StaleWeightWarning, match=f"{name} of this .* is stale"):
        return getattr(module, name)


def first_output(module: nn.Module, x: Tensor) -> Tensor:
    """What a module gives; of what an RNN gives, the outputs."""
    result = module(x)
    return result[0] if isinstance(result, tuple) else result


def change_parts(module: nn.Module, seed: int) -> None:
    """Gives every part new values in place, behind the stored weight, and none near zero."""
    generator = torch.Generator().manual_seed(seed)
    changed: set[int] = set()
    with torch.no_grad():
        for name, part in module.named_parameters():
            if part.data_ptr() in changed or not name.endswith(("_g", "_v")):
                continue
            changed.add(part.data_ptr())
            noise = torch.randn(part.shape, generator=generator, dtype=torch.float64)
            part.copy_(noise + 0.5 * noise.sign())
    assert changed


# The models. TorchScript reads their source, so every one is written out.


class Net(nn.Module):
    """The first module of the README."""

    def __init__(self, norm: Any = None, layer: nn.Module | None = None, verb: str = "apply") -> None:
        super().__init__()
        self.wn = WeightNorm() if norm is None else norm
        self.fc = getattr(self.wn, verb)(nn.Linear(3, 2) if layer is None else layer)

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        return self.fc(x)


class Explicit(nn.Module):
    def __init__(self, norm: Norm, layer: nn.Module, names: tuple[str, ...], dim: Dim) -> None:
        super().__init__()
        self.wn = norm(names[0], dim)
        for name in names:
            self.wn.apply(layer, name)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.layer)
        return self.layer(x)


class ExplicitPair(Explicit):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.wn.recompute(self.layer)
        return self.layer(x, y)


class ExplicitRecurrent(Explicit):
    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.layer)
        return self.layer(x)[0]


class ExplicitAttention(Explicit):
    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.layer)
        return self.layer(x, x, x)[0]


class Inlined(nn.Module):
    def __init__(self, norm: Norm, layer: nn.Module, names: tuple[str, ...], dim: Dim) -> None:
        super().__init__()
        wn = norm(names[0], dim)
        for name in names:
            wn.inline(layer, name)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class InlinedPair(Inlined):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x, y)


class InlinedRecurrent(Inlined):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class InlinedAttention(Inlined):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0]


class UsersLayer(nn.Module):
    """A layer that a user wrote: another parameter name, an optional argument, a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 4))
        self.shift = nn.Parameter(torch.randn(3))

    def shifted(self, y: Tensor, scale: float) -> Tensor:
        return y + scale * self.shift

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.shifted(x @ self.kernel.t(), scale)


class TwoKernels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, 4))
        self.up = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.down.t()) @ self.up.t()


class ExplicitTwoNames(nn.Module):
    """Two norms with two dims on one module, each recomputed by its own object."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.down_wn = norm("down", 0)
        self.up_wn = norm("up", 1)
        self.layer = self.up_wn.apply(self.down_wn.apply(TwoKernels()))

    def forward(self, x: Tensor) -> Tensor:
        self.down_wn.recompute(self.layer)
        self.up_wn.recompute(self.layer)
        return self.layer(x)


class InlinedTwoNames(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.layer = norm("up", 1).inline(norm("down", 0).inline(TwoKernels()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class ExplicitTwoDims(nn.Module):
    """Two layers of one class with two dims."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.rows = norm("weight", 0)
        self.columns = norm("weight", 1)
        self.a = self.rows.apply(nn.Linear(4, 4))
        self.b = self.columns.apply(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.rows.recompute(self.a)
        self.columns.recompute(self.b)
        return self.b(torch.tanh(self.a(x)))


class InlinedTwoDims(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.a = norm("weight", 0).inline(nn.Linear(4, 4))
        self.b = norm("weight", 1).inline(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class ExplicitManyModules(nn.Module):
    """One object on modules of several classes, and with several dims; calling it is to recompute."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.wn = norm()
        self.conv = self.wn.apply(nn.Conv1d(2, 3, 2))
        self.same = self.wn.apply(nn.Conv1d(3, 3, 1), dim=1)
        self.fc = self.wn.apply(nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.conv)
        self.wn(self.same)
        self.wn(self.fc)
        return self.fc(torch.tanh(self.same(self.conv(x))))


class InlinedManyModules(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        wn = norm()
        self.conv = wn.inline(nn.Conv1d(2, 3, 2))
        self.same = wn.inline(nn.Conv1d(3, 3, 1), dim=1)
        self.fc = wn.inline(nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.same(self.conv(x))))


class ExplicitLoop(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.wn = norm()
        self.layers = nn.ModuleList(self.wn.apply(nn.Linear(3, 3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            self.wn.recompute(layer)
            x = torch.tanh(layer(x))
        return x


class InlinedLoop(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        wn = norm()
        self.layers = nn.ModuleList(wn.inline(nn.Linear(3, 3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class ExplicitOwnParameter(nn.Module):
    """A module that norms a parameter of its own."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 4))
        self.wn = norm("kernel", 0)
        self.wn.apply(self)

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self)
        return x @ self.kernel.t()


class InlinedOwnParameter(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 4))
        norm("kernel", 0).inline(self)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel.t()


class ExplicitShared(nn.Module):
    """One layer that has two places in the model."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.wn = norm()
        self.first = self.wn.apply(nn.Linear(3, 3))
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.first)
        return self.second(torch.tanh(self.first(x)))


class InlinedShared(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.first = norm().inline(nn.Linear(3, 3))
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class ExplicitSequential(nn.Module):
    """Layers reached through a container."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.wn = norm()
        self.body = nn.Sequential(self.wn.apply(nn.Linear(3, 4)), nn.Tanh(), self.wn.apply(nn.Linear(4, 2)))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.body[0])
        self.wn.recompute(self.body[2])
        return self.body(x)


class InlinedSequential(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        wn = norm()
        self.body = nn.Sequential(wn.inline(nn.Linear(3, 4)), nn.Tanh(), wn.inline(nn.Linear(4, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


# The subjects


@attrs.frozen
class Subject:
    """A model, what is normed in it, and an input for it."""

    kind: str
    form: str
    build: Callable[[Norm], nn.Module]
    normed: Mapping[str, int | None]
    """The qualified name of every normed parameter, and the dimension that its norm keeps."""
    inputs: Callable[[], tuple[Tensor, ...]]
    eps: float = 0.0
    recurrent: bool = False

    def __str__(self) -> str:
        return f"{self.kind}-{self.form}"

    def model(self) -> nn.Module:
        """The model, normed, with a stored weight that is out of date."""
        model = self.build(WeightNorm)
        model(*self.inputs())
        change_parts(model, seed=1)
        return model

    def plain_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The `state_dict` of the plain model that this state of the normed one describes."""
        plain = dict(state)
        for name, dim in self.normed.items():
            plain[name] = weight_of(plain.pop(f"{name}_g"), plain.pop(f"{name}_v"), dim, self.eps)
        return plain

    def expected(self, module: nn.Module, inputs: tuple[Tensor, ...] | None = None) -> Tensor:
        """What the model must give, from the parameters that `module` has now."""
        plain = self.build(NoNorm).train(module.training)
        plain.load_state_dict(self.plain_state({name: tensor.detach() for name, tensor in tensors_of(module).items()}))
        with torch.no_grad():
            output: Tensor = plain(*(self.inputs() if inputs is None else inputs))
        return output

    def expected_gradients(self, module: nn.Module, inputs: tuple[Tensor, ...] | None = None) -> dict[str, Tensor]:
        """The gradients of `loss_of` by name, from the parameters that `module` has now."""
        tensors = tensors_of(module)
        leaves = {t.data_ptr(): t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors.values()}
        state = self.plain_state({name: leaves[tensor.data_ptr()] for name, tensor in tensors.items()})
        plain = self.build(NoNorm).train(module.training)
        output = torch.func.functional_call(
            plain, state, self.inputs() if inputs is None else inputs, tie_weights=False
        )
        loss_of(output).backward()
        return {name: leaves[tensor.data_ptr()].grad for name, tensor in tensors.items()}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of `module`, shared ones under all their names."""
    tensors = dict(module.named_parameters(remove_duplicate=False))
    for name in [name for name in tensors if name.startswith("first.")]:
        tensors.setdefault(name.replace("first.", "second."), tensors[name])  # strict export knows the first name only
    return tensors


def loss_of(output: Tensor) -> Tensor:
    """A number on which every entry of `output` has another influence."""
    weights = torch.linspace(0.5, 1.5, output.numel(), device=output.device, dtype=output.dtype)
    return (output * weights.view_as(output)).sum()


def _random(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        return (torch.randn(*shape, generator=torch.Generator().manual_seed(7)),)

    return make


def _pair(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*_random(*shape)(), *_random(*shape)())


def _indices() -> tuple[Tensor, ...]:
    return (torch.tensor([[0, 3, 1], [4, 2, 0]]),)


def _channels_last(make: Callable[[], tuple[Tensor, ...]], memory_format: Any) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(tensor.to(memory_format=memory_format) for tensor in make())


def _layer(
    kind: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[], tuple[Tensor, ...]],
    *,
    names: tuple[str, ...] = ("weight",),
    dim: Dim = 0,
    kept: int | str | None = "as dim",
    eps: float = 0.0,
    forms: tuple[type[Explicit], type[Inlined]] = (Explicit, Inlined),
    recurrent: bool = False,
) -> list[Subject]:
    """The two forms of a model with one layer."""
    normed: Any = {f"layer.{name}": dim if kept == "as dim" else kept for name in names}

    def one_form(form: str, model: type[Explicit] | type[Inlined]) -> Subject:
        def build(norm: Norm) -> nn.Module:
            return model(functools.partial(norm, eps=eps), make(), names, dim)

        return Subject(kind, form, build, normed, inputs, eps, recurrent)

    return [one_form("explicit", forms[0]), one_form("inlined", forms[1])]


def _model(
    kind: str,
    explicit: Callable[[Norm], nn.Module],
    inlined: Callable[[Norm], nn.Module],
    normed: Mapping[str, int | None],
    *shape: int,
) -> list[Subject]:
    """The two forms of a model that is written out above."""
    return [
        Subject(kind, "explicit", explicit, normed, _random(*shape)),
        Subject(kind, "inlined", inlined, normed, _random(*shape)),
    ]


def _weights_of_rnn(make: Callable[[], nn.Module]) -> tuple[str, ...]:
    return tuple(name for name, _ in make().named_parameters() if name.startswith("weight"))


def _recurrent(kind: str, make: Callable[[], nn.Module], names: tuple[str, ...] | None = None) -> list[Subject]:
    names = _weights_of_rnn(make) if names is None else names
    forms = ExplicitRecurrent, InlinedRecurrent
    return _layer(kind, make, _random(5, 2, 3), names=names, forms=forms, recurrent=True)


def _padded_conv_3d() -> nn.Module:
    return nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate")


def _channels_last_conv() -> nn.Module:
    return nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _channels_last_conv_3d() -> nn.Module:
    return nn.Conv3d(2, 3, 2).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


SUBJECTS: list[Subject] = [
    *_layer("Linear", lambda: nn.Linear(3, 4), _random(2, 3)),
    *_layer("Linear_dim_1", lambda: nn.Linear(3, 4), _random(2, 3), dim=1),
    *_layer("Linear_eps", lambda: nn.Linear(3, 4), _random(2, 3), eps=1.0),
    *_layer("Linear_whole", lambda: nn.Linear(3, 4, bias=False), _random(2, 3), dim=None),
    *_layer("Conv1d_groups", lambda: nn.Conv1d(4, 6, 3, groups=2), _random(2, 4, 6)),
    *_layer("Conv1d_reflect", lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect"), _random(2, 2, 5)),
    *_layer("Conv2d", lambda: nn.Conv2d(2, 3, 2, stride=2), _random(2, 2, 4, 4)),
    *_layer("Conv2d_circular", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), _random(2, 2, 4, 4)),
    *_layer("Conv2d_channels_last", _channels_last_conv, _channels_last(_random(2, 2, 4, 4), torch.channels_last)),
    *_layer("Conv3d_replicate", _padded_conv_3d, _random(1, 2, 3, 3, 3)),
    *_layer(
        "Conv3d_channels_last",
        _channels_last_conv_3d,
        _channels_last(_random(1, 2, 3, 3, 3), torch.channels_last_3d),
    ),
    *_layer("ConvTranspose1d", lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), _random(2, 2, 4)),
    *_layer("ConvTranspose1d_out", lambda: nn.ConvTranspose1d(2, 3, 3), _random(2, 2, 4), dim="out", kept=1),
    *_layer(
        "ConvTranspose2d_out",
        lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, output_padding=1, stride=2),
        _random(1, 4, 3, 3),
        dim="out",
        kept=1,
    ),
    *_layer("Embedding", lambda: nn.Embedding(5, 3), _indices),
    *_layer("Embedding_padding", lambda: nn.Embedding(5, 3, padding_idx=2), _indices, eps=1e-12),
    *_layer("Bilinear", lambda: nn.Bilinear(3, 3, 4), _pair(2, 3), forms=(ExplicitPair, InlinedPair)),
    *_recurrent("LSTM", lambda: nn.LSTM(3, 4)),
    *_recurrent("LSTM_one_name", lambda: nn.LSTM(3, 4), names=("weight_hh_l0",)),
    *_recurrent("LSTM_deep", lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)),
    *_recurrent("GRU_deep", lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True)),
    *_layer(
        "MultiheadAttention",
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        _random(2, 3, 4),
        names=("in_proj_weight",),
        forms=(ExplicitAttention, InlinedAttention),
    ),
    *_layer("UsersLayer", UsersLayer, _random(2, 4), names=("kernel",)),
    *_model("two_names", ExplicitTwoNames, InlinedTwoNames, {"layer.down": 0, "layer.up": 1}, 2, 4),
    *_model("two_dims", ExplicitTwoDims, InlinedTwoDims, {"a.weight": 0, "b.weight": 1}, 2, 4),
    *_model(
        "many_modules",
        ExplicitManyModules,
        InlinedManyModules,
        {"conv.weight": 0, "same.weight": 1, "fc.weight": 0},
        *(2, 2, 5),
    ),
    *_model("loop", ExplicitLoop, InlinedLoop, {f"layers.{index}.weight": 0 for index in range(3)}, 2, 3),
    *_model("own_parameter", ExplicitOwnParameter, InlinedOwnParameter, {"kernel": 0}, 2, 4),
    *_model("shared", ExplicitShared, InlinedShared, {"first.weight": 0, "second.weight": 0}, 2, 3),
    *_model("Sequential", ExplicitSequential, InlinedSequential, {"body.0.weight": 0, "body.2.weight": 0}, 2, 3),
]


def subject(kind: str, form: str) -> Subject:
    """The subject of that name."""
    (found,) = [s for s in SUBJECTS if (s.kind, s.form) == (kind, form)]
    return found
