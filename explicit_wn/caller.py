"""Who calls: the user's own line, for a warning to point to, and the modules whose methods are running."""

import contextlib
import copy
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn

_OURS = str(Path(__file__).parent) + os.sep, "<explicit_wn"
_BETWEEN = *_OURS, str(Path(torch.__file__).parents[1]) + os.sep, contextlib.__file__, copy.__file__, "<string>"


def warn(message: str, category: type[Warning]) -> None:
    """Warns at the user's line: the innermost one that is neither ours nor of what is installed beside torch.

    `skip_file_prefixes`, which does this, came with Python 3.12.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def running() -> list[nn.Module]:
    """The modules whose methods are running, the outermost first, without what `torch.compile` wraps around them."""
    found = [frame.f_locals.get("self") for frame in callers()]
    return [getattr(one, "_orig_mod", one) for one in found if isinstance(one, nn.Module)][::-1]


def callers() -> Iterator[FrameType]:
    """The frames of the code that called this package, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    while frame is not None:
        yield frame
        frame = frame.f_back
