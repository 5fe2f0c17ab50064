"""Checkpoints in files: the same as their state dicts, read back by torch and safetensors; whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from explicit_wn import checkpoint
from explicit_wn.checkpoint import files
from explicit_wn.checkpoint.files import Order
from explicit_wn.checkpoint.format import read_header

safetensors = pytest.importorskip("safetensors.torch")
FOLD = Order("fold")


def state() -> dict[str, Tensor]:
    """Weights in both spellings and other things, of many dtypes."""
    return {
        "a.weight_g": torch.rand(5, 1, 1),
        "a.weight_v": torch.randn(5, 3, 2),
        "a.steps": torch.tensor(3),
        "b.parametrizations.weight.original0": torch.rand(()).bfloat16(),
        "b.parametrizations.weight.original1": torch.randn(3, 3).bfloat16(),
        "c.weight_orig": torch.randn(4, 3).double(),
        "c.weight_u": torch.randn(4).double(),
        "c.weight_v": torch.randn(3).double(),
        "mask": torch.tensor([True, False, True]),
        "tiny": torch.arange(3, dtype=torch.int8),
        "empty": torch.zeros(0, 4),
        "eight": torch.rand(3).to(torch.float8_e4m3fn),
        "unsigned": torch.arange(3).to(torch.uint16),
    }


def save(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)
    return path


def load(path: Path) -> Any:
    return safetensors.load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), key
        assert found[key].shape == value.shape


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("to", ["plain", "hook", "parametrization", "ours"])
def test_a_file_becomes_what_its_state_dict_becomes(suffix: str, to: str, tmp_path: Path) -> None:
    before, out = state(), tmp_path / f"out{suffix}"
    path = save(before, tmp_path / f"in{suffix}")
    content, ticks = path.read_bytes(), []
    assert files.respell(path, out, Order("respell", to, tick=lambda *done: ticks.append(done))) == 3
    assert ticks == [(done, len(ticks)) for done in range(1, len(ticks) + 1)]
    same(load(out), checkpoint.respell(before, to))
    assert path.read_bytes() == content
    assert sorted(tmp_path.iterdir()) == sorted([path, out])
    assert str(files.report(path)).splitlines()[2:] != []
    assert {row.name for row in files.report(path).rows} == {row.name for row in checkpoint.report(before).rows}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_weight_of_no_numbers_is_one_still(suffix: str, tmp_path: Path) -> None:
    path = save({"weight_g": torch.rand(2, 1), "weight_v": torch.zeros(2, 0)}, tmp_path / f"in{suffix}")
    files.respell(path, tmp_path / f"out{suffix}", FOLD)
    assert load(tmp_path / f"out{suffix}")["weight"].shape == (2, 0)


def test_every_tensor_lies_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    files.respell(save(state(), tmp_path / "in.safetensors"), tmp_path / "out.safetensors", FOLD)
    stored, _ = read_header(tmp_path / "out.safetensors")
    assert not [name for name, one in stored.items() if one.start % one.dtype.itemsize]


def test_shards_that_are_refused_halfway_leave_the_folder_as_it_was(tmp_path: Path) -> None:
    _, folder = sharded(tmp_path / "in")
    zero = tmp_path / "in/model-1.safetensors"
    save(load(zero) | {"a.weight_v": torch.zeros(5, 3, 2)}, zero)
    for there in False, True:
        if there:
            (tmp_path / "out").mkdir()
            (tmp_path / "out/config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"'a.weight' would not be finite"):
            files.respell(folder, tmp_path / "out", FOLD)
        assert [path.name for path in (tmp_path / "out").glob("*")] == (["config.json"] if there else [])
        assert (tmp_path / "out").exists() == there


def test_the_metadata_of_a_safetensors_file_stays(tmp_path: Path) -> None:
    path, out = save(state(), tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    files.respell(path, out, FOLD)
    with safetensors.safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_file_of_torch_keeps_what_it_nests_and_shares_and_strides(tmp_path: Path) -> None:
    v = torch.randn(3, 4).t()
    shared = {"x.weight_g": torch.rand(4, 1), "x.weight_v": v}
    before = {"generator": {**shared, "y.weight_g": shared["x.weight_g"], "y.weight_v": v}, "epoch": 3}
    files.respell(save(before, tmp_path / "in.pt"), tmp_path / "out.pt", FOLD)
    after = load(tmp_path / "out.pt")
    assert after["epoch"] == 3
    x, y = after["generator"]["x.weight"], after["generator"]["y.weight"]
    torch.testing.assert_close(x, shared["x.weight_g"] * v / v.norm(dim=1, keepdim=True))
    assert x.data_ptr() == y.data_ptr()
    assert x.stride() == v.stride()


def test_a_file_of_torch_from_before_zip_is_read(tmp_path: Path) -> None:
    before = {"a.weight_g": torch.rand(5, 1), "a.weight_v": torch.randn(5, 3)}
    torch.save(before, tmp_path / "in.pt", _use_new_zipfile_serialization=False)
    files.respell(tmp_path / "in.pt", tmp_path / "out.pt", FOLD)
    same(load(tmp_path / "out.pt"), checkpoint.fold(before))


INDEX = "model.safetensors.index.json"


def sharded(folder: Path, index_name: str = INDEX) -> tuple[dict[str, Tensor], Path]:
    """A checkpoint in three files, with the parts of one weight in two of them, and one file of a g alone."""
    whole, suffix = state(), ".bin" if ".bin." in index_name else ".safetensors"
    of_file = {"a.weight_g": "3", "b.parametrizations.weight.original0": "2"}
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in whole.items():
        groups.setdefault(f"model-{of_file.get(key, '1')}{suffix}", {})[key] = value
    folder.mkdir()
    for name, group in groups.items():
        save(group, folder / name)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {key: name for name, group in groups.items() for key in group},
    }
    (folder / index_name).write_text(json.dumps(index))
    return whole, folder


@pytest.mark.parametrize("by", ["folder", "index"])
@pytest.mark.parametrize("to", ["plain", "parametrization", "hook"])
@pytest.mark.parametrize(
    "name",
    [
        INDEX,
        "pytorch_model.bin.index.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "model.fp16.safetensors.index.json",
        "model.safetensors.index.fp16.json",
    ],
)
def test_shards_are_done_in_one_call(name: str, by: str, to: str, tmp_path: Path) -> None:
    before, folder = sharded(tmp_path / "in", name)
    out = tmp_path / "out"
    assert str(files.report(folder)) == str(files.report(folder / name))
    assert {row.name for row in files.report(folder).rows} == {row.name for row in checkpoint.report(before).rows}
    assert files.respell(folder if by == "folder" else folder / name, out, Order("respell", to)) == 3
    index = json.loads((out / name).read_text())
    wanted = checkpoint.respell(before, to)
    names = set(index["weight_map"].values())
    assert {path.name for path in out.iterdir()} == {name, *names}
    found = {one: load(out / one) for one in names}
    same({key: found[one][key] for key, one in index["weight_map"].items()}, wanted)
    assert sum(map(len, found.values())) == len(wanted)
    was_in = json.loads((folder / name).read_text())["weight_map"]
    assert all(was_in[key] == one for key, one in index["weight_map"].items() if key in was_in)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in wanted.values())


def test_a_folder_of_two_indices_and_an_index_of_two_formats_are_refused(tmp_path: Path) -> None:
    _, folder = sharded(tmp_path / "in")
    other = folder / "pytorch_model.bin.index.json"
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    save(state(), folder / "all.bin")
    other.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, "all.bin")}))
    with pytest.raises(ValueError, match=rf"in holds {INDEX} and {other.name}; name the one that is meant"):
        files.respell(folder, tmp_path / "out", FOLD)
    other.write_text(json.dumps({"weight_map": weight_map | {"x": "all.bin"}}))
    with pytest.raises(ValueError, match=r"names \.safetensors files and others"):
        files.respell(other, tmp_path / "out", FOLD)
    assert not (tmp_path / "out").exists()


def test_an_index_that_does_not_agree_with_its_files_is_refused(tmp_path: Path) -> None:
    _, folder = sharded(tmp_path / "in")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for weight_map, why in (
        ({**content["weight_map"], "more": "model-1.safetensors"}, "do not agree on whether 'more' is in it"),
        ({k: v for k, v in content["weight_map"].items() if k != "mask"}, "whether 'mask' is in it"),
        ({"a": "../in/model-1.safetensors"}, "no index of shards"),
        ([], "no index of shards"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=why):
            files.respell(folder, tmp_path / "out", FOLD)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_exists_stays_unless_forced_and_a_file_may_replace_itself(suffix: str, tmp_path: Path) -> None:
    before = state()
    path, out = save(before, tmp_path / f"in{suffix}"), tmp_path / f"out{suffix}"
    out.write_text("precious")
    with pytest.raises(FileExistsError, match="exists already; --force overwrites it"):
        files.respell(path, out, FOLD)
    assert out.read_text() == "precious"
    for target in out, path:
        files.respell(path, target, Order("fold", force=True))
        same(load(target), checkpoint.fold(before))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_refusal_halfway_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    path = save(state() | {"z.weight_g": torch.ones(2, 1), "z.weight_v": torch.zeros(2, 2)}, tmp_path / f"in{suffix}")
    with pytest.raises(ValueError, match=r"'z.weight' would not be finite"):
        files.respell(path, tmp_path / f"out{suffix}", FOLD)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_checkpoint_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    whole = save(state(), tmp_path / "whole.safetensors").read_bytes()
    whole_pt = save(state(), tmp_path / "whole.pt").read_bytes()
    contents = {
        "a.safetensors": (b"", ""),
        "b.safetensors": (whole[:-1], ""),
        "c.safetensors": (whole[:20], ""),
        "d.safetensors": ((2).to_bytes(8, "little") + b"[]", ""),
        "e.pt": (b"", "it is cut off"),
        "f.pt": (b"PK", "torch.save did not write it"),
        "g.pt": (b"hello", "torch.save did not write it"),
        "h.pt": (whole_pt[:-50], "it is cut off"),
        "i.pt": (whole_pt[:20], r"PytorchStreamReader failed .*\w"),
    }
    for name, (content, why) in contents.items():
        (tmp_path / name).write_bytes(content)
        says = rf"{name} (is no whole .safetensors file|cannot be read by torch.load with weights_only: {why}\.\Z)"
        with pytest.raises(ValueError, match=says):
            files.respell(tmp_path / name, tmp_path / f"out{name[1:]}", FOLD)
    torch.save(torch.nn.Linear(1, 1), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        files.respell(tmp_path / "model.pt", tmp_path / "out.pt", FOLD)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(TypeError, match="takes a state dict, not a list"):
        files.respell(tmp_path / "list.pt", tmp_path / "out.pt", FOLD)
    with pytest.raises(ValueError, match="of another format"):
        files.respell(tmp_path / "whole.safetensors", tmp_path / "out.pt", FOLD)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


PEAK = """
import sys, threading
from pathlib import Path
from explicit_wn.checkpoint.command import main

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024

main(["fold", sys.argv[1], "-o", sys.argv[3]])  # what is imported late is there now
before, seen, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.001):
        seen.append(anonymous())

thread = threading.Thread(target=watch)
thread.start()
assert main(["fold", sys.argv[2], "-o", sys.argv[4]]) == 0
done.set()
thread.join()
print(max(seen) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it reads what Linux says of memory")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_large_file_takes_the_memory_of_a_few_of_its_tensors(suffix: str, tmp_path: Path) -> None:
    size, count = 1 << 24, 12  # 16 MB each
    large = {f"{i}.weight_g": torch.rand(1024, 1) for i in range(count)}
    large |= {f"{i}.weight_v": torch.rand(1024, size // 4096) for i in range(count)}
    paths = [save(state(), tmp_path / f"small{suffix}"), save(large, tmp_path / f"large{suffix}")]
    command = [sys.executable, "-c", PEAK, *paths, tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak < 4 * size
    same(load(tmp_path / f"b{suffix}"), checkpoint.fold(large))
