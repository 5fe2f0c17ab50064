"""The documents say what is so: their code runs and prints what they show, and their tables are what happens."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from r_files import write_as_r

import explicit_wn.teaching

ROOT = Path(__file__).parents[2]
DOCUMENTS = "README.md", "MIGRATION.md", "tests/README.md", "examples/README.md"
EXTRAS = "accelerate", "ema_pytorch", "lightning", "openvino", "peft", "safetensors", "torchinfo", "transformers"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def chapters(name: str) -> dict[str, tuple[int, str]]:
    """The chapters of a document, each with the number of its first line, by their titles."""
    parts = re.split(r"^(?=## )", (ROOT / name).read_text(), flags=re.MULTILINE)
    starts = [1 + sum(part.count("\n") for part in parts[:index]) for index in range(len(parts))]
    return {part.partition("\n")[0].lstrip("# "): (start, part) for start, part in zip(starts, parts, strict=True)}


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The blocks of code in one language, each with the number of lines before it."""
    return [(text[: found.start(2)].count("\n"), found[2]) for found in BLOCK.finditer(text) if found[1] == language]


def outputs(text: str) -> list[str]:
    """The blocks of text that follow a block of Python at once: what it prints."""
    found = list(BLOCK.finditer(text))
    pairs = [(a, b) for a, b in pairwise(found) if a[1] == "python" and b[1] == "text"]
    return [b[2] for a, b in pairs if text[a.end() : b.start()] == "\n"]


CHAPTERS = [
    pytest.param(name, title, id=f"{name}: {title}")
    for name in DOCUMENTS
    for title, (_, text) in chapters(name).items()
    if blocks(text, "python")
]


@pytest.fixture
def net_of_r(tmp_path: Path) -> dict[str, torch.Tensor]:
    """The state of the net of MIGRATION's first chapter, which lies in `net.pt` as R would have saved it."""
    state = {"fc.bias": torch.randn(40), "fc.weight_g": torch.rand(1, 20), "fc.weight_v": torch.randn(40, 20)}
    write_as_r(tmp_path / "net.pt", state)
    return state


def run_chapter(name: str, title: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Runs the Python of one chapter as a module, whose line numbers in tracebacks are those of the document."""
    start, text = chapters(name)[title]
    lines: list[str] = []
    for offset, code in blocks(text, "python"):
        lines += [""] * (start + offset - 1 - len(lines)) + code.splitlines()
    path = folder / f"{Path(name).stem}.py"
    path.write_text("\n".join(lines) + "\n")
    module = types.ModuleType(path.stem)
    monkeypatch.setitem(sys.modules, path.stem, module)  # so that its classes can be pickled
    monkeypatch.chdir(folder)
    try:
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    except ModuleNotFoundError as missing:
        if missing.name in EXTRAS:
            pytest.skip(f"{missing.name} is not installed")
        raise
    return module


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # Lightning
@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
@pytest.mark.parametrize(("name", "title"), CHAPTERS)
def test_code_runs_and_prints_what_is_shown(
    name: str,
    title: str,
    net_of_r: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_chapter(name, title, tmp_path, monkeypatch)
    _, text = chapters(name)[title]
    assert capsys.readouterr().out == "".join(outputs(text))


def test_a_module_that_r_saved_is_loaded_with_its_numbers(
    net_of_r: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = run_chapter("MIGRATION.md", "From R", tmp_path, monkeypatch).net
    bias, g, v = net_of_r.values()
    x = torch.randn(8, 20)
    expected = torch.nn.functional.linear(x, g * v / v.norm(dim=0, keepdim=True), bias)
    torch.testing.assert_close(net(x), expected)


def test_every_block_says_its_language_and_every_python_block_is_found() -> None:
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        fences = re.findall(r"^```(\w*)$", text, re.MULTILINE)
        assert len(fences) % 2 == 0
        assert set(fences[::2]) <= {"python", "text", "sh", "r"}
        assert set(fences[1::2]) == {""}
        in_chapters = [block for _, chapter in chapters(name).values() for block in blocks(chapter, "python")]
        assert len(in_chapters) == fences.count("python")


def test_the_readme_has_the_two_commands_once_each_and_both_make_their_venv() -> None:
    commands = [code.strip() for _, code in blocks((ROOT / "README.md").read_text(), "sh")]
    assert len(commands) == 2
    for command, end in zip(commands, ("examples/quickstart.py", "-m pytest"), strict=True):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -e ")
        assert command.endswith(f" && .venv/bin/python {end}")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_runs_the_readmes_test_command_word_for_word() -> None:
    shown = subprocess.run(
        ["bash", ROOT / ".ci/run", "--show"], check=True, capture_output=True, text=True, env=dict(os.environ)
    )
    assert f"```sh\n{shown.stdout}```\n" in (ROOT / "README.md").read_text()
    assert shown.stdout.endswith(" -m pytest\n")


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def anchors(path: Path) -> set[str]:
    headings = [line.lstrip("# ").lower() for line in path.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_within_the_project_lead_somewhere(name: str) -> None:
    inside = [link for link in links((ROOT / name).read_text()) if not link.startswith("https://")]
    assert inside
    for link in inside:
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1500


def test_the_readme_names_the_versions_that_the_package_declares() -> None:
    readme, declared = (ROOT / "README.md").read_text(), (ROOT / "pyproject.toml").read_text()
    for name, pattern in {"torch": r'"torch>=([\d.]+)"', "Python": r'requires-python = ">=([\d.]+)"'}.items():
        version = re.search(pattern, declared)
        assert version is not None
        assert f"{name} {version[1]} or newer" in readme


def contexts(name: str) -> str:
    found = re.search(r"<!-- contexts -->\n(.*?)\n<!-- /contexts -->", (ROOT / name).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def rows(text: str, head: str) -> list[list[str]]:
    """The table whose first row begins with `head`, its rule left out."""
    lines = text[text.index(head) :].partition("\n\n")[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [table[0], *table[2:]]


def test_the_tables_of_contexts_are_what_happens() -> None:
    """On the torch that they name all of it; on another one the columns of the first table that are ours."""
    command = [sys.executable, ROOT / "tests/contexts_table.py"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    written = contexts("tests/README.md")
    if torch.__version__.startswith("2.13."):
        assert printed == written
    else:
        first = [text.partition("\n\n")[0].splitlines() for text in (printed, written)]
        assert [row.split("|")[1:4] for row in first[0]] == [row.split("|")[1:4] for row in first[1]]


@pytest.mark.parametrize(("head", "least"), [("|  | `recompute`", 8), ("| | eager inference", 3)])
def test_the_readmes_tables_are_rows_and_columns_of_the_full_ones(head: str, least: int) -> None:
    short, full = (rows((ROOT / name).read_text(), head) for name in ("README.md", "tests/README.md"))
    columns = [full[0].index(title) for title in short[0]]
    picked = [[row[column] for column in columns] for row in full]
    assert [row for row in picked if row in short] == short
    assert len(short) > least


def test_the_api_reference_is_built_without_a_warning_and_shows_what_is_public(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    arguments = "-m pdoc -d google"
    modules = "explicit_wn explicit_wn.models explicit_wn.teaching"
    assert f".venv/bin/python {arguments} {modules}`" in (ROOT / "README.md").read_text()
    assert f'{arguments} -o "$scratch/docs_html" {modules}' in (ROOT / ".ci/run").read_text()
    command = [sys.executable, "-W", "error", *arguments.split(), "-o", tmp_path, *modules.split()]
    subprocess.run(command, check=True, cwd=ROOT)
    for module in explicit_wn, explicit_wn.models, explicit_wn.teaching, explicit_wn.functional, explicit_wn.checkpoint:
        path = tmp_path / f"{module.__name__.replace('.', '/')}.html"
        shown = set(re.findall(r'<section id="(\w+)">', path.read_text()))
        public = {name for name in getattr(module, "__all__", shown) if not inspect.ismodule(getattr(module, name))}
        assert shown == public
        assert all(inspect.getdoc(getattr(module, name)) for name in public)
