"""What an editor offers: the names of the package, those of a norm object, and what can be caught by name."""

import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import explicit_wn
from explicit_wn import ForeignNormWarning, SpectralNorm, StaleWeightError, WeightNorm, convert, detect_stale

VERBS = {"apply", "assign", "call", "clone", "compute_weight", "inline", "recompute", "remove"}
PROTOCOL = {
    "advance",
    "buffer_parts",
    "default_dim",
    "formula",
    "inverse",
    "no_inverse",
    "objection",
    "quick",
    "spellings",
    "split",
    "steps",
}


def offered(norm: nn.Module) -> set[str]:
    """What an editor offers on `norm`, beside what every nn.Module has."""
    return {name for name in dir(norm) if not name.startswith("_")} - set(dir(nn.Module()))


def test_a_norm_object_shows_its_verbs_its_settings_and_the_protocol_and_nothing_else() -> None:
    verbs = VERBS - set(dir(nn.Module()))
    assert offered(WeightNorm()) == {*verbs, *PROTOCOL, "name", "dim", "eps", "from_r"}
    settings = {"name", "n_power_iterations", "eps", "dim", "warmup", "first"}
    assert offered(SpectralNorm()) == {*verbs, *PROTOCOL, *settings}


def classes() -> Iterator[type]:
    """Every class that the package defines."""
    for found in pkgutil.walk_packages(explicit_wn.__path__, "explicit_wn."):
        module = importlib.import_module(found.name)
        yield from (cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == found.name)


def test_every_error_and_warning_of_ours_is_exported() -> None:
    ours = {cls.__name__ for cls in classes() if issubclass(cls, Exception) and cls.__name__[0] != "_"}
    assert ours == {"ForeignNormWarning", "LostWriteWarning", "StaleWeightError", "StaleWeightWarning"}
    assert ours <= set(explicit_wn.__all__)


def test_they_are_what_is_raised_and_warned() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("u", torch.ones(1, 2))
    with pytest.warns(ForeignNormWarning, match="convert leaves alone"):
        convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ForeignNormWarning)
        convert(model)
    layer = WeightNorm().apply(nn.Linear(2, 2))
    nn.init.ones_(layer.weight_g)
    with detect_stale(), pytest.raises(StaleWeightError):
        layer(torch.ones(1, 2))


def test_the_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", explicit_wn.__version__)


def test_the_license_lies_in_the_package() -> None:
    license = (Path(explicit_wn.__file__).parent / "LICENSE").read_text()
    assert license.startswith("MIT License\n")
    assert "the explicit_wn authors" in license
