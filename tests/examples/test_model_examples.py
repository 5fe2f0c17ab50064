"""The examples about whole models run as a new user runs them, and what they print is true."""

import importlib.util
import io
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from programs import STRICT_PYTHON

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(example: str, *arguments: str) -> str:
    """What an example prints, warnings being errors."""
    command = [*STRICT_PYTHON, str(EXAMPLES / example), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr, "a progress bar in what is no terminal"
    return done.stdout


def load(example: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(example).stem, EXAMPLES / example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# The vocoder


@pytest.fixture(scope="module")
def vocoder_output() -> str:
    pytest.importorskip("transformers")
    return run("convert_vocoder.py", "--small")


def test_the_vocoder_is_converted_exported_and_folded(vocoder_output: str) -> None:
    steps = re.findall(r"^(\d)\. (\w+)", vocoder_output, re.MULTILINE)
    assert steps == [("1", "Build"), ("2", "Convert"), ("3", "Save"), ("4", "Export"), ("5", "Load"), ("6", "Fold")]
    assert "30 weights WeightNorm parametrization" in vocoder_output
    assert "30 norms, conv_pre.weight to conv_post.weight, on the same 90 Parameter objects" in vocoder_output
    assert "now 30 weights WeightNorm ours" in vocoder_output
    assert "30 norms, now 30 weights plain, in layers of the classes Conv1d, ConvTranspose1d" in vocoder_output


def test_the_vocoder_says_the_same_in_every_form(vocoder_output: str) -> None:
    differences = re.findall(
        r"difference.*?: ([\d.e+-]+)(?: before, ([\d.e+-]+) after)?$", vocoder_output, re.MULTILINE
    )
    assert len(differences) == 5
    (low, high) = re.findall(r"samples between (\S+) and (\S+)", vocoder_output)[0]
    assert float(low) < -0.1 < 0.1 < float(high)  # it is not silent, so that a difference would show
    assert [float(first) < 1e-4 for first, _ in differences] == [True] * 4 + [False]
    assert float(differences[-1][1]) < 1e-4


def test_the_vocoder_shows_what_does_not_work_without_us(vocoder_output: str) -> None:
    assert re.search(r"remove_weight_norm\(\) +ValueError: weight_norm of 'weight' not found", vocoder_output)
    assert re.search(r"torch.save\(vocoder, file\) +RuntimeError: Serialization of parametrized", vocoder_output)


WITHOUT_TRANSFORMERS = """
import runpy, sys
sys.modules["transformers"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_transformers_the_vocoder_says_what_to_install() -> None:
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, str(EXAMPLES / "convert_vocoder.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "This example converts a model of transformers, which is not installed: pip install transformers\n"
    )


def test_a_long_step_shows_a_bar_in_a_terminal_and_a_short_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = load("convert_vocoder.py").Progress(steps=2)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.step("short"):
        pass
    assert terminal.getvalue() == ""
    with progress.step("long"):
        give_up = time.monotonic() + 60
        while "long" not in terminal.getvalue():
            assert time.monotonic() < give_up
            time.sleep(0.05)
    assert "[############            ] 1 of 2 done; long, " in terminal.getvalue()
    assert terminal.getvalue().endswith(f"\r{'':79}\r")


def test_a_step_that_fails_ends_its_bar_and_is_not_called_done(capsys: pytest.CaptureFixture[str]) -> None:
    progress = load("convert_vocoder.py").Progress(steps=2)
    with pytest.raises(ZeroDivisionError), progress.step("hopeless"):
        raise ZeroDivisionError
    assert progress.done == 0
    assert "hopeless" not in capsys.readouterr().out


# The fixed point


@pytest.fixture(scope="module")
def fixed_point_rows() -> dict[str, list[list[str]]]:
    """The columns of every row, by its name: one list for each table that it is in."""
    rows: dict[str, list[list[str]]] = {}
    for line in run("deep_equilibrium.py", "--width", "24", "--batch", "2", "--rounds", "2").splitlines():
        found = re.match(r"  (\S.{32}) +(\S.*)", line)
        if found:
            rows.setdefault(found[1].strip(), []).append(found[2].split())
    return rows


WAYS = {
    "explicit_wn, recompute_all once": "2",
    "torch's hook": "31",
    "torch's parametrization": "31",
    "torch's, in parametrize.cached()": "2",
}


def test_the_fixed_point_computes_each_weight_once_where_torch_does_at_every_use(
    fixed_point_rows: dict[str, list[list[str]]],
) -> None:
    counted = {name: fixed_point_rows[name][0][0] for name in ["no norm, for scale", *WAYS]}
    assert counted == {"no norm, for scale": "0", **WAYS}


def test_the_fixed_point_is_timed_against_itself(fixed_point_rows: dict[str, list[list[str]]]) -> None:
    times = {name: fixed_point_rows[name][0][1:] for name in WAYS}
    for milliseconds, ratio, *inference in times.values():
        assert float(milliseconds) > 0
        assert ratio.endswith("×")
        assert len(inference) == 2
    assert times["explicit_wn, recompute_all once"][1::2] == ["1.00×", "1.00×"]


def test_the_fixed_point_is_the_same_in_every_spelling(fixed_point_rows: dict[str, list[list[str]]]) -> None:
    for name in WAYS:
        output, gradient = fixed_point_rows[name][1]
        assert float(output) < 1e-5
        assert float(gradient) < 1e-4
