"""The whole tensor under a name that means it everywhere; a `None` given to `apply` means "as the object says"."""

from typing import Any

import pytest
import torch
from layers import by_hand, make_stale
from torch import nn

from explicit_wn import SpectralNorm, WeightNorm

VERBS = pytest.mark.parametrize("verb", ["apply", "inline"])


@VERBS
def test_whole_given_to_a_verb_is_the_whole_tensor_and_none_is_the_objects_dim(verb: str) -> None:
    wn = WeightNorm(dim=1)
    whole = getattr(wn, verb)(nn.Linear(4, 3), dim="whole")
    as_said = getattr(wn, verb)(nn.Linear(4, 3), dim=None)
    for layer, dim in (whole, None), (as_said, 1):
        make_stale(layer)
        wn.recompute(layer)
        torch.testing.assert_close(layer.weight, by_hand(layer, dim=dim))
    assert (whole.weight_g.dim(), as_said.weight_g.shape) == (0, (1, 4))
    torch.testing.assert_close(wn.compute_weight(whole, dim="whole"), by_hand(whole, dim=None))
    with pytest.raises(ValueError, match="its parts were made for"):
        wn.compute_weight(as_said, dim="whole")


def test_an_object_made_with_whole_is_one_made_with_none() -> None:
    whole, none = WeightNorm(dim="whole").apply(nn.Linear(4, 3)), WeightNorm(dim=None).apply(nn.Linear(4, 3))
    assert type(whole) is type(none)
    assert repr(whole).endswith("weight=WeightNorm(dim=None))")
    assert repr(WeightNorm(dim="whole")) == "WeightNorm('weight', dim='whole')"


@VERBS
def test_a_spectral_norm_has_no_norm_of_the_whole_tensor(verb: str) -> None:
    layer: Any = nn.Linear(4, 3)
    with pytest.raises(TypeError, match=r'this Linear: dim is an int, "out" or None, not \'whole\''):
        getattr(SpectralNorm(), verb)(layer, dim="whole")
    assert type(layer) is nn.Linear


def test_what_an_out_of_range_dim_is_told_is_right_where_it_was_given() -> None:
    layer = nn.Linear(4, 3)
    for dim in -1, 2:
        with pytest.raises(ValueError, match='"whole"'):
            WeightNorm(dim=1).apply(layer, dim=dim)
    with pytest.raises(ValueError, match='from 0 to 1, or "out"'):
        SpectralNorm().apply(layer, dim=2)
