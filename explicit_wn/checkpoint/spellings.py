"""Which entries of a state dict are the parts of a weight, by their names and shapes alone.

Nothing here reads a number, so that a file is understood from its header. Whatever has a `shape` and a `dtype` will do
as a tensor.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import attrs
import torch

from ..functional.weight import shape_of_g
from ..norms import SpectralNorm, WeightNorm
from ..reparametrization import Reparametrization

NORMS: dict[str, type[Reparametrization]] = {"WeightNorm": WeightNorm, "SpectralNorm": SpectralNorm}
SPELLINGS = ("hook", "parametrization", "plain", "ours")
_PARAMETRIZATION = re.compile(r"((?:.*\.)?)parametrizations\.([^.]+)\.(.+)", re.DOTALL)
_HOOK = re.compile(r"((?:.*\.)?[^.]+)_(g|v|orig|u|bar)", re.DOTALL)
_BAR = {"orig": "bar", "u": "u", "v": "v"}
"""A spectral norm that many projects copied: the hook's, computed the same, with another name for one part."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

KeptDim = int | None
"""What a norm keeps, as an index; None for one norm of the whole tensor."""
Shape = tuple[int, ...]


def whole_part(parts: Collection[str]) -> str:
    """Which part has the shape, the dtype and the strides of the weight."""
    return "v" if "g" in parts else "orig"


@attrs.frozen
class Normed:
    """A weight that a state dict holds in parts."""

    name: str
    """Its qualified name."""
    kind: str
    """`WeightNorm` or `SpectralNorm`; empty where that cannot be told."""
    spelling: str
    """`hook`, which is ours too, `parametrization`, or `bar`."""
    keys: dict[str, str]
    """The keys of its parts, by our names for the parts."""
    shape: Shape = ()
    """The weight's shape."""
    dims: tuple[KeptDim, ...] = ()
    """The dims that the shapes allow. Those of a weight norm give the same weight."""
    why_not: str | None = None
    """Why it cannot be computed, and the way out."""

    def respelled(self, to: str, shapes: Mapping[str, Shape]) -> dict[str, tuple[str, Shape]]:
        """The parts under the keys of another spelling: the key of each part now, and the shape that torch wants."""
        wanted = {**shapes, "g": shape_of_g(self.shape, self.dims[0])} if "g" in shapes else shapes
        return {self._key(part, to): (key, wanted[part]) for part, key in self.keys.items()}

    def _key(self, part: str, to: str) -> str:
        if to != "parametrization":
            return f"{self.name}_{part}"
        prefix, dot, last = self.name.rpartition(".")
        return f"{prefix}{dot}parametrizations.{last}.{NORMS[self.kind].spellings[part]}"


def in_parts(state: Mapping[str, Any], dims: Mapping[str, KeptDim], skip: Collection[str] = ()) -> Iterator[Normed]:
    """The weights in `state` that are in parts, but for those to `skip`, with `dims` where they are known."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for key in state:
        for name, spelling, part in _readings(key):
            groups.setdefault((name, spelling), {})[part] = key
    understood = [
        _understand(*group, spelled, state, dims) for group, spelled in groups.items() if group[0] not in skip
    ]
    norms = [norm for norm in understood if norm]
    names = Counter(norm.name for norm in norms)
    for norm in norms:
        if _is_older_than_torch_1(norm, state):
            norm = attrs.evolve(norm, why_not=_OLDER.format(norm.name))
        elif norm.name in state or names[norm.name] > 1:
            other = f"as {norm.name}" if norm.name in state else "in the other spelling"
            norm = attrs.evolve(norm, why_not=f"it is there twice, as {', '.join(norm.keys.values())} and {other}")
        yield norm


_OLDER = (
    "torch before 1.0 wrote it, without a {0}_v; delete {0}_orig and {0}_u to keep {0}, the weight of its last "
    "forward, or let a model with torch.nn.utils.spectral_norm load the file and save it again"
)


def _is_older_than_torch_1(norm: Normed, state: Mapping[str, Any]) -> bool:
    """Whether there is a spectral norm as the first releases of torch saved it."""
    return norm.spelling == "hook" and set(norm.keys) == {"orig", "u"} and norm.name in state


def _readings(key: Any) -> Iterator[tuple[str, str, str]]:
    """The weight that `key` may be a part of, the spelling and the part."""
    if not isinstance(key, str):
        return
    if found := _PARAMETRIZATION.fullmatch(key):
        yield found[1] + found[2], "parametrization", found[3]
    elif found := _HOOK.fullmatch(key):
        yield found[1], "hook", found[2]


def _understand(
    name: str, spelling: str, spelled: dict[str, str], state: Mapping[str, Any], dims: Mapping[str, KeptDim]
) -> Normed | None:
    """What the entries of one weight are; None if they are no norm's."""
    kind, keys = _kind_of(spelling, spelled, state)
    if not kind:
        why_not = None if _is_something_else(spelling, spelled, state) else _what_is_wrong(spelling, spelled)
        largest = max((tuple(state[key].shape) for key in spelled.values()), key=math.prod)
        found = Normed(name, "", spelling, spelled, largest, why_not=why_not)
    else:
        shapes = {part: tuple(state[key].shape) for part, key in keys.items()}
        allowed, why_not = _narrowed(*_dims_of(shapes), [dims[name]] if name in dims else [])
        spelling = "bar" if keys == {part: f"{name}_{ours}" for part, ours in _BAR.items()} else spelling
        odd = next((key for key in keys.values() if state[key].dtype not in _FLOATS), None)
        why_not = f"{odd} is {state[odd].dtype}; convert it to a float type first" if odd else why_not
        found = Normed(name, kind, spelling, keys, shapes[whole_part(keys)], allowed, why_not)
    return found if _is_a_norm(found, state) else None


def _is_a_norm(found: Normed, state: Mapping[str, Any]) -> bool:
    """Whether what was found is to be taken for a norm's parts, or for what is left of them.

    `bias_v` alone is one of attention's, and under another name than a weight's `_g` and `_v` may be anything, unless
    their shapes are as torch makes them.
    """
    last = found.name.rpartition(".")[2]
    if found.spelling == "parametrization" or "weight" in last:
        return bool(found.kind or found.why_not)
    if not found.kind or found.why_not:
        return False
    shapes = [state[key].shape for key in found.keys.values()]
    return "bias" in last or len(shapes) == 3 or len(shapes[0]) == len(found.shape) > 1


def _kind_of(spelling: str, spelled: dict[str, str], state: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The kind of norm and the keys of its parts by our names; no kind if they are not all there, and nothing else."""
    for kind, norm in NORMS.items():
        names = {part: norm.spellings[part] if spelling == "parametrization" else part for part in norm.spellings}
        if set(names.values()) == set(spelled):
            return kind, {part: spelled[s] for part, s in names.items()}
    if set(spelled) == set(_BAR.values()):
        return "SpectralNorm", {part: spelled[s] for part, s in _BAR.items()}
    if set(spelled) == {"orig"} and len(state[spelled["orig"]].shape) == 1 and not _is_pruned(spelled, state):
        return "SpectralNorm", spelled  # a vector has no u and v
    return "", spelled


def _is_something_else(spelling: str, spelled: dict[str, str], state: Mapping[str, Any]) -> bool:
    """Whether the entries are what pruning leaves, or another parametrization than a norm."""
    if spelling == "hook":
        return _is_pruned(spelled, state) or set(spelled) == {"bar"}
    if set(spelled) == {"original"}:
        return len(state[spelled["original"]].shape) != 1  # a vector may have a spectral norm, without u and v
    return not {"original0", "original1", "0._u", "0._v"} & set(spelled)


def _is_pruned(spelled: dict[str, str], state: Mapping[str, Any]) -> bool:
    return set(spelled) == {"orig"} and spelled["orig"].removesuffix("orig") + "mask" in state


def _what_is_wrong(spelling: str, spelled: dict[str, str]) -> str:
    """Which parts are missing, or that there are others than a norm's."""
    shown = ", ".join(spelled.values())
    for norm in NORMS.values():
        names = [norm.spellings[part] if spelling == "parametrization" else part for part in norm.spellings]
        if set(names) > set(spelled) != {"original"}:
            part, key = next(iter(spelled.items()))
            missing = [key.removesuffix(part) + name for name in names if name not in spelled]
            if set(spelled) == {"v"}:
                shown += f", or a norm made it that has none: {_IN_THE_MODEL}"
            return f"{' and '.join(missing)} must be there too, beside {shown}"
    if set(spelled) == {"original"}:
        return f"{shown} alone may be a vector's spectral norm or any other parametrization"
    return f"{shown} are not the parts of one norm that is known without its model: {_IN_THE_MODEL}"


_IN_THE_MODEL = "load it into the model, and call explicit_wn.fold(model)"


def _dims_of(shapes: dict[str, Shape]) -> tuple[tuple[KeptDim, ...], str | None]:
    """The dims that the shapes allow, and why not one of them can be taken."""
    if "g" not in shapes:
        return _dims_of_spectral(shapes)
    g, v = shapes["g"], shapes["v"]
    fits = _dims_of_g(g, v)
    if not fits:
        return fits, f"its g has the shape {g}, which belongs to no dim of its v, {v}"
    if len(fits) > 1 and math.prod(g) != 1:
        return fits, f"its g, {g}, may belong to {_any(fits)} of its v, {v}; say which in dims (--dim NAME=0)"
    return fits, None


def _dims_of_g(g: Shape, v: Shape) -> tuple[KeptDim, ...]:
    """The dims that g may keep. A single number is the norm of it all, whichever dim of length 1 it is said to keep."""
    fits = [d for d in range(len(v)) if g == shape_of_g(v, d)]
    if fits or len(g) > max(1, len(v)):
        return tuple(fits)
    if math.prod(g) == 1:
        return (None,)
    return tuple(d for d, n in enumerate(v) if g == (n,))  # somebody flattened it


def _dims_of_spectral(shapes: dict[str, Shape]) -> tuple[tuple[KeptDim, ...], str | None]:
    """The dims that may be the rows of the matrix whose singular vectors u and v are."""
    orig, size = shapes["orig"], math.prod(shapes["orig"])
    if "u" not in shapes:
        return ((0,), None) if len(orig) == 1 else ((), "its u and v must be there too")
    u, v = shapes["u"], shapes["v"]
    fits = tuple(d for d, n in enumerate(orig) if n and (u, v) == ((n,), (size // n,)))
    return fits, None if fits else f"its u and v, {u} and {v}, belong to no dim of its weight, {orig}"


def _narrowed(
    allowed: tuple[KeptDim, ...], why_not: str | None, said: list[KeptDim]
) -> tuple[tuple[KeptDim, ...], str | None]:
    """The dim that was said, if one was."""
    if not said or not allowed:
        return allowed, why_not
    if said[0] not in allowed:
        return allowed, f"its parts belong to {_any(allowed)}, not to dim {said[0]}"
    return (said[0],), None


def _any(dims: tuple[KeptDim, ...]) -> str:
    return "dim " + " or ".join(map(str, dims))
