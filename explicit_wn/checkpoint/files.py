"""The norms of checkpoints in files: whole `.safetensors` and `.pt`, and the shards of an index.

Of a `.safetensors` file one weight at a time is in memory. One of torch's is mapped into memory, and so is every weight
that is made: the system holds of both what fits.
"""

import contextlib
import errno
import itertools
import os
import pickle
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import torch
from torch import Tensor

from . import shards, state
from .format import InFile, header, read_header, write_tensor
from .spellings import KeptDim, Shape
from .state import Entry, Report

Tick = Callable[[int, int], None]
"""What is told how many of how many entries are done."""


@attrs.frozen
class Order:
    """What is to be done with a checkpoint."""

    verb: str
    to: str = "plain"
    dims: Mapping[str, KeptDim] = attrs.field(factory=dict)
    skip: Collection[str] = ()
    force: bool = False
    tick: Tick = lambda done, total: None


def report(path: Path) -> Report:
    """What norms a file, or an index with its shards, holds."""
    if not shards.is_index(path):
        return state.report(_read(path))
    index = shards.index_in(path)
    return state.report(_read_shards(index, shards.files_of(index)))


def respell(path: Path, out: Path, order: Order) -> int:
    """Writes the checkpoint in another spelling, for an index into a folder. Returns how many weights that took."""
    if shards.is_index(path):
        with _folder(out):
            return _respell_shards(shards.index_in(path), out, order)
    if (out.suffix == ".safetensors") == _is_torchs(path):
        raise ValueError(f"{out} would be of another format than {path}; this command keeps the format.")
    return _respell_torchs(path, out, order) if _is_torchs(path) else _respell_safetensors(path, out, order)


def _is_torchs(path: Path) -> bool:
    return path.suffix != ".safetensors"


def _read(path: Path) -> Any:
    """What a file holds: its tensors, or what describes them."""
    return _load(path) if _is_torchs(path) else read_header(path)[0]


# The files of an index


def _read_shards(index: Path, files: Mapping[str, Path]) -> dict[str, Any]:
    return shards.joined(index, files, {file: _read(file) for file in dict.fromkeys(files.values())})


def _respell_shards(index: Path, out: Path, order: Order) -> int:
    files = shards.files_of(index)
    formats = {_is_torchs(file) for file in files.values()}
    if len(formats) > 1:
        raise ValueError(f"{index} names .safetensors files and others; this command wants files of one format.")
    content = _read_shards(index, files)
    entries, count = _plan(content, order)
    groups = shards.grouped(entries, files)
    with whole([*(out / file.name for file in groups), out / index.name], order.force) as (*targets, new_index):
        if True in formats:
            _write_torchs(content, groups, targets, count, order)
        else:
            _write_safetensors(content, groups, targets, order)
        new_index.write(shards.index_of(content, groups))
    return count


def _plan(content: Mapping[str, Any], order: Order) -> tuple[dict[str, Entry], int]:
    """The entries of the result, and how many weights are among them that were in parts."""
    known = state.names_in(content, order.dims)
    state.check_names(order.verb, known, order.dims, order.skip)
    return state.plan(order.verb, content, order.to, order.dims, order.skip), len(known - set(order.skip))


Groups = Mapping[Path, Mapping[str, Entry]]


def _write_torchs(content: Mapping[str, Any], groups: Groups, files: list[BinaryIO], count: int, order: Order) -> None:
    with _scratch(Path(files[0].name).parent, count, order) as place:
        values = state.respelled(order.verb, content, order.to, order.dims, order.skip, place)
        for group, file in zip(groups.values(), files, strict=True):
            torch.save({name: values[name] for name in group}, file)


def _write_safetensors(content: Mapping[str, InFile], groups: Groups, files: list[BinaryIO], order: Order) -> None:
    ticks, total = itertools.count(1), sum(map(len, groups.values()))
    for (source, group), file in zip(groups.items(), files, strict=True):
        _, metadata = read_header(source)
        _write_one(content, group, metadata, file, lambda: order.tick(next(ticks), total))


# Files of torch


def _load(path: Path) -> Any:
    """What a file of torch's holds, mapped into memory; the files of before torch 1.6 cannot be mapped."""
    with path.open("rb") as file:
        head = file.read(4)
    is_zip = head == b"PK\x03\x04"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (pickle.UnpicklingError, KeyError):
        why = "it holds more than tensors and plain values; load it where its classes are, and save its state_dict()"
        if not is_zip and head[:1] != b"\x80":
            why = "torch.save did not write it"
    except (RuntimeError, EOFError, ValueError) as error:
        why = str(error).partition("\n")[0].rstrip(".") or "it is cut off"
    except OSError as error:  # which torch's reader raises where but the last bytes are gone
        if error.errno != errno.EINVAL:
            raise
        why = "it is cut off"
    raise ValueError(f"{path} cannot be read by torch.load with weights_only: {why}.")


def _respell_torchs(path: Path, out: Path, order: Order) -> int:
    with whole([out], order.force) as (file,):
        loaded = _load(path)
        names = state.names_in(loaded, order.dims) - set(order.skip) if isinstance(loaded, Mapping) else set()
        with _scratch(out.parent, len(names), order) as place:
            torch.save(state.respelled(order.verb, loaded, order.to, order.dims, order.skip, place), file)
    return len(names)


@contextlib.contextmanager
def _scratch(folder: Path, total: int, order: Order) -> Iterator["_Mapped"]:
    """A place for the weights that are made, in the folder of the result."""
    with tempfile.TemporaryDirectory(prefix=".weights.", dir=folder) as kept:
        yield _Mapped(Path(kept), total, order.tick)


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
        count, file = weight.untyped_storage().nbytes() // weight.itemsize, self.folder / str(self.done)
        moved = torch.from_file(str(file), shared=True, size=count, dtype=weight.dtype)
        return moved.as_strided(weight.shape, weight.stride()).copy_(weight)


# Files of safetensors


def _respell_safetensors(path: Path, out: Path, order: Order) -> int:
    content = _read(path)
    entries, count = _plan(content, order)
    with whole([out], order.force) as files:
        _write_safetensors(content, {path: entries}, files, order)
    return count


def _write_one(
    tensors: Mapping[str, InFile],
    entries: Mapping[str, Entry],
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
