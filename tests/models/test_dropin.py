"""torch's four functions under their own names, on the shapes of code that call them."""

import copy
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook
from whole_models import (
    LAYERS,
    SPECTRAL_NORMS,
    WEIGHT_NORMS,
    Layer,
    change_values,
    hook_spectral_norm,
    hook_weight_norm,
    hooks_of,
    normed_weight,
    spectral_weight,
    train,
    unchanged,
)

import explicit_wn
from explicit_wn import (
    SpectralNorm,
    WeightNorm,
    convert,
    normed,
    remove_spectral_norm,
    remove_weight_norm,
    report,
    spectral_norm,
    weight_norm,
)

PAIRS = [
    (weight_norm, nn.utils.weight_norm),
    (spectral_norm, nn.utils.spectral_norm),
    (remove_weight_norm, nn.utils.remove_weight_norm),
    (remove_spectral_norm, nn.utils.remove_spectral_norm),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_signatures_are_torchs(ours: Any, theirs: Any) -> None:
    def of(function: Any) -> list[tuple[str, Any]]:
        return [(one.name, one.default) for one in inspect.signature(function).parameters.values()]

    assert ours.__name__ == theirs.__name__
    assert of(ours) == of(theirs)


def test_no_submodule_stands_in_the_way_of_a_public_name() -> None:
    for found in pkgutil.walk_packages(explicit_wn.__path__, "explicit_wn."):
        __import__(found.name)
    modules = [name for name in explicit_wn.__all__ if inspect.ismodule(getattr(explicit_wn, name))]
    assert modules == ["checkpoint", "functional"]
    assert not inspect.ismodule(explicit_wn.functional.weight_norm)
    assert not inspect.ismodule(explicit_wn.functional.spectral_norm)


# Norming


@pytest.mark.parametrize("dim", [0, 1, None, -1])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_weight_norm_gives_what_torchs_hook_does(layer: Layer, dim: int | None) -> None:
    ours, theirs = layer.model(weight_norm, dim=dim), layer.model(hook_weight_norm, dim=dim)
    assert hooks_of(ours) == []
    for model in ours, theirs:
        change_values(model, seed=1)
    weights = {name: normed_weight(ours.state_dict(), f"layer.{name}", dim) for name in layer.names}
    torch.testing.assert_close(ours(*layer.inputs()).detach(), layer.expected(weights, ours))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(*layer.inputs()), theirs(*layer.inputs()))


@pytest.mark.parametrize("settings", [{}, {"n_power_iterations": 3}, {"eps": 0.0}, {"dim": 1}], ids=str)
def test_spectral_norm_trains_as_torchs_hook_does_from_one_seed(settings: dict[str, Any]) -> None:
    x = torch.randn(5, 4)
    models = []
    for norm in spectral_norm, hook_spectral_norm:
        torch.manual_seed(4)
        model = nn.Sequential(norm(nn.Linear(4, 6), **settings), nn.Tanh(), norm(nn.Linear(6, 2), **settings))
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), (x,))
        models.append(model)
    assert hooks_of(models[0]) == []
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    for key, value in models[1].state_dict().items():
        torch.testing.assert_close(models[0].state_dict()[key], value)
    torch.testing.assert_close(models[0].eval()(x), models[1].eval()(x))


def test_spectral_norm_of_a_transposed_convolution_goes_by_its_outputs() -> None:
    layer = spectral_norm(nn.ConvTranspose1d(3, 4, 2)).eval()
    change_values(layer, seed=1)
    x = torch.randn(2, 3, 5)
    weight = spectral_weight(layer.weight_orig.detach(), layer.weight_u, layer.weight_v, dim=1)
    torch.testing.assert_close(layer(x), nn.functional.conv_transpose1d(x, weight, layer.bias))


BAD: list[tuple[Callable[[nn.Module], Any], type[Exception], str]] = [
    (lambda layer: weight_norm(layer, "kernel"), ValueError, "no such parameter"),
    (lambda layer: weight_norm(layer, dim=2), ValueError, "out of range"),
    (lambda layer: weight_norm(layer, dim=True), TypeError, "dim is"),
    (lambda layer: spectral_norm(layer, n_power_iterations=0), ValueError, "n_power_iterations is"),
    (lambda layer: spectral_norm(layer, eps=-1.0), ValueError, "eps is"),
    (lambda layer: weight_norm(weight_norm(layer)), ValueError, "normed already"),
    (lambda layer: spectral_norm(weight_norm(layer)), ValueError, "normed already"),
]


@pytest.mark.parametrize(("call", "error", "says"), BAD)
def test_bad_input_is_refused(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(nn.Linear(3, 2))


# Removing


WAYS = [(remove_weight_norm, norm) for norm in (weight_norm, *WEIGHT_NORMS.values())]
WAYS += [(remove_spectral_norm, norm) for norm in (spectral_norm, *SPECTRAL_NORMS.values())]


@pytest.mark.parametrize(("remove", "norm"), WAYS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_all_three_spellings_are_removed_and_the_numbers_stay(layer: Layer, remove: Any, norm: Any) -> None:
    model = layer.model(norm)
    model(*layer.inputs())
    change_values(model, seed=1)
    expected = model.eval()(*layer.inputs()).detach()
    for name in layer.names:
        assert remove(model.layer, name) is model.layer
    assert type(model.layer) is type(layer.make())
    assert {name for name, _ in model.layer.named_parameters()} == {n for n, _ in layer.make().named_parameters()}
    assert hooks_of(model) == []
    torch.testing.assert_close(model(*layer.inputs()).detach(), expected)


@pytest.mark.parametrize("norm", [weight_norm, *WEIGHT_NORMS.values()])
def test_one_name_is_removed_and_the_others_stay(norm: Any) -> None:
    lstm = nn.LSTM(2, 3)
    for name in "weight_ih_l0", "weight_hh_l0":
        norm(lstm, name)
    x = torch.randn(4, 1, 2)
    expected = lstm(x)[0].detach()
    remove_weight_norm(lstm, "weight_hh_l0")
    assert [row.norm for row in report(lstm).rows if row.name.startswith("weight")] == ["WeightNorm", ""]
    torch.testing.assert_close(lstm(x)[0].detach(), expected)


@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])  # the hook cannot be copied
def test_copies_of_the_module_keep_their_norm(norm: Any) -> None:
    layer = norm(nn.Linear(3, 2))
    twin, x = copy.deepcopy(layer), torch.ones(1, 3)
    expected = twin(x)
    remove_weight_norm(layer)
    torch.testing.assert_close(twin(x), expected)
    assert report(twin).rows[0].norm == "WeightNorm"


class DerivedHook(WeightNormHook):
    """A hook that somebody derived from torch's."""


def derived() -> nn.Module:
    layer = hook_weight_norm(nn.Linear(3, 2))
    next(iter(layer._forward_pre_hooks.values())).__class__ = DerivedHook
    return layer


def doubly_parametrized() -> nn.Module:
    return parametrizations.orthogonal(parametrizations.weight_norm(nn.Linear(3, 3)))


NOTHING: list[tuple[Callable[[], nn.Module], Any, str]] = [
    (lambda: nn.Linear(3, 2), remove_weight_norm, "WeightNorm to remove from 'weight' of this Linear: neither we nor"),
    (lambda: nn.Linear(3, 2), remove_spectral_norm, "SpectralNorm to remove from 'weight' of this Linear: neither"),
    (lambda: weight_norm(nn.Linear(3, 2), "bias"), remove_weight_norm, "neither we nor torch"),
    (lambda: weight_norm(nn.Linear(3, 2)), remove_spectral_norm, r"WeightNorm\('weight', dim=0\) norms it"),
    (lambda: hook_spectral_norm(nn.Linear(3, 2)), remove_weight_norm, r"SpectralNorm\('weight', dim=0\) norms it"),
    (lambda: parametrizations.spectral_norm(nn.Linear(3, 2)), remove_weight_norm, "SpectralNorm.* norms it"),
    (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), remove_weight_norm, "neither we nor torch"),
    (derived, remove_weight_norm, "remove that hook its own way"),
    (doubly_parametrized, remove_weight_norm, "end the rest first"),
    (WeightNorm, remove_weight_norm, "neither we nor torch"),
    (lambda: nn.Sequential(weight_norm(nn.Linear(3, 2))), remove_weight_norm, "of this Sequential: neither"),
]


@pytest.mark.parametrize(("make", "remove", "says"), NOTHING)
def test_where_nothing_can_be_removed_a_value_error_says_why_and_nothing_changes(
    make: Callable[[], nn.Module], remove: Any, says: str
) -> None:
    module = make()
    with unchanged(module), pytest.raises(ValueError, match=says):
        remove(module)


def test_a_scripted_module_has_nothing_to_remove_and_what_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="finds no WeightNorm"):
        remove_weight_norm(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"remove_weight_norm wants the module first, an nn\.Module, and got a str"):
        remove_weight_norm("weight")  # type: ignore[type-var]


# The shapes of code in which vocoders norm and un-norm themselves


def init_weights(module: nn.Module) -> None:
    if "Conv" in type(module).__name__:
        module.weight.data.normal_(0, 0.3)


class ListOfBlocks(nn.Module):
    """As Hifi-GAN is: normed where it is built, initialized afterwards, and each block ends its own norms."""

    def __init__(self, norm: Any, remove: Any) -> None:
        super().__init__()
        self.remove = remove
        self.before = norm(nn.Conv1d(3, 4, 3, padding=1))
        self.ups = nn.ModuleList(norm(nn.ConvTranspose1d(4, 4, 4, 2, padding=1)) for _ in range(2))
        self.ups.apply(init_weights)
        self.blocks = nn.ModuleList(Block(norm, remove) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for up, block in zip(self.ups, self.blocks, strict=True):
            x = block(up(nn.functional.leaky_relu(x, 0.1)))
        return x

    def remove_weight_norm(self) -> None:
        for layer in self.ups:
            self.remove(layer)
        for block in self.blocks:
            block.remove_weight_norm()
        self.remove(self.before)


class Block(nn.Module):
    def __init__(self, norm: Any, remove: Any) -> None:
        super().__init__()
        self.remove = remove
        self.layers = nn.ModuleList([norm(nn.Conv1d(4, 4, 3, dilation=d, padding=d)) for d in (1, 3)])
        self.layers.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(torch.tanh(x))
        return x

    def remove_weight_norm(self) -> None:
        for layer in self.layers:
            self.remove(layer)


class NewLists(nn.Module):
    """As WaveGlow is: what the function returns is put in a new list, and that in the place of the old one."""

    def __init__(self, norm: Any, remove: Any) -> None:
        super().__init__()
        self.remove = remove
        self.start = norm(nn.Conv1d(3, 4, 1), name="weight")
        self.layers = nn.ModuleList()
        for index in range(2):
            self.layers.append(norm(nn.Conv1d(4, 4, 3, dilation=2**index, padding=2**index), name="weight"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x

    def remove_weight_norm(self) -> None:
        self.start = self.remove(self.start)
        plain = nn.ModuleList()
        for layer in self.layers:
            plain.append(self.remove(layer))
        self.layers = plain


class Everywhere(nn.Module):
    """As Parallel WaveGAN is: every module is tried, and a ValueError says that there was nothing."""

    def __init__(self, norm: Any, remove: Any) -> None:
        super().__init__()
        self.norm, self.remove = norm, remove
        self.body = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Sequential(nn.Conv1d(4, 4, 1)))
        self.apply_weight_norm()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y

    def apply_weight_norm(self) -> None:
        def norm(module: nn.Module) -> None:
            if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                self.norm(module)

        self.apply(norm)

    def remove_weight_norm(self) -> None:
        def remove(module: nn.Module) -> None:
            try:
                self.remove(module)
            except ValueError:
                return

        self.apply(remove)


SHAPES = [(ListOfBlocks, 7), (NewLists, 3), (Everywhere, 2)]
SPELLINGS = [weight_norm, *WEIGHT_NORMS.values()]


def built(shape: Any, norm: Any) -> nn.Module:
    torch.manual_seed(2)
    model: nn.Module = shape(norm, remove_weight_norm)
    change_values(model, seed=1)
    return model


@pytest.mark.filterwarnings("ignore::explicit_wn.LostWriteWarning")  # of `init_weights`, in either spelling
@pytest.mark.parametrize("norm", SPELLINGS)
@pytest.mark.parametrize(("shape", "weights"), SHAPES)
def test_a_models_own_removal_works_as_written_in_every_spelling(shape: Any, weights: int, norm: Any) -> None:
    model, theirs, x = built(shape, norm), shape(hook_weight_norm, None), torch.randn(2, 3, 8)
    assert [row.norm for row in report(model).rows].count("WeightNorm") == weights
    if norm is not parametrizations.weight_norm:
        theirs.load_state_dict(model.state_dict())
    else:
        convert(state := copy.deepcopy(model))
        theirs.load_state_dict(state.state_dict())
    model.remove_weight_norm()
    assert [row.norm for row in report(model).rows if row.norm] == []
    assert hooks_of(model) == []
    torch.testing.assert_close(model(x), theirs(x))


@pytest.mark.filterwarnings("ignore::explicit_wn.LostWriteWarning")  # of `init_weights`, in either spelling
@pytest.mark.parametrize(("shape", "weights"), SHAPES)
def test_such_a_model_is_built_with_the_hooks_numbers_from_one_seed(shape: Any, weights: int) -> None:
    ours, theirs = built(shape, weight_norm), built(shape, hook_weight_norm)
    assert len(list(normed(ours))) == weights
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("shape", "weights"), SHAPES)
def test_torchs_function_in_a_converted_model_leaves_every_norm_and_ours_none(shape: Any, weights: int) -> None:
    model = built(shape, hook_weight_norm)
    convert(model)
    model.remove = nn.utils.remove_weight_norm
    if shape is Everywhere:
        model.remove_weight_norm()  # it swallows the error
    else:
        with pytest.raises(ValueError, match="weight_norm of 'weight' not found"):
            model.remove_weight_norm()
    assert [row.spelling for row in report(model).rows].count("ours") == weights
    model.remove = remove_weight_norm
    model.remove_weight_norm()
    assert list(normed(model)) == []


def test_the_norm_object_ends_what_the_function_began_and_the_other_way_round() -> None:
    first = WeightNorm().remove(weight_norm(nn.Linear(2, 3)))
    second = remove_spectral_norm(SpectralNorm().apply(nn.Linear(2, 3)))
    assert type(first) is type(second) is nn.Linear
