"""What a worker is told of one block, what it leaves behind, and the hidden states that both sides read and write.

A *boundary* is the place before a layer: boundary l holds the parent's hidden states that enter layer l, which are also
those that left layer l - 1. Each needed boundary is one safetensors file with one tensor per batch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from moesaic.core.files import write_text_atomically, written_atomically
from moesaic.recover.distill_blocks.stage import DistillBlocksConfig

LEARNED, HELD_OUT = "learned", "held_out"
MASKS = "masks.safetensors"

Example = tuple[Float[Tensor, "batch time hidden"], Float[Tensor, "batch time hidden"], Bool[Tensor, "batch time"]]
"""What enters the parent's block, what leaves it, and where real tokens are."""


@dataclass(frozen=True)
class BlockJob:
    """Train one layer's block."""

    layer: int
    child: Path
    states: Path
    """The directory of masks and boundaries."""
    directory: Path
    """The experiment's own: NeMo's logs and checkpoints, and the result."""
    learned_names: tuple[str, ...]
    """Checkpoint names of the tensors that learn."""
    config: DistillBlocksConfig

    def to_json(self) -> str:
        """One line of JSON."""
        plain = asdict(self) | {"config": self.config.to_json()}
        return json.dumps(plain, default=str)

    @classmethod
    def from_json(cls, text: str) -> "BlockJob":
        """Read what :meth:`to_json` wrote."""
        plain: dict[str, Any] = json.loads(text)
        plain |= {key: Path(plain[key]) for key in ("child", "states", "directory")}
        plain["learned_names"] = tuple(plain["learned_names"])
        return cls(**plain | {"config": DistillBlocksConfig.parse(plain["config"])})

    @property
    def is_finished(self) -> bool:
        """Whether its result is on disk."""
        return (self.directory / "result.json").is_file()


@dataclass(frozen=True)
class BlockResult:
    """What training one block gave."""

    losses: tuple[float, ...]
    """Of every step."""
    held_out_before: float
    held_out_after: float
    """With the learned weights rounded as they are written."""
    tensors: Mapping[str, Tensor]
    """What was learned, in the dtypes of the checkpoint."""

    @property
    def is_better(self) -> bool:
        """Whether the block came closer to its parent's on sequences that it did not learn from."""
        return self.held_out_after < self.held_out_before

    def save(self, directory: Path) -> None:
        """Write it; ``result.json`` comes last and says that it is whole."""
        save_file(dict(self.tensors), directory / "learned.safetensors")
        figures = {key: value for key, value in vars(self).items() if key != "tensors"}
        write_text_atomically(directory / "result.json", json.dumps(figures) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "BlockResult":
        """Read what :meth:`save` wrote."""
        figures = json.loads((directory / "result.json").read_text())
        figures["losses"] = tuple(figures["losses"])
        return cls(**figures, tensors=load_file(directory / "learned.safetensors"))


class BlockExamples(Dataset[Example]):
    """One layer's examples of one part of the data, memory-mapped."""

    def __init__(self, states: Path, layer: int, part: str) -> None:
        masks = load_file(states / MASKS)
        self._masks = {name: mask for name, mask in masks.items() if name.startswith(part)}
        self._names = sorted(self._masks)
        self._inputs: Any = safe_open(boundary_file(states, layer), framework="pt")
        self._targets: Any = safe_open(boundary_file(states, layer + 1), framework="pt")

    @property
    def num_positions(self) -> int:
        """The length of the longest sequence."""
        return max(int(mask.shape[1]) for mask in self._masks.values())

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        name = self._names[index]
        return self._inputs.get_tensor(name), self._targets.get_tensor(name), self._masks[name]


def batch_name(part: str, index: int) -> str:
    """What a batch is called in masks and boundaries."""
    return f"{part}-{index:06d}"


def boundary_file(states: Path, boundary: int) -> Path:
    """Where a boundary is kept."""
    return states / f"boundary-{boundary:03d}.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors that appear only when they are whole."""
    with written_atomically(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
