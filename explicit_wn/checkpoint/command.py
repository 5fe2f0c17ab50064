"""The command line: `python -m explicit_wn`."""

import argparse
import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import files
from .files import Order, Tick
from .spellings import SPELLINGS, KeptDim

_DESCRIPTION = """\
Weight norm and spectral norm in checkpoints, without the model: what there is,
folded into plain weights, or in another spelling of their parts.

A checkpoint is
  a .safetensors file;
  a .pt file (any other suffix), read by torch.load with weights_only=True:
      a state_dict, or a dict with such dicts in it. Its tensors are on the
      CPU in OUT, wherever they were;
  a folder with an index in it, *.index.json, or that file: all its shards,
      of either format. OUT is a folder then, which gets the shards and a
      new index."""

_EPILOG = """\
examples:
  python -m explicit_wn report generator.pt
  python -m explicit_wn fold model.safetensors -o folded.safetensors
  python -m explicit_wn respell --to parametrization old.pt -o new.pt
  python -m explicit_wn fold --dim decoder.fc.weight=0 --skip head.weight gan.pt -o out.pt

exit status: 0 if it is done, 1 if it cannot be (OUT is not touched then),
2 for a wrong command line. Messages go to the standard error."""

_OUTPUT = "where to write; it appears when it is complete, and what exists stays unless --force"
_SPELLINGS = """\
hook is that of torch.nn.utils.weight_norm and spectral_norm (X_g, X_v; X_orig,
X_u, X_v), ours the same, parametrization that of torch.nn.utils.parametrizations,
and plain folds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    chosen = _parser().parse_args(arguments)
    _give_memory_back()
    try:
        chosen.run(chosen)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the report has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        print(f"explicit_wn: {_sentence(error)}", file=sys.stderr)
        return 1
    return 0


def _give_memory_back() -> None:
    """Lets every tensor of a megabyte or more go back to the system when it is freed: glibc would keep some of them."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, which has its own ways
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


_M_MMAP_THRESHOLD = -3
"""As `malloc.h` has it."""


def _sentence(error: Exception) -> str:
    """What went wrong, as Unix says it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _parser() -> argparse.ArgumentParser:
    look: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = _Parser("python -m explicit_wn", description=_DESCRIPTION, epilog=_EPILOG, **look)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    report = commands.add_parser("report", help="print a table of the weights and their norms", **look)
    report.description = "Prints a table of the weights in a checkpoint, their norms, and what is wrong with them."
    report.add_argument("file", metavar="FILE", type=Path, help="the checkpoint")
    report.set_defaults(run=_report)
    fold = commands.add_parser("fold", help="bake every norm into a plain weight", **look)
    fold.description = "Bakes every weight norm and spectral norm, in any spelling, into a plain weight."
    fold.set_defaults(run=_respell, verb="fold", to="plain")
    respell = commands.add_parser("respell", help="write the parts of every norm in another spelling", **look)
    respell.description = "Writes the parts of every norm in another spelling.\n\n" + _SPELLINGS
    respell.add_argument("--to", required=True, choices=SPELLINGS, help="the spelling")
    respell.set_defaults(run=_respell, verb="respell")
    for command in fold, respell:
        _add_options(command)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose messages are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"explicit_wn: {message}; {self.prog} --help says more\n")


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", type=Path, help="the checkpoint")
    command.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help=_OUTPUT)
    command.add_argument("--force", action="store_true", help="overwrite OUT")
    command.add_argument(
        *("--dim", "-d"),
        metavar="NAME=DIM",
        type=_dim,
        action="append",
        default=[],
        help="the dim that the norm of this weight keeps (none for all of it), where the shapes allow several",
    )
    command.add_argument(
        "--skip", metavar="NAME", action="append", default=[], help="leave this weight as it is; may be repeated"
    )


def _dim(text: str) -> tuple[str, KeptDim]:
    name, equals, dim = text.rpartition("=")
    if not equals or not (dim == "none" or dim.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIM, with a number from 0 or none")
    return name, None if dim == "none" else int(dim)


def _report(chosen: Any) -> None:
    print(files.report(chosen.file))


def _respell(chosen: Any) -> None:
    with Progress() as progress:
        what = Order(chosen.verb, chosen.to, dict(chosen.dim), chosen.skip, chosen.force, progress)
        count = files.respell(chosen.file, chosen.output, what)
    done = "folded" if chosen.to == "plain" else "respelled"
    print(f"{chosen.output}: {count} weight{'' if count == 1 else 's'} {done}", file=sys.stderr)


class Progress:
    """Says how far it is once that takes more than two seconds: by a bar of tqdm in a terminal, or in plain lines."""

    def __init__(self, every: float = 2.0) -> None:
        self.every, self.last = every, time.monotonic()
        self.bar: Any = None
        self.show: Tick = self._draw if sys.stderr.isatty() and _tqdm() else self._say

    def __call__(self, done: int, total: int) -> None:
        if self.bar is not None or time.monotonic() - self.last >= self.every:
            self.show(done, total)
            self.last = time.monotonic()

    def _say(self, done: int, total: int) -> None:
        print(f"explicit_wn: {done} of {total}", file=sys.stderr, flush=True)

    def _draw(self, done: int, total: int) -> None:
        self.bar = self.bar or _tqdm()(total=total, initial=done, leave=False)
        self.bar.update(done - self.bar.n)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _tqdm() -> Any:
    """The class of bars, if it is installed."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return None
    return tqdm
