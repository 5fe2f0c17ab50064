"""The modules of the package import each other in one direction."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

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
