"""The norms of a state dict: what there is, folded, or in another spelling."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from .. import functional
from ..functional.weight import shape_of_g
from ..table import Rows, cells_of, parts_shown
from . import spellings
from .spellings import KeptDim, Normed, Shape, whole_part


@attrs.frozen
class Row:
    """One weight of a checkpoint."""

    name: str
    """Its qualified name."""
    norm: str
    """`WeightNorm`, `SpectralNorm`, or empty."""
    spelling: str
    """`hook`, which is ours too, `parametrization`, `plain`, or `bar`: a hook's spectral norm with X_bar for X_orig."""
    dim: str
    """The dim of the norm: what its shapes allow."""
    shape: Shape
    """The weight's shape."""
    parts: str
    """The shapes of its parts."""
    dtype: str
    """The dtype of the weight."""
    problem: str
    """Why it cannot be folded or respelled; empty where it can."""


@attrs.frozen(repr=False)
class Report(Rows):
    """The weights of a checkpoint as a table: `print` it, show it in a notebook, or walk through its rows."""

    rows: list[Row]

    def cells(self) -> list[list[str]]:
        return cells_of(Row, self.rows, without=() if any(row.problem for row in self.rows) else ("problem",))


def report(state: Mapping[str, Any]) -> Report:
    """What norms a state dict holds, in whatever spelling: the first thing to run on a file that you did not write.

    Every other tensor of two dimensions or more is `plain`. Nothing is computed.

    ```pycon
    >>> model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 3))
    >>> print(report(model.state_dict()))
    name    norm        spelling         dim  shape  parts         dtype
    ------  ----------  ---------------  ---  -----  ------------  -------
    weight  WeightNorm  parametrization  0    3×2    g 3×1, v 3×2  float32

    ```
    """
    _check("report", state)
    return Report(list(_rows(state, "")))


def fold(state: Mapping[str, Any], *, dims: Mapping[str, KeptDim] | None = None, skip: Collection[str] = ()) -> Any:
    """A new state dict with every weight norm and spectral norm, in any spelling, baked into a plain weight.

    Args:
        state: what `state_dict()` returned, or a dict with such dicts in it. It stays as it is; the result holds the
            same tensors wherever there is nothing to fold.
        dims: the dim of each weight, by its name, whose shapes allow several. Where u and v of a spectral norm do so,
            they are tried, and it is only for those that fit none well.
        skip: the names of weights to leave as they are.

    The weight has the dtype and the strides of the part that has its shape. Parts that two weights share become one
    weight that they share. A norm with an eps is folded without it, since no checkpoint says what it is; a weight that
    is not finite then is refused.

    >>> model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 3))
    >>> list(fold(model.state_dict()))
    ['bias', 'weight']
    """
    return _respelled("fold", state, "plain", dims or {}, skip)


def respell(
    state: Mapping[str, Any], to: str, *, dims: Mapping[str, KeptDim] | None = None, skip: Collection[str] = ()
) -> Any:
    """A new state dict with every norm in the spelling `to`; the arguments are those of `fold`.

    `"hook"` is that of `torch.nn.utils.weight_norm` and `spectral_norm`, `"ours"` is the same, `"parametrization"` that
    of `torch.nn.utils.parametrizations`, and `"plain"` folds. Weights without a norm stay plain.

    >>> model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 3))
    >>> list(respell(model.state_dict(), "hook"))
    ['bias', 'weight_g', 'weight_v']
    """
    if to not in spellings.SPELLINGS:
        raise ValueError(f"respell(state, {to!r}): the spellings are {', '.join(map(repr, spellings.SPELLINGS))}.")
    return _respelled("respell", state, to, dims or {}, skip)


@attrs.frozen
class Entry:
    """One entry of a result."""

    keys: tuple[str, ...]
    """What it is made of: the keys of the parts to compute with, or one key to take over."""
    shape: Shape | None = None
    """Its shape, where that is known to be a tensor's."""
    norm: Normed | None = None
    """What is to be computed, if anything is."""

    @property
    def like(self) -> str:
        """The key that has its dtype."""
        return self.norm.keys[whole_part(self.norm.keys)] if self.norm else self.keys[0]


def plan(
    verb: str, state: Mapping[str, Any], to: str, dims: Mapping[str, KeptDim], skip: Collection[str]
) -> dict[str, Entry]:
    """The entries of the result, from names and shapes alone. Refuses what cannot be done."""
    tensors = _tensors(state)
    made: dict[str, dict[str, Entry]] = {}
    for norm in spellings.in_parts(tensors, dims, skip):
        if norm.why_not:
            raise ValueError(f"{verb} cannot take {norm.name!r}: {norm.why_not}; or leave it as it is, by skip.")
        entries = _entries(norm, to, tensors)
        for key in entries.keys() & state.keys() - set(norm.keys.values()):
            raise ValueError(f"{verb} cannot take {norm.name!r}: something else is there as {key}; rename that first.")
        made |= dict.fromkeys(norm.keys.values(), entries)
    result: dict[str, Entry] = {}
    for key, value in state.items():
        result |= made.get(key) or {key: Entry((key,), tuple(value.shape) if key in tensors else None)}
    return result


def _entries(norm: Normed, to: str, tensors: Mapping[str, Any]) -> dict[str, Entry]:
    """The entries that take the place of a norm's parts."""
    if to == "plain":
        return {norm.name: Entry(tuple(norm.keys.values()), norm.shape, norm)}
    shapes = {part: tuple(tensors[key].shape) for part, key in norm.keys.items()}
    return {new: Entry((key,), shape) for new, (key, shape) in norm.respelled(to, shapes).items()}


Place = Callable[[Tensor], Tensor]
"""Where a weight that was computed is kept."""


def _respelled(verb: str, state: Mapping[str, Any], to: str, dims: Mapping[str, KeptDim], skip: Collection[str]) -> Any:
    return respelled(verb, state, to, dims, skip, lambda weight: weight)


def respelled(
    verb: str, state: Mapping[str, Any], to: str, dims: Mapping[str, KeptDim], skip: Collection[str], place: Place
) -> Any:
    """The result of either verb, with each weight where `place` puts it."""
    _check(verb, state)
    check_names(verb, names_in(state, dims), dims, skip)
    plans = [(path, one, plan(verb, _under(path, one), to, dims, skip)) for path, one in _dicts(state, "")]
    made: dict[Any, Tensor] = {}
    results = {id(one): _filled(path, one, entries, made, place) for path, one, entries in plans}
    for _, one, _ in plans:
        for key in _nested(one):
            results[id(one)][key] = results[id(one[key])]
    return results[id(state)]


def names_in(state: Mapping[str, Any], dims: Mapping[str, KeptDim]) -> set[str]:
    """The names of the weights that are there in parts."""
    return {
        norm.name for path, one in _dicts(state, "") for norm in spellings.in_parts(_tensors(_under(path, one)), dims)
    }


def check_names(verb: str, known: Collection[str], dims: Mapping[str, KeptDim], skip: Collection[str]) -> None:
    """Refuses the names of weights that are not there in parts."""
    if isinstance(skip, str):
        raise TypeError(f"{verb} takes in skip a list of names, not a str.")
    for name in (*dims, *skip):
        if name not in known:
            raise ValueError(f"{verb} finds no norm of {name!r}, which is in dims or skip; report shows what there is.")


def _check(verb: str, state: Any) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"{verb} takes a state dict, not a {type(state).__name__}; a model has one by state_dict().")


def _nested(state: Mapping[Any, Any]) -> list[str]:
    """The keys under which there is another dict of names."""
    return [key for key, value in state.items() if isinstance(key, str) and isinstance(value, Mapping)]


def _dicts(state: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """`state` and the dicts in it, each with what comes before its names."""
    yield path, state
    for key in _nested(state):
        yield from _dicts(state[key], f"{path}{key}.")


def _under(path: str, state: Mapping[str, Any]) -> dict[Any, Any]:
    """The entries of one dict by their full names."""
    return {path + key if isinstance(key, str) else key: value for key, value in state.items()}


def _tensors(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The tensors among the entries, or what describes them."""
    return {key: value for key, value in state.items() if hasattr(value, "dtype") and hasattr(value, "shape")}


def _filled(
    path: str, state: Mapping[str, Any], entries: dict[str, Entry], made: dict[Any, Tensor], place: Place
) -> dict[str, Any]:
    """The result for one dict, of the kind that it is."""
    result: dict[Any, Any] = OrderedDict() if isinstance(state, OrderedDict) else {}
    if hasattr(state, "_metadata"):
        result._metadata = state._metadata.copy()  # type: ignore[attr-defined]
    values = _under(path, state)
    for key, entry in entries.items():
        short = key[len(path) :] if isinstance(key, str) else key
        result[short] = _value(entry, [values[one] for one in entry.keys], made, place)
    return result


def _value(entry: Entry, values: list[Any], made: dict[Any, Tensor], place: Place) -> Any:
    """The value of an entry; `made` holds what was computed, by what it was computed of."""
    if entry.norm is None:
        whole = entry.shape is None or tuple(values[0].shape) == entry.shape
        return values[0] if whole else values[0].reshape(entry.shape)
    key = (entry.norm.kind, entry.norm.dims, *map(_identity, values))
    if key not in made:
        made[key] = place(compute(entry.norm, dict(zip(entry.norm.keys, values, strict=True))))
    return made[key]


def _identity(tensor: Tensor) -> Any:
    """What two tensors that are one have in common."""
    where = id(tensor) if tensor.is_meta else (tensor.device, tensor.data_ptr())
    return where, tensor.shape, tensor.stride(), tensor.dtype


@torch.no_grad()
def compute(norm: Normed, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight of its parts, in the dtype and strides of the one that has its shape."""
    like = parts[whole_part(parts)].detach()
    weight = _weight_norm(norm, like, parts["g"]) if "g" in parts else _spectral_norm(norm, like, parts)
    if not weight.is_meta and weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
        raise ValueError(
            f"{norm.name!r} would not be finite: its parts are not, or a slice is zero; leave it as it is, by skip."
        )
    weight = weight.to(like.dtype)
    return weight if weight.stride() == like.stride() else torch.empty_like(like).copy_(weight)


def _weight_norm(norm: Normed, v: Tensor, g: Tensor) -> Tensor:
    dim, wide = norm.dims[0], torch.promote_types(v.dtype, g.dtype)
    return functional.weight_norm(v.to(wide), g.detach().to(wide).reshape(shape_of_g(v.shape, dim)), dim)


def _spectral_norm(norm: Normed, orig: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    if "u" not in parts:
        return functional.spectral_norm(orig)
    u, v = parts["u"].detach(), parts["v"].detach()
    dim = norm.dims[0] if len(norm.dims) == 1 or orig.is_meta else _dim_that_fits(norm, orig, u, v.to(u.dtype))
    assert dim is not None
    return functional.spectral_norm(orig, u, v.to(u.dtype), dim)


def _dim_that_fits(norm: Normed, orig: Tensor, u: Tensor, v: Tensor) -> KeptDim:
    """The dim for which u and v are singular vectors, nearly; any of them if all give the same σ."""
    tried = {
        dim: _sigma_and_cosine(functional.as_matrix(orig, dim).to(u.dtype), u, v)
        for dim in norm.dims
        if dim is not None
    }
    sigmas = torch.stack([sigma for sigma, _ in tried.values()])
    fits = sorted(tried, key=lambda dim: tried[dim][1], reverse=True)
    if tried[fits[0]][1] > 0.999 and tried[fits[1]][1] < 0.9:
        return fits[0]
    if torch.allclose(sigmas, sigmas[0], rtol=8 * torch.finfo(u.dtype).eps, atol=0.0):
        return fits[0]
    known = " or ".join(map(str, norm.dims))
    raise ValueError(
        f"{norm.name!r} may be normed along dim {known}, and its u and v do not tell; say which in dims (--dim NAME=0)."
    )


def _sigma_and_cosine(matrix: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, float]:
    """σ, and the cosine between u and where the matrix takes v, or v and where its transpose takes u."""
    right, left = torch.mv(matrix, v), torch.mv(matrix.t(), u)
    sigma = torch.dot(u, right)
    lengths = torch.stack([right.norm() * u.norm(), left.norm() * v.norm()])
    return sigma, (sigma.abs() / lengths).max().item()


def _rows(state: Mapping[str, Any], path: str) -> Iterator[Row]:
    for prefix, one in _dicts(state, path):
        yield from _rows_of(_tensors(_under(prefix, one)))


def _rows_of(tensors: dict[str, Any]) -> Iterator[Row]:
    """A row for each norm, at the place of its first part, and for every other matrix."""
    norms = {key: norm for norm in spellings.in_parts(tensors, {}) for key in norm.keys.values()}
    shown = set()
    for key, value in tensors.items():
        norm = norms.get(key)
        if norm is not None and (norm.name, norm.spelling) not in shown:
            shown.add((norm.name, norm.spelling))
            yield _row(norm, tensors)
        elif norm is None and len(value.shape) > 1:
            yield Row(key, "", "plain", "", tuple(value.shape), "", _dtype(value), "")


def _row(norm: Normed, tensors: Mapping[str, Any]) -> Row:
    parts = {part: tensors[key] for part, key in norm.keys.items()}
    return Row(
        name=norm.name,
        norm=norm.kind,
        spelling=norm.spelling,
        dim=" or ".join(map(str, norm.dims)),
        shape=norm.shape,
        parts=parts_shown(parts),
        dtype=_dtype(parts.get(whole_part(parts), next(iter(parts.values())))),
        problem=norm.why_not or "",
    )


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")
