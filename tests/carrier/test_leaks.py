"""Nothing piles up, and what is deleted goes: the short form of `soak.py`, without the resident memory."""

import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import soak
import torch
from torch import nn

import explicit_wn
from explicit_wn import WeightNorm, cached, carrier, fold, normed

pytestmark = [
    pytest.mark.usefixtures("a_quick_collector"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.no_cover,  # which makes calls, and objects, of its own
]


@pytest.mark.parametrize("name", soak.cycles())
def test_a_few_cycles_leave_nothing_behind(name: str) -> None:
    cycle, _ = soak.cycles()[name]
    before, after = soak.grown(cycle, count=40, first=10)
    assert after.objects - before.objects < 15  # half an object for each cycle
    assert [after.tensors, after.classes, after.sources] == [before.tensors, before.classes, before.sources]


def test_a_leak_of_one_object_would_be_seen() -> None:
    kept: list[Any] = []
    before, after = soak.grown(lambda: kept.append([]), count=40, first=10)
    assert after.objects - before.objects >= 30
    assert soak.growth_of(before, after) == [f"objects +{after.objects - before.objects}"]
    before, after = soak.grown(lambda: kept.append(WeightNorm().apply(nn.Linear(2, 2))), count=5, first=1)
    assert after.tensors > before.tensors


USES: dict[str, Callable[[soak.Net], Any]] = {
    "nothing": lambda model: None,
    "training": lambda model: model(soak.X).sum().backward(),
    "inference": torch.no_grad()(lambda model: model(soak.X)),
    "cached": soak.use_cached,
    "copied": lambda model: copy.deepcopy(model)(soak.X),
    "saved and loaded": soak.save_and_load,
    "transformed": soak.transform,
    "in a thread": soak.in_a_thread,
    "looked at": soak.look_for_stale,
    "folded": fold,
    "an error in the forward": lambda model: fails(model),
    "an error within cached": lambda model: fails_within_cached(model),
    "traced": lambda model: torch.jit.trace(model.eval(), soak.X),
    "exported": lambda model: torch.export.export(model.eval(), (soak.X,)),
    "scripted": lambda model: explicit_wn.script(soak.Scripted()),
}


def fails(model: soak.Net) -> None:
    for module in (model, model.inlined, model.middle):
        with contextlib.suppress(RuntimeError):
            module(torch.ones(1, 3))


def fails_within_cached(model: soak.Net) -> None:
    with contextlib.suppress(RuntimeError), cached(model):
        model(torch.ones(1, 3))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_model_that_is_deleted_is_collected_with_all_that_it_held(use: Callable[[soak.Net], Any]) -> None:
    class Local(nn.Linear):
        pass

    def references() -> list[weakref.ref[Any]]:
        model = soak.Net()
        model.inlined = WeightNorm(eps=1e-6).inline(Local(8, 32))
        held: list[Any] = [model, *model.parameters(), *model.buffers()]
        held += [type(model.inlined)] if use is not USES["traced"] else []  # torch.jit keeps the classes that it saw
        use(model)
        for _, module, _ in normed(model):
            explicit_wn.recompute_all(model)
            held += [module, module.weight, carrier.store_of(module)]
        return [weakref.ref(one) for one in held]

    found = references()
    while gc.collect():
        pass
    assert [reference() for reference in found] == [None] * len(found)


def test_the_weights_of_threads_that_ended_are_not_kept() -> None:
    model, weights = soak.Net(), []

    def work() -> None:
        model(soak.X)
        for _, module, _ in normed(model):
            weights.append(weakref.ref(module.weight))

    for _ in range(20):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    gc.collect()
    assert sum(weight() is not None for weight in weights) <= len(list(normed(model)))  # the last thread's
    for _, module, _ in normed(model):
        assert not carrier.store_of(module).in_forward
