"""What the stages that learn layer by layer have in common: the layers that differ, and sequences that are held out."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from moesaic.core.errors import ArtifactError
from moesaic.data.batches import Batch, make_batches
from moesaic.data.calibration import read_conversations, tokenize
from moesaic.data.chat import load_tokenizer
from moesaic.models.checkpoint import Checkpoint

HELD_OUT_EVERY = 10
"""Of this many sequences one is never learned from."""

Item = TypeVar("Item")


def changed_layers(child: Checkpoint, parent: Checkpoint) -> list[int]:
    """The layers whose block is not the parent's.

    Raises:
        ArtifactError: if their sizes differ.
        ConfigError: if a block cannot be cut out of the parent's.
    """
    if child.shape != parent.shape:
        raise ArtifactError(f"{child.directory} is no child of {parent.directory}: their sizes differ")
    child.architecture.check_child_of(parent.architecture)
    pairs = zip(child.architecture.blocks, parent.architecture.blocks, strict=True)
    return [layer for layer, (own, whole) in enumerate(pairs) if own != whole]


def split_held_out(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """What is learned from, and what is held out: every tenth item, from the first on."""
    learned = [item for index, item in enumerate(items) if index % HELD_OUT_EVERY]
    return learned, list(items[::HELD_OUT_EVERY])


def read_batches(
    calibration: Path, model: Checkpoint, max_sequences: int, max_tokens: int, batch_tokens: int
) -> tuple[list[Batch], list[Batch]]:
    """The first sequences of a calibration set, in batches to learn from and batches that are held out.

    Raises:
        ArtifactError: if the set is missing, has a bad row, or less than two; or the model has no tokenizer.
    """
    tokenizer = load_tokenizer(model.directory)
    rows = read_conversations(calibration)[:max_sequences]
    if len(rows) < 2:
        raise ArtifactError(
            f"{calibration}: only 1 sequence to use; give 2 or more, of which one in {HELD_OUT_EVERY} is held out"
        )
    longest = min(max_tokens, model.shape.max_positions)
    learned, held_out = split_held_out([tokenize(tokenizer, row, longest) for row in rows])
    return make_batches(learned, batch_tokens), make_batches(held_out, batch_tokens)
