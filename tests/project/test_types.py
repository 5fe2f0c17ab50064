"""mypy and pyright understand a user's file, and refuse in it the lines that say so and no other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests/users_file.py"


def marked() -> set[int]:
    """The lines that are to be refused."""
    lines = enumerate(FILE.read_text().splitlines(), 1)
    return {number for number, line in lines if line.endswith("# error")}


def errors_of_mypy(file: Path, cache: Path) -> dict[int, str]:
    """What it says in strict mode, by the line."""
    pytest.importorskip("mypy")
    arguments = ["--strict", "--output", "json", "--config-file", "", "--cache-dir", cache]
    done = subprocess.run([sys.executable, "-m", "mypy", *arguments, file], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    errors = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {error["line"]: error["message"] for error in errors if error["severity"] == "error"}


def test_mypy_in_strict_mode_refuses_what_is_to_be_refused_and_nothing_else(tmp_path: Path) -> None:
    found = errors_of_mypy(FILE, tmp_path)
    assert found.keys() == marked(), found


FIRST_MODULE = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


def test_mypy_in_strict_mode_has_nothing_against_the_readmes_first_module(tmp_path: Path) -> None:
    file = tmp_path / "first_module.py"
    file.write_text(FIRST_MODULE)
    assert errors_of_mypy(file, tmp_path) == {}


BESIDE_PYTHON = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
PYRIGHT = shutil.which("basedpyright", path=BESIDE_PYTHON)
"""Which is pyright, and brings the node that it runs on."""


@pytest.mark.skipif(PYRIGHT is None, reason="needs basedpyright")
def test_pyright_in_strict_mode_refuses_what_is_to_be_refused_and_nothing_else(tmp_path: Path) -> None:
    shutil.copy(FILE, tmp_path)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict"}))
    command = [str(PYRIGHT), "--outputjson", "--pythonpath", sys.executable, "--project", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    errors = json.loads(done.stdout)["generalDiagnostics"]
    found = {error["range"]["start"]["line"] + 1: error["message"] for error in errors if error["severity"] == "error"}
    assert found.keys() == marked(), found
