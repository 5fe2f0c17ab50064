"""The index of a checkpoint in several files, which says what is in which, as transformers and diffusers write it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .state import Entry

_NAME = re.compile(r".+\.index(\.[^.]+)?\.json")
"""A variant may stand in it, as in `model.safetensors.index.fp16.json`."""


def is_index(path: Path) -> bool:
    """Whether it names an index, or a folder that should hold one."""
    return path.is_dir() or path.suffix == ".json"


def index_in(path: Path) -> Path:
    """The index itself."""
    if not path.is_dir():
        return path
    found = sorted(file.name for file in path.iterdir() if _NAME.fullmatch(file.name))
    if not found:
        raise ValueError(f"{path} holds no index of shards, *.index.json; name a file in it.")
    if len(found) > 1:
        raise ValueError(f"{path} holds {' and '.join(found)}; name the one that is meant.")
    return path / found[0]


def files_of(index: Path) -> dict[str, Path]:
    """In which file each entry is."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
            return {name: index.parent / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{index} is no index of shards: it has no weight_map of names of files beside it.")


def joined(index: Path, files: Mapping[str, Path], shards: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """The entries of all files, in the order of the index."""
    found = {(name, file): value for file, shard in shards.items() for name, value in shard.items()}
    for name, file in sorted(found.keys() ^ files.items()):
        raise ValueError(f"{index} and {file.name} do not agree on whether {name!r} is in it.")
    return {name: found[name, file] for name, file in files.items()}


def grouped(entries: Mapping[str, Entry], files: Mapping[str, Path]) -> dict[Path, dict[str, Entry]]:
    """The entries of a result by the file that they belong to: that of the part which is most of them."""
    groups: dict[Path, dict[str, Entry]] = {}
    for name, entry in entries.items():
        groups.setdefault(files[entry.like], {})[name] = entry
    return groups


def index_of(content: Mapping[str, Any], groups: Mapping[Path, Mapping[str, Entry]]) -> bytes:
    """The index of a result."""
    weight_map = {name: file.name for file, group in groups.items() for name in group}
    size = sum(getattr(content[entry.like], "nbytes", 0) for group in groups.values() for entry in group.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
