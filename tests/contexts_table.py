"""Prints the tables of contexts in tests/README.md, each cell by trying it. Run: python tests/contexts_table.py

Every cell takes a model one training step along, changes the parts behind its weights, brings the model into the
context, and compares the answer with a plain model whose weights are computed here from the parts; then it changes the
parts in the context itself, where they are still there, and compares once more. Warnings count.
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.utils.checkpoint
from captured import reloaded, reloaded_script, through_bytes
from norms_by_hand import NORMS, OTHERS, ByHand
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
    def __init__(self, wn: nn.Module) -> None:
        super().__init__()
        self.wn = wn
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
    def __init__(self, wn: nn.Module) -> None:
        super().__init__()
        self.wn = wn
        self.lstm = self.wn.apply(nn.LSTM(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.lstm)
        return self.lstm(x)[0]


Model = Callable[[], nn.Module]
PERCEPTRONS: dict[str, Model] = {
    "`recompute`": lambda: ExplicitPerceptron(WeightNorm()),
    "`inline`": lambda: Perceptron(WeightNorm().inline),
    "hook": lambda: Perceptron(hook),
    "parametrization": lambda: Perceptron(parametrization),
}
RECURRENTS: dict[str, Model] = {
    "`recompute`": lambda: ExplicitRecurrent(WeightNorm("weight_hh_l0")),
    "`inline`": lambda: Recurrent(WeightNorm("weight_hh_l0").inline),
    "hook": lambda: Recurrent(lambda lstm: hook(lstm, "weight_hh_l0")),
    "parametrization": lambda: Recurrent(lambda lstm: parametrization(lstm, "weight_hh_l0")),
    "no norm": lambda: Recurrent(lambda lstm: lstm),
}


def parts(state: dict[str, Any], norm: ByHand) -> dict[str, dict[str, str]]:
    """The names of the parts in a state dict, by the name of the weight that they make."""
    first = f"_{norm.parts[0]}"
    names = [name.removesuffix(first) for name in state if name.endswith(first)]
    ours = {name: {part: f"{name}_{part}" for part in norm.parts} for name in names}
    ending = ".original0"
    theirs = {n.removesuffix(ending): {"g": n, "v": n.removesuffix("0") + "1"} for n in state if n.endswith(ending)}
    return ours | {name.replace("parametrizations.", ""): made for name, made in theirs.items()}


def plain_state(state: dict[str, Any], norm: ByHand) -> dict[str, Tensor]:
    """The state dict of the same model without a norm."""
    made = parts(state, norm)
    used = {name for names in made.values() for name in names.values()}
    weights = {name: norm.of({part: state[key] for part, key in names.items()}) for name, names in made.items()}
    return {name: value for name, value in state.items() if name not in used} | weights


def expected(state: dict[str, Any], x: Tensor, norm: ByHand) -> Tensor:
    kind = Recurrent if x.dim() == 3 else Perceptron
    plain = kind(lambda module: module)
    plain.load_state_dict(plain_state(state, norm))
    return plain(x)


def close(answer: Tensor, right: Tensor) -> None:
    """A weight that is out of date is off by a tenth and more."""
    torch.testing.assert_close(answer, right, rtol=1e-4, atol=1e-4)


def change_parts(state: dict[str, Any], norm: ByHand) -> None:
    """Changes what is trained, and a fixed g; the vectors of an iteration have the length 1 and stay."""
    with torch.no_grad():
        for names in parts(state, norm).values():
            for part, name in names.items():
                if part in ("g", "gain"):
                    state[name].mul_(2).add_(0.3)
                elif part not in norm.buffers:
                    state[name].add_(torch.linspace(-1, 1, state[name].numel()).view_as(state[name]))


def frozen(model: nn.Module, x: Tensor, norm: ByHand) -> Any:
    ours = any("explicit_wn" in cls.__module__ for module in model.modules() for cls in type(module).__mro__)
    scripted = explicit_wn.script(model.eval()) if ours else torch.jit.script(model.eval())
    change_parts(dict(model.state_dict()), norm)
    return torch.jit.freeze(scripted)


def export_saved_and_loaded(model: nn.Module, x: Tensor, norm: ByHand) -> Any:
    program = torch.export.export(model, (x,))
    return through_bytes(torch.export.save, torch.export.load, program).module()


def checkpointed(model: nn.Module, x: Tensor, norm: ByHand) -> Any:
    return lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)


def through_functional_call(model: nn.Module, x: Tensor, norm: ByHand) -> Any:
    """Answers under other parameters, and then again under its own."""
    others = {name: value.detach().clone() for name, value in model.state_dict().items()}
    change_parts(others, norm)
    answer = torch.func.functional_call(model, others, (x,))
    close(answer, expected(others, x, norm))
    return model


def through_gradients(model: nn.Module, x: Tensor, norm: ByHand) -> Any:
    """Checks the gradient for every example, taken by vmap(grad), against one at a time."""
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (example,)).square().sum()

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    plain = Perceptron(lambda module: module)
    for index, example in enumerate(x):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        state = dict(model.named_buffers()) | leaves
        answer = torch.func.functional_call(plain, plain_state(state, norm), (example,)).square().sum()
        gradients = torch.autograd.grad(answer, list(leaves.values()))
        for name, gradient in zip(leaves, gradients, strict=True):
            torch.testing.assert_close(per_example[name][index], gradient, rtol=1e-4, atol=1e-5)
    return model


Context = Callable[[nn.Module, Tensor, ByHand], Any]
CONTEXTS: dict[str, Context] = {
    "eager": lambda model, x, norm: model,
    "`torch.jit.script`": lambda model, x, norm: torch.jit.script(model),
    "`torch.jit.script`, saved and loaded": lambda model, x, norm: reloaded_script(torch.jit.script(model)),
    "`torch.jit.freeze` of the script": frozen,
    "`torch.jit.trace`": lambda model, x, norm: torch.jit.trace(model, x),
    "`torch.export`": lambda model, x, norm: torch.export.export(model, (x,)).module(),
    "`torch.export`, `strict=True`": lambda model, x, norm: torch.export.export(model, (x,), strict=True).module(),
    "`torch.export`, saved and loaded": export_saved_and_loaded,
    "`torch.compile(fullgraph=True)`": lambda m, x, norm: torch.compile(m, fullgraph=True, backend="aot_eager"),
    "`copy.deepcopy` after a forward": lambda model, x, norm: copy.deepcopy(model),
    "`torch.save(model)`, `torch.load`": lambda model, x, norm: reloaded(model),
    "activation checkpointing": checkpointed,
    "`functional_call`": through_functional_call,
    "`vmap(grad)`": through_gradients,
    "`torch.fx.symbolic_trace`": lambda model, x, norm: torch.fx.symbolic_trace(model),
}


def answers_rightly(make: Model, context: Context, x: Tensor, norm: ByHand) -> None:
    """Raises what the context raises, or what is wrong with its answer."""
    torch.manual_seed(0)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this is not the context yet
        model = make()
        model(x).square().sum().backward()
    change_parts(model.state_dict(), norm)
    result = context(model, x, norm)
    state = result.state_dict() if isinstance(result, nn.Module) else model.state_dict()
    own = {name.removeprefix("_orig_mod."): value for name, value in state.items()}
    answer = result(x)
    advanced = {name: value for name, value in own.items() if name.endswith(("_u", "_v")) and value.dim() == 1}
    close(answer, expected(model.state_dict() | advanced, x, norm))
    if parts(own, norm):
        change_parts(own, norm)
        answer = result(x)
        close(answer, expected(own, x, norm))


def outcome(make: Model, context: Context, x: Tensor, norm: ByHand, warning: Literal["error", "ignore"]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter(warning)
        warnings.filterwarnings("ignore", ".torch.jit")
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.10, whatever it loads
        try:
            answers_rightly(make, context, x, norm)
        except AssertionError:
            return "**wrong**"
        except Exception as error:
            return "torch.jit.Error" if isinstance(error, torch.jit.Error) else type(error).__name__
        return "✓"


def cell(make: Model, context: Context, x: Tensor, norm: ByHand = NORMS["WeightNorm"]) -> str:
    strict = outcome(make, context, x, norm, "error")
    lenient = strict if strict == "✓" else outcome(make, context, x, norm, "ignore")
    return "warns" if strict != lenient == "✓" else lenient


def as_table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def table(models: dict[str, Model], x: Tensor, contexts: dict[str, Context]) -> str:
    rows = [[name, *(cell(make, context, x) for make in models.values())] for name, context in contexts.items()]
    return as_table([["", *models], *rows])


def of_norm(norm: ByHand, recurrent: bool) -> tuple[Model, Model]:
    """The model in its two forms: `recompute`, `inline`."""
    if recurrent:
        wn = norm.make("weight_hh_l0")
        return lambda: ExplicitRecurrent(wn), lambda: Recurrent(wn.inline)
    return lambda: ExplicitPerceptron(norm.make()), lambda: Perceptron(norm.make().inline)


def both(norm: ByHand, context: Context, x: Tensor) -> str:
    """The cells of both forms, or one where they are alike."""
    cells = [cell(make, context, x, norm) for make in of_norm(norm, x.dim() == 3)]
    return ", ".join(dict.fromkeys(cells))


def table_of_norms(x: Tensor, contexts: dict[str, Context]) -> str:
    rows = [[name, *(both(norm, context, x) for norm in OTHERS.values())] for name, context in contexts.items()]
    return as_table([["", *OTHERS], *rows])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("norms",), help="only the tables of the other norms")
    parser.add_argument("--device", default="cpu", help="where the models and their inputs are")
    chosen = parser.parse_args()
    torch.set_default_device(chosen.device)
    torch.manual_seed(0)
    x, sequence = torch.randn(3, 6), torch.randn(3, 2, 6)
    alike = ["eager", "activation checkpointing", "`functional_call`", "`vmap(grad)`", "`torch.fx.symbolic_trace`"]
    some = {name: context for name, context in CONTEXTS.items() if name not in alike}
    if not chosen.only:
        print(table(PERCEPTRONS, x, CONTEXTS), end="\n\n")
        print(table(RECURRENTS, sequence, some), end="\n\n")
    print(table_of_norms(x, CONTEXTS), end="\n\n")
    print(table_of_norms(sequence, some))


if __name__ == "__main__":
    main()
