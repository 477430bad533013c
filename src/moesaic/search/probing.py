"""What scoring and refinement read: the tokens that damage is measured on, and a parent, layer by layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.core.errors import ArtifactError
from moesaic.core.process_group import BatchShare
from moesaic.data.calibration import load_batches
from moesaic.models import loading
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.streaming import LayerReader, StateOffloader, state_memory_bytes
from moesaic.search.damage_config import DamageConfig
from moesaic.search.score_blocks.scoring import Offloaded, Parent, Probe


@dataclass(frozen=True)
class Probes:
    """The measured tokens of both calibration sets."""

    short: Sequence[Probe]
    long: Sequence[Probe]

    @property
    def all(self) -> list[Probe]:
        """The probes of both sets, the short ones first."""
        return [*self.short, *self.long]

    @classmethod
    def read(
        cls,
        config: DamageConfig,
        checkpoint: Checkpoint,
        calibration_short: Path,
        calibration_long: Path,
        windows: Sequence[int],
        at_once: int,
    ) -> "Probes":
        """Read both sets.

        Args:
            config: how much of them.
            checkpoint: the parent.
            calibration_short: short conversations.
            calibration_long: long ones; only tokens behind the smallest window count.
            windows: those on offer in the parent's full layers.
            at_once: changed models that together fill ``batch_tokens``.

        Raises:
            ArtifactError: if nothing is left to measure, or a window is longer than all sequences.
        """
        batch_tokens = config.batch_tokens // at_once
        short = _read(config, checkpoint, calibration_short, config.max_tokens, 0, batch_tokens)
        long_tokens, first = config.max_long_tokens or config.max_tokens, min(windows, default=0)
        long = _read(config, checkpoint, calibration_long, long_tokens, first, batch_tokens)
        furthest = max(int(probe.measured.any(0).nonzero().max()) for probe in long)
        if max(windows, default=0) > furthest:
            raise ArtifactError(
                f"{calibration_long}: its last response token is at position {furthest}, where a window of "
                f"{max(windows)} cannot do harm and would score 0; use longer sequences (max_tokens cuts them) or "
                "smaller windows"
            )
        return cls(short, long)


def _read(
    config: DamageConfig, checkpoint: Checkpoint, data: Path, max_tokens: int, first: int, batch_tokens: int
) -> list[Probe]:
    """The batches of a set that have something to measure."""
    batches = load_batches(
        data,
        checkpoint.directory,
        max_sequences=config.max_sequences,
        max_tokens=min(max_tokens, checkpoint.shape.max_positions),
        batch_tokens=batch_tokens,
    )
    probes = [probe for probe in (Probe.of(batch, first, config.balance) for batch in batches) if probe.measured.any()]
    if not probes:
        longest = max(batch.num_positions for batch in batches)
        raise ArtifactError(
            f"{data} has no response token at or beyond position {first} (its longest sequence has {longest} tokens); "
            "use longer conversations that end in an assistant's turn, or smaller windows"
        )
    return probes


@contextmanager
def open_parent(
    config: DamageConfig, checkpoint: Checkpoint, probes: Probes, scratch: Path, batch_share: BatchShare
) -> Iterator[Parent]:
    """A parent whose layers are read when they are needed, and whose states spill to ``scratch``."""
    device, dtype = loading.choose_device(), _dtype(config)
    reader = LayerReader(checkpoint, dtype, device)
    offloader = StateOffloader(state_memory_bytes(batch_share.count), scratch / f"states-{batch_share.rank}", device)
    longest = max(probe.batch.num_positions for probe in probes.all)
    try:
        yield Parent(
            checkpoint.architecture,
            reader.load,
            loading.load_head(checkpoint, dtype, device),
            loading.rotary(checkpoint, longest, dtype, device),
            offloader.offload,
        )
    finally:
        reader.close()


def embed(config: DamageConfig, checkpoint: Checkpoint, parent: Parent, probes: Sequence[Probe]) -> list[Offloaded]:
    """The embedded tokens of every probe, [batch time hidden]."""
    token_ids = [probe.batch.token_ids for probe in probes]
    return [parent.offload(states) for states in loading.embed_each(checkpoint, token_ids, _dtype(config))]


def _dtype(config: DamageConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.precision)
    return dtype
