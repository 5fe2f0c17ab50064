"""How the tests run the programs of the project: as their users do, but with warnings as errors."""

import os
import subprocess
import sys
from pathlib import Path

STRICT_PYTHON = [
    *(sys.executable, "-W", "error"),
    *("-W", "ignore:The given buffer is not writable:UserWarning"),  # torch 2.10, when it loads an export
]


def printed_by(folder: Path, *command: str | Path, **environment: str) -> str:
    """What Python prints, run in an empty folder, which it leaves so; a word on stderr is an error."""
    done = subprocess.run(
        [*STRICT_PYTHON, *command],
        capture_output=True,
        text=True,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert list(folder.iterdir()) == []
    return done.stdout
