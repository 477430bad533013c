"""Files put together out of ranges of others are, byte for byte, what safetensors writes."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.core.errors import ArtifactError, MoesaicError
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.safetensors_files import StoredTensor, find_tensors, num_data_bytes, read_header, write_shard


def _rows() -> dict[str, Tensor]:
    """Eight rows each, of several widths and types; one name is not ASCII."""
    draw = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(8, 3, generator=draw).bfloat16(),
        "a": torch.randint(0, 256, (8, 5, 2), generator=draw).byte(),
        "d.weight": torch.randn(8, generator=draw),
        "c.é": torch.randn(8, 1, generator=draw).bfloat16(),
    }


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    save_file(_rows(), tmp_path / "parent.safetensors", metadata={"format": "pt"})
    return tmp_path / "parent.safetensors"


@pytest.mark.parametrize("kept", [[0, 1, 4, 6, 7], [5], list(range(8))])
def test_a_file_of_rows_is_what_safetensors_writes(parent: Path, tmp_path: Path, kept: list[int]) -> None:
    rows = torch.tensor(kept)
    write_shard(tmp_path / "own", {name: stored.index_select(0, rows) for name, stored in read_header(parent).items()})
    selected = {name: tensor.index_select(0, rows) for name, tensor in _rows().items()}
    save_file(selected, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert num_data_bytes(tmp_path / "own") == len(kept) * (10 + 6 + 4 + 2)


def test_one_file_takes_tensors_from_several(parent: Path, tmp_path: Path) -> None:
    save_file({"z": torch.arange(4.0)}, tmp_path / "other.safetensors")
    write_shard(tmp_path / "own", read_header(parent) | read_header(tmp_path / "other.safetensors"))
    found = read_header(tmp_path / "own")
    assert found["z"].read().tolist() == [0, 1, 2, 3]
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in _rows().items())


def test_neighbouring_rows_are_one_range(tmp_path: Path) -> None:
    whole = StoredTensor(tmp_path, "BF16", (6, 5), ((100, 60),))
    some = whole.index_select(0, torch.tensor([0, 1, 3, 4, 5]))
    assert some.runs == ((100, 20), (130, 30))
    assert some.shape == (5, 5) and some.num_bytes == 50
    assert whole.index_select(0, torch.arange(6)) == whole


def test_reading_gives_values_or_fills_a_buffer(tiny_checkpoint: Checkpoint) -> None:
    for name in tiny_checkpoint.files:
        stored, expected = tiny_checkpoint.stored(name), tiny_checkpoint.tensor(name)
        assert torch.equal(stored.read(), expected) and stored.read().dtype == expected.dtype
        buffer = torch.zeros(stored.num_bytes, dtype=torch.uint8)
        assert torch.equal(stored.read(into=buffer), expected)
        assert torch.equal(buffer, expected.reshape(-1).view(torch.uint8))


def test_rows_are_read_without_the_others(parent: Path) -> None:
    some = read_header(parent)["b"].index_select(0, torch.tensor([1, 2, 7]))
    assert torch.equal(some.read(), _rows()["b"][[1, 2, 7]])


def test_a_file_cut_short_is_named(parent: Path, tmp_path: Path) -> None:
    stored = read_header(parent)
    parent.write_bytes(parent.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"parent\.safetensors ends before"):
        stored["a"].read()
    with pytest.raises(ArtifactError, match=r"parent\.safetensors ends before"):
        write_shard(tmp_path / "own", stored)


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    save_file({"ids": torch.arange(3)}, tmp_path / "x.safetensors")
    ids = read_header(tmp_path / "x.safetensors")["ids"]
    with pytest.raises(ArtifactError, match="a tensor of type I64; allowed are F64, F32"):
        ids.read()


def test_a_header_is_found_in_one_read_or_two_and_nothing_else_is_read(tmp_path: Path) -> None:
    """The format: eight bytes of length, JSON, data. The long header has 2000 tensors of one byte each."""
    for count, reads in ((4, 1), (2000, 2)):
        save_file({f"layer.{index}.weight": torch.zeros(1).byte() for index in range(count)}, tmp_path / "x")
        content, asked = (tmp_path / "x").read_bytes(), []

        def read(start: int, length: int, content: bytes = content, asked: list[int] = asked) -> bytes:
            asked.append(length)
            return content[start : start + length]

        found = find_tensors(read, len(content), tmp_path / "x")
        header_bytes = 8 + int.from_bytes(content[:8], "little")
        assert found == read_header(tmp_path / "x") and len(found) == count
        assert len(asked) == reads and sum(asked) <= max(header_bytes, 2**16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{]",
        (12).to_bytes(8, "little") + b'{"a": "BF16"}',
        (30).to_bytes(8, "little") + b'{"a": {"dtype": "U8"}}        ',
    ],
)
def test_what_is_no_safetensors_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x is not a safetensors file: (its header|it is empty)"):
        read_header(tmp_path / "x")


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F32", "BF16", "U8", "I64", "F8_E8M0", "F4", "Q9", 3]),
        "shape": st.sampled_from([[2], [2], [1, 2], [4], [], [0], [-2]]),
        "data_offsets": st.sampled_from([[0, 8], [0, 8], [8, 16], [0, 4], [4, 8], [0, 2], [8, 0], [0, 0]]),
    }
)
HEADERS = st.dictionaries(st.sampled_from("abc"), ENTRIES | st.none() | st.just({"dtype": "U8"}), max_size=2)


@settings(max_examples=800, deadline=None, derandomize=True)
@given(
    HEADERS.map(json.dumps) | st.text(alphabet='{}[]",:ab0 ', max_size=20),
    st.sampled_from([8, 8, 16, 4, 0]),
    st.sampled_from([0, 0, 0, 1, -1]),
)
def test_a_header_is_read_as_the_library_reads_it_or_refused(
    tmp_path_factory: pytest.TempPathFactory, text: str, num_bytes: int, more: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes((max(0, len(text) + more)).to_bytes(8, "little") + text.encode() + b"\0" * num_bytes)
    try:
        found = read_header(path)
    except MoesaicError:
        event("refused")
        return
    if all(tensor.dtype in ("F32", "BF16", "U8") for tensor in found.values()):
        expected = load_file(path)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name].read(), tensor) for name, tensor in expected.items())
