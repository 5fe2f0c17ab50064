"""What TorchScript makes of it: forwards of every signature, and pins of how torch.jit behaves that we build on.

A pin that fails tells that torch has changed, and its docstring what to do then.
"""

import contextlib
import copy
import functools
import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import pytest
import torch
from layers import Net, by_hand, make_stale
from torch import Tensor, nn

import explicit_wn
from explicit_wn import SpectralNorm, StaleWeightWarning, WeightNorm, functional

Norm = Callable[[nn.Module], Any]


def fresh_net() -> Any:
    """Of a class of its own: torch.jit keeps what it compiles of a class, with all that was done to it."""

    class Fresh(Net):
        pass

    return Fresh()


def expected(model: Net, x: Tensor) -> Tensor:
    return nn.functional.linear(x, by_hand(model.fc), model.fc.bias)


# Forwards of every signature, inlined


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))


class Annotated(Weighted):
    def forward(self, x: Tensor, scale: float = 2.0, shift: Optional[Tensor] = None, n: int = 1) -> Tensor:
        result = nn.functional.linear(x, self.weight) * scale * n
        return result if shift is None else result + shift


class KeywordOnly(Weighted):
    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return nn.functional.linear(x, self.weight) * scale


class KeywordOnlyWithDefault(Weighted):
    def forward(self, x: Tensor, *, scale: float = 2.0) -> Tensor:
        return nn.functional.linear(x, self.weight) * scale


class PositionalOnly(Weighted):
    def forward(self, x: Tensor, /, scale: float = 2.0) -> Tensor:
        return nn.functional.linear(x, self.weight) * scale


class Variadic(Weighted):
    def forward(self, x: Tensor, *more: Tensor, scale: float = 2.0, **options: float) -> Tensor:
        shift = options.get("shift", 0.0) + sum(float(tensor.sum()) for tensor in more)
        return nn.functional.linear(x, self.weight) * scale + shift


class AllVariadic(Weighted):
    def forward(*args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self, x = args
        return nn.functional.linear(x, self.weight) * kwargs.get("scale", 2.0)


class AnotherSelf(Weighted):
    def forward(this, x: Tensor, scale: float = 2.0) -> Tensor:
        return nn.functional.linear(x, this.weight) * scale


class SelfAmongTheKeywords(Weighted):
    def forward(this, x: Tensor, scale: float = 2.0, **self: float) -> Tensor:
        return nn.functional.linear(x, this.weight) * scale + self.get("shift", 0.0)


class SelfAsAnArgument(Weighted):
    def forward(this, x: Tensor, scale: float = 2.0, self: float = 0.0) -> Tensor:
        return nn.functional.linear(x, this.weight) * scale + self


class NamesOfOurs(Weighted):
    def forward(self, recompute: Tensor, torch: float = 2.0, label: float = 1.0) -> Tensor:
        return nn.functional.linear(recompute, self.weight) * torch * label


class TypeComment(Weighted):
    def forward(self, x, scale=2.0):
        # type: (Tensor, float) -> Tensor
        return nn.functional.linear(x, self.weight) * scale


class TypeCommentAfterDocstring(Weighted):
    def forward(self, x, scale=2.0):
        """Scales."""
        # type: (Tensor, float) -> Tensor
        return nn.functional.linear(x, self.weight) * scale


class TypeCommentPerArgument(Weighted):
    def forward(
        self,
        x,  # type: Tensor
        scale=2.0,  # type: float
    ):
        # type: (...) -> Tensor
        return nn.functional.linear(x, self.weight) * scale


class IgnoringComment(Weighted):
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:  # type: ignore[override]
        return nn.functional.linear(x, self.weight) * scale


class NoAnnotations(Weighted):
    def forward(self, x):
        return nn.functional.linear(x, self.weight) * 2.0


class QuotedAnnotations(Weighted):
    def forward(self, x: "Tensor", scale: "float" = 2.0) -> "Tensor":
        return nn.functional.linear(x, self.weight) * scale


class Decorated(Weighted):
    @torch.no_grad()
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return x @ self.weight.t() * scale  # `nn` is looked up where the decorator comes from


def takes_more(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, negate: bool = False, **kwargs: Any) -> Tensor:
        result = forward(self, *args, **kwargs)
        return -result if negate else result

    return wrapper


class DecoratedToTakeMore(Weighted):
    @takes_more
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return nn.functional.linear(x, self.weight) * scale


class Lambda(Weighted):
    forward = lambda self, x, scale=2.0: nn.functional.linear(x, self.weight) * scale  # noqa: E731


class Inherited(Annotated):
    pass


class CallsSuper(Annotated):
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:  # type: ignore[override]
        return super().forward(x, scale)


class CallsHelpers(Weighted):
    def helper(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)

    @torch.jit.ignore
    def note(self, x: Tensor) -> None:
        self.noted = len(x)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        self.note(x)
        return self.helper(x) * scale


class Local:
    """Makes a module of a class whose annotations only the function around it knows."""

    def __new__(cls) -> Any:
        class Options(NamedTuple):
            scale: float

        class Layer(Weighted):
            def forward(self, x: Tensor, scale: float = 2.0, options: Optional[Options] = None) -> Tensor:
                held = Options(scale) if options is None else options
                return nn.functional.linear(x, self.weight) * held.scale

        return Layer()


def without_source() -> nn.Module:
    scope: dict[str, Any] = {"Weighted": Weighted, "nn": nn, "Tensor": Tensor, "__name__": __name__}
    source = (
        "class WithoutSource(Weighted):\n"
        "    def forward(self, x: Tensor, scale: float = 2.0, shift: float = 0.0, *, more: float = 1.0) -> Tensor:\n"
        "        return nn.functional.linear(x, self.weight) * scale * more + shift\n"
    )
    exec(source, scope)
    module: nn.Module = scope["WithoutSource"]()
    return module


SCRIPTED: list[Callable[[], nn.Module]] = [
    Annotated, KeywordOnly, AnotherSelf, SelfAsAnArgument, NamesOfOurs, TypeComment, TypeCommentAfterDocstring,
    TypeCommentPerArgument, IgnoringComment, NoAnnotations, QuotedAnnotations, Decorated, DecoratedToTakeMore,
    Inherited, CallsHelpers, Local,
]  # fmt: skip
NOT_SCRIPTED: list[Callable[[], nn.Module]] = [
    KeywordOnlyWithDefault, PositionalOnly, Variadic, AllVariadic, SelfAmongTheKeywords, Lambda, CallsSuper,
    without_source,
]  # fmt: skip
every_forward = pytest.mark.parametrize("make", SCRIPTED + NOT_SCRIPTED, ids=lambda make: make.__name__)
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    ((), {"scale": 3.0}),
    ((3.0,), {}),
    ((3.0, torch.ones(2)), {}),
    ((torch.ones(2), torch.ones(3)), {"scale": 3.0, "shift": 1.0}),
    ((), {"scale": 3.0, "negate": True}),
    ((3.0, 1.0), {"more": 2.0}),
    ((1, 2, 3, 4, 5, 6), {}),
    ((), {"unknown": 1.0}),
]


def pair(make: Callable[[], nn.Module], verb: str = "inline") -> tuple[Any, Any]:
    """A normed module whose parts were changed, and a plain one with the weight that they make."""
    plain: Any = make()
    module: Any = getattr(WeightNorm(), verb)(copy.deepcopy(plain))
    make_stale(module)
    with torch.no_grad():
        plain.weight.copy_(by_hand(module))
    return module, plain


def outcome(call: Callable[[], Any]) -> Any:
    """The result, or the kind of error that Python has for arguments that do not fit."""
    try:
        return call()
    except (TypeError, AttributeError, ValueError) as error:
        return type(error)


@every_forward
def test_an_inlined_forward_takes_what_the_plain_one_takes(make: Callable[[], nn.Module]) -> None:
    module, plain = pair(make)
    x = torch.randn(4, 3)
    results = 0
    for args, kwargs in CALLS:
        ours, theirs = outcome(lambda: module(x, *args, **kwargs)), outcome(lambda: plain(x, *args, **kwargs))  # noqa: B023
        assert isinstance(ours, Tensor) is isinstance(theirs, Tensor), (args, kwargs)
        if isinstance(theirs, Tensor):
            torch.testing.assert_close(ours, theirs)
            results += 1
    assert results >= 1


@every_forward
def test_an_inlined_forward_shows_the_signature_of_the_plain_one(make: Callable[[], nn.Module]) -> None:
    plain: Any = make()
    module: Any = WeightNorm().inline(copy.deepcopy(plain))
    ours, theirs = (inspect.signature(each.forward) for each in (module, plain))
    assert [(p.name, p.kind, p.default, p.annotation) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default, p.annotation) for p in theirs.parameters.values()
    ]
    assert ours.return_annotation == theirs.return_annotation
    assert module.forward.__doc__ == plain.forward.__doc__


@pytest.mark.parametrize("verb", ["apply", "inline"])
@pytest.mark.parametrize("make", SCRIPTED, ids=lambda make: make.__name__)
def test_a_normed_forward_scripts_where_the_plain_one_does(make: Callable[[], nn.Module], verb: str) -> None:
    module, plain = pair(make, verb)
    x = torch.randn(4, 3)
    scripted, scripted_plain = torch.jit.script(module), torch.jit.script(plain)
    make_stale(module)
    with torch.no_grad():
        plain.weight.copy_(by_hand(module))
    results = 0
    for args, kwargs in (((), {}), ((), {"scale": 3.0}), ((3.0,), {})):
        try:
            wanted = scripted_plain(x, *args, **kwargs)
        except RuntimeError:  # this one takes no such arguments
            continue
        torch.testing.assert_close(scripted(x, *args, **kwargs), wanted)
        results += 1
    assert results >= 1


@pytest.mark.parametrize("make", NOT_SCRIPTED, ids=lambda make: make.__name__)
def test_what_torch_cannot_script_plain_it_cannot_script_inlined(make: Callable[[], nn.Module]) -> None:
    """If the plain one scripts, torch has learned it: move the class to SCRIPTED."""
    for module in (make(), WeightNorm().inline(make())):
        with pytest.raises((RuntimeError, OSError, torch.jit.frontend.NotSupportedError)):
            torch.jit.script(module)


def test_a_whole_number_for_eps_scripts() -> None:
    module: Any = WeightNorm(eps=1).inline(nn.Linear(3, 2))
    make_stale(module)
    x, v = torch.randn(4, 3), module.weight_v
    weight = module.weight_g * v / v.square().sum(1, keepdim=True).sqrt().clamp(min=1)
    torch.testing.assert_close(torch.jit.script(module)(x), nn.functional.linear(x, weight, module.bias))


@pytest.mark.parametrize("name", ["self", "torch", "label", "recompute", "weight_norm_0", "größe", "_p", "forward_"])
def test_a_parameter_may_bear_the_names_that_the_generated_source_uses(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.randn(2, 3)))

        def forward(self, x: Tensor) -> Tensor:
            return x

    module = WeightNorm(name).inline(Named())
    g, v = getattr(module, f"{name}_g"), getattr(module, f"{name}_v")
    scripted = torch.jit.script(module)
    with torch.no_grad():
        g.mul_(2)
        v.add_(0.5)
    scripted(torch.ones(1))
    wanted = g * v / v.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(getattr(scripted, name), wanted)
    torch.testing.assert_close(getattr(module, name), wanted)


def test_a_forward_may_refer_to_what_is_defined_later() -> None:
    class Layer(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            return doubled(nn.functional.linear(x, self.weight))

    module = WeightNorm().inline(Layer())

    def doubled(x: Tensor) -> Tensor:
        return x * 2

    make_stale(module)
    x = torch.randn(4, 3)
    wanted = nn.functional.linear(x, by_hand(module)) * 2
    torch.testing.assert_close(module(x), wanted)
    torch.testing.assert_close(torch.jit.script(module)(x), wanted)


class Generating(Weighted):
    def forward(self, x: Tensor) -> Any:
        for factor in (1, 2):
            yield nn.functional.linear(x, self.weight) * factor


def test_a_forward_may_be_a_generator() -> None:
    module, x = WeightNorm().inline(Generating()), torch.randn(4, 3)
    make_stale(module)
    wanted = nn.functional.linear(x, by_hand(module))
    for factor, result in enumerate(module(x), start=1):
        torch.testing.assert_close(result, wanted * factor)


# Traced as the plain twin is: torch.jit.trace compiles nothing of a layer, whatever TorchScript would say of it


class TwoNames(nn.Module):
    """A layer with two names, whose bias its parent uses too, as in every TCN."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.conv = norm(nn.Conv1d(3, 3, 2))
        self.net = nn.Sequential(self.conv, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.conv.bias.sum()


class TwoNamesExplicitly(TwoNames):
    def __init__(self, norm: Norm) -> None:
        super().__init__(norm)
        self.wn = WeightNorm()

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.conv, "weight_g"):
            self.wn.recompute(self.conv)
        return super().forward(x)


class Unscriptable(nn.Conv1d):
    annotated: "what TorchScript cannot read"  # noqa: F722

    @property
    def anything(self) -> Any:
        return {object(): [1, "a"]}


class WithAnExportedMethod(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.conv = norm(nn.Conv1d(3, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    @torch.jit.export
    def twice(self, x: Tensor) -> Tensor:
        return 2 * x


class Recomputing(WithAnExportedMethod):
    """Whose own method recomputes, and is compiled while the forward is traced."""

    def __init__(self, norm: Norm) -> None:
        super().__init__(norm)
        self.wn = WeightNorm()

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.conv)
        return self.conv(x)

    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.conv)
        return self.conv(x)


def test_a_method_that_recomputes_is_compiled_with_a_trace() -> None:
    model, x = Recomputing(WeightNorm().apply), torch.randn(4, 3, 8)
    result = torch.jit.trace(model, x)
    make_stale(model.conv)
    wanted = nn.functional.conv1d(x, by_hand(model.conv), model.conv.bias)
    torch.testing.assert_close(result(x), wanted)
    torch.testing.assert_close(result.encode(x), wanted)


def hooked(norm: Norm) -> nn.Module:
    layer = norm(nn.Conv1d(3, 3, 2))
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    layer.register_forward_pre_hook(lambda module, inputs: None)
    return layer


UNSCRIPTABLE: dict[str, Callable[[Norm], nn.Module]] = {
    "two names": TwoNames,
    "two names, explicitly": TwoNamesExplicitly,
    "within another": lambda norm: nn.Sequential(nn.Sequential(TwoNames(norm)), norm(nn.Conv1d(3, 1, 1))),
    "NumPy's integers": lambda norm: norm(nn.Conv1d(3, 3, kernel_size=np.int64(2), dilation=np.int64(2))),
    "NumPy's integers, transposed": lambda norm: norm(nn.ConvTranspose1d(3, 3, np.int64(2), stride=np.int64(2))),
    "what TorchScript cannot read": lambda norm: norm(Unscriptable(3, 3, 2)),
    "hooks of the user's": hooked,
    "hooks within": lambda norm: nn.Sequential(hooked(norm)),
    "with an exported method": WithAnExportedMethod,
}


def converted(layer: nn.Module) -> nn.Module:
    explicit_wn.convert(torch.nn.utils.parametrizations.weight_norm(layer))
    return layer


def traced(model: nn.Module, x: Tensor) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return torch.jit.trace(model, x), [str(warning.message) for warning in caught]


@pytest.mark.parametrize("scripted_before", [False, True])
@pytest.mark.parametrize("norm", [WeightNorm().inline, converted], ids=["inline", "convert"])
@pytest.mark.parametrize("make", UNSCRIPTABLE.values(), ids=UNSCRIPTABLE)
def test_a_module_is_traced_as_its_plain_twin_is(make: Any, norm: Norm, scripted_before: bool) -> None:
    norm = WeightNorm().apply if make is TwoNamesExplicitly else norm
    model, plain, x = make(norm), make(lambda layer: layer), torch.randn(4, 3, 8)
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith(("_g", "_v"))}
    for path, layer in model.named_modules(remove_duplicate=False):
        if hasattr(layer, "weight_g"):
            make_stale(layer)
            weights[f"{path}.weight".lstrip(".")] = by_hand(layer)
    plain.load_state_dict(weights)
    if scripted_before:
        with contextlib.suppress(RuntimeError, TypeError, torch.jit.frontend.NotSupportedError):
            torch.jit.script(model)
    result, warned = traced(model, x)
    wanted, warned_of_plain = traced(plain, x)
    assert type(result) is type(wanted)
    assert warned == warned_of_plain
    torch.testing.assert_close(result(x), plain(x))
    assert list(result.state_dict()) == list(model.state_dict())


# Pins


def test_pin_who_looks_for_the_marks_of_torch_jit_export() -> None:
    """`Exported` shows none to the functions of torch that look on behalf of a trace, and knows them by their names.

    If this fails, a trace drags the module through TorchScript again, or a script does without our method.
    """
    layer = WeightNorm().inline(nn.Linear(3, 2))
    assert not torch._jit_internal.module_has_exports(layer)
    assert torch.jit._recursive.make_stubs_from_exported_methods(layer) == []
    stubs = torch.jit._recursive.infer_methods_to_compile(layer)
    assert "_recompute_normed" in [stub.def_.name().name for stub in stubs]


class Unapplied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)


class Computing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.wn.compute_weight(self.fc))


class Calling(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.wn.call(self.fc)(x)


class Inlining(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.wn.inline(self.fc)(x)


class Assigning(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.wn.assign(self.fc, x)
        return x


class Removing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.wn.remove(self.fc)(x)


GLOBAL = WeightNorm()


class WithAGlobal(Net):
    def forward(self, x: Tensor) -> Tensor:
        GLOBAL.recompute(self.fc)
        return self.fc(x)


class CallsAGlobal(Net):
    def forward(self, x: Tensor) -> Tensor:
        GLOBAL(self.fc)
        return self.fc(x)


class Chained(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.wn(self.fc)(x)


class InAList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norms = [self.wn]

    def forward(self, x: Tensor) -> Tensor:
        self.norms[0].recompute(self.fc)
        return self.fc(x)


class RecomputesAll(Net):
    def forward(self, x: Tensor) -> Tensor:
        explicit_wn.recompute_all(self)
        return self.fc(x)


class Caches(Net):
    def forward(self, x: Tensor) -> Tensor:
        with explicit_wn.cached(self):
            return self.fc(x)


def frozen_without_us() -> None:
    torch.jit.freeze(torch.jit.script(fresh_net().eval()))(torch.ones(4, 3))


IN_TORCHS_WORDS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "apply forgotten": (Unapplied, "does not have method '_recompute_normed'", "interface.WhatApplyReturns'"),
    "compute_weight": (Computing, "Don't support conversion in JoinedStr", "write self.wn.recompute(module) and read"),
    "call": (Calling, "Unknown type name 'Module'", ""),
    "inline": (Inlining, "Unknown type name 'Module'", ""),
    "assign": (Assigning, "Unknown type name 'Module'", ""),
    "remove": (Removing, "Unknown type name 'Module'", ""),
    "global": (WithAGlobal, "attribute lookup is not defined on python value of type 'WeightNorm'", "GLOBAL.recompute"),
    "global, called": (CallsAGlobal, "Unknown type annotation: '~Module'", "GLOBAL(self.fc)"),
    "call, chained": (Chained, "cannot call a value of type 'NoneType'", "self.wn(self.fc)"),
    "list": (InAList, "Could not infer type of list element", "'norms'"),
    "recompute_all": (RecomputesAll, "try blocks aren't supported", ""),
    "cached": (Caches, "Comprehension ifs are not supported yet", ""),
    "freeze": (frozen_without_us, "Couldn't find method: '_recompute_normed'", ""),
}


@pytest.mark.parametrize(("make", "words", "hint"), IN_TORCHS_WORDS.values(), ids=IN_TORCHS_WORDS)
def test_pin_the_limits_quote_what_torchscript_says(make: Callable[[], Any], words: str, hint: str) -> None:
    """And where torch shows lines of ours, they name the way out. If this fails, quote the new words in the limits."""
    with pytest.raises((RuntimeError, ValueError, torch.jit.frontend.NotSupportedError)) as raised:
        torch.jit.script(make())
    assert words in str(raised.value)
    assert hint in str(raised.value)
    assert f"`{words}`" in Path(__file__).parents[1].joinpath("README.md").read_text()


class OfAnother(nn.Module):
    """A norm object, and a layer that it was not applied to."""

    def __init__(self, wn: Any, fc: nn.Module) -> None:
        super().__init__()
        self.wn = wn
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        return self.fc(x)


RUN: dict[str, Callable[[Any, Tensor], Any]] = {
    "eager": lambda model, x: model(x),
    "script": lambda model, x: torch.jit.script(model)(x),
    "our script": lambda model, x: explicit_wn.script(model)(x),
    "frozen": lambda model, x: torch.jit.freeze(explicit_wn.script(model.eval()))(x),
    "traced": lambda model, x: torch.jit.trace(nn.Sequential(torch.jit.script(model)), x)(x),
}


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("others", [(SpectralNorm(warmup=0),), (WeightNorm("bias"), SpectralNorm(warmup=0))], ids=len)
def test_an_object_that_was_applied_to_something_else_is_refused(run: Callable[..., Any], others: Any) -> None:
    layer = nn.Linear(3, 3)
    for norm in others:
        norm.apply(layer)
    carried = ", ".join(repr(norm) for _, _, norm in explicit_wn.normed(layer))
    says = rf"this Linear: .*was not called for it, or remove ended it; this module carries {re.escape(carried)}\."
    with pytest.raises((ValueError, torch.jit.Error), match=says):
        run(OfAnother(WeightNorm(), layer), torch.ones(1, 3))


def test_pin_freeze_alone_cannot_follow_a_call_through_an_interface() -> None:
    """`explicit_wn.script` inlines those calls for this reason. If this fails, see whether torch.jit.script will do."""
    frozen = torch.jit.freeze(torch.jit.script(fresh_net().eval()))
    with pytest.raises(RuntimeError, match="Couldn't find method: '_recompute_normed'"):
        frozen(torch.randn(4, 3))


MOBILE = """
import io, sys, warnings
import torch
from torch import nn
from torch.jit.mobile import _load_for_lite_interpreter
import explicit_wn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wn = explicit_wn.WeightNorm()
        self.fc = self.wn.apply(nn.Linear(3, 2))

    def forward(self, x):
        self.wn.recompute(self.fc)
        return self.fc(x)

model, x = Net(), torch.randn(4, 3)
model.fc.weight_g.data.mul_(2)
warnings.simplefilter("ignore")
scripted = (explicit_wn if sys.argv[1] == "ours" else torch.jit).script(model)
file = io.BytesIO(scripted._save_to_buffer_for_lite_interpreter())
try:
    print(_load_for_lite_interpreter(file)(x).equal(model(x)))
except RuntimeError as error:
    print(error)
"""


def test_the_lite_interpreter_wants_our_script(tmp_path: Path) -> None:
    """In a process of its own: after many another script, torch's `_save_to_buffer_for_lite_interpreter` may fail."""
    (tmp_path / "mobile.py").write_text(MOBILE)

    def printed(by: str) -> str:
        return subprocess.check_output([sys.executable, "-W", "ignore", tmp_path / "mobile.py", by], text=True)

    assert printed("ours") == "True\n"
    assert "Couldn't find method: '_recompute_normed'" in printed("torch's")  # a pin, as above


@pytest.mark.parametrize("optimize", [torch.jit.freeze, torch.jit.optimize_for_inference])
def test_after_our_script_it_folds_the_weight_of_the_moment(optimize: Callable[[Any], Any]) -> None:
    model, x = fresh_net().eval(), torch.randn(4, 3)
    scripted = explicit_wn.script(model)
    make_stale(model.fc)
    wanted = expected(model, x)
    frozen = optimize(scripted)
    make_stale(model.fc)
    torch.testing.assert_close(frozen(x), wanted)
    assert not {"aten::_weight_norm", "prim::CallMethod"} & {node.kind() for node in frozen.graph.nodes()}
    torch.testing.assert_close(scripted(x), expected(model, x))


def test_our_script_leaves_no_call_that_takes_an_interface() -> None:
    def calls(scripted: Any) -> list[str]:
        return [node.s("name") for node in scripted.graph.nodes() if node.kind() == "prim::CallMethod"]

    assert "recompute" in calls(torch.jit.script(fresh_net()))
    assert "recompute" not in calls(explicit_wn.script(fresh_net()))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="it was not deprecated yet")
def test_pin_the_interface_is_deprecated_and_says_so() -> None:
    """So we define ours with warnings off. If this fails, the catch_warnings in torchscript.py can go."""

    def define() -> None:
        @torch.jit.interface
        class Interface(nn.Module):
            def go(self) -> None:
                pass

    with pytest.warns((DeprecationWarning, FutureWarning), match=r"torch\.jit\.interface. is deprecated"):
        define()


def test_importing_is_silent_and_leaves_the_warning_filters_alone() -> None:
    command = (
        "import warnings, torch; before = list(warnings.filters); import explicit_wn;"
        "assert warnings.filters == before; print('silent')"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("silent\n", "")


class UnreadableComment(Weighted):
    def forward(self, x, scale=2.0):
        # type : (Tensor, float) -> Tensor
        return nn.functional.linear(x, self.weight) * scale


def test_a_comment_that_torchscript_cannot_read_is_its_own_affair() -> None:
    module, x = WeightNorm().inline(UnreadableComment()), torch.randn(2, 3)
    make_stale(module)
    torch.testing.assert_close(module(x), x @ by_hand(module).t() * 2)
    with pytest.raises(RuntimeError, match="annotation prefix"):
        torch.jit.script(UnreadableComment())


def test_pin_the_private_names_of_torch_jit_are_there() -> None:
    """Each stands in torchscript.py for want of a public one; if one is gone, it needs another way there."""
    assert callable(torch._C._jit_pass_inline)
    assert torch.jit.Attribute(None, torch.Tensor).type is torch.Tensor
    line = torch.jit.annotations.get_type_line("def f(x):\n    # type: (int) -> int\n    return x\n")
    assert line.strip() == "# type: (int) -> int"
    assert torch.jit.annotations.get_type_line("def f(x):\n    return x\n") is None
    scripted = torch.jit.script(nn.Linear(2, 3))
    assert scripted._c._method_names() == ["forward"]
    assert scripted._c._get_method("forward").graph is not None


def test_pin_script_prepares_every_module_of_the_tree() -> None:
    """`__prepare_scriptable__` is where a stored weight is made fresh before torch.jit.script copies it."""
    prepared = []

    class Preparing(nn.Linear):
        def __prepare_scriptable__(self) -> "Preparing":
            prepared.append(self)
            return self

    model = nn.Sequential(Preparing(3, 2), nn.Sequential(Preparing(2, 2)))
    torch.jit.script(model)
    assert prepared == [model[0], model[1][0]]


def test_pin_torchscript_reads_source_through_linecache() -> None:
    """That is how it finds the methods that we write. If this fails, nothing of ours scripts."""
    module = WeightNorm().inline(nn.Linear(3, 2))
    for method in (type(module)._recompute_normed, inspect.unwrap(type(module).forward)):
        assert inspect.getsource(method).startswith("def ")
        assert inspect.getsourcefile(method).startswith("<explicit_wn ")


def test_a_module_norms_a_parameter_of_its_own() -> None:
    """There `recompute` is given the module whose forward is being compiled, before TorchScript knows all of it."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wn = WeightNorm()
            self.weight = nn.Parameter(torch.randn(2, 3))
            self.wn.apply(self)

        def forward(self, x: Tensor) -> Tensor:
            self.wn.recompute(self)
            return nn.functional.linear(x, self.weight)

    module, x = Own(), torch.randn(4, 3)
    scripted = torch.jit.script(module)
    for _ in range(2):
        make_stale(module)
        torch.testing.assert_close(scripted(x), nn.functional.linear(x, by_hand(module)))
        torch.testing.assert_close(module(x), nn.functional.linear(x, by_hand(module)))


def test_a_scripted_module_shares_its_parts_with_the_eager_one() -> None:
    model, x = Net(), torch.randn(4, 3)
    scripted = torch.jit.script(model)
    make_stale(model.fc)
    torch.testing.assert_close(scripted(x), expected(model, x))
    with torch.no_grad():
        scripted.fc.weight_g.mul_(3)
    torch.testing.assert_close(model(x), expected(model, x))
    assert sorted(name for name, _ in scripted.named_parameters()) == ["fc.bias", "fc.weight_g", "fc.weight_v"]


def test_script_copies_a_weight_that_is_fresh() -> None:
    """One that is read before any forward would else be the weight of some moment before."""
    layer = WeightNorm().apply(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    layer(x)
    make_stale(layer)
    scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted.weight, by_hand(layer))
    torch.testing.assert_close(scripted(x), nn.functional.linear(x, by_hand(layer), layer.bias))


class Shared(Net):
    """Calls one layer under two names, and recomputes it under one."""

    def __init__(self) -> None:
        super().__init__(layer=nn.Linear(3, 3))
        self.body = nn.Sequential(self.fc, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        return self.body(self.fc(x))


class CalledUnderAnotherName(Shared):
    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        return self.body(x)


@pytest.mark.parametrize("script", [torch.jit.script, explicit_wn.script])
@pytest.mark.parametrize("kind", [Shared, CalledUnderAnotherName])
def test_a_layer_with_two_names_is_fresh_under_both(kind: type[Any], script: Any) -> None:
    """torch.jit.script makes a module of each name; they share the parts and not the stored weight."""
    model, x = kind(), torch.randn(4, 3)
    scripted = script(model)
    assert scripted.fc is not scripted.body[0]
    for _ in range(2):
        make_stale(model.fc)
        hidden = expected(model, x) if kind is Shared else x
        wanted = expected(model, hidden).tanh()
        torch.testing.assert_close(scripted(x), wanted)
        torch.testing.assert_close(model(x), wanted)
        torch.testing.assert_close(torch.jit.freeze(explicit_wn.script(model.eval()))(x), wanted)


class Sometimes(Net):
    """Recomputes when it is told to."""

    def forward(self, x: Tensor, fresh: bool) -> Tensor:
        if fresh:
            self.wn.recompute(self.fc)
        return self.fc(x)


def test_a_layer_that_is_told_when_to_recompute_does_it_only_then() -> None:
    """As in eager mode: a fixed-point loop recomputes once, before it."""
    model, x = Sometimes(), torch.randn(4, 3)
    for form in (model, torch.jit.script(model)):
        form(x, True)
        wanted = nn.functional.linear(x, by_hand(model.fc), model.fc.bias)
        make_stale(model.fc)
        with pytest.warns(StaleWeightWarning) if form is model else contextlib.nullcontext():
            torch.testing.assert_close(form(x, False), wanted)
        wanted = nn.functional.linear(x, by_hand(model.fc), model.fc.bias)
        torch.testing.assert_close(form(x, True), wanted)
        torch.testing.assert_close(form(x, False), wanted)


class ReadsUnderAnotherName(Shared):
    """Reads the weight under the name that is neither called nor recomputed."""

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        return nn.functional.linear(x, self.body[0].weight)


def test_limit_a_weight_read_under_a_name_that_is_neither_called_nor_recomputed_is_stale() -> None:
    """A limit, in TorchScript alone, that tests/README.md states. If this fails it is no more: drop it there."""
    model, x = ReadsUnderAnotherName(), torch.randn(4, 3)
    scripted = torch.jit.script(model)
    stale = nn.functional.linear(x, by_hand(model.fc)).detach()
    make_stale(model.fc)
    torch.testing.assert_close(model(x), nn.functional.linear(x, by_hand(model.fc)))
    torch.testing.assert_close(scripted(x).detach(), stale)


def test_scripting_changes_nothing_for_the_eager_modules_of_that_class() -> None:
    model, other, x = fresh_net(), fresh_net(), torch.randn(4, 3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    torch.jit.script(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        make_stale(model.fc)
        torch.testing.assert_close(compiled(x), expected(model, x))
    for each in (model, other, copy.deepcopy(model)):
        make_stale(each.fc)
        torch.testing.assert_close(each(x), expected(each, x))
        stale = expected(each, x)
        make_stale(each.fc)
        with pytest.warns(StaleWeightWarning):
            torch.testing.assert_close(each.fc(x), stale)
    assert type(WeightNorm().remove(model.fc)) is nn.Linear


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("dim", [None, 0, 1, 2])
def test_a_frozen_script_computes_no_norm_and_shares_nothing_with_the_model(eps: float, dim: int | None) -> None:
    """torch.jit.freeze resolves branches a few times only: a formula with too many stays in the graph."""
    model = nn.Sequential(WeightNorm(dim=dim, eps=eps).inline(nn.ConvTranspose1d(32, 32, 7))).eval()
    x = torch.randn(2, 32, 9)
    expected = model(x)
    frozen: Any = torch.jit.freeze(explicit_wn.script(model))
    with torch.no_grad():
        for name in "weight_g", "weight_v":  # torch shares the bias, with a plain layer as well
            model[0].get_parameter(name).add_(1)
    torch.testing.assert_close(frozen(x), expected)
    computing = {node.kind() for node in frozen.graph.nodes() if node.kind().startswith("aten::")}
    assert computing == {"aten::conv_transpose1d"}


@pytest.mark.parametrize("dim", [None, 0, 1, -2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 4), (4, 0)])
def test_the_scripted_formula_with_eps_is_that_of_eager_mode(
    shape: tuple[int, int], dtype: torch.dtype, dim: int | None
) -> None:
    v = torch.randn(shape).to(dtype)
    g = torch.rand([] if dim is None else [size if index == dim % 2 else 1 for index, size in enumerate(shape)]).to(
        dtype
    )
    scripted = torch.jit.script(functional.weight_norm)
    torch.testing.assert_close(scripted(v, g, dim, 0.5), functional.weight_norm(v, g, dim, 0.5))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.attention = nn.MultiheadAttention(4, 2)
        self.wn.apply(self.attention.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.attention.out_proj)
        return self.attention(x, x, x)[0]


def test_the_out_proj_of_an_attention_is_recomputed_and_not_inlined() -> None:
    """nn.MultiheadAttention reads its weight and does not call it."""
    model, x = Attention(), torch.randn(5, 2, 4)
    scripted = torch.jit.script(model)
    make_stale(model.attention.out_proj)
    plain = copy.deepcopy(model)
    plain.wn.remove(plain.attention.out_proj)
    torch.testing.assert_close(scripted(x), plain.attention(x, x, x)[0])
    WeightNorm().inline(plain.attention.out_proj)
    torch.testing.assert_close(model(x), plain.attention(x, x, x)[0])
    with pytest.raises(RuntimeError, match=r"out_proj without calling it.*recompute\(attention.out_proj\)"):
        torch.jit.script(plain.attention)
