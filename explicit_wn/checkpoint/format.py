"""The format of `.safetensors` files: the length of the header in 8 bytes, the header in JSON, then the numbers.

Each tensor is read when it is wanted, and nothing is mapped into memory, so that a file takes that of one tensor.
"""

import ctypes
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CHUNK = 1 << 24
_METADATA = "__metadata__"


@attrs.frozen
class InFile:
    """A tensor in a file."""

    file: Path
    tag: str
    """The dtype as the format names it."""
    shape: tuple[int, ...]
    start: int
    """Where in the file it begins."""
    nbytes: int

    @property
    def dtype(self) -> Any:
        """torch's name for the dtype; one that only needs to be copied keeps the format's."""
        return _DTYPES.get(self.tag, self.tag)

    def read(self) -> Tensor:
        """The tensor."""
        buffer = bytearray(self.nbytes)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            _fill(file, memoryview(buffer))
        if not buffer:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(buffer, dtype=self.dtype).reshape(self.shape)

    def copy_to(self, out: BinaryIO) -> None:
        """Writes its numbers as they are."""
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            for left in range(self.nbytes, 0, -_CHUNK):
                chunk = bytearray(min(_CHUNK, left))
                _fill(file, memoryview(chunk))
                out.write(chunk)


def _fill(file: Any, buffer: memoryview) -> None:
    """Reads as much as the buffer holds."""
    while len(buffer):
        count = file.readinto(buffer)
        if not count:
            raise ValueError(f"{file.name} became shorter while it was read.")
        buffer = buffer[count:]


def read_header(path: Path) -> tuple[dict[str, InFile], dict[str, str]]:
    """The tensors in a file, by their names, and what else the file says of itself."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is no whole .safetensors file: its header is longer than the file.")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop(_METADATA, None) or {}
            return {name: _stored(path, 8 + length, size, about) for name, about in header.items()}, metadata
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no whole .safetensors file: {error or type(error).__name__}.") from None


def _stored(path: Path, after_header: int, size: int, about: dict[str, Any]) -> InFile:
    start, end = (after_header + int(offset) for offset in about["data_offsets"])
    one = InFile(path, about["dtype"], tuple(map(int, about["shape"])), start, end - start)
    wrong = one.tag in _DTYPES and one.nbytes != math.prod(one.shape) * one.dtype.itemsize
    if not after_header <= start <= end <= size or wrong:
        raise ValueError(f"a tensor of {one.tag} {one.shape} is not where its header says")
    return one


def header(entries: Iterable[tuple[str, InFile, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file with these names, dtypes and shapes, in this order."""
    about: dict[str, Any] = {_METADATA: metadata} if metadata else {}
    start = 0
    for name, like, shape in entries:
        end = start + like.nbytes
        about[name] = {"dtype": like.tag, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8, as readers like it
    return len(text).to_bytes(8, "little") + text


def write_tensor(tensor: Tensor, out: BinaryIO) -> None:
    """Writes the numbers of a tensor, without a copy and without NumPy."""
    if sys.byteorder != "little":
        raise RuntimeError("a .safetensors file can be written on a little-endian machine alone.")
    tensor = tensor.contiguous()
    if tensor.numel():
        out.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
