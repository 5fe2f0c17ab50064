"""The modules of the package import each other in one direction."""

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import explicit_wn

PACKAGE = Path(explicit_wn.__file__).parent


def name_of(file: Path) -> str:
    return ".".join(part for part in file.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


def imports_of(file: Path) -> Iterator[str]:
    """The modules of the package that `file` imports when it is imported: not those for type checkers alone."""
    folders = file.relative_to(PACKAGE).parts[:-1]
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folders[: len(folders) + 1 - node.level]
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield ".".join((*base, name))


def test_no_module_imports_one_that_imports_it() -> None:
    graph = {name_of(file): set(imports_of(file)) for file in PACKAGE.rglob("*.py")}
    assert len(graph) > 20
    assert "carrier" in graph["refusals"]
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


IMPORT_EACH_ALONE = """
import os, sys
import torch
for name in sys.argv[1:]:
    if not os.fork():  # a process that knows torch, and nothing of the package
        __import__(name)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{name} cannot be imported alone")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it takes fork")
def test_each_module_can_be_imported_first() -> None:
    names = [".".join(filter(None, ("explicit_wn", name_of(file)))) for file in PACKAGE.rglob("*.py")]
    program = [sys.executable, "-W", "error", "-c", IMPORT_EACH_ALONE, *names]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_is_longer_than_a_reader_likes() -> None:
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    assert max(lengths.values()) <= 350, lengths
