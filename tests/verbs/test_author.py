"""What the author of a norm is told where the class is wrong, and what its functions are given."""

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from captured import Captured, Inputs, compiled, exported, in_eager, same, scripted, traced
from layers import Net
from torch import Tensor, nn
from torch.nn.utils import prune

from explicit_wn import Reparametrization

norm: Any = attrs.define(slots=False, eq=False, on_setattr=attrs.setters.NO_OP, repr=False)


def written(**members: Any) -> Any:
    """A norm of the setting `scale`, right but for these members; None leaves one out."""
    right = {
        "formula": staticmethod(lambda v, scale: scale * v),
        "split": lambda self, weight: {"v": weight / self.scale},
    }
    namespace = {name: member for name, member in (right | members).items() if member is not None}
    types = {"name": str, "scale": float}
    made = type("Mine", (Reparametrization,), {**namespace, "__annotations__": types, "name": "weight", "scale": 2.0})
    return norm(made)


def test_the_one_that_is_right_is_right() -> None:
    with torch.inference_mode():
        written()().apply(nn.Linear(2, 3))
    layer = nn.Linear(2, 3)
    weight = layer.weight.detach().clone()
    written()().apply(layer)
    torch.testing.assert_close(layer.weight.detach(), weight)
    torch.testing.assert_close(layer.weight_v.detach(), weight / 2)


CLASSES: dict[str, tuple[dict[str, Any], str]] = {
    "no formula": ({"formula": None}, "Mine: it has no formula; write one as a staticmethod"),
    "a method": ({"formula": lambda self, v: v}, "Mine: its formula takes 'self'; write @staticmethod above it"),
    "advance, a method": ({"advance": lambda self, v: None}, "its advance takes 'self'"),
    "no part": ({"formula": staticmethod(lambda scale: scale)}, "its formula names no part, only settings"),
    "no names": ({"formula": staticmethod(lambda *parts: parts[0])}, "the arguments of its formula have no names"),
    "no signature": ({"formula": torch.exp}, "the arguments of its formula have no names"),
    "advance": (
        {"advance": staticmethod(lambda v, speed: None)},
        r"its advance takes 'speed', which is neither a part that its formula takes \('v'\) nor a setting; rename it",
    ),
    "quick": ({"quick": staticmethod(lambda w: None)}, "its quick takes 'w', which is neither"),
    "steps": ({"steps": staticmethod(lambda v, size: iter(()))}, "its steps takes 'size', which is neither"),
    "buffers": ({"buffer_parts": ("u",)}, "its buffer_parts name 'u', which is no part; its formula takes 'v'"),
}


@pytest.mark.parametrize(("members", "sentence"), CLASSES.values(), ids=CLASSES)
def test_a_class_that_cannot_be_a_norm_says_so_when_an_object_is_made(members: dict[str, Any], sentence: str) -> None:
    mine = written(**members)
    for _ in range(2):
        with pytest.raises(TypeError, match=sentence):
            mine()


def in_place(v: Tensor, scale: float) -> Tensor:
    return v.mul_(scale)


APPLIED: dict[str, tuple[dict[str, Any], str]] = {
    "no dict": ({"split": lambda self, weight: [weight]}, "its split must return a dict of tensors"),
    "no tensor": ({"split": lambda self, weight: {"v": 1.0}}, "its split must return a dict of tensors"),
    "another name": (
        {"split": lambda self, weight: {"v": weight, "g": weight}},
        "its split returns 'g', and its formula takes 'v'; give it the same name",
    ),
    "one too few": (
        {"formula": staticmethod(lambda v, g: g * v)},
        "its formula takes 'g', which its split does not return; return it, or give it a default",
    ),
    "in place": ({"formula": staticmethod(in_place)}, "its formula changes 'v' in place; compute a new tensor"),
    "another shape": (
        {"formula": staticmethod(lambda v: v.sum(0))},
        r"its formula gives the shape \(2,\) for a weight of the shape \(3, 2\)",
    ),
    "another type": ({"formula": staticmethod(lambda v: (v,))}, "its formula gives a tuple for a weight"),
}


@pytest.mark.parametrize(("members", "sentence"), APPLIED.values(), ids=APPLIED)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("verb", ["apply", "inline"])
def test_what_it_does_wrong_is_said_at_the_first_apply_and_changes_nothing(
    members: dict[str, Any], sentence: str, verb: str, mode: Any
) -> None:
    mine, layer = written(**members)(), nn.Linear(2, 3)
    before = layer.weight.detach().clone()
    for _ in range(2):
        with (
            mode(),
            pytest.raises(ValueError, match=rf"Mine\('weight'\) cannot norm 'weight' of this Linear: {sentence}"),
        ):
            getattr(mine, verb)(layer)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, before)


def test_a_norm_without_a_split_says_that_it_wants_one() -> None:
    with pytest.raises(NotImplementedError, match="Mine: it has no split; write one that returns the parts"):
        written(split=None)().apply(nn.Linear(2, 3))


def times(v: Tensor, factor: Tensor, count: Tensor) -> Tensor:
    return v * factor


def count_up(count: Tensor, step: int) -> None:
    count.add_(step)


@norm
class Counting(Reparametrization):
    """Its advance takes one of its three parts, and a setting that its formula does not take."""

    name: str = "weight"
    step: int = 3
    formula = staticmethod(times)
    advance = staticmethod(count_up)
    buffer_parts = ("count",)

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        return {"v": weight, "factor": torch.ones(()), "count": torch.zeros(())}


def pruned(model: Any, inputs: Inputs) -> Captured:
    prune.identity(model.fc, "weight_v")
    return same(model)


@pytest.mark.parametrize("context", [in_eager, scripted, traced, exported, compiled, pruned])
def test_advance_takes_the_parts_and_settings_that_it_names_and_no_others(context: Callable[..., Captured]) -> None:
    model, x = Net(Counting(), nn.Linear(2, 3)), torch.randn(4, 2)
    captured = context(model, (x,))
    assert captured.module is not None
    count = next(buffer for name, buffer in captured.module.named_buffers() if name.endswith("weight_count"))
    before = count.item()
    for number in (1, 2):
        torch.testing.assert_close(captured.run(x), nn.functional.linear(x, model.fc.weight_v, model.fc.bias))
        assert count.item() == before + 3 * number
