"""Layers and hidden states that do not fit into memory: layers are read one ahead, states spill to disk.

Weights. While one layer computes, a thread reads the next one's tensors as they are stored, MXFP4 experts packed. They
are unpacked on the device that computes, just before that layer runs. Memory holds one layer unpacked and one packed,
whatever the number of layers. Nothing is memory-mapped, so pages once read do not add up. For an accelerator tensors
are read into two pinned buffers alternately, and move to it on a stream of their own while it computes.

Hidden states. They stay where they were computed while there is memory, then in the host's memory up to a budget, then
in files. Where they are kept changes no bit of them.
"""

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moesaic.core.errors import ConfigError
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.layers import DecoderLayer
from moesaic.models.loading import build_block
from moesaic.models.safetensors_files import StoredTensor

STATE_MEMORY = "MOESAIC_STATE_MEMORY_MIB"
"""The environment variable that says how much of the host's memory hidden states may take; half of what is free if not
set. All processes of a run share it."""
_DEVICE_SHARE = 0.5
"""Share of an accelerator's free memory that states may take; layers and what they compute need the rest."""
_ALIGNMENT = 64


class LayerReader:
    """Loads layers of a checkpoint in any order, fast if it is told which one comes next."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._thread = ThreadPoolExecutor(1, "moesaic-read-ahead")
        self._ahead: tuple[int, Future[_Stored]] | None = None
        self._staging = _Staging(device) if device.type == "cuda" else None

    def load(self, layer: int, then: int | None = None) -> DecoderLayer:
        """Build a layer, and begin to read the one named by ``then``; drop the layer before, or both are in memory."""
        stored = self._take(layer)
        if stored.arrived is not None:
            torch.cuda.current_stream().wait_event(stored.arrived)
        block = build_block(self._checkpoint, layer, stored.tensors, self._dtype, self._device)
        if then is not None:
            self._ahead = (then, self._thread.submit(self._read, then))
        return block

    def close(self) -> None:
        """Stop reading ahead and free what has been read."""
        self._thread.shutdown(cancel_futures=True)
        self._ahead = None

    def _take(self, layer: int) -> "_Stored":
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._read(layer)
        expected, future = ahead
        stored = future.result()
        return stored if expected == layer else self._read(layer)

    def _read(self, layer: int) -> "_Stored":
        stored = {name: self._checkpoint.stored(name) for name in self._checkpoint.layer_names(layer)}
        if self._staging is not None:
            return self._staging.read(stored)
        return _Stored({name: tensor.read() for name, tensor in stored.items()})


@dataclass
class _Stored:
    """A layer's tensors as stored; on an accelerator they are complete once ``arrived`` is."""

    tensors: dict[str, Tensor]
    arrived: torch.cuda.Event | None = None


class _Staging:
    """Two pinned buffers through which layers move to an accelerator: one is filled while the other is emptied."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._emptied: list[torch.cuda.Event | None] = [None, None]
        self._current = 0

    def read(self, stored: Mapping[str, StoredTensor]) -> _Stored:
        """Read tensors into one buffer, while the other is emptied, and copy them to the accelerator."""
        self._current = 1 - self._current
        emptied = self._emptied[self._current]
        if emptied is not None:
            emptied.synchronize()
        starts, needed = _lay_out({name: tensor.num_bytes for name, tensor in stored.items()})
        if self._buffers[self._current].numel() < needed:
            self._buffers[self._current] = torch.empty(needed, dtype=torch.uint8, pin_memory=True)
        buffer, tensors = self._buffers[self._current], {}
        with torch.cuda.stream(self._stream):
            for name, tensor in stored.items():
                part = buffer[starts[name] : starts[name] + tensor.num_bytes]
                tensors[name] = tensor.read(into=part).to(self._device, non_blocking=True)
                tensors[name].record_stream(torch.cuda.default_stream(self._device))
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        self._emptied[self._current] = arrived
        return _Stored(tensors, arrived)


def _lay_out(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each of several tensors begins in one buffer, and how long that is."""
    starts, end = {}, 0
    for name, size in sizes.items():
        starts[name] = end
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, end


class StateOffloader:
    """Keeps hidden states between layers: on their device, in host memory or in files."""

    def __init__(self, memory_bytes: int, directory: Path, device: torch.device) -> None:
        """Start empty; ``directory`` takes the files, and is emptied of those of a killed run."""
        directory.mkdir(parents=True, exist_ok=True)
        for left_over in directory.glob("*.state"):
            left_over.unlink()
        self.host_bytes, self.directory = memory_bytes, directory
        self.device_bytes = int(torch.cuda.mem_get_info(device)[0] * _DEVICE_SHARE) if device.type == "cuda" else 0
        self.num_spilled = 0

    def offload(self, tensor: Tensor) -> "OffloadedTensor":
        """Keep a tensor until it is dropped, in the fastest memory that has room for it."""
        return OffloadedTensor(self, tensor)


class OffloadedTensor:
    """A tensor on its device, in the host's memory, or in a file."""

    def __init__(self, offloader: StateOffloader, tensor: Tensor) -> None:
        self._offloader, self.num_bytes = offloader, tensor.nbytes
        self._shape, self._dtype = tensor.shape, tensor.dtype
        self._kept: Tensor | Path | None
        if tensor.device.type != "cpu" and offloader.device_bytes >= tensor.nbytes:
            offloader.device_bytes -= tensor.nbytes
            self._kept = tensor
        elif offloader.host_bytes >= tensor.nbytes:
            offloader.host_bytes -= tensor.nbytes
            self._kept = _to_host(tensor)
        else:
            self._kept = offloader.directory / f"{offloader.num_spilled:06d}.state"
            offloader.num_spilled += 1
            tensor.cpu().contiguous().view(torch.uint8).numpy().tofile(self._kept)

    def read(self) -> Tensor:
        """The tensor; read only."""
        assert self._kept is not None, "a dropped tensor is read"
        if isinstance(self._kept, Tensor):
            return self._kept
        content = torch.from_numpy(np.fromfile(self._kept, dtype=np.uint8))
        return content.view(self._dtype).view(self._shape)

    def drop(self) -> None:
        """Free its memory, or delete its file."""
        if isinstance(self._kept, Path):
            self._kept.unlink()
        elif self._kept is not None and self._kept.device.type == "cpu":
            self._offloader.host_bytes += self.num_bytes
        elif self._kept is not None:
            self._offloader.device_bytes += self.num_bytes
        self._kept = None


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; from an accelerator pinned, for speed, and in the order of the stream that computes."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def state_memory_bytes(num_processes: int) -> int:
    """What one of several processes on this host may keep of hidden states in its memory."""
    text = os.environ.get(STATE_MEMORY)
    if text is None:
        return _free_bytes() // 2 // num_processes
    if not text.isdigit():
        raise ConfigError(f"{STATE_MEMORY} is {text!r}; set it to a number of MiB, 0 or more, or leave it unset")
    return int(text) * 2**20 // num_processes


def _free_bytes() -> int:
    """Memory that is free, or will be made so when asked for; no more than the container's limit leaves."""
    words = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(words["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return max(0, free)
