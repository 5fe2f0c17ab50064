"""In a torch that has no TorchScript any more, the package imports and everything else works.

This file is also the program that the tests run, in a process of its own for each removal: it takes TorchScript away,
imports the package only then, and says of every check below whether it held.
"""

import copy
import pickle
import subprocess
import sys
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

STAYS = ("is_scripting", "is_tracing", "annotate", "ignore", "unused", "export")
"""What a torch without a compiler for TorchScript would keep, since models all over the world call it."""
COMPILER = (
    *("Attribute", "CompilationUnit", "freeze", "interface", "load", "optimize_for_inference", "save", "script"),
    "script_method",
)
"""What torch 2.13 itself can do without, once it is imported."""


def hide(jit: types.ModuleType | None) -> None:
    """Has whoever imports torch from now on find `jit` as its `torch.jit`; torch itself goes on with its own."""
    seen = types.ModuleType("torch")
    vars(seen).update({name: value for name, value in vars(torch).items() if name != "jit"})
    if jit is not None:
        vars(seen)["jit"] = jit
    sys.modules["torch"] = seen


def hide_all() -> None:
    hide(None)


def hide_all_but_what_models_call() -> None:
    rest = types.ModuleType("torch.jit")
    vars(rest).update({name: getattr(torch.jit, name) for name in STAYS})
    hide(rest)


def delete_the_compiler() -> None:
    import torch._dynamo
    import torch.export

    for name in COMPILER:
        delattr(torch.jit, name)
    del torch._C._jit_pass_inline  # type: ignore[attr-defined]


REMOVALS: dict[str, Callable[[], None]] = {
    "torch.jit": hide_all,
    "all_but_what_models_call": hide_all_but_what_models_call,
    "the_compiler": delete_the_compiler,
}


# The checks, run in the other process. Each imports what it needs after the removal.


def formula(layer: Any) -> Tensor:
    """The weight by hand, one norm for each entry of dimension 0."""
    v = layer.weight_v.detach()
    return layer.weight_g.detach() * v / v.flatten(1).norm(dim=1).view_as(layer.weight_g)


def every_layer_computes_and_differentiates() -> None:
    from layers import SUBJECTS, loss_of

    for subject in SUBJECTS:
        model, inputs = subject.model(), subject.inputs()
        output = model(*inputs)
        torch.testing.assert_close(output, subject.expected(model), msg=str(subject))
        loss_of(output).backward()
        wanted = subject.expected_gradients(model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            torch.testing.assert_close(parameter.grad, wanted[name], msg=f"{subject} {name}")


def copies_compute_their_own() -> None:
    from layers import SUBJECTS, change_parts

    for subject in SUBJECTS:
        model = subject.model()
        for copied in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
            change_parts(copied, seed=2)
            torch.testing.assert_close(copied(*subject.inputs()), subject.expected(copied), msg=str(subject))
        torch.testing.assert_close(model(*subject.inputs()), subject.expected(model), msg=str(subject))


def states_load() -> None:
    from layers import SUBJECTS, change_parts

    for subject in SUBJECTS:
        model = subject.model()
        other = subject.model()
        change_parts(other, seed=3)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(*subject.inputs()), subject.expected(other), msg=str(subject))


def compiled_models_follow_their_parts() -> None:
    from layers import change_parts, subject

    for kind, form in (("Conv1d_groups", "explicit"), ("two_dims", "inlined"), ("loop", "explicit")):
        of = subject(kind, form)
        model = of.model()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for seed in (4, 5):
            change_parts(model, seed)
            torch.testing.assert_close(compiled(*of.inputs()), of.expected(model), msg=str(of))


def exported_programs_compute() -> None:
    from layers import change_parts, subject

    for kind, form in (("Linear", "explicit"), ("ConvTranspose1d_out", "inlined"), ("LSTM", "explicit")):
        of = subject(kind, form)
        for strict in (False,) if of.recurrent else (False, True):
            exported = torch.export.export(of.model(), of.inputs(), strict=strict).module()
            change_parts(exported, seed=6)
            torch.testing.assert_close(exported(*of.inputs()), of.expected(exported), msg=str(of))


def spectral_norm_follows_torchs_hook() -> None:
    from explicit_wn import SpectralNorm

    theirs = torch.nn.utils.spectral_norm(nn.Linear(4, 3))
    ours = SpectralNorm().inline(nn.Linear(4, 3))
    ours.load_state_dict(theirs.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (theirs, ours)]
    for batch in torch.randn(3, 5, 4):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


def verbs_over_a_whole_model_work() -> None:
    import explicit_wn

    model = nn.Sequential(nn.Linear(3, 4), torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.LSTM(4, 2))
    assert explicit_wn.convert(model) == ["1.weight"]
    assert explicit_wn.apply_all(model, explicit_wn.WeightNorm(), lambda path, _: path == "0") == ["0.weight"]
    explicit_wn.WeightNorm("weight_hh_l0").inline(model[2])
    x = torch.randn(5, 3)
    with torch.no_grad():
        model[0].weight_g.mul_(2)
        model[1].weight_v.add_(0.3)
    expected = nn.functional.linear(nn.functional.linear(x, formula(model[0]), model[0].bias), formula(model[1]))
    expected += model[1].bias
    torch.testing.assert_close(model[:2](x), expected)
    with explicit_wn.cached(model):
        torch.testing.assert_close(model[:2](x), expected)
        with torch.no_grad():
            model[0].weight_g.mul_(3)
        torch.testing.assert_close(model[:2](x), expected)
    assert len(explicit_wn.report(model).rows) == 4
    before = model(x)[0]
    assert explicit_wn.fold(model) == ["0.weight", "1.weight", "2.weight_hh_l0"]
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x)[0], before)
    assert not torch.allclose(model[:2](x), expected)


def a_leftover_recompute_does_nothing() -> None:
    from layers import subject

    from explicit_wn import fold

    of = subject("two_names", "explicit")
    model = of.model()
    expected = of.expected(model)
    fold(model)
    torch.testing.assert_close(model(*of.inputs()), expected)


def the_teaching_verbs_work() -> None:
    from explicit_wn import WeightNorm, data_dependent_init, detect_stale, steps

    wn = WeightNorm()
    layer = wn.apply(nn.Linear(3, 2))
    with torch.no_grad():
        layer.weight_g.mul_(2)
    torch.testing.assert_close(list(steps(layer))[-1].value, formula(layer))
    with pytest.raises(RuntimeError, match="recompute"), detect_stale():
        layer(torch.randn(1, 3))
    wn.recompute(layer)
    with detect_stale():
        layer(torch.randn(1, 3))
    inlined = WeightNorm().inline(nn.Linear(3, 2))
    batch = torch.randn(20, 3)
    assert data_dependent_init(inlined, batch) == ["weight"]
    torch.testing.assert_close(inlined(batch).mean(0), torch.zeros(2), atol=1e-5, rtol=0)


def removing_restores_the_class() -> None:
    from explicit_wn import WeightNorm

    wn = WeightNorm()
    layer = wn.apply(nn.Conv1d(2, 3, 2))
    with torch.no_grad():
        layer.weight_g.mul_(2)
    expected = formula(layer)
    attributes = set(vars(nn.Conv1d(2, 3, 2)))
    assert type(wn.remove(layer)) is nn.Conv1d
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert set(vars(layer)) == attributes


def script_says_one_clear_thing() -> None:
    from explicit_wn import WeightNorm, script

    with pytest.raises(RuntimeError, match=r"TorchScript.*torch\.export"):
        script(WeightNorm().inline(nn.Linear(3, 2)))


def make() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, an input, and its output by plain modules."""
    from explicit_wn import WeightNorm

    plain = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2))
    x = torch.randn(5, 3)
    expected = plain(x)[0].detach()
    WeightNorm().inline(plain[0])
    WeightNorm("weight_ih_l0").inline(plain[1])
    return plain, x, expected


def a_file_from_a_torch_that_has_it_loads() -> None:
    folder = Path(sys.argv[2])
    model, x, expected = torch.load(folder / "from where it is", weights_only=False)
    torch.testing.assert_close(model(x)[0], expected)
    torch.save(make(), folder / sys.argv[1])


CHECKS = [
    every_layer_computes_and_differentiates,
    copies_compute_their_own,
    states_load,
    compiled_models_follow_their_parts,
    exported_programs_compute,
    spectral_norm_follows_torchs_hook,
    verbs_over_a_whole_model_work,
    a_leftover_recompute_does_nothing,
    the_teaching_verbs_work,
    removing_restores_the_class,
    script_says_one_clear_thing,
    a_file_from_a_torch_that_has_it_loads,
]


def main(removal: str) -> None:
    """Prints a line for each check: what became of it, and its name."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="LSTM with projections")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    REMOVALS[removal]()
    import explicit_wn

    seen = explicit_wn.contexts.torchscript.torch  # type: ignore[attr-defined]
    sys.modules["torch"] = torch
    assert (seen is torch) == (removal == "the_compiler")
    assert not hasattr(getattr(seen, "jit", None), "interface")
    for check in CHECKS:
        try:
            check()
            print("held", check.__name__)
        except BaseException:
            traceback.print_exc()
            print("failed", check.__name__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("without_torchscript")
    torch.save(make(), made / "from where it is")
    return made


@pytest.fixture(scope="module", params=REMOVALS)
def ran(request: pytest.FixtureRequest, folder: Path) -> tuple[str, subprocess.CompletedProcess[str]]:
    command = [sys.executable, __file__, request.param, str(folder)]
    return request.param, subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_where_it_is_missing(ran: tuple[str, subprocess.CompletedProcess[str]], check: Callable[[], None]) -> None:
    assert f"held {check.__name__}" in ran[1].stdout.splitlines(), ran[1].stderr


def test_a_file_from_a_torch_that_lacks_it_loads_and_scripts(
    ran: tuple[str, subprocess.CompletedProcess[str]], folder: Path
) -> None:
    model, x, expected = torch.load(folder / ran[0], weights_only=False)
    torch.testing.assert_close(model(x)[0].detach(), expected)
    torch.testing.assert_close(torch.jit.script(model)(x)[0].detach(), expected)


def test_a_pickle_names_nothing_of_torchscript() -> None:
    assert b"jit" not in pickle.dumps(make()[0])


if __name__ == "__main__":
    main(sys.argv[1])
