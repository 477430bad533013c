"""What measuring damage needs: the part of their plans that scoring and refinement share."""

from dataclasses import dataclass
from typing import Any

from moesaic.costs.facts import (
    Facts,
    compare_bytes,
    head_bytes,
    hidden_bytes,
    host_layers,
    largest_batch,
    squares_bytes,
    streamed_layers,
)
from moesaic.models.peak import BATCH, HEAD, LAYERS
from moesaic.search.damage_config import DamageConfig


@dataclass(frozen=True)
class MeasuredTokens:
    """The tokens of both calibration sets, at the most."""

    lengths: tuple[int, int]
    """Of a sequence of the short and of the long set."""
    count: int
    """Of both sets together."""
    batch: int
    """Of the largest batch."""

    @classmethod
    def of(cls, config: DamageConfig, at_once: int) -> "MeasuredTokens":
        """Those of a config, with so many changed models that together fill ``batch_tokens``."""
        lengths = (config.max_tokens, config.max_long_tokens or config.max_tokens)
        batch = max(largest_batch(config.batch_tokens // at_once, length, config.max_sequences) for length in lengths)
        return cls(lengths, config.max_sequences * sum(lengths), batch)


def damage_memory(
    config: DamageConfig, facts: Facts, tokens: MeasuredTokens, at_once: int, running: float, compared: int
) -> dict[str, Any]:
    """The memory of a stage's ``Needs``, by field.

    Args:
        config: of the stage.
        facts: the model and where it runs.
        tokens: see there.
        at_once: changed models that are kept together.
        running: bytes of what goes through a layer.
        compared: changed models whose outputs are compared with the parent's at once.
    """
    precision = config.precision
    running = max(running, squares_bytes(facts, tokens.batch, precision))
    layers, comparing = (
        streamed_layers(facts, precision),
        compare_bytes(facts, tokens.batch, at_once, compared, precision),
    )
    working = {LAYERS: layers, BATCH: running} if layers + running > comparing else {BATCH: comparing}
    return {
        "device": {HEAD: head_bytes(facts, precision), **working},
        "host_bytes": host_layers(facts),
        "state_bytes": (1 + at_once) * hidden_bytes(facts, tokens.count, precision),
    }
