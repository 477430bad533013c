"""How far a ranking pass has come, kept in scratch, so that a killed pass goes on and ends with the same bits.

What is kept are the layers ranked so far and the hidden states behind the last of them, of every process its own. That
takes as much disk as all hidden states, twice for a moment: it is done every five minutes, and where there is room.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.core.files import write_text_atomically
from moesaic.core.process_group import BatchShare
from moesaic.models.streaming import OffloadedTensor
from moesaic.search.rank_experts.ranking import LayerRanking

_EVERY_S = 300.0
_COMMITTED = "ranked.json"
_STATE = "state"


class RankingProgress:
    """What this process, one of ``batch_share.count``, and all of them together have done."""

    def __init__(self, scratch: Path, batch_share: BatchShare) -> None:
        self._scratch, self._batch_share = scratch, batch_share
        self._kept_s = time.monotonic()

    def layers(self) -> list[LayerRanking]:
        """The layers that a killed pass of as many processes has ranked; none if the number of processes differs."""
        committed = self._scratch / _COMMITTED
        content: dict[str, Any] = json.loads(committed.read_text()) if committed.is_file() else {}
        if content.get("processes") != self._batch_share.count:
            return []
        return [LayerRanking.from_json(layer) for layer in content["layers"]]

    def states(self, num_layers: int) -> Iterator[Tensor]:
        """The hidden states behind so many layers, in the order of this process's batches."""
        for path in sorted(self._place(num_layers).iterdir()):
            yield load_file(path)[_STATE]

    def keep(self, layers: Sequence[LayerRanking], states: Sequence[OffloadedTensor]) -> None:
        """Keep what has been done, if the first process finds it time and room for it: all do so, or none."""
        is_time = time.monotonic() - self._kept_s >= _EVERY_S
        if not self._batch_share.gather([is_time and self._has_room(states)])[0]:
            return
        place = self._place(len(layers))
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for index, state in enumerate(states):
            save_file({_STATE: state.read().contiguous()}, place / f"{index:06d}.safetensors")
        self._batch_share.gather([True])  # Everyone's states are there.
        if self._batch_share.rank == 0:
            self._commit(layers)
        self._batch_share.gather([True])  # Nobody needs the older ones.
        for older in self._scratch.glob(f"ranked-{self._batch_share.rank}-*"):
            if older != place:
                shutil.rmtree(older)
        self._kept_s = time.monotonic()

    def _has_room(self, states: Sequence[OffloadedTensor]) -> bool:
        """Half of the free disk takes them; the other processes' are about as many."""
        needed = self._batch_share.count * sum(state.num_bytes for state in states)
        return needed <= shutil.disk_usage(self._scratch).free // 2

    def _commit(self, layers: Sequence[LayerRanking]) -> None:
        content = {"processes": self._batch_share.count, "layers": [layer.as_json() for layer in layers]}
        write_text_atomically(self._scratch / _COMMITTED, json.dumps(content) + "\n")

    def _place(self, num_layers: int) -> Path:
        return self._scratch / f"ranked-{self._batch_share.rank}-{num_layers:03d}"
