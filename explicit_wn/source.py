"""Functions that are written as source, for one class each: where they get a name in tracebacks and debuggers."""

import __future__

import linecache
import math
import zlib
from types import FunctionType
from typing import Any


def define(source: str, name: str, base: type, scope: dict[str, Any]) -> FunctionType:
    """Runs the source of one function, known to tracebacks, debuggers and TorchScript through `linecache`."""
    filename = f"<explicit_wn {name} of {base.__module__}.{base.__qualname__} {zlib.crc32(source.encode()):08x}>"
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    exec(compile(source, filename, "exec", __future__.annotations.compiler_flag), scope)
    function: FunctionType = scope[name]
    return function


def literal(value: Any) -> str:
    """A setting as source."""
    return f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)
