"""The modules of the package import each other in one direction, and their files and functions stay short."""

import ast
import graphlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import explicit_wn

PACKAGE = Path(explicit_wn.__file__).parent

ROOMS = ("contexts", "functional", "carrier", "norms", "models", "teaching", "checkpoint")
"""The folders, from the lowest: none uses one that comes after it. The files beside them stand where these let them."""


def name_of(file: Path) -> str:
    return ".".join(part for part in file.relative_to(PACKAGE.parent).with_suffix("").parts if part != "__init__")


FILES = {name_of(file): file for file in PACKAGE.rglob("*.py")}


def imports_of(name: str, file: Path, names: Mapping[str, object]) -> Iterator[str]:
    """The modules among `names` that `file` imports anywhere in it, and the packages in which they are, but its own."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    around = {".".join(name.split(".")[: depth + 1]) for depth in range(name.count(".") + 1)}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            of = ".".join([*parents, *([node.module] if node.module else [])])
            found = [one if (one := f"{of}.{alias.name}") in names else of for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        for one in found:
            if one in names:
                yield one
                while (one := one.rpartition(".")[0]) and one not in around:
                    yield one


def graph() -> dict[str, set[str]]:
    return {name: set(imports_of(name, file, FILES)) for name, file in FILES.items()}


def test_no_module_imports_one_that_imports_it() -> None:
    imports = graph()
    assert len(imports) > 20
    assert {"explicit_wn.carrier", "explicit_wn.contexts.torchscript"} <= imports["explicit_wn.refusals"]
    graphlib.TopologicalSorter(imports).prepare()  # raises a CycleError that names the circle


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_uses_one_above_it(room: str) -> None:
    imports = graph()
    used = [name for name in imports if name.split(".")[1:2] == [room]]
    assert used
    for name in used:  # which grows by what it finds
        used += [other for other in imports[name] if other not in used]
    above = ROOMS[ROOMS.index(room) + 1 :]
    assert [name for name in used if name.startswith(tuple(f"explicit_wn.{one}" for one in above))] == []


IMPORT_EACH_ALONE = """
import importlib, os, sys, types
import torch
_, folder, *names = sys.argv
for name in names:
    if not os.fork():  # a process that knows torch, and nothing of the package
        for depth in range(1, name.count(".") + 1):  # whose own __init__ would import the other modules first
            parts = name.split(".")[:depth]
            sys.modules[".".join(parts)] = empty = types.ModuleType(".".join(parts))
            empty.__path__ = [os.path.join(folder, *parts)]
        importlib.import_module(name)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{name} cannot be imported alone")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it takes fork")
def test_each_module_can_be_imported_first() -> None:
    program = [sys.executable, "-W", "error", "-c", IMPORT_EACH_ALONE, str(PACKAGE.parent), *FILES]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_is_longer_than_a_reader_likes() -> None:
    lengths = {name: len(file.read_text().splitlines()) for name, file in FILES.items()}
    assert max(lengths.values()) <= 350, lengths


def lengths_of_functions(source: str) -> Iterator[tuple[int, str]]:
    """How many lines each function of `source` has without its docstring, and its name; methods and inner ones too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first, last = node.body[0], node.body[-1]
            docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
            yield last.end_lineno - node.lineno + 1 - docstring, node.name


def test_functions_stay_short() -> None:
    found = sorted(
        (length, f"{name}.{function}")
        for name, file in FILES.items()
        for length, function in lengths_of_functions(file.read_text())
    )
    assert len(found) > 400
    lengths = [length for length, _ in found]
    assert statistics.mean(lengths) <= 7.5
    assert statistics.quantiles(lengths, n=10)[-1] <= 16, found[-len(found) // 10 :]
    assert found[-1][0] <= 40, found[-5:]
