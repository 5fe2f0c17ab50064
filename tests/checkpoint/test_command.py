"""The command line, run as its users run it: what it prints where, its exit status, and what it leaves."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import STRICT_PYTHON

from explicit_wn import checkpoint
from explicit_wn.checkpoint import command, spellings
from explicit_wn.checkpoint.command import Progress, main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint, `in.pt`, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    torch.save(STATE, tmp_path / "in.pt")
    return tmp_path


STATE = {"fc.weight_g": torch.rand(3, 1), "fc.weight_v": torch.randn(3, 2), "fc.bias": torch.zeros(3)}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*STRICT_PYTHON, "-m", "explicit_wn", *arguments], capture_output=True, text=True)


def test_a_report_goes_to_the_standard_output(here: Path) -> None:
    done = run("report", "in.pt")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{checkpoint.report(STATE)}\n"


def test_fold_and_respell_write_what_they_are_asked(here: Path) -> None:
    done = run("fold", "in.pt", "-o", "out.pt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "out.pt: 1 weight folded\n")
    assert torch.equal(torch.load("out.pt")["fc.weight"], checkpoint.fold(STATE)["fc.weight"])
    assert main(["respell", "--to", "parametrization", "in.pt", "-o", "new.pt"]) == 0
    assert set(torch.load("new.pt")) == set(checkpoint.respell(STATE, "parametrization"))


def status_of(arguments: list[str]) -> Any:
    """The exit status: a wrong command line ends the program at once."""
    try:
        return main(arguments)
    except SystemExit as exit_:
        return exit_.code


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["fold", "none.pt", "-o", "out.pt"], 1, "none.pt: No such file or directory"),
        (["fold", "in.pt", "-o", "no/out.pt"], 1, r"no/.*: No such file or directory"),
        (["fold", "in.pt", "-o", "in.pt"], 1, r"in.pt exists already; --force overwrites it\."),
        (["fold", "in.pt", "-o", "."], 1, r".*exists already.*"),
        (["fold", "in.pt", "-o", "out.safetensors"], 1, "out.safetensors would be of another format than in.pt; .*"),
        (["fold", "in.pt", "-o", "out.pt", "--skip", "fc"], 1, "fold finds no norm of 'fc', .*"),
        (
            ["fold", "in.pt", "-o", "out.pt", "--dim", "fc.weight=1"],
            1,
            ".*'fc.weight': its parts belong to dim 0, not .*",
        ),
        (["fold", "in.pt", "-o", "out.pt", "--dim", "fc.weight"], 2, ".*'fc.weight' is not NAME=DIM, with a number .*"),
        (["fold", "in.pt"], 2, "the following arguments are required: -o/--output; .* fold --help says more"),
        (["respell", "in.pt", "-o", "out.pt", "--to", "torch"], 2, ".*invalid choice: 'torch'.*"),
        ([], 2, "the following arguments are required: COMMAND; python -m explicit_wn --help says more"),
        (["report", "folder"], 1, r"folder holds no index of shards, \*\.index\.json; name a file in it\."),
        (["fold", "no.index.json", "-o", "out"], 1, "no.index.json: No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_leaves_nothing(
    arguments: list[str], status: int, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "folder").mkdir()
    before = (here / "in.pt").read_bytes()
    assert status_of(arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(f"explicit_wn: {message}\n", printed.err)
    assert {path.name for path in here.iterdir()} == {"in.pt", "folder"}
    assert (here / "in.pt").read_bytes() == before


def test_force_overwrites_and_skip_and_dim_are_passed_on(here: Path) -> None:
    assert main(["fold", "in.pt", "-o", "in.pt", "--force", "--skip", "fc.weight"]) == 0
    assert set(torch.load("in.pt")) == set(STATE)
    square = {"a=b.weight_g": torch.rand(3), "a=b.weight_v": torch.randn(3, 3)}
    torch.save(square, "in.pt")
    assert main(["fold", "in.pt", "-o", "in.pt", "--force", "--dim", "a=b.weight=1"]) == 0
    wanted = checkpoint.fold(square, dims={"a=b.weight": 1})
    assert torch.equal(torch.load("in.pt")["a=b.weight"], wanted["a=b.weight"])
    assert command._dim("a=none") == ("a", None)


@pytest.mark.parametrize("arguments", [[], ["report"], ["fold"], ["respell"]])
def test_help_fits_a_terminal_and_names_all_there_is(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    words = {"respell": spellings.SPELLINGS, "fold": ("--force", "--dim", "--skip", "-o")}
    assert all(
        word in text
        for word in words.get(
            "".join(arguments), ("FILE",) if arguments else ("exit status", ".pt", "CPU", "*.index.json")
        )
    )


def test_a_reader_that_has_enough_is_no_error(here: Path) -> None:
    torch.save({f"{i}.weight": torch.zeros(2, 2) for i in range(5000)}, "in.pt")
    program = [*STRICT_PYTHON, "-m", "explicit_wn", "report", "in.pt"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the signals are those of Unix")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing(number: signal.Signals, here: Path) -> None:
    # a shell has what it starts in the background ignore Ctrl-C, and so would all that the tests start there
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "import runpy, sys, torch, time; torch.save = lambda *_: (print(flush=True), time.sleep(60)); "
    code += "sys.argv = ['explicit_wn', 'fold', 'in.pt', '-o', 'out.pt']; "
    code += "runpy.run_module('explicit_wn', run_name='__main__')"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        assert len(list(here.iterdir())) > 1
        os.kill(process.pid, number)
        assert process.wait(30) == 128 + number
    assert [path.name for path in here.iterdir()] == ["in.pt"]


class Bar:
    """What stands in for tqdm's bar."""

    made: "list[Bar]" = []

    def __init__(self, total: int, initial: int, leave: bool) -> None:
        self.n, self.total, self.closed = initial, total, False
        self.made.append(self)

    def update(self, count: int) -> None:
        self.n += count

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("bar", [True, False])
def test_progress_shows_after_its_time_and_not_before(
    bar: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(command, "_tqdm", lambda: Bar if bar else None)
    monkeypatch.setattr(Bar, "made", [])
    with Progress() as progress:
        for done, at in enumerate((0.5, 1.9, 2.1, 2.2, 4.2), start=1):
            now[0] = at
            progress(done, 5)
            assert bool(Bar.made) == (bar and done > 2)
    assert capsys.readouterr().err == ("" if bar else "explicit_wn: 3 of 5\nexplicit_wn: 5 of 5\n")
    assert [(one.n, one.total, one.closed) for one in Bar.made] == ([(5, 5, True)] if bar else [])


def test_tqdms_bar_is_drawn_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(every=0.0) as progress:
        progress(3, 10)
    assert "3/10" in capsys.readouterr().err
