"""Prints the tables of contexts in tests/README.md, each cell by trying it. Run: python tests/contexts_table.py

Every cell takes a model one training step along, changes the parts behind its weights, brings the model into the
context, and compares the answer with a plain model whose weights are computed here from the parts; then it changes the
parts in the context itself, where they are still there, and compares once more. Warnings count.
"""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import weight_norm as hook
from torch.nn.utils.parametrizations import weight_norm as parametrization

import explicit_wn
from explicit_wn import WeightNorm


class Perceptron(nn.Module):
    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.fc = norm(nn.Linear(6, 5))
        self.out = norm(nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x)))


class ExplicitPerceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.fc = self.wn.apply(nn.Linear(6, 5))
        self.out = self.wn.apply(nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        self.wn.recompute(self.out)
        return self.out(torch.relu(self.fc(x)))


class Recurrent(nn.Module):
    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.lstm = norm(nn.LSTM(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class ExplicitRecurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm("weight_hh_l0")
        self.lstm = self.wn.apply(nn.LSTM(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.lstm)
        return self.lstm(x)[0]


Model = Callable[[], nn.Module]
PERCEPTRONS: dict[str, Model] = {
    "`recompute`": ExplicitPerceptron,
    "`inline`": lambda: Perceptron(WeightNorm().inline),
    "hook": lambda: Perceptron(hook),
    "parametrization": lambda: Perceptron(parametrization),
}
RECURRENTS: dict[str, Model] = {
    "`recompute`": ExplicitRecurrent,
    "`inline`": lambda: Recurrent(WeightNorm("weight_hh_l0").inline),
    "hook": lambda: Recurrent(lambda lstm: hook(lstm, "weight_hh_l0")),
    "parametrization": lambda: Recurrent(lambda lstm: parametrization(lstm, "weight_hh_l0")),
    "no norm": lambda: Recurrent(lambda lstm: lstm),
}


def parts(state: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The names of g and v in a state dict, by the name of the weight that they make."""
    ours = {name[:-2]: (name, name[:-2] + "_v") for name in state if name.endswith("_g")}
    ending = ".original0"
    theirs = {n.removesuffix(ending): (n, n.removesuffix("0") + "1") for n in state if n.endswith(ending)}
    return ours | {name.replace("parametrizations.", ""): pair for name, pair in theirs.items()}


def formula(g: Tensor, v: Tensor) -> Tensor:
    return g * v / v.flatten(1).norm(dim=1).view_as(g)


def plain_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of the same model without a norm."""
    made = parts(state)
    used = {name for pair in made.values() for name in pair}
    weights = {name: formula(state[g], state[v]) for name, (g, v) in made.items()}
    return {name: value for name, value in state.items() if name not in used} | weights


def expected(state: dict[str, Any], x: Tensor) -> Tensor:
    kind = Recurrent if x.dim() == 3 else Perceptron
    plain = kind(lambda module: module)
    plain.load_state_dict(plain_state(state))
    return plain(x)


def change_parts(state: dict[str, Any]) -> None:
    with torch.no_grad():
        for g, v in parts(state).values():
            state[g].mul_(2).add_(0.3)
            state[v].add_(torch.linspace(-1, 1, state[v].numel()).view_as(state[v]))


def through_file(save: Callable[[Any], None], load: Callable[[Any], Any]) -> Any:
    buffer = io.BytesIO()
    save(buffer)
    buffer.seek(0)
    return load(buffer)


def scripted_saved_and_loaded(model: nn.Module, x: Tensor) -> Any:
    scripted = torch.jit.script(model)
    return through_file(lambda file: torch.jit.save(scripted, file), torch.jit.load)


def frozen(model: nn.Module, x: Tensor) -> Any:
    ours = any("explicit_wn" in cls.__module__ for module in model.modules() for cls in type(module).__mro__)
    scripted = explicit_wn.script(model.eval()) if ours else torch.jit.script(model.eval())
    change_parts(dict(model.named_parameters()))
    return torch.jit.freeze(scripted)


def export_saved_and_loaded(model: nn.Module, x: Tensor) -> Any:
    program = torch.export.export(model, (x,))
    return through_file(lambda file: torch.export.save(program, file), torch.export.load).module()


def saved_and_loaded(model: nn.Module, x: Tensor) -> Any:
    return through_file(lambda file: torch.save(model, file), lambda file: torch.load(file, weights_only=False))


def checkpointed(model: nn.Module, x: Tensor) -> Any:
    return lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)


def through_functional_call(model: nn.Module, x: Tensor) -> Any:
    """Answers under other parameters, and then again under its own."""
    others = {name: value.detach().clone() for name, value in model.named_parameters()}
    change_parts(others)
    answer = torch.func.functional_call(model, others, (x,))
    torch.testing.assert_close(answer, expected(others, x))
    return model


def through_gradients(model: nn.Module, x: Tensor) -> Any:
    """Checks the gradient for every example, taken by vmap(grad), against one at a time."""
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (example,)).square().sum()

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    plain = Perceptron(lambda module: module)
    for index, example in enumerate(x):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        answer = torch.func.functional_call(plain, plain_state(leaves), (example,)).square().sum()
        gradients = torch.autograd.grad(answer, list(leaves.values()))
        for name, gradient in zip(leaves, gradients, strict=True):
            torch.testing.assert_close(per_example[name][index], gradient)
    return model


Context = Callable[[nn.Module, Tensor], Any]
CONTEXTS: dict[str, Context] = {
    "eager": lambda model, x: model,
    "`torch.jit.script`": lambda model, x: torch.jit.script(model),
    "`torch.jit.script`, saved and loaded": scripted_saved_and_loaded,
    "`torch.jit.freeze` of the script": frozen,
    "`torch.jit.trace`": lambda model, x: torch.jit.trace(model, x),
    "`torch.export`": lambda model, x: torch.export.export(model, (x,)).module(),
    "`torch.export`, `strict=True`": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "`torch.export`, saved and loaded": export_saved_and_loaded,
    "`torch.compile(fullgraph=True)`": lambda m, x: torch.compile(m, fullgraph=True, backend="aot_eager"),
    "`copy.deepcopy` after a forward": lambda model, x: copy.deepcopy(model),
    "`torch.save(model)`, `torch.load`": saved_and_loaded,
    "activation checkpointing": checkpointed,
    "`functional_call`": through_functional_call,
    "`vmap(grad)`": through_gradients,
    "`torch.fx.symbolic_trace`": lambda model, x: torch.fx.symbolic_trace(model),
}


def answers_rightly(make: Model, context: Context, x: Tensor) -> None:
    """Raises what the context raises, or what is wrong with its answer."""
    torch.manual_seed(0)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this is not the context yet
        model = make()
        model(x).square().sum().backward()
    change_parts(dict(model.named_parameters()))
    result = context(model, x)
    torch.testing.assert_close(result(x), expected(model.state_dict(), x))
    state = result.state_dict() if isinstance(result, nn.Module) else model.state_dict()
    if parts(state):
        change_parts(state)
        torch.testing.assert_close(result(x), expected({k.removeprefix("_orig_mod."): v for k, v in state.items()}, x))


def outcome(make: Model, context: Context, x: Tensor, warning: Literal["error", "ignore"]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter(warning)
        warnings.filterwarnings("ignore", ".torch.jit")
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.10, whatever it loads
        try:
            answers_rightly(make, context, x)
        except AssertionError:
            return "**wrong**"
        except Exception as error:
            return "torch.jit.Error" if isinstance(error, torch.jit.Error) else type(error).__name__
        return "✓"


def cell(make: Model, context: Context, x: Tensor) -> str:
    strict = outcome(make, context, x, "error")
    lenient = strict if strict == "✓" else outcome(make, context, x, "ignore")
    return "warns" if strict != lenient == "✓" else lenient


def table(models: dict[str, Model], x: Tensor, contexts: dict[str, Context]) -> str:
    heads = ["", *models]
    rows = [[name, *(cell(make, context, x) for make in models.values())] for name, context in contexts.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def main() -> None:
    print(table(PERCEPTRONS, torch.randn(3, 6), CONTEXTS), end="\n\n")
    alike = ["eager", "activation checkpointing", "`functional_call`", "`vmap(grad)`", "`torch.fx.symbolic_trace`"]
    print(table(RECURRENTS, torch.randn(3, 2, 6), {name: c for name, c in CONTEXTS.items() if name not in alike}))


if __name__ == "__main__":
    main()
