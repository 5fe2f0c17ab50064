"""`assign_all`: what an initialization writes into normed weights is kept, or nothing is changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from explicit_wn import LostWriteWarning, SpectralNorm, WeightNorm, apply_all, assign_all, normed

X = torch.randn(5, 6)


def model_of(norm: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))
    apply_all(model, norm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def by_data(module: nn.Module) -> None:
    if type(module).__name__ == "Linear":
        module.weight.data.normal_(0, 0.01)


def by_init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        if module.bias is not None:
            nn.init.constant_(module.bias, 0.5)


def by_reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def by_replacement(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight = nn.Parameter(torch.randn_like(module.weight))


def by_copy(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        with torch.no_grad():
            module.weight.copy_(torch.eye(*module.weight.shape) + 0.1)


INITS = [by_data, by_init, by_reset, by_replacement, by_copy]


@pytest.mark.parametrize("init", INITS, ids=lambda init: init.__name__)
@pytest.mark.parametrize("norm", [WeightNorm(), WeightNorm(dim=None, eps=1e-6), SpectralNorm()], ids=repr)
def test_it_gives_what_a_plain_model_would_have_before_its_norms(norm: Any, init: Callable[[nn.Module], None]) -> None:
    model = model_of(norm)
    parameters, order = dict(model.named_parameters()), list(model.state_dict())
    plain = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))
    torch.manual_seed(1)
    assert assign_all(model, init) == ["0.weight", "2.weight"]
    torch.manual_seed(1)
    plain.apply(init)
    for name, module, _ in normed(model):
        expected = plain.get_parameter(name).detach()
        if isinstance(norm, SpectralNorm):
            expected = expected / torch.linalg.matrix_norm(expected, 2)
        tolerance = {"rtol": 0.2, "atol": 0.02} if isinstance(norm, SpectralNorm) else {}
        torch.testing.assert_close(module.weight, expected, **tolerance)
    if init in (by_init, by_reset):
        torch.testing.assert_close(model[0].bias, plain[0].bias)
    assert list(model.state_dict()) == order
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model(X).sum().backward()


@pytest.mark.parametrize("verb", ["apply", "inline"])
def test_an_lstm_and_two_norms_of_one_module_keep_what_is_written(verb: str) -> None:
    lstm = nn.LSTM(3, 2)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        getattr(WeightNorm(), verb)(lstm, name)
    assert assign_all(lstm, lambda module: nn.init.constant_(module.weight_hh_l0, 0.25)) == ["weight_hh_l0"]
    plain = nn.LSTM(3, 2)
    plain.load_state_dict({name: getattr(lstm, name).detach() for name in plain.state_dict()})
    assert (plain.weight_hh_l0 == 0.25).all()
    torch.testing.assert_close(lstm(torch.ones(4, 3))[0], plain(torch.ones(4, 3))[0])


def test_a_weight_that_is_left_alone_keeps_its_parts_to_the_bit() -> None:
    model = model_of(WeightNorm())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert assign_all(model, lambda module: None) == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def zeros_in_the_second(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.constant_(module.weight, 0.0 if module.bias is None else 1.0)


def fails_in_the_second(module: nn.Module) -> None:
    by_data(module)
    if getattr(module, "bias", 0) is None:
        raise KeyboardInterrupt


def of_another_shape(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight = nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("init", "error", "message"),
    [
        (
            zeros_in_the_second,
            ValueError,
            r"^2: WeightNorm.* cannot take over 'weight' of this Linear: along dim 0, ",
        ),
        (of_another_shape, ValueError, r"^0: .*a tensor of the shape \(4, 6\) is wanted, not the shape \(2, 2\)\.$"),
        (fails_in_the_second, KeyboardInterrupt, None),
        (3, TypeError, "assign_all wants a function second"),
        (nn.Linear(2, 2), TypeError, "assign_all wants a function second"),
    ],
)
def test_what_fails_changes_nothing(init: Any, error: type[BaseException], message: Any) -> None:
    model = model_of(WeightNorm())
    before = {name: (tensor, tensor.clone()) for name, tensor in model.named_parameters()}
    expected = model(X).detach()
    with pytest.raises(error, match=message):
        assign_all(model, init)
    for name, tensor in model.named_parameters():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert [name for name, _, _ in normed(model)] == ["0.weight", "2.weight"]
    torch.testing.assert_close(model(X), expected)


def test_a_lost_initialization_is_lost_without_it() -> None:
    """What `assign_all` is for: if this fails, torch or we keep such writes, and the docstring is out of date."""
    model = model_of(WeightNorm())

    def weights() -> list[Tensor]:
        return [module.weight.detach().clone() for _, module, _ in normed(model)]

    before = weights()
    model.apply(by_data)
    with pytest.warns(LostWriteWarning, match="assign_all") as told:
        after = weights()
    assert len(told) == len(after)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)
