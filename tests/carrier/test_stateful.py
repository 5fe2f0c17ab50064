"""After any sequence of verbs, and of what else is done to modules, a module holds what a simple model of it holds.

`Weight` and `Expected` are that model: the parts as plain tensors, what was last stored, what `cached` blocks hold.
It uses the formulas, and never the package. After every step the module is compared with it.

`EXAMPLES=500 pytest tests/carrier/test_stateful.py` runs so many sequences of each kind, another choice each time.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from captured import reloaded
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from layers import norm_of, weight_of
from random_examples import MANY, drawn
from torch import Tensor, nn

import explicit_wn
from explicit_wn import SpectralNorm, WeightNorm

SETTINGS = drawn(30, stateful_step_count=25, phases=[Phase.generate, *([Phase.shrink] if MANY else [])])

some = st.integers(0, 11)
seeds = st.integers(0, 999)
flags = st.booleans()
a_norm: dict[str, Any] = {
    "which": some,
    "choice": some,
    "spectral": flags,
    "inlined": flags,
    "eps": st.sampled_from([0.0, 1e-12, 2.0]),
    "owner": some,
}


# What is expected


def matrix_of(weight: Tensor, dim: int) -> Tensor:
    return weight.movedim(dim, 0).reshape(weight.shape[dim], -1)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.square().sum().sqrt()


@attrs.define
class Weight:
    """One parameter of the layer: its parts by the suffix of their names, or itself under ''."""

    name: str
    parts: dict[str, Tensor]
    trainable: dict[str, bool]
    """Of those parts that are parameters."""
    norm: Any = None
    dim: int | None = None
    inlined: bool = False
    stored: Tensor | None = None
    """What the last recompute made of the parts, where it is kept."""

    @property
    def labels(self) -> set[str]:
        kind = type(self.norm).__name__
        return {f"{kind} {self.norm.name}", f"{kind} {self.name}"}

    def attribute(self, part: str) -> str:
        return f"{self.name}_{part}" if part else self.name

    def value(self, parts: dict[str, Tensor] | None = None) -> Tensor:
        """The weight that these parts make."""
        parts = {**self.parts, **(parts or {})}
        if self.norm is None:
            return parts[""]
        if isinstance(self.norm, WeightNorm):
            return weight_of(parts["g"], parts["v"], self.dim, self.norm.eps)
        orig = parts["orig"]
        if orig.dim() == 1:
            return orig / orig.square().sum().sqrt()
        sigma = torch.einsum(
            "i,ij,j", parts["u"].double(), matrix_of(orig.double(), self.dim or 0), parts["v"].double()
        )
        return (orig / sigma).to(orig.dtype)

    def advance(self, orig: Tensor | None = None) -> None:
        """One power iteration."""
        if "u" not in self.parts:
            return
        matrix = matrix_of((self.parts["orig"] if orig is None else orig).detach().double(), self.dim or 0)
        u, v = self.parts["u"].double(), self.parts["v"].double()
        for which in "uv" if self.norm.first == "u" else "vu":
            if which == "u":
                u = unit(matrix @ v)
            else:
                v = unit(matrix.t() @ u)
        self.parts |= {"u": u.to(self.parts["u"].dtype), "v": v.to(self.parts["v"].dtype)}

    def describe(self) -> str:
        settings = f"dim={self.dim}"
        if isinstance(self.norm, WeightNorm):
            settings += f", eps={self.norm.eps!r}" if self.norm.eps else ""
        else:
            settings += f", warmup={self.norm.warmup}" if self.norm.warmup != 15 else ""
            settings += f", first={self.norm.first!r}" if self.norm.first != "v" else ""
        return f"{self.name}={type(self.norm).__name__}({settings})"


@attrs.define
class Expected:
    """The layer as it should be, and the model around it."""

    weights: dict[str, Weight]
    """Every parameter, normed or not; the normed ones in the order of their norms."""
    training: bool = True
    recomputes: str | None = None
    """The label that the forward of the parent asks for."""
    blocks: set[int] = attrs.Factory(set)
    """The `cached` blocks that hold the weights."""

    @property
    def normed(self) -> list[Weight]:
        return [weight for weight in self.weights.values() if weight.norm is not None]

    def with_label(self, label: str) -> list[Weight]:
        return [weight for weight in self.normed if label in weight.labels]

    def recompute(self, weights: list[Weight], replaced: dict[str, dict[str, Tensor]] | None = None) -> None:
        for weight in weights:
            if not self.blocks:
                new = (replaced or {}).get(weight.name, {})
                if self.training and isinstance(weight.norm, SpectralNorm):
                    weight.advance(new.get("orig"))
                weight.stored = weight.value(new)

    def read(self, weight: Weight) -> Tensor:
        """The weight as an attribute of the layer, outside its forward."""
        if weight.norm is None or (weight.inlined and not self.blocks):
            return weight.value()
        if weight.stored is None:
            weight.stored = weight.value()
        return weight.stored

    def forget(self) -> None:
        """Nothing stored is good any more."""
        for weight in self.weights.values():
            weight.stored = None

    def renew(self) -> None:
        """The layer became another class, which is outside the blocks that held it."""
        self.forget()
        self.blocks.clear()

    def runs(self) -> bool:
        """Whether the forward of the parent finds what it recomputes."""
        return self.recomputes is None or bool(self.with_label(self.recomputes))

    def forward(self, replaced: dict[str, dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """The weights with which the layer computes its output when the model is called, perhaps with other parts."""
        if self.recomputes is not None:
            self.recompute(self.with_label(self.recomputes), replaced)
        self.recompute([weight for weight in self.normed if weight.inlined], replaced)
        if replaced is None:
            used = {name: self.read(w) if w.stored is None else w.stored for name, w in self.weights.items()}
        else:
            used = {name: weight.value(replaced[name]) for name, weight in self.weights.items()}
            self.forget()
        if not self.blocks:
            for weight in self.normed:
                weight.stored = None if weight.inlined else weight.stored
        return used


# What it is tried on


class Parent(nn.Module):
    """Recomputes a weight of its layer."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.wn = WeightNorm(name)
        self.layer = self.wn.apply(layer)

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.layer)
        return self.layer(x)


class RecurrentParent(Parent):
    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.layer)
        return self.layer(x)[0]


class AroundRecurrent(nn.Module):
    """For TorchScript, in which the overloaded forward of an RNN can be called by other modules only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@attrs.frozen
class Kind:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    """The parameters that are normed."""
    in_parent: bool = False


RNN_NAMES = ("weight_hh_l0", "weight_ih_l0", "bias_hh_l0")
KINDS = {
    "Linear": Kind(lambda: nn.Linear(3, 4), (2, 3), ("weight", "bias")),
    "Conv1d": Kind(lambda: nn.Conv1d(2, 3, 2), (2, 2, 5), ("weight", "bias")),
    "ConvTranspose1d": Kind(lambda: nn.ConvTranspose1d(2, 3, 2), (2, 2, 4), ("weight", "bias")),
    "LSTM": Kind(lambda: nn.LSTM(2, 3), (3, 1, 2), RNN_NAMES),
    "GRU": Kind(lambda: nn.GRU(2, 2, bidirectional=True), (3, 1, 2), (*RNN_NAMES, "weight_hh_l0_reverse")),
    "parent of Linear": Kind(lambda: nn.Linear(3, 4), (2, 3), ("weight", "bias"), in_parent=True),
    "parent of LSTM": Kind(lambda: nn.LSTM(2, 3), (3, 1, 2), RNN_NAMES, in_parent=True),
}


@attrs.define
class Pair:
    """A module and what it should be."""

    root: nn.Module
    expected: Expected

    @property
    def layer(self) -> Any:
        return self.root.layer if isinstance(self.root, Parent) else self.root

    @property
    def prefix(self) -> str:
        return "layer." if isinstance(self.root, Parent) else ""

    def tensor(self, weight: Weight, part: str) -> Tensor:
        found: Tensor = getattr(self.layer, weight.attribute(part))
        return found

    def take(self, weight: Weight) -> None:
        """Goes on with the parts as the module has them, to the last bit, once they are nearly what was expected."""
        for part in weight.parts:
            close(self.tensor(weight, part).detach(), weight.parts[part], f"part {weight.attribute(part)}")
            weight.parts[part] = self.tensor(weight, part).detach().clone()


def close(actual: Tensor, expected: Tensor, what: str, scale: float = 1.0) -> None:
    tolerance = scale * (1e-9 if expected.dtype == torch.float64 else 3e-5)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def noise(like: Tensor, seed: int) -> Tensor:
    """Random numbers, none near zero."""
    numbers = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (numbers + 0.5 * numbers.sign()).to(like.dtype)


def vectors_of(orig: Tensor, dim: int) -> dict[str, Tensor]:
    """The first singular vectors."""
    u, _, v = torch.linalg.svd(matrix_of(orig.double(), dim), full_matrices=False)
    return {"u": u[:, 0].to(orig.dtype), "v": v[0].to(orig.dtype)}


def torchs_hook(layer: nn.Module, name: str, dim: int | None, spectral: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if spectral:
            torch.nn.utils.spectral_norm(layer, name, dim=dim)
        else:
            torch.nn.utils.weight_norm(layer, name, dim)


def torchs_parametrization(layer: nn.Module, name: str, dim: int | None, spectral: bool) -> None:
    norms = torch.nn.utils.parametrizations
    (norms.spectral_norm if spectral else norms.weight_norm)(layer, name, dim=dim)


some_normed = precondition(lambda self: self.candidates(normed=True))
some_plain = precondition(lambda self: self.candidates(normed=False))
runs = precondition(lambda self: self.expected.runs())


class Verbs(RuleBasedStateMachine):
    """The verbs; each does to the module and to what is expected the same."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.plain = kind.make()
        self.pairs: list[Pair] = []
        self.contexts: dict[int, Any] = {}
        self.opened = self.scripts = self.exports = 0

    @initialize(seed=seeds, norms=st.lists(st.fixed_dictionaries(a_norm), min_size=1, max_size=3))
    def build(self, seed: int, norms: list[dict[str, Any]]) -> None:
        layer = self.kind.make()
        with torch.no_grad():
            for index, parameter in enumerate(layer.parameters()):
                parameter.copy_(noise(parameter, seed + index))
                parameter.requires_grad_((seed + index) % 4 > 0)
        named = layer.named_parameters()
        weights = {n: Weight(n, {"": p.detach().clone()}, {"": p.requires_grad}) for n, p in named}
        root, expected = layer, Expected(weights)
        if self.kind.in_parent:
            name = self.kind.names[0]
            root = (RecurrentParent if isinstance(layer, nn.RNNBase) else Parent)(layer, name)
            expected.recomputes = f"WeightNorm {name}"
            self.becomes_normed(expected, name, WeightNorm(name), 0, inlined=False)
        self.pairs = [Pair(root, expected)]
        if self.kind.in_parent:
            self.pair.take(expected.weights[name])
            expected.weights[name].stored = expected.weights[name].value()
        for norm in norms:
            if self.candidates(normed=False):
                self.apply(**norm)

    @property
    def pair(self) -> Pair:
        return self.pairs[0]

    @property
    def expected(self) -> Expected:
        return self.pair.expected

    def becomes_normed(self, expected: Expected, name: str, norm: Any, dim: int | None, inlined: bool) -> Weight:
        old = expected.weights.pop(name)
        value, trainable = old.parts[""], old.trainable[""]
        if isinstance(norm, WeightNorm):
            parts = {"g": norm_of(value.double(), dim).clamp_min(norm.eps).to(value.dtype), "v": value}
            expected.weights[name] = Weight(name, parts, {"g": trainable, "v": trainable}, norm, dim, inlined)
        else:
            parts = {"orig": value} | (vectors_of(value, dim or 0) if value.dim() > 1 else {})
            expected.weights[name] = Weight(name, parts, {"orig": trainable}, norm, dim, inlined)
        expected.renew()
        return expected.weights[name]

    def take_vectors(self, weight: Weight) -> None:
        """u and v begin at random: they are unit vectors, and that is all that can be expected of them."""
        for part in set(weight.parts) & {"u", "v"} if isinstance(weight.norm, SpectralNorm) else ():
            vector = self.pair.tensor(weight, part)
            close(vector.square().sum(), torch.ones_like(vector[0]), f"the length of {weight.attribute(part)}")
            weight.parts[part] = vector.detach().clone()

    def one(self, index: int, normed: bool) -> Weight:
        """One of the weights that are normed, or that are not."""
        candidates = self.candidates(normed)
        return candidates[index % len(candidates)]

    def candidates(self, normed: bool) -> list[Weight]:
        weights = [self.expected.weights[name] for name in self.kind.names]
        return [weight for weight in weights if (weight.norm is not None) == normed]

    def dims(self, weight: Weight, spectral: bool) -> list[Any]:
        ndim = weight.parts[""].dim()
        return [None, "out", *range(ndim), *range(-ndim, 0 if spectral else -1)]

    def resolved(self, weight: Weight, dim: Any, spectral: bool) -> int | None:
        ndim = weight.parts[""].dim()
        if dim == "out" or (spectral and dim is None):
            return 1 if ndim > 1 and isinstance(self.plain, nn.ConvTranspose1d) else 0
        return dim if dim is None else dim % ndim

    # The verbs of a norm

    @some_plain
    @rule(**a_norm)
    def apply(self, which: int, choice: int, spectral: bool, inlined: bool, eps: float, owner: int) -> None:
        weight = self.one(which, normed=False)
        dims = self.dims(weight, spectral)
        dim = dims[choice % len(dims)]
        owners = [weight.name, *self.kind.names]
        owner_name = owners[owner % len(owners)]
        norm: Any = None if spectral else WeightNorm(owner_name, dim, eps)
        if spectral:
            norm = SpectralNorm(owner_name, dim=dim, warmup=choice, first="vu"[choice % 2])
        original = self.pair.tensor(weight, "")
        (norm.inline if inlined else norm.apply)(self.pair.layer, weight.name)
        resolved = self.resolved(weight, dim, spectral)
        weight = self.becomes_normed(self.expected, weight.name, norm, resolved, inlined)
        assert self.pair.tensor(weight, "orig" if spectral else "v") is original
        self.take_vectors(weight)
        self.pair.take(weight)
        if not inlined:
            weight.stored = weight.value()

    @some_normed
    @rule(which=some, everything=flags)
    def remove(self, which: int, everything: bool) -> None:
        weight = self.one(which, normed=True)
        ended = [weight]
        if everything:  # that this object was applied to
            ended = self.expected.with_label(f"{type(weight.norm).__name__} {weight.norm.name}")
        weight.norm.remove(self.pair.layer, None if everything else weight.name)
        for one in ended:
            self.becomes_plain(one)

    def becomes_plain(self, weight: Weight) -> None:
        value = weight.value()
        plain = Weight(weight.name, {"": value}, {"": any(weight.trainable.values())})
        self.expected.weights[weight.name] = plain
        self.expected.renew()
        self.pair.take(plain)

    @some_normed
    @rule(which=some, seed=seeds)
    def assign(self, which: int, seed: int) -> None:
        weight = self.one(which, normed=True)
        wanted = noise(weight.value(), seed)
        if isinstance(weight.norm, WeightNorm):
            norm = norm_of(wanted.double(), weight.dim).clamp_min(weight.norm.eps).to(wanted.dtype)
            weight.parts |= {"g": norm, "v": wanted}
        elif wanted.dim() == 1:
            wanted = unit(wanted)
            weight.parts["orig"] = wanted
        else:
            sigma = torch.linalg.matrix_norm(matrix_of(wanted.double(), weight.dim or 0), 2)
            wanted = (wanted.double() / sigma).to(wanted.dtype)
            weight.parts |= {"orig": wanted}
        weight.norm.assign(self.pair.layer, wanted, weight.name)
        weight.stored = None
        self.take_vectors(weight)
        self.pair.take(weight)
        close(weight.value(), wanted, "the assigned weight")

    @some_normed
    @rule(which=some)
    def recompute(self, which: int) -> None:
        weight = self.one(which, normed=True)
        matching = self.expected.with_label(f"{type(weight.norm).__name__} {weight.norm.name}")
        weight.norm.recompute(self.pair.layer)
        self.expected.recompute(matching)
        for one in matching:
            self.pair.take(one)

    @rule()
    def recompute_all(self) -> None:
        explicit_wn.recompute_all(self.pair.root)
        self.expected.recompute(self.expected.normed)
        self.take_all()

    def take_all(self) -> None:
        for weight in self.expected.weights.values():
            self.pair.take(weight)

    @some_normed
    @rule(which=some)
    def compute_weight(self, which: int) -> None:
        weight = self.one(which, normed=True)
        close(weight.norm.compute_weight(self.pair.layer, weight.name).detach(), weight.value(), "compute_weight")

    @rule(which=some)
    def what_is_refused_changes_nothing(self, which: int) -> None:
        weight = self.expected.weights[self.kind.names[which % len(self.kind.names)]]
        layer = self.pair.layer
        norm: Any = WeightNorm(weight.name) if which % 2 else SpectralNorm(weight.name)
        if weight.norm is None:
            with pytest.raises(ValueError, match="was not called for it"):
                norm.remove(layer, weight.name)
            with pytest.raises(ValueError, match="out of range"):
                norm.inline(layer, dim=9)
        else:
            with pytest.raises(ValueError, match="it is normed already"):
                norm.apply(layer)
            with pytest.raises(AttributeError, match="cannot be set"):
                setattr(layer, weight.name, nn.Parameter(weight.value()))
            with pytest.raises(ValueError, match="is wanted, not the shape"):
                weight.norm.assign(layer, torch.zeros(9), weight.name)

    # The verbs of a model

    @rule()
    def fold(self) -> None:
        normed = self.expected.normed
        names = explicit_wn.fold(self.pair.root)
        assert names == [self.pair.prefix + weight.name for weight in normed]
        if normed and self.expected.recomputes in set().union(*(weight.labels for weight in normed)):
            self.expected.recomputes = None
        for weight in normed:
            self.becomes_plain(weight)

    @some_plain
    @rule(which=some, choice=some, spectral=flags, hook=flags)
    def convert(self, which: int, choice: int, spectral: bool, hook: bool) -> None:
        weight = self.one(which, normed=False)
        spectral = spectral and weight.parts[""].dim() > 1
        dims = range(weight.parts[""].dim()) if spectral else [None, *range(weight.parts[""].dim())]
        dim = dims[choice % len(dims)]
        (torchs_hook if hook else torchs_parametrization)(self.pair.layer, weight.name, dim, spectral)
        assert explicit_wn.convert(self.pair.root) == [self.pair.prefix + weight.name]
        norm: Any = WeightNorm(weight.name)
        if spectral:
            norm = SpectralNorm(weight.name, first="v" if hook else "u")
        weight = self.becomes_normed(self.expected, weight.name, norm, dim, inlined=True)
        if hook and not spectral:
            weight.trainable = {"g": True, "v": True}  # whatever the weight was
        self.take_vectors(weight)
        self.pair.take(weight)

    @precondition(lambda self: len(self.contexts) < 3)
    @rule()
    def cached_enter(self) -> None:
        context = explicit_wn.cached(self.pair.root)
        context.__enter__()
        self.opened += 1
        self.contexts[self.opened] = context
        self.expected.recompute(self.expected.normed)
        self.take_all()
        if self.expected.normed:
            self.expected.blocks.add(self.opened)

    @precondition(lambda self: self.contexts)
    @rule(which=some)
    def cached_exit(self, which: int) -> None:
        """In whatever order."""
        block = list(self.contexts)[which % len(self.contexts)]
        self.contexts.pop(block).__exit__(None, None, None)
        for pair in self.pairs:
            pair.expected.blocks.discard(block)
            if not pair.expected.blocks:
                for weight in pair.expected.normed:
                    weight.stored = None if weight.inlined else weight.stored

    # What else is done to a module

    @rule(which=some, part=some, seed=seeds, how=st.sampled_from(["in place", "data", "another Parameter"]))
    def change_part(self, which: int, part: int, seed: int, how: str) -> None:
        weight = list(self.expected.weights.values())[which % len(self.expected.weights)]
        name = list(weight.trainable)[part % len(weight.trainable)]
        new = self.changed(weight, name, seed)
        old = self.pair.tensor(weight, name)
        if how == "in place":
            with torch.no_grad():
                old.copy_(new)
        elif how == "data":
            old.data = new.clone()
        else:
            setattr(self.pair.layer, weight.attribute(name), nn.Parameter(new.clone(), weight.trainable[name]))
            weight.stored = None
        weight.parts[name] = new

    def changed(self, weight: Weight, part: str, seed: int) -> Tensor:
        """Another value for one part: of a spectral norm one for which its vectors are not much worse."""
        old = weight.parts[part]
        if part != "orig":
            return noise(old, seed)
        new = old * (0.5 + seed % 4 / 2) + 0.1 * old.abs().mean() * noise(old, seed)
        far = "u" in weight.parts and weight.value({"orig": new}).abs().max() > 5
        return old.clone() if far else new

    @rule(seed=seeds, spelling=st.sampled_from(["parts", "parametrization", "plain"]), assign=flags, chosen=seeds)
    def load(self, seed: int, spelling: str, assign: bool, chosen: int) -> None:
        weights = list(self.expected.weights.values())
        loaded = [weight for index, weight in enumerate(weights) if chosen >> index & 1] or weights
        state: dict[str, Tensor] = {}
        for weight in loaded:
            state |= self.spelled(weight, spelling, seed)
        state = {self.pair.prefix + key: value.clone() for key, value in state.items()}
        self.pair.root.load_state_dict(state, strict=len(loaded) == len(weights), assign=assign)
        self.expected.forget()
        for weight in loaded:
            if spelling == "plain":
                self.take_vectors(weight)
            self.pair.take(weight)

    def spelled(self, weight: Weight, spelling: str, seed: int) -> dict[str, Tensor]:
        """The state of one weight in a checkpoint; its parts become what that says."""
        value = noise(weight.value(), seed)
        parts = {"": value}
        if isinstance(weight.norm, WeightNorm):
            parts = {"g": noise(weight.parts["g"], seed + 1), "v": value}
        elif weight.norm is not None:
            parts = {"orig": value} | (vectors_of(value, weight.dim or 0) if "u" in weight.parts else {})
        theirs = {"g": "original0", "v": "original1"}
        if isinstance(weight.norm, SpectralNorm):
            theirs = {"orig": "original", "u": "0._u", "v": "0._v"}
        if weight.norm is None:
            state = {weight.name: value}
        elif spelling == "plain":
            state = {weight.name: value}
            if isinstance(weight.norm, WeightNorm):
                parts["g"] = norm_of(value.double(), weight.dim).clamp_min(weight.norm.eps).to(value.dtype)
        elif spelling == "parts":
            state = {weight.attribute(part): tensor for part, tensor in parts.items()}
        else:
            state = {f"parametrizations.{weight.name}.{theirs[part]}": tensor for part, tensor in parts.items()}
        weight.parts = parts
        return state

    @rule(which=some)
    def load_what_does_not_fit(self, which: int) -> None:
        weight = list(self.expected.weights.values())[which % len(self.expected.weights)]
        state = {f"{self.pair.prefix}{weight.attribute(part)}": torch.zeros(7, 7) for part in weight.trainable}
        with pytest.raises(RuntimeError, match="size mismatch"):
            self.pair.root.load_state_dict(state, strict=False)
        self.expected.forget()

    @rule(other=flags, how=st.sampled_from(["deepcopy", "torch.save"]))
    def copy(self, other: bool, how: str) -> None:
        """The copy is as fresh as can be, and whichever is not worked with further stays as it is."""
        copied = (copy.deepcopy if how == "deepcopy" else reloaded)(self.pair.root)
        expected = copy.deepcopy(self.expected)
        expected.renew()
        pairs = [Pair(copied, expected), self.pair] if other else [self.pair, Pair(copied, expected)]
        self.pairs = [*pairs, *self.pairs[1:2]]

    @precondition(lambda self: len(self.pairs) > 1)
    @rule()
    def go_on_with_another_copy(self) -> None:
        self.pairs.append(self.pairs.pop(0))

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def move(self, dtype: torch.dtype) -> None:
        self.pair.root.to(dtype)
        self.expected.forget()
        for weight in self.expected.weights.values():
            weight.parts = {part: tensor.to(dtype) for part, tensor in weight.parts.items()}

    @rule(which=some, part=some, flag=flags, everything=flags)
    def requires_grad(self, which: int, part: int, flag: bool, everything: bool) -> None:
        weights = list(self.expected.weights.values())
        if everything:
            self.pair.root.requires_grad_(flag)
            for weight in weights:
                weight.trainable = dict.fromkeys(weight.trainable, flag)
            return
        weight = weights[which % len(weights)]
        name = list(weight.trainable)[part % len(weight.trainable)]
        self.pair.tensor(weight, name).requires_grad_(flag)
        weight.trainable[name] = flag

    @rule(training=flags)
    def train(self, training: bool) -> None:
        self.pair.root.train(training)
        self.expected.training = training

    @rule(which=some)
    def read(self, which: int) -> None:
        weights = list(self.expected.weights.values())
        weight = weights[which % len(weights)]
        close(getattr(self.pair.layer, weight.name).detach(), self.expected.read(weight), f"reading {weight.name}")

    def input(self) -> Tensor:
        dtype = next(iter(self.expected.weights.values())).value().dtype
        return torch.randn(self.kind.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)

    def plain_output(self, weights: dict[str, Tensor]) -> Tensor:
        """What a layer without norms gives, with these weights."""
        return first(torch.func.functional_call(copy.deepcopy(self.plain), weights, self.input()))

    @rule(grad=flags)
    def forward(self, grad: bool) -> None:
        if not self.expected.runs():
            with pytest.raises(ValueError, match="was not called for it"):
                self.pair.root(self.input())
            return
        with contextlib.nullcontext() if grad else torch.no_grad():
            output = first(self.pair.root(self.input())).detach()
        close(output, self.plain_output(self.expected.forward()).detach(), "the output")
        self.take_all()

    @runs
    @rule(seed=seeds)
    def functional_call(self, seed: int) -> None:
        """With other parameters: the module does not keep what it computed of them."""
        weights = self.expected.weights
        replaced = {n: {part: self.changed(w, part, seed) for part in w.trainable} for n, w in weights.items()}
        parameters = {
            f"{self.pair.prefix}{weights[name].attribute(part)}": tensor
            for name, parts in replaced.items()
            for part, tensor in parts.items()
        }
        output = first(torch.func.functional_call(self.pair.root, parameters, self.input())).detach()
        close(output, self.plain_output(self.expected.forward(replaced)), "the output of functional_call")
        self.take_all()

    @runs
    @rule()
    def optimizer_step(self) -> None:
        """Every weight is recomputed first, as a forward that trains them all would."""
        expected = self.expected
        trained = [(w, part) for w in expected.weights.values() for part, flag in w.trainable.items() if flag]
        if not trained or expected.blocks:
            return
        explicit_wn.recompute_all(self.pair.root)
        expected.recompute(expected.normed)
        expected.forward()
        self.pair.root.zero_grad()
        loss(first(self.pair.root(self.input()))).backward()
        expected_gradients = self.gradients()
        for weight, part in trained:
            gradient = self.pair.tensor(weight, part).grad
            assert gradient is not None
            close(gradient, expected_gradients[weight.name, part], f"the gradient of {weight.attribute(part)}", 10)
        torch.optim.SGD(self.pair.root.parameters(), lr=0.1).step()
        for weight, part in trained:
            weight.parts[part] = weight.parts[part] - 0.1 * expected_gradients[weight.name, part]
        self.take_all()
        self.pair.root.zero_grad()

    def gradients(self) -> dict[tuple[str, str], Tensor]:
        """Of the loss, for every part that is a parameter."""
        leaves = {
            (name, part): weight.parts[part].clone().requires_grad_()
            for name, weight in self.expected.weights.items()
            for part in weight.trainable
        }
        weights = {}
        for name, weight in self.expected.weights.items():
            weights[name] = weight.value({part: leaves[name, part] for part in weight.trainable})
        loss(self.plain_output(weights)).backward()
        return {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}

    @precondition(lambda self: self.scripts < 2)
    @runs
    @rule(seed=seeds)
    def script(self, seed: int) -> None:
        expected = self.expected
        self.scripts += 1
        root = self.pair.root
        if isinstance(self.plain, nn.RNNBase) and not expected.normed:
            root(self.input())  # else, after functional_call, torch scripts a plain RNN with the weights of that
        scripted = torch.jit.script(AroundRecurrent(root) if isinstance(root, nn.RNNBase) else root)
        expected.forget()
        at_first = {weight.name: expected.read(weight) for weight in expected.normed}
        for step in range(2):
            close(first(scripted(self.input())).detach(), self.plain_output(self.in_script(at_first)), f"script {step}")
            self.take_all()
            for weight in expected.normed:
                part = next(iter(weight.trainable))
                with torch.no_grad():
                    new = self.changed(weight, part, seed + step)
                    self.pair.tensor(weight, part).copy_(new)
                    weight.parts[part] = new

    def in_script(self, at_first: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights in TorchScript, which keeps its own: a layer that nobody told to recompute does it by itself."""
        expected = self.expected
        told = [weight for weight in expected.normed if weight.inlined]
        if expected.recomputes is not None:
            told = expected.with_label(expected.recomputes) + told
        for weight in told:
            if expected.training and isinstance(weight.norm, SpectralNorm):
                weight.advance()
        for weight in told or expected.normed:
            at_first[weight.name] = weight.value()
        return {name: at_first.get(name, weight.value()) for name, weight in expected.weights.items()}

    @precondition(lambda self: self.exports < 1 and not isinstance(self.plain, nn.RNNBase))
    @runs
    @rule(seed=seeds)
    def export(self, seed: int) -> None:
        self.exports += 1
        self.train(False)
        program = torch.export.export(self.pair.root, (self.input(),)).module()
        fresh = {name: weight.value() for name, weight in self.expected.weights.items()}
        close(program(self.input()).detach(), self.plain_output(fresh), "the exported program")

    # What always holds

    @invariant()
    def every_module_is_what_it_should_be(self) -> None:
        for pair in self.pairs:
            self.check_names_and_values(pair)
            self.check_class(pair)
            check_no_hooks(pair.root)

    def check_names_and_values(self, pair: Pair) -> None:
        parameters = dict(pair.root.named_parameters())
        buffers = dict(pair.root.named_buffers())
        names: set[str] = set()
        for weight in pair.expected.weights.values():
            for part, tensor in weight.parts.items():
                name = pair.prefix + weight.attribute(part)
                names.add(name)
                found = parameters[name] if part in weight.trainable else buffers[name]
                assert found.dtype == tensor.dtype
                assert torch.equal(found, tensor), name
                assert found.is_leaf
                assert found.requires_grad == weight.trainable.get(part, False), name
                assert isinstance(found, nn.Parameter) == (part in weight.trainable), name
        assert set(pair.root.state_dict()) == set(parameters) | set(buffers) == names
        assert all(module.training == pair.expected.training for module in pair.root.modules())

    def check_class(self, pair: Pair) -> None:
        layer, base, normed = pair.layer, type(self.plain), pair.expected.normed
        assert isinstance(layer, base)
        assert (type(layer) is base) == (not normed)
        assert type(layer).__name__ == base.__name__
        if "bias" in pair.expected.weights:
            pair.expected.read(pair.expected.weights["bias"])  # as the extra_repr of Linear and Conv does
        assert layer.extra_repr() == ", ".join([self.plain.extra_repr(), *(weight.describe() for weight in normed)])
        if not normed:
            assert set(vars(layer)) - {"__overloads__"} == set(vars(self.plain))  # of torch.jit.script
        found = [(name, repr(norm).partition(", ")[2]) for name, _, norm in explicit_wn.normed(pair.root)]
        expected = [(pair.prefix + w.name, w.describe().partition("(")[2]) for w in normed]
        assert found == expected

    def teardown(self) -> None:
        """The rest is seen by whoever uses the module next."""
        for _ in self.pairs:
            for which in range(len(self.expected.weights)):
                self.read(which)
            self.forward(grad=True)
            self.go_on_with_another_copy()
        for context in self.contexts.values():
            context.__exit__(None, None, None)


def first(output: Any) -> Tensor:
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def loss(output: Tensor) -> Tensor:
    """A number on which every entry of `output` has another influence."""
    return (output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)).mean()


def check_no_hooks(model: nn.Module) -> None:
    for module in model.modules():
        hooks = {name: value for name, value in vars(module).items() if name.endswith("_hooks") and value}
        assert not hooks, hooks


@pytest.mark.filterwarnings("ignore::explicit_wn.StaleWeightWarning")  # a stale weight is what it expects then
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_any_sequence_of_verbs_leaves_what_is_expected(kind: Kind) -> None:
    run_state_machine_as_test(lambda: Verbs(kind), settings=SETTINGS)  # type: ignore[no-untyped-call]
