"""The norms of checkpoints in files: whole `.safetensors` and `.pt`, and the shards of an index.

Of a `.safetensors` file one weight at a time is in memory. One of torch's is mapped into memory, and so is every weight
that is made: the system holds of both what fits.
"""

import contextlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import torch
from torch import Tensor

from . import state
from .format import Stored, header, read_header, write_tensor
from .spellings import Dim, Shape
from .state import Entry, Report

_INDEX = "model.safetensors.index.json"

Tick = Callable[[int, int], None]
"""What is told how many of how many entries are done."""


@attrs.frozen
class Asked:
    """What is to be done with a checkpoint."""

    verb: str
    to: str = "plain"
    dims: Mapping[str, Dim] = attrs.field(factory=dict)
    skip: Collection[str] = ()
    force: bool = False
    tick: Tick = lambda done, total: None


def report(path: Path) -> Report:
    """What norms a file, or an index with its shards, holds."""
    return state.report(_load(path) if _is_torchs(path) else _shards(path)[0])


def respell(path: Path, out: Path, asked: Asked) -> int:
    """Writes the checkpoint in another spelling, for an index into a folder. Returns how many weights that took."""
    if not _is_index(path) and (out.suffix == ".safetensors") == _is_torchs(path):
        raise ValueError(f"{out} would be of another format than {path}; this command keeps the format.")
    if _is_torchs(path):
        return _respell_torchs(path, out, asked)
    tensors, metadata = _shards(path)
    known = state.names_in(tensors, asked.dims)
    state.check_names(asked.verb, known, asked.dims, asked.skip)
    entries = state.plan(asked.verb, tensors, asked.to, asked.dims, asked.skip)
    with _folder(out) if _is_index(path) else contextlib.nullcontext():
        _write_shards(tensors, metadata, entries, out if _is_index(path) else None, out, asked)
    return len(known - set(asked.skip))


def _is_index(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".json"


def _is_torchs(path: Path) -> bool:
    return not _is_index(path) and path.suffix != ".safetensors"


# Files of torch


def _load(path: Path) -> Any:
    """What a file of torch's holds, mapped into memory; the files of before torch 1.6 cannot be mapped."""
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        why = "it holds more than tensors and plain values; load it where its classes are, and save its state_dict()"
    except (RuntimeError, EOFError, ValueError) as error:
        why = str(error).partition("\n")[0].rstrip(".") or "it is cut off"
    raise ValueError(f"{path} cannot be read by torch.load with weights_only: {why}.")


def _respell_torchs(path: Path, out: Path, asked: Asked) -> int:
    with (
        whole([out], asked.force) as (file,),
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as kept,
    ):
        loaded = _load(path)
        names = state.names_in(loaded, asked.dims) - set(asked.skip) if isinstance(loaded, Mapping) else set()
        place = _Mapped(Path(kept), len(names), asked.tick)
        torch.save(state.respelled(asked.verb, loaded, asked.to, asked.dims, asked.skip, place), file)
    return len(names)


@attrs.define
class _Mapped:
    """Moves tensors into files that are mapped into memory."""

    folder: Path
    total: int
    tick: Tick
    done: int = 0

    def __call__(self, weight: Tensor) -> Tensor:
        self.done += 1
        self.tick(self.done, self.total)
        if weight.numel() == 0:
            return weight
        count, file = weight.untyped_storage().nbytes() // weight.itemsize, self.folder / str(self.done)
        moved = torch.from_file(str(file), shared=True, size=count, dtype=weight.dtype)
        return moved.as_strided(weight.shape, weight.stride()).copy_(weight)


# Files of safetensors


def _shards(path: Path) -> tuple[dict[str, Stored], dict[Path, dict[str, str]]]:
    """The tensors of a file, or of all files of an index, and what each file says of itself."""
    if not _is_index(path):
        tensors, metadata = read_header(path)
        return tensors, {path: metadata}
    index = path / _INDEX if path.is_dir() else path
    weight_map = _weight_map(index)
    headers = {index.parent / name: read_header(index.parent / name) for name in dict.fromkeys(weight_map.values())}
    found = {(name, file.name): one for file, (tensors, _) in headers.items() for name, one in tensors.items()}
    for name, file_name in sorted(found.keys() ^ weight_map.items()):
        raise ValueError(f"{index} and {file_name} do not agree on whether {name!r} is in it.")
    tensors = {name: found[name, file_name] for name, file_name in weight_map.items()}
    return tensors, {file: about for file, (_, about) in headers.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """In which file each tensor is."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
            return dict(weight_map)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{index} is no index of shards: it has no weight_map of names of files beside it.")


def _write_shards(
    tensors: dict[str, Stored],
    metadata: dict[Path, dict[str, str]],
    entries: dict[str, Entry],
    folder: Path | None,
    out: Path,
    asked: Asked,
) -> None:
    """Writes every file, and the index if there is a folder for it."""
    groups: dict[Path, dict[str, Entry]] = {}
    for name, entry in entries.items():
        groups.setdefault(tensors[entry.like].file, {})[name] = entry
    targets = [folder / file.name for file in groups] if folder else [out for _ in metadata]
    ticks = iter(range(1, len(entries) + 1))
    with whole([*targets, *([folder / _INDEX] if folder else [])], asked.force) as files:
        for source, file in zip(groups or metadata, files, strict=False):
            group = groups.get(source, {})
            _write_one(tensors, group, metadata[source], file, lambda: asked.tick(next(ticks), len(entries)))
        if folder:
            files[-1].write(_index_of(tensors, groups))


def _write_one(
    tensors: dict[str, Stored],
    entries: dict[str, Entry],
    metadata: dict[str, str],
    file: BinaryIO,
    tick: Callable[[], None],
) -> None:
    """Writes one file, the widest numbers first, so that each tensor lies at a multiple of their width."""
    widths = {name: getattr(tensors[entry.like].dtype, "itemsize", 0) for name, entry in entries.items()}
    names = sorted(entries, key=lambda name: widths[name], reverse=True)
    file.write(header(((name, tensors[entries[name].like], _shape(entries[name])) for name in names), metadata))
    for name in names:
        entry = entries[name]
        if entry.norm is None:
            tensors[entry.like].copy_to(file)
        else:
            write_tensor(
                state.compute(entry.norm, {p: tensors[key].read() for p, key in entry.norm.keys.items()}), file
            )
        tick()


def _shape(entry: Entry) -> Shape:
    assert entry.shape is not None, "everything in the file is a tensor"
    return entry.shape


def _index_of(tensors: dict[str, Stored], groups: dict[Path, dict[str, Entry]]) -> bytes:
    weight_map = {name: file.name for file, group in groups.items() for name in group}
    size = sum(tensors[entry.like].nbytes for group in groups.values() for entry in group.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


# Whole files or none


@contextlib.contextmanager
def whole(targets: list[Path], force: bool) -> Iterator[list[BinaryIO]]:
    """Files to write, which appear under their names when all are complete; if anything is raised, none does."""
    _refuse_existing(targets, force)
    parts = [target.with_name(f".{target.name}.{os.getpid()}.part") for target in targets]
    try:
        with contextlib.ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context(part.open("xb")) for part in parts]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        _refuse_existing(targets, force)
        for part, target in zip(parts, targets, strict=True):
            part.replace(target)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _refuse_existing(targets: list[Path], force: bool) -> None:
    for target in targets:
        if target.is_dir() or (os.path.lexists(target) and not force):
            raise FileExistsError(f"{target} exists already" + ("." if target.is_dir() else "; --force overwrites it."))


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """A folder that is there; one that was made for nothing is removed."""
    made = not path.exists()
    path.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            path.rmdir()
        raise
