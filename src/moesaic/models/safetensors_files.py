"""Safetensors files by their bytes: where each tensor lies, and new files put together out of ranges of old ones.

A file is eight bytes that say how long its header is (little-endian), the header (JSON: dtype, shape and the range of
bytes of every tensor), and the tensors' bytes. Rows along a tensor's first axis are consecutive, so a tensor without
some of its rows is a few ranges of the file, which are copied as they are: none is unpacked, none held in memory.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moesaic.core.errors import ArtifactError
from moesaic.core.json_text import foreign_kind, parse_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""What Moesaic reads, by the names of the format, in the order in which its library stores them."""
_BITS = {
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F32", "U32", "I32"), 32),
    **dict.fromkeys(("BF16", "F16", "U16", "I16"), 16),
    **dict.fromkeys(("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Of one value of every type that the format has."""
_LENGTH = struct.Struct("<Q")
_FIRST_READ_BYTES = 64 * 2**10
"""Read at once: enough for the header of most files."""
_LONGEST_HEADER_BYTES = 100 * 2**20
_COPIED_BYTES = 2**20
"""Copied at once: what a core's second-level cache takes."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, or some of its rows; nothing of it is read yet."""

    file: Path
    dtype: str
    """The data type's name in the format, such as ``BF16``."""
    shape: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    """The ranges of the file that hold it, one after the other: first byte and number of bytes."""

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all its values."""
        return sum(count for _, count in self.runs)

    def index_select(self, dim: int, index: Tensor) -> "StoredTensor":
        """These rows of a whole tensor, in this order; neighbours become one range. Only for the first axis."""
        assert dim == 0 and len(self.runs) == 1, "rows are taken from whole tensors, along their first axis"
        start, size = self.runs[0][0], self.num_bytes // len(self)
        runs: list[tuple[int, int]] = []
        for row in index.tolist():
            first = start + row * size
            if runs and sum(runs[-1]) == first:
                runs[-1] = runs[-1][0], runs[-1][1] + size
            else:
                runs.append((first, size))
        return replace(self, shape=(len(index), *self.shape[1:]), runs=tuple(runs))

    def read(self, into: Tensor | None = None) -> Tensor:
        """Its values: in memory of their own, or in ``into``, as many bytes of uint8."""
        if self.dtype not in _DTYPES:
            raise ArtifactError(f"{self.file}: a tensor of type {self.dtype}; allowed are {', '.join(_DTYPES)}")
        room = torch.empty(self.num_bytes, dtype=torch.uint8) if into is None else into
        left = room.numpy().data
        with self.file.open("rb", buffering=0) as file:
            for start, count in self.runs:
                file.seek(start)
                while count:
                    got = file.readinto(left[:count])
                    if not got:
                        raise _cut_short(self.file)
                    left, count = left[got:], count - got
        return room.view(_DTYPES[self.dtype]).view(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file.

    Raises:
        ArtifactError: if it is none, or ends before or after its header says.
    """
    with path.open("rb") as file:

        def read(start: int, count: int) -> bytes:
            file.seek(start)
            return file.read(count)

        return find_tensors(read, os.fstat(file.fileno()).st_size, path)


def find_tensors(read: Callable[[int, int], bytes], size_bytes: int, path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, wherever it is.

    Args:
        read: gives as many bytes, from a byte on; asked for the header alone, in one or two pieces.
        size_bytes: of the file.
        path: its name in what is returned, and in errors.

    Raises:
        ArtifactError: as :func:`read_header`.
    """
    first = read(0, min(_FIRST_READ_BYTES, size_bytes))
    if not first:
        raise ArtifactError(f"{path} is not a safetensors file: it is empty; copy or download it again")
    if kind := foreign_kind(first):
        raise ArtifactError(f"{path} is not a safetensors file: it is {kind}")
    length = _LENGTH.unpack_from(first)[0] if len(first) >= _LENGTH.size else size_bytes
    data = _LENGTH.size + length
    if data > size_bytes or length > _LONGEST_HEADER_BYTES:
        why = (
            "it is a web page, maybe to log in"
            if first.startswith(b"<")
            else "its header would be longer than the file"
        )
        raise ArtifactError(f"{path} is not a safetensors file: {why}")
    text = first[_LENGTH.size : data]
    text += read(len(first), data - len(first)) if data > len(first) else b""
    try:
        header: dict[str, Any] = parse_json(text, "the header")
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, entry, data) for name, entry in header.items()}
    except (ArtifactError, AttributeError, KeyError, TypeError, ValueError) as broken:
        raise ArtifactError(f"{path} is not a safetensors file: its header is broken ({broken})") from broken
    _check_ranges(path, tensors, data, size_bytes)
    return tensors


def _stored(path: Path, entry: Mapping[str, Any], data: int) -> StoredTensor:
    (start, end), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
    if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
        raise ValueError(f"{entry} does not give its place in numbers of bytes")
    if dtype in _BITS and (end - start) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{entry} has not the bytes of its shape")
    return StoredTensor(path, str(dtype), shape, ((data + start, end - start),))


def _check_ranges(path: Path, tensors: Mapping[str, StoredTensor], data: int, size_bytes: int) -> None:
    """Tensors follow one another without a gap, from the header to the end of the file."""
    end = data
    for start, count in sorted(run for tensor in tensors.values() for run in tensor.runs):
        if start != end:
            raise ArtifactError(f"{path} is not a safetensors file: its header is broken (tensors overlap or gape)")
        end = start + count
    if end > size_bytes:
        raise _cut_short(path)
    if end < size_bytes:
        raise ArtifactError(f"{path} goes on after its header says that it ends; copy or download it again")


def write_shard(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write a file of these tensors, exactly as safetensors would: wide dtypes first, then by name.

    Raises:
        ArtifactError: if a file they lie in ends too early.
    """
    order = list(_DTYPES)
    ordered = dict(sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])))
    with ExitStack() as opened, path.open("wb", buffering=0) as target:
        files = {tensor.file for tensor in ordered.values()}
        sources = {file: opened.enter_context(file.open("rb", buffering=0)) for file in files}
        runs = [(sources[tensor.file], *run) for tensor in ordered.values() for run in tensor.runs]
        for source, start, count in runs:  # all of it is asked for at once, so that no copy waits for a disk at rest
            os.posix_fadvise(source.fileno(), start, count, os.POSIX_FADV_WILLNEED)
        target.write(header_of(ordered))
        buffer = memoryview(bytearray(_COPIED_BYTES))
        for source, start, count in runs:
            _copy(source, target, start, count, buffer)


class Described(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> str:
        """The data type's name in the format, such as ``BF16``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""


def header_of(tensors: Mapping[str, Described]) -> bytes:
    """The header of a file of these tensors in this order: its length in front, spaces up to a multiple of eight."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.num_bytes
        content[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def _copy(source: FileIO, target: FileIO, start: int, count: int, buffer: memoryview) -> None:
    """Copy a range of a file to where the target's last write ended."""
    source.seek(start)
    while count:
        got = source.readinto(buffer[:count])
        if not got:
            raise _cut_short(source.name)
        written = 0
        while written < got:
            written += target.write(buffer[written:got])
        count -= got


def _cut_short(path: object) -> ArtifactError:
    return ArtifactError(f"{path} ends before its header says; copy or download it again")


def num_data_bytes(path: Path) -> int:
    """Bytes of a file's tensors, without its header."""
    with path.open("rb") as file:
        return path.stat().st_size - _LENGTH.size - int(_LENGTH.unpack(file.read(_LENGTH.size))[0])
