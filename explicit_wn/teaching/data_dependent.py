"""The data-dependent initialization of the paper, g and bias from a batch."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import carrier
from ..carrier import Recipe
from ..layers import LAYERS, TRANSPOSED, qualified
from ..models.verbs import check_model
from ..norms import WeightNorm

_FUNCTIONS = [nn.functional.linear]
_FUNCTIONS += [nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d]
_FUNCTIONS += [nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d]
_OPERANDS = "input", "weight", "bias"


def data_dependent_init(model: nn.Module, *batch: Any, **keywords: Any) -> list[str]:
    """Sets g and bias so that every pre-activation has mean 0 and variance 1 on one batch; returns the weights' names.

    The initialization of Salimans and Kingma (2016, section 3). `model(*batch, **keywords)` runs once. On its way
    through, every weight-normed Linear, Conv and ConvTranspose layer is given, for each of its output channels,
    `g = 1/σ` and `bias = -μ/σ`, where μ and σ are the mean and the standard deviation of `v/‖v‖ · x` over the batch,
    before its output goes on to the next layer. A layer that is called several times keeps what the first call gave.

    The parameters `g` and `bias` apart, the model is afterwards what it was: buffers such as BatchNorm's statistics,
    the random state of torch and the training flag, in which the model runs as it is. No hook is registered. An error
    leaves everything as it was.

    >>> model = nn.Sequential(WeightNorm().inline(nn.Linear(8, 16)), nn.ReLU(), WeightNorm().inline(nn.Linear(16, 2)))
    >>> batch = torch.randn(64, 8)
    >>> data_dependent_init(model, batch)
    ['0.weight', '2.weight']
    >>> torch.allclose(model(batch).mean(dim=0), torch.zeros(2), atol=1e-5)
    True
    >>> torch.allclose(model(batch).var(dim=0, correction=0), torch.ones(2), atol=1e-5)
    True
    """
    check_model("data_dependent_init", model)
    layers = _layers_to_initialize(model)
    if not layers:
        raise ValueError(
            f"data_dependent_init: this {type(model).__name__} has no weight-normed Linear, Conv or ConvTranspose "
            "layer. apply_all(model, WeightNorm(dim='out')) makes them so."
        )
    order: list[str] = []
    with _restored(model, layers.values()), torch.no_grad(), _uncompiled(), _Initializer(layers, order):
        model(*batch, **keywords)
        unused = ", ".join(path or type(layer).__name__ for path, layer in layers.items() if path not in order)
        if unused:
            raise ValueError(
                f"data_dependent_init: on this batch the model did not call {unused} in eager mode. Call "
                "data_dependent_init on the part of the model that does, with what that part is given."
            )
    return [qualified(path, "weight") for path in order]


def _layers_to_initialize(model: nn.Module) -> dict[str, nn.Module]:
    """The weight-normed layers by path; refuses those that cannot be initialized."""
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        for recipe in carrier.recipes_of(module):
            if isinstance(module, LAYERS) and isinstance(recipe.norm, WeightNorm) and recipe.name == "weight":
                layers[path] = module
                why_not = _why_not(module, recipe)
                if why_not:
                    raise _cannot(path, module, why_not)
    return layers


def _cannot(path: str, module: nn.Module, why_not: str) -> ValueError:
    where = f"{path} ({carrier.base_of(module).__name__})" if path else f"this {carrier.base_of(module).__name__}"
    return ValueError(f"data_dependent_init cannot initialize {where}: {why_not}.")


def _why_not(module: nn.Module, recipe: Recipe) -> str | None:
    """Why a layer cannot have mean 0 and variance 1 in every channel, and the way out."""
    output, dim = int(isinstance(module, TRANSPOSED)), recipe.norm.dim
    for name in ("weight_g", "weight_v", "bias"):
        if module._parameters.get(name) is None:
            if name == "bias" and getattr(module, "bias", None) is None:
                return "it has no bias to set the mean with; make it with bias=True"
            return f"its {name} is not a parameter of its own, but computed; initialize before that"
    if dim != output:
        return f'its g belongs to dim={dim} and its output channels are dim {output}; apply the norm with dim="out"'
    if module._parameters["weight_g"].numel() != module._parameters["bias"].numel():  # type: ignore[union-attr]
        return f"its {module.groups} groups share each g; make it with groups=1"
    return None


@contextlib.contextmanager
def _restored(model: nn.Module, layers: Iterable[Any]) -> Iterator[None]:
    """Undoes what happens to buffers and to the random state in this block; after an error, to g and bias as well."""
    parts = [part for layer in layers for part in (layer.weight_g, layer.bias)]
    before = [(part, part.detach().clone()) for part in parts]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    _forget_all(model)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(list(devices), device_type="cuda"):
            yield
    except BaseException:
        values += before
        raise
    finally:
        with torch.no_grad():
            for module, own in buffers:
                module._buffers.clear()
                module._buffers.update(own)
            for tensor, value in values:
                tensor.copy_(value)
        _forget_all(model)


def _forget_all(model: nn.Module) -> None:
    for module in model.modules():
        carrier.forget_all(module)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Has what was compiled run in eager mode; without importing Dynamo, if nothing was."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


class _Initializer(TorchFunctionMode):
    """Initializes each layer at the moment when the model first computes with its weight."""

    def __init__(self, layers: dict[str, nn.Module], order: list[str]) -> None:
        super().__init__()
        self.layers, self.order = layers, order

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _FUNCTIONS:
            given = dict(zip(_OPERANDS, args, strict=False)) | kwargs
            others = {name: value for name, value in kwargs.items() if name not in _OPERANDS}
            compute = functools.partial(function, given["input"])
            for path in self._first_used(given["weight"]):
                layer = self.layers[path]
                if given.get("bias") is not layer.bias:
                    raise _cannot(path, layer, "the model uses its weight without its bias")
                self.order.append(path)
                weight = _initialize(path, layer, lambda weight, bias: compute(weight, bias, *args[3:], **others))
                return compute(weight, layer.bias, *args[3:], **others)
        return function(*args, **kwargs)

    def _first_used(self, weight: Tensor) -> Iterator[str]:
        """The path of the layer whose weight this is, if it has not been initialized."""
        for path, layer in self.layers.items():
            if path not in self.order and carrier.in_use(layer, "weight") is weight:
                yield path


def _initialize(path: str, layer: Any, compute: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """Sets g and bias of `layer`, and returns its new weight; `compute` gives its output for a weight and a bias."""
    (recipe,) = (recipe for recipe in carrier.recipes_of(layer) if recipe.name == "weight")
    g, v = layer.weight_g, layer.weight_v
    with torch.no_grad():
        output = compute(recipe.make({"g": torch.ones_like(g), "v": v}), None)
        values = output.movedim(output.dim() - v.dim() + 1, 0).reshape(layer.bias.numel(), -1)  # the channels first
        mean, deviation = values.mean(1), values.std(1, correction=0)
        least = 4 * torch.finfo(output.dtype).eps * values.abs().amax(1)
        bad = (~(deviation > least) | deviation.isinf()).nonzero().flatten().tolist()
        if bad:
            shown = f"{bad[:5]} and {len(bad) - 5} more" if len(bad) > 5 else str(bad)
            why_not = f"over the {values.shape[1]} values of each, its output channels {shown} do not vary"
            if not deviation.isfinite().all():
                why_not = f"its output channels {shown} are not finite"
            raise _cannot(path, layer, f"{why_not}; give another batch, or initialize v otherwise")
        g.copy_((1 / deviation).view_as(g))
        layer.bias.copy_(-mean / deviation)
        return carrier.refresh(layer, recipe)
