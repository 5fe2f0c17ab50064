"""A file as a user writes it, for type checkers: what they understand, and what they refuse, marked by a comment."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import explicit_wn
from explicit_wn import (
    ForeignNormWarning,
    SpectralNorm,
    StaleWeightError,
    WeightNorm,
    apply_all,
    cached,
    convert,
    fold,
    normed,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm("weight", dim=0)
        self.fc = self.wn.apply(nn.Linear(20, 40))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        output: Tensor = self.fc(x)  # torch says Any of every call of a module
        return output


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


net, wn, sn = Net(), WeightNorm(), SpectralNorm(n_power_iterations=2)

# What a verb is given it returns, of the same type
assert_type(net.fc, nn.Linear)
assert_type(wn.apply(nn.Linear(2, 3)), nn.Linear)
assert_type(wn.apply(nn.Linear(2, 3), "weight", 1), nn.Linear)
assert_type(wn.apply(nn.LSTM(2, 3), name="weight_ih_l0", dim="whole"), nn.LSTM)
assert_type(wn.inline(nn.Conv1d(2, 3, 1), dim="out"), nn.Conv1d)
assert_type(wn(net.fc), nn.Linear)
assert_type(wn.call(net.fc), nn.Linear)
assert_type(wn.assign(net.fc, torch.ones(40, 20)), nn.Linear)
assert_type(wn.remove(net.fc), nn.Linear)
assert_type(wn.compute_weight(net.fc), Tensor)
assert_type(sn.apply(net), Net)

# A function is nn.Module.apply
assert_type(wn.apply(initialize), WeightNorm)
assert_type(sn.apply(initialize), SpectralNorm)
assert_type(net.apply(initialize), Net)

# Objects
assert_type(wn.clone(), WeightNorm)
assert_type(WeightNorm.from_r("weight", None), WeightNorm)
norms: list[nn.Module] = [WeightNorm(dim=None), WeightNorm(dim="out"), WeightNorm(dim="whole"), SpectralNorm(dim="out")]

# The names of torch
assert_type(weight_norm(nn.Conv1d(1, 8, 3), "weight", -1), nn.Conv1d)
assert_type(weight_norm(nn.Conv1d(1, 8, 3), dim=None), nn.Conv1d)
assert_type(spectral_norm(nn.Linear(2, 3), n_power_iterations=2), nn.Linear)
assert_type(remove_weight_norm(nn.Linear(2, 3)), nn.Linear)
assert_type(remove_spectral_norm(nn.Linear(2, 3)), nn.Linear)

# Whole models
assert_type(apply_all(net, wn, where=nn.Linear), list[str])
assert_type(convert(net), list[str])
assert_type(fold(net), list[str])
with cached(net) as same:
    assert_type(same, Net)
for name, module, _norm in normed(net):
    assert_type((name, module), tuple[str, nn.Module])
assert_type(explicit_wn.__version__, str)
errors: list[type[Exception]] = [ForeignNormWarning, StaleWeightError]

# What is refused
WeightNorm(dim="channels")  # error
WeightNorm(dim=0.5)  # error
WeightNorm(nn.Linear(2, 3))  # error
wn.apply(nn.Linear(2, 3), dim="all")  # error
wn.apply("weight")  # error
wn.inline(nn.Linear(2, 3), dim=1.5)  # error
wn.recompute(torch.ones(2))  # error
wn.apply(initialize).weight_g.no_such()  # error
wn.no_such_verb(net)  # error
weight_norm(net, dim="out")  # error
weight_norm("weight")  # error
remove_weight_norm(net, 0)  # error
apply_all(wn)  # error
linear: nn.Conv1d = wn.apply(nn.Linear(2, 3))  # error
