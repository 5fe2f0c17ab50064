"""The package imports in silence, and a wheel and an sdist of it work where nothing else of ours is installed."""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import explicit_wn

ROOT = Path(__file__).parents[2]

IMPORTS = ["import explicit_wn", "from explicit_wn import WeightNorm, script", "import explicit_wn.functional"]


@pytest.mark.parametrize("statement", IMPORTS)
def test_importing_the_package_is_silent(statement: str) -> None:
    command = [sys.executable, "-W", "error", "-c", statement]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# What is built

PROGRAM = """
import importlib.metadata, pathlib, sys
import torch
from torch import nn
import explicit_wn
from explicit_wn import WeightNorm, fold, remove_weight_norm, weight_norm


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wn = WeightNorm()
        self.fc = self.wn.apply(nn.Linear(4, 3))

    def forward(self, x):
        self.wn.recompute(self.fc)
        return self.fc(x)


folder = pathlib.Path(explicit_wn.__file__).parent
assert folder.is_relative_to(sys.prefix), folder
assert (folder / "py.typed").is_file() and (folder / "LICENSE").is_file()
assert importlib.metadata.version("explicit_wn") == explicit_wn.__version__

net, x = Net(), torch.randn(2, 4)
nn.init.constant_(net.fc.weight_g, 2)
v = net.fc.weight_v.detach()
expected = nn.functional.linear(x, 2 * v / v.norm(dim=1, keepdim=True), net.fc.bias)
for form in net, torch.jit.script(net), torch.export.export(net, (x,)).module():
    torch.testing.assert_close(form(x), expected)
fold(net)
torch.testing.assert_close(net(x), expected)
assert type(remove_weight_norm(weight_norm(nn.Linear(2, 3)))) is nn.Linear
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # To look pip up as a module ends setuptools' distutils
    if not any(path.joinpath("pip").is_dir() for path in map(Path, sys.path)):
        pytest.skip("pip is not installed")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    build = "import sys; from hatchling import build; build.build_wheel(sys.argv[1]); build.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], check=True, cwd=ROOT)
    return folder


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_is_installed_in_an_empty_environment_and_works_there(built: Path, kind: str, tmp_path: Path) -> None:
    (file,) = built.glob(kind)
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    there = next((tmp_path / "venv").rglob("site-packages"))
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet", "--target"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, there, file], check=True)
    (there / "torch.pth").write_text(sysconfig.get_path("purelib"))  # torch and attrs lie here, after what is there
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    subprocess.run([python, "-E", program], check=True, cwd=tmp_path)


def test_both_hold_the_package_and_its_license_and_nothing_that_was_left_behind(built: Path) -> None:
    package = {f"explicit_wn/{p.relative_to(ROOT / 'explicit_wn')}" for p in (ROOT / "explicit_wn").rglob("*.py")}
    package |= {"explicit_wn/py.typed", "explicit_wn/LICENSE"}
    wheel = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    assert {name for name in wheel if ".dist-info/" not in name} == package
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        sdist = archive.getnames()
    assert package <= {name.partition("/")[2] for name in sdist}
    assert not [name for name in sdist if "__pycache__" in name or "/.venv" in name]


def test_what_pip_shows_reads_well(built: Path) -> None:
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    text = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
    shown = importlib.metadata.PathDistribution(
        zipfile.Path(wheel, f"explicit_wn-{explicit_wn.__version__}.dist-info/")
    )
    assert shown.metadata["Author"] == "the explicit_wn authors"
    assert shown.metadata["License-Expression"] == "MIT"
    assert shown.metadata["License-File"] == "explicit_wn/LICENSE"
    assert "Typing :: Typed" in shown.metadata.get_all("Classifier")
    assert "weight normalization" in shown.metadata["Keywords"]
    assert "Project-URL" not in text.partition("\n\n")[0]
