"""The quickstart, the ports and the norms run as their readers run them, with warnings as errors, and print what is so.

Every other example has a file of its own here, or shares one.
"""

import re
from pathlib import Path

import pytest
from programs import printed_by

import explicit_wn.norms

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path, *arguments: object) -> str:
    """What an example prints, run in an empty folder."""
    return printed_by(folder, EXAMPLES / name, *map(str, arguments))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run("quickstart.py", tmp_path_factory.mktemp("quickstart"))


def differences(printed: str) -> dict[str, float]:
    rows = re.findall(r"^  (\S.*?) {2,}(\d\.\de[+-]\d\d)$", printed, re.MULTILINE)
    return {name: float(value) for name, value in rows}


def test_the_quickstart_learns_its_task(quickstart: str) -> None:
    found = re.search(r"accuracy on new images: ([\d.]+)%", quickstart)
    assert found is not None
    assert float(found[1]) > 90


def test_the_quickstart_shows_how_far_it_is(quickstart: str) -> None:
    losses = re.findall(r"^step ([ \d]{3}) of 250: loss ([\d.]+)$", quickstart, re.MULTILINE)
    assert [int(step) for step, _ in losses] == [50, 100, 150, 200, 250]
    assert float(losses[-1][1]) < float(losses[0][1])


def test_the_quickstart_gives_the_formulas_numbers_every_way_and_old_weights_would_show(quickstart: str) -> None:
    rows = differences(quickstart)
    stale = rows.pop("for scale: weights one step old")
    for way in ("eager", "jit.script", "frozen", "jit.trace", "export", "saved and loaded", "state_dict", "fold"):
        assert any(way in name for name in rows), way
    assert len(rows) == 12
    assert max(rows.values()) < 1e-4
    assert stale > 1e-2


def test_the_quickstart_folds_every_layer(quickstart: str) -> None:
    assert quickstart.splitlines()[-1] == "folded into plain parameters: edges.weight, stripes.weight, out.weight"


def test_the_port_from_r_runs_line_for_line(tmp_path: Path) -> None:
    printed = dict(line.split(": ") for line in run("port_from_r.py", tmp_path).splitlines())
    assert 0 <= float(printed.pop("loss")) < 0.01
    assert printed == {"shape of g": "1 20", "shape of v": "40 20", "parameters": "bias weight"}


def spoken(line: str) -> list[str]:
    """What a line of R or Python calls that is called the same in both."""
    line = line.partition("#")[0].replace("nn_utils_weight_norm", "WeightNorm")
    words = re.split(r"[^A-Za-z_]+", re.sub(r"\b(torch|nn|nnf|optim|named)_", "", line))
    shared = (
        "apply remove recompute weightnorm backward zero_grad step randn sin sum linear mse_loss relu adam parameters"
    )
    return sorted(word.lower() for word in words if word.lower() in shared.split())


def test_the_two_ports_say_the_same_on_every_line() -> None:
    in_r = (EXAMPLES / "port_from_r.R").read_text().splitlines()
    in_python = (EXAMPLES / "port_from_r.py").read_text().splitlines()
    said = [(number, spoken(r)) for number, r in enumerate(in_r, start=1)]
    assert [words for _, words in said][8:] == [spoken(line) for line in in_python][8:]
    assert sum(len(words) for _, words in said) > 20


def test_each_norm_is_trained_at_each_rate_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "empty").mkdir()
    picture = tmp_path / "norms.png"
    printed = run("norms.py", tmp_path / "empty", "--steps", 3, "--seeds", 2, "--out", picture)
    head, *rows = printed.partition("\n\n")[0].splitlines()
    rates = head.removeprefix("error in %, at the learning rate").split()
    assert [float(rate) for rate in rates] == sorted(map(float, rates))
    shown = {re.split(r" {2,}", row)[0]: re.findall(r"([\d.]+) ± ([\d.]+)", row) for row in rows}
    ours = {re.sub(r"\(.*", "", name) for name in shown} - {"no norm"}
    assert ours == set(explicit_wn.norms.__all__)
    for cells in shown.values():
        assert len(cells) == len(rates)
        assert all(0 < float(mean) < 100 for mean, _ in cells)
    assert picture.stat().st_size > 10_000


def test_the_page_shows_the_table_of_the_norms_as_it_is_printed() -> None:
    page = (EXAMPLES / "README.md").read_text()
    head = page[page.index("error in %, at the learning rate") :].splitlines()
    names = [re.split(r" {2,}", line)[0] for line in head[1:9]]
    assert {re.sub(r"\(.*", "", name) for name in names} == {"no norm", *explicit_wn.norms.__all__}


def test_the_gallery_names_every_example_and_shows_every_picture() -> None:
    page = (EXAMPLES / "README.md").read_text()
    named, shown = set(re.findall(r"(?<!!)\[[^]]+\]\(([^)#]+)\)", page)), set(re.findall(r"!\[[^]]+\]\((.+?)\)", page))
    files = [path for path in EXAMPLES.iterdir() if path.is_file()]
    assert {path.name for path in files if path.suffix in {".html", ".ipynb", ".py", ".R"}} <= named
    assert {path.name for path in files if path.suffix == ".png"} == shown
