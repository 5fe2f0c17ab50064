"""How the tests run the programs of the project: as their users do, but with warnings as errors."""

import sys

STRICT_PYTHON = [
    *(sys.executable, "-W", "error"),
    *("-W", "ignore:The given buffer is not writable:UserWarning"),  # torch 2.10, when it loads an export
]
