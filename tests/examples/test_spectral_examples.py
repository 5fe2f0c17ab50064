"""examples/spectral_gan.py and examples/custom_norm.py, run as a reader runs them."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from programs import STRICT_PYTHON
from torch import Tensor

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: object) -> str:
    """What the example prints; a warning, but for torch's deprecations, is an error."""
    command = [*STRICT_PYTHON, "-W", "ignore::DeprecationWarning:torch", str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(printed: str, title: str) -> dict[str, float]:
    """The rows below a title, down to the next empty line."""
    rows = printed.split(f"{title}\n")[1].split("\n\n")[0].splitlines()
    return {name.strip(): float(value) for name, value in (row.rsplit(maxsplit=1) for row in rows)}


# The GAN


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("gan") / "new" / "gan.png"
    return run("spectral_gan.py", "--steps", 800, "--out", path), path


def test_the_samples_cover_the_modes(drawn: tuple[str, Path]) -> None:
    """After a third of the steps not all are sharp, but most modes have their samples."""
    printed, _ = drawn
    counted = re.search(r"(\d) of 8 modes covered; ([\d.]+)% of the samples lie at one", printed)
    assert counted
    assert int(counted[1]) >= 6
    shares = [float(share) for share in re.findall(r"([\d.]+)%", printed.split("share at each mode:")[1].split(";")[0])]
    assert len(shares) == 8
    assert sum(share >= 12.5 / 4 for share in shares) == int(counted[1])
    assert sum(shares) == pytest.approx(float(counted[2]), abs=0.5)


def test_no_weight_of_the_discriminator_stretches(drawn: tuple[str, Path]) -> None:
    values = table(drawn[0], "largest singular value of each weight, by SVD, with SpectralNorm")
    assert list(values) == ["first", "second", "third", "score"]
    assert all(value == pytest.approx(1, abs=0.1) for value in values.values())
    without = table(drawn[0], "largest singular value of each weight, by SVD, without")
    assert list(without) == list(values)
    assert max(without.values()) > 2


def test_the_scripted_discriminator_answers_alike_in_both_modes(drawn: tuple[str, Path]) -> None:
    differences = table(drawn[0], "largest difference to torch.jit.script of the discriminator")
    scale = differences.pop("for scale: between the modes")
    assert scale > 2e-5
    assert len(differences) == 3
    assert max(differences.values()) < scale / 10


def pixels_of(path: Path) -> Tensor:
    matplotlib_image = pytest.importorskip("matplotlib.image")
    return Tensor(matplotlib_image.imread(path))[..., :3]


def count_near(pixels: Tensor, color: tuple[float, float, float]) -> int:
    return int(((pixels - Tensor(color)).abs().amax(dim=-1) < 0.12).sum())


def test_the_picture_shows_both_losses_and_both_kinds_of_points(drawn: tuple[str, Path]) -> None:
    printed, path = drawn
    assert f"losses and samples drawn to {path}" in printed
    pixels = pixels_of(path)
    assert pixels.shape == (1200, 1320, 3)
    for row in (pixels[:600], pixels[600:]):
        left, right = row[:, :630], row[:, 630:]
        for half, colors in (
            (left, {"ink": (0.17, 0.18, 0.21), "amber": (0.90, 0.62, 0.0)}),
            (right, {"blue": (0.0, 0.45, 0.70), "orange": (0.84, 0.37, 0.0)}),
        ):
            for name, color in colors.items():
                assert count_near(half, color) > 200, name
        assert count_near(left, (0.84, 0.37, 0.0)) == 0
        grays = right[(right.amax(dim=-1) - right.amin(dim=-1)) < 0.02]
        assert len(grays.unique(dim=0)) > 15, "the discriminator's score is shaded"


def test_the_default_picture_is_one_that_git_ignores() -> None:
    help_text = run("spectral_gan.py", "--help")
    assert "--out" in help_text
    assert "/examples/out/" in (EXAMPLES.parent / ".gitignore").read_text().splitlines()
    assert 'Path(__file__).parent / "out" / "spectral_gan.png"' in (EXAMPLES / "spectral_gan.py").read_text()


# The norm of one's own


@pytest.fixture(scope="module")
def printed() -> str:
    return run("custom_norm.py")


def test_a_norm_of_ones_own_takes_every_way_out(printed: str) -> None:
    differences = table(printed, "largest difference from the formula")
    assert differences.pop("for scale: weights out of date") > 0.1
    assert {"torch.jit.script", "torch.export", "explicit_wn.fold", "explicit_wn.script, frozen"} < set(differences)
    assert len(differences) == 10
    assert max(differences.values()) < 1e-5


def test_a_norm_of_ones_own_trains_and_shows_itself(printed: str) -> None:
    losses = re.search(r"the loss was ([\d.]+) and is ([\d.]+)", printed)
    assert losses
    assert float(losses[2]) < float(losses[1])
    before, after = printed.split("folded, it is plain:")
    assert "(up): ConvTranspose1d(3, 8, kernel_size=(4,), stride=(1,), weight=LogWeightNorm(dim=1))" in before
    assert "(out): Linear(in_features=8, out_features=2, bias=True, weight=LogWeightNorm(dim=0))" in before
    assert "(up): ConvTranspose1d(3, 8, kernel_size=(4,), stride=(1,))\n" in after
    assert "(out): Linear(in_features=8, out_features=2, bias=True)\n" in after


def test_a_norm_of_ones_own_takes_at_most_forty_lines() -> None:
    source = (EXAMPLES / "custom_norm.py").read_text()
    norm = source[source.index("def log_weight_norm") : source.index("\nclass Net")]
    assert "class LogWeightNorm(Reparametrization)" in norm
    assert len([line for line in norm.splitlines() if line.strip()]) <= 40
