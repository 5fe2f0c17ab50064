"""How many examples the tests draw: few, and always the same; with EXAMPLES=500 so many, and others each time."""

import atexit
import os
import shutil
import tempfile
from typing import Any

import hypothesis
from hypothesis import configuration

MANY = int(os.environ.get("EXAMPLES", "0"))

_scratch = tempfile.mkdtemp(prefix="hypothesis-")  # what it would keep in a folder .hypothesis
configuration.set_hypothesis_home_dir(_scratch)
atexit.register(shutil.rmtree, _scratch, ignore_errors=True)


def drawn(examples: int, **more: Any) -> hypothesis.settings:
    """The settings of a test that draws so many examples."""
    return hypothesis.settings(
        max_examples=MANY or examples,
        derandomize=not MANY,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        **more,
    )
