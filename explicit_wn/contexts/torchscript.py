"""All that `torch.jit` needs.

TorchScript compiles source text, looks attributes up by literal names, and passes a module as an argument only through
a *module interface*. So every class of a carrier gets methods whose source is written here.

A torch that has dropped TorchScript does without all this: then `script` says so, and everything else works.
"""

import ast
import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from textwrap import dedent, indent
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..source import define, literal

_jit: Any = getattr(torch, "jit", None)
_USED = ("Attribute", "annotations", "export", "freeze", "interface", "script")
IS_THERE = all(hasattr(_jit, name) for name in _USED) and hasattr(torch._C, "_jit_pass_inline")


class Recipe(Protocol):
    """What is asked here of a `carrier.Recipe`, which says what it is."""

    @property
    def norm(self) -> object: ...
    @property
    def name(self) -> str: ...
    @property
    def inlined(self) -> bool: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def formula(self) -> Callable[..., torch.Tensor]: ...
    @property
    def advance(self) -> Callable[..., None] | None: ...
    def attribute(self, part: str) -> str: ...
    def parts_of(self, function: Callable[..., Any]) -> tuple[str, ...]: ...
    def options_of(self, function: Callable[..., Any]) -> dict[str, Any]: ...


def _never() -> bool:
    return False


is_scripting: Callable[[], bool] = getattr(_jit, "is_scripting", _never)
is_tracing: Callable[[], bool] = getattr(_jit, "is_tracing", _never)
is_traced: Callable[[], bool] = getattr(torch._C, "_is_tracing", _never)
"""The same without its detour, where a small layer feels it; TorchScript does not compile it."""


def is_scripted(module: Any) -> bool:
    """Whether `module` is what `torch.jit.script` or `torch.jit.trace` returned."""
    return hasattr(_jit, "ScriptModule") and isinstance(module, _jit.ScriptModule)


def shape_of(tensor: torch.Tensor) -> list[int]:
    """Its shape in numbers that can be compared, also while `torch.jit.trace` records what is done with shapes."""
    if not is_tracing():
        return list(tensor.shape)
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined] # private, and the only way to stop recording
    try:
        return list(tensor.shape)
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


ATTRIBUTES = ("_recompute_normed", "_forward_of_base", "_was_told_to_recompute")
"""What a carrier has for TorchScript, besides `forward`."""


def script(model: nn.Module) -> Any:
    """`torch.jit.script` whose result `torch.jit.freeze` and `torch.jit.optimize_for_inference` fold correctly.

    `self.wn.recompute(self.fc)` compiles to a call through an interface, which `freeze` does not look into: it fails,
    or keeps the weight of the moment of scripting. Here those calls are replaced by what they do.

    What is saved for the lite interpreter (`_save_to_buffer_for_lite_interpreter`) wants the same: of a plain
    `torch.jit.script` it runs nowhere ("Couldn't find method: '_recompute_normed'").

    >>> import explicit_wn
    >>> layer = explicit_wn.WeightNorm().inline(torch.nn.Linear(3, 2)).eval()
    >>> frozen = torch.jit.freeze(explicit_wn.script(layer))
    >>> torch.equal(frozen(torch.ones(1, 3)), layer(torch.ones(1, 3)))
    True
    """
    if not IS_THERE:
        raise RuntimeError(
            f"explicit_wn.script: torch {torch.__version__} has no TorchScript (torch.jit.script) any more. The same "
            "model goes to torch.export.export as it is."
        )
    scripted = _jit.script(model)
    modules: list[Any] = list(scripted.modules())
    for module in modules:
        for name in module._c._method_names():
            # private, and the only way: there is no public pass that inlines, nor an option of freeze
            torch._C._jit_pass_inline(module._c._get_method(name).graph)
    return scripted


def prepare(module: nn.Module, recipes: tuple[Recipe, ...]) -> None:
    """Called for every carrier that `torch.jit.script` is about to compile.

    TorchScript makes as many modules of a layer as it has names (`self.fc`, and again in `self.body`). They share their
    parameters, but not the stored weight. So in TorchScript, and only there, the forward of a layer that was never told
    to recompute does it by itself.
    """
    inlined = any(recipe.inlined for recipe in recipes)
    if inlined and isinstance(module, NonDynamicallyQuantizableLinear):
        raise RuntimeError(
            "nn.MultiheadAttention reads the weight of its out_proj without calling it, so a norm inlined there "
            "would not be recomputed in TorchScript. Apply the norm to out_proj instead of inlining it, and call "
            "recompute(attention.out_proj) in a forward of your own; or use torch.export."
        )
    carrier: Any = type(module)
    base = carrier._normed_base
    wrapped = "_forward_of_base" in vars(carrier) or isinstance(module, nn.RNNBase)
    if not wrapped and base.forward is not nn.Module.forward:
        carrier._forward_of_base = _renamed(base.forward, "_forward_of_base")
        carrier.forward = _wrapped_forward(base, _RECOMPUTE_IF_NEVER_TOLD, _run_base)


def methods(base: type[nn.Module], recipes: tuple[Recipe, ...], eager: dict[str, Any]) -> dict[str, Any]:
    """What a class that carries `recipes` needs for TorchScript: methods of its own, and those of `eager` mode as
    TorchScript can read them, which do the same when they are called."""
    scope: dict[str, Any] = {"is_scripting": is_scripting}
    is_rnn, inlined = issubclass(base, nn.RNNBase), any(recipe.inlined for recipe in recipes)
    source = _recompute_source(recipes, scope, is_rnn, base.__name__)
    explicit = any(not recipe.inlined for recipe in recipes)
    made: dict[str, Any] = {"_recompute_normed": Exported(define(source, "_recompute_normed", base, scope), explicit)}
    if "_update_flat_weights" in eager:
        scope["eager"] = eager["_update_flat_weights"]
        scripted = _RECOMPUTE_INLINED if inlined else _RECOMPUTE_IF_NEVER_TOLD
        lines = f"if is_scripting():\n{indent(scripted, '    ')}\nelse:\n    eager(self)\n"
        source = "def _update_flat_weights(self) -> None:\n" + indent(lines, "    ")
        made["_update_flat_weights"] = define(source, "_update_flat_weights", base, scope)
    if "forward" in eager:
        made["_forward_of_base"] = _renamed(base.forward, "_forward_of_base")
        made["forward"] = _wrapped_forward(base, _RECOMPUTE_INLINED, eager["forward"])
    return made


NEVER_TOLD = ""
"""What the forward of a layer asks for that was never told to recompute."""

_RECOMPUTE_INLINED = 'self._recompute_normed("inlined")'
_RECOMPUTE_IF_NEVER_TOLD = f"if not self._was_told_to_recompute:\n    self._recompute_normed({NEVER_TOLD!r})"


class Exported:
    """A method that `torch.jit.script` compiles because it is there, and that `torch.jit.trace` is not shown.

    A trace runs the module, and compiles what is marked with `torch.jit.export`; one such mark has it put the whole
    module through TorchScript, which a plain layer is spared. So who looks for marks on behalf of a trace sees none;
    except that a model with a marked method of its own goes through TorchScript anyway, and that method may recompute.
    """

    def __init__(self, function: Callable[..., None], explicit: bool) -> None:
        self.function = function
        self.hidden_from = ("module_has_exports",) if explicit else _LOOK_FOR_A_TRACE
        self.marked = _jit.export(_renamed(function, function.__name__)) if IS_THERE else function

    def __get__(self, module: Any, owner: Any = None) -> Any:
        is_hidden = sys._getframe(1).f_code.co_name in self.hidden_from
        return (self.function if is_hidden else self.marked).__get__(module, owner)


_LOOK_FOR_A_TRACE = ("module_has_exports", "make_stubs_from_exported_methods")
"""The functions of torch that look for marks when they trace; `torch.jit.script` has one of its own."""


def declarations(base: type[nn.Module], recipes: tuple[Recipe, ...]) -> dict[str, Any]:
    """What the instance `__dict__` of a carrier holds for TorchScript, which finds attributes nowhere else.

    They only declare the types; the values are those that the class's descriptors of the same names give.
    """
    if not IS_THERE:
        return {}
    declared = {recipe.name: _jit.Attribute(None, torch.Tensor) for recipe in recipes}
    if issubclass(base, nn.RNNBase):
        declared["_flat_weights"] = _jit.Attribute(None, list[torch.Tensor])
    declared["_was_told_to_recompute"] = _jit.Attribute(False, bool)
    return declared


def _recompute_source(recipes: tuple[Recipe, ...], scope: dict[str, Any], is_rnn: bool, kind: str) -> str:
    """The source of `_recompute_normed`; the functions it calls are added to `scope`."""
    lines = ["def _recompute_normed(self, label: str) -> None:"]
    keyword = "if"
    for label in dict.fromkeys([label for recipe in recipes for label in recipe.labels] + [NEVER_TOLD]):
        lines.append(f"    {keyword} label == {label!r}:")
        keyword, told = "elif", label != NEVER_TOLD
        for index, recipe in enumerate(recipes):
            if not told or label in recipe.labels:
                lines += [" " * 8 + line for line in _statements(recipe, index, scope, is_rnn, advance=told)]
        if told:
            lines.append("        self._was_told_to_recompute = True")
    return "\n".join([*lines, "    else:", f"        raise ValueError({_not_its_own(recipes, kind)})"]) + "\n"


def _not_its_own(recipes: tuple[Recipe, ...], kind: str) -> str:
    """What TorchScript says where eager mode says it as well, of a norm that was applied to something else."""
    carried = ", ".join(repr(recipe.norm) for recipe in recipes)
    reason = f"apply(module) was not called for it, or remove ended it; this module carries {carried}."
    return f"label + {f' cannot recompute this {kind}: {reason}'!r}"


def _statements(recipe: Recipe, index: int, scope: dict[str, Any], is_rnn: bool, advance: bool) -> Iterator[str]:
    """The lines that rebuild one weight, in TorchScript."""

    def call(function: Callable[..., Any]) -> str:
        own = function.__name__ if function.__name__.isidentifier() else "function"  # a lambda has no name
        name = f"{own}_{index}"
        scope[name] = function
        parts = [f"{part}=self.{recipe.attribute(part)}" for part in recipe.parts_of(function)]
        options = [f"{option}={literal(value)}" for option, value in recipe.options_of(function).items()]
        return f"{name}({', '.join(parts + options)})"

    if recipe.advance is not None and advance:
        yield "if self.training:"
        yield f"    {call(recipe.advance)}"
    yield f"self.{recipe.name} = {call(recipe.formula)}"
    if is_rnn:
        yield f"self._flat_weights[self._flat_weights_names.index({recipe.name!r})] = self.{recipe.name}"


def _wrapped_forward(base: type[nn.Module], before: str, eager: Any) -> Any:
    """The function `eager` as a forward for TorchScript too, which unwraps it and finds one that does `before` first.

    That one has the signature of the base's, word for word.
    """
    forward: Any = base.forward
    inner: Any = inspect.unwrap(forward)
    own, parameters, arguments, returns, comment = _signature(inner)
    lines = [*([comment] if comment else []), before.replace("self.", f"{own}.")]
    lines.append(f"return {own}._forward_of_base({arguments})")
    source = f"def forward({parameters}){returns}:\n" + indent("\n".join(lines), "    ") + "\n"
    written: Any = define(source, "forward", base, _names_of(inner))
    if parameters == _ANYTHING:
        written.__signature__ = inspect.signature(forward)
    else:
        written.__defaults__, written.__kwdefaults__ = inner.__defaults__, inner.__kwdefaults__
    used = {name: eager.__globals__[name] for name in eager.__code__.co_names if name in eager.__globals__}
    made: Any = FunctionType(eager.__code__, {**_names_of(inner), **used}, "forward")  # TorchScript wants both there
    made.__wrapped__ = written
    for function in (made, written):
        for name in ("__annotations__", "__module__", "__qualname__", "__doc__"):
            if hasattr(forward, name):
                setattr(function, name, getattr(forward, name))
    return made


def _run_base(self: Any, /, *arguments: Any, **keywords: Any) -> Any:
    return self._forward_of_base(*arguments, **keywords)


_ANYTHING = "self, /, *args, **kwargs"


def _names_of(function: Any) -> dict[str, Any]:
    """The names that the annotations of `function` may use."""
    if not isinstance(function, FunctionType):
        return {}
    names = dict(function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            names[name] = cell.cell_contents
    names.pop("__name__", None)  # by which Dynamo would look for our names in the module of `function`
    return names


def _renamed(function: Any, name: str) -> Any:
    """A copy of `function` under another name, by which TorchScript knows it."""
    if not isinstance(function, FunctionType):
        return function
    if hasattr(function, "__wrapped__"):
        # TorchScript unwraps a decorated function; let it find the names that one uses
        scope = {**_names_of(inspect.unwrap(function)), "_decorated": function}
        source = f"def {name}({_ANYTHING}):\n    return _decorated(self, *args, **kwargs)\n"
        outer: Any = define(source, name, object, scope)
        outer.__wrapped__ = inspect.unwrap(function)
        return outer
    arguments = function.__globals__, name, function.__defaults__, function.__closure__
    copied = FunctionType(function.__code__, *arguments)
    copied.__kwdefaults__, copied.__annotations__ = function.__kwdefaults__, function.__annotations__
    copied.__dict__.update(vars(function))
    return copied


def _signature(forward: Any) -> tuple[str, str, str, str, str | None]:
    """What `forward` calls its module, its parameters, the arguments that pass them on, the return annotation and the
    type comment."""
    try:
        source = dedent(inspect.getsource(forward))
        node: Any = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):  # no source to read, hence none for TorchScript either
        node = None
    written = isinstance(forward, FunctionType) and isinstance(node, ast.FunctionDef)
    if not written or node.name != forward.__name__ or not _arguments(node.args):
        return "self", _ANYTHING, "*args, **kwargs", "", None
    names = node.args
    first, *positional = _arguments(names)
    arguments = [argument.arg for argument in positional] + ([f"*{names.vararg.arg}"] if names.vararg else [])
    arguments += [f"{argument.arg}={argument.arg}" for argument in names.kwonlyargs]
    arguments += [f"**{names.kwarg.arg}"] if names.kwarg else []
    nothing = ast.Constant(None)  # the defaults themselves are copied by _wrapped_forward
    names.defaults = [nothing for _ in names.defaults]
    names.kw_defaults = [default and nothing for default in names.kw_defaults]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    try:
        comment = _jit.annotations.get_type_line(source) if IS_THERE else None
    except RuntimeError:  # comments that TorchScript itself cannot make sense of
        comment = None
    return first.arg, ast.unparse(names), ", ".join(arguments), returns, comment


def _arguments(names: ast.arguments) -> list[ast.arg]:
    return names.posonlyargs + names.args
