"""`check` finds what is wrong with a model, each thing in the form in which people make it, and nothing else."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import Net
from torch import nn

from explicit_wn import (
    LostWriteWarning,
    SpectralNorm,
    WeightNorm,
    apply_all,
    cached,
    check,
    fold,
    recompute_all,
    report,
)


def found(model: nn.Module, optimizer: Any = None) -> list[tuple[str, str]]:
    return [(row.name, row.problem) for row in check(model, optimizer).rows]


@pytest.mark.parametrize("verb", ["apply", "inline"])
@pytest.mark.parametrize("norm", [WeightNorm, SpectralNorm, lambda: WeightNorm(eps=1e-6)])
def test_a_model_that_trains_as_it_should_has_nothing(verb: str, norm: Any) -> None:
    model = nn.Sequential(Net(norm()), norm().inline(nn.Conv1d(2, 2, 1)) if verb == "inline" else nn.Tanh())
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model[0](torch.randn(4, 3)).sum().backward()
        optimizer.step()
        model[0](torch.randn(4, 3))
        assert found(model, optimizer) == []
        assert not check(model, optimizer)


def test_a_stale_weight_and_one_that_was_written_into() -> None:
    model = Net()
    nn.init.constant_(model.fc.weight_g, 3)
    assert found(model) == [("fc.weight", "stale")]
    model(torch.ones(1, 3))
    assert found(model) == []
    with torch.no_grad():
        model.fc.weight.mul_(2)
    assert found(model) == [("fc.weight", "lost write")]
    assert "assign_all" in str(check(model))
    with pytest.warns(LostWriteWarning):
        model(torch.ones(1, 3))
    assert found(model) == []


def test_a_part_that_is_a_plain_parameter_elsewhere_is_tied() -> None:
    embedding, decoder = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    decoder.weight = embedding.weight
    WeightNorm().inline(decoder)
    assert found(nn.Sequential(embedding, decoder)) == [("1.weight_v", "tied")]
    assert found(nn.Sequential(decoder, embedding)) == [("0.weight_v", "tied")]


@pytest.mark.parametrize("name", ["weight_g", "weight_v"])
def test_parts_that_data_changes_unseen_are_not_called_fresh(name: str) -> None:
    model = Net()
    getattr(model.fc, name).data.add_(1)
    assert found(model) == [("fc.weight", "unknown")]
    assert [row.state for row in report(model).rows] == ["unknown"]
    model(torch.ones(1, 3))
    assert [row.state for row in report(model).rows] == ["fresh"]


def test_an_optimizer_that_was_made_before_the_norms() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apply_all(model, WeightNorm())
    assert found(model, optimizer) == [("0.weight_g", "not in the optimizer"), ("1.weight_g", "not in the optimizer")]
    model[0].weight_g.requires_grad_(False)
    optimizer.add_param_group({"params": [model[1].weight_g]})
    assert found(model, optimizer) == []


def test_weights_that_are_not_finite() -> None:
    model = Net(verb="inline")
    nn.init.zeros_(model.fc.weight_v)
    assert found(model) == [("fc.weight", "not finite")]


def test_parts_that_two_modules_share() -> None:
    model = nn.Sequential(WeightNorm().inline(nn.Linear(3, 3)), WeightNorm().inline(nn.Linear(3, 3)))
    model[1].weight_v = model[0].weight_v
    assert found(model) == [("1.weight_v", "tied")]
    assert found(nn.Sequential(model[0], model[0])) == []


def test_two_norms_of_one_name_and_other_settings() -> None:
    model = Net()
    model.other = WeightNorm()
    assert found(model) == []
    model.other = WeightNorm(dim=1)
    assert found(model) == [("other", "same name")]


@pytest.mark.parametrize(
    ("norm", "problem"),
    [
        (torch.nn.utils.parametrizations.weight_norm, "spelling of torch"),
        (torch.nn.utils.spectral_norm, "spelling of torch"),
        (lambda layer: layer, None),
    ],
)
def test_spellings_of_torch(norm: Any, problem: str | None) -> None:
    assert found(nn.Sequential(norm(nn.Linear(3, 2)))) == ([("0.weight", problem)] if problem else [])


@pytest.mark.parametrize("model", [3, WeightNorm(), None])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="check wants the model first"):
        check(model)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="check wants an optimizer second, with param_groups, and got a list"):
        check(nn.Linear(2, 2), [])  # type: ignore[arg-type]


def with_a_wrong_g(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), norm(nn.Linear(20, 40)), WeightNorm().inline(nn.Linear(2, 2)))
    owner, part = (model[1], "weight_g") if hasattr(model[1], "weight_g") else (parts_of(model[1]), "original0")
    setattr(owner, part, nn.Parameter(torch.rand(1, 20)))
    return model


def parts_of(layer: Any) -> Any:
    """Where torch's parametrization keeps its parts."""
    return layer.parametrizations["weight"]


TORCHS = torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm
WRONG_G = "a weight of the shape [40, 20] with dim=0 wants a g of the shape [40, 1], not [1, 20]"


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [WeightNorm().inline, WeightNorm().apply, *TORCHS])
def test_a_g_of_another_shape_is_found_and_the_rest_is_shown(norm: Any) -> None:
    model = with_a_wrong_g(norm)
    (finding,) = check(model)
    assert (finding.name, finding.problem) == ("1.weight", "broken")
    assert check(model)[0] == finding
    assert WRONG_G in finding.way_out
    states = {row.name: row.state for row in report(model) if row.norm}
    assert states == {"1.weight": "broken", "2.weight": "fresh"}
    says = "cannot fold '1.weight' of this Linear" if norm in TORCHS else "1: WeightNorm"
    with pytest.raises(ValueError, match=f"^{says}.*{re.escape(WRONG_G)}"):
        fold(model)


def test_a_g_of_another_shape_is_named_by_its_path() -> None:
    model = with_a_wrong_g(WeightNorm().apply)
    for compute in recompute_all, lambda model: cached(model).__enter__():
        with pytest.raises(ValueError, match=rf"^1: WeightNorm.*: {re.escape(WRONG_G)}"):
            compute(model)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", TORCHS)
def test_a_norm_of_torchs_whose_v_lost_a_dimension_is_broken(norm: Any) -> None:
    layer = norm(nn.Linear(3, 2), dim=1)
    v = layer.weight_v if hasattr(layer, "weight_v") else parts_of(layer).original1
    v.data = torch.zeros(3)
    assert [row.state for row in report(layer)] == ["broken"]
    assert [finding.problem for finding in check(layer)] == ["broken"]
