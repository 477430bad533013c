"""What ``calibrate_kv`` needs."""

from collections.abc import Sequence

from moesaic.costs.facts import (
    Facts,
    Needs,
    PipelineTask,
    ShardSizes,
    attend_bytes,
    hidden_bytes,
    host_layers,
    largest_batch,
    mix_bytes,
    model_of,
    new_bytes,
    retrained,
    unpacked_layer,
)
from moesaic.costs.times import forward_ms
from moesaic.models.architecture import Architecture
from moesaic.models.peak import BATCH, LAYERS, Peak
from moesaic.recover.calibrate_kv.stage import CalibrateKvConfig


def needs(task: PipelineTask[CalibrateKvConfig], facts: Facts, inputs: Sequence[ShardSizes]) -> Needs:
    """One forward of the calibration set, layer by layer; adds two scalars a layer.

    Device: a layer unpacked, and a batch in attention or in the mixture. All states are on the host.
    """
    config, model = task.config, model_of(facts, inputs[0])
    tokens = config.max_sequences * config.max_tokens
    batch = largest_batch(config.batch_tokens, config.max_tokens, config.max_sequences)
    working = max(attend_bytes(facts, batch, config.precision), mix_bytes(facts, batch, config.precision))
    scales = 2 * 4 * model.num_layers
    made = retrained(inputs[0], task.name, ["attention"]) if config.fold else dict(inputs[0])
    made |= {f"scales by {task.name}": scales}
    return Needs(
        read_bytes=sum(inputs[0].values()),
        written_bytes=new_bytes(made, inputs[0]),
        device={LAYERS: unpacked_layer(facts, config.precision), BATCH: working},
        host_bytes=host_layers(facts) + hidden_bytes(facts, tokens, config.precision),
        gpu_ms=forward_ms(facts, model.blocks, tokens, config.max_tokens),
        counts={"tokens": tokens},
        made=made,
        smaller=("batch_tokens", "max_tokens"),
    )


def simulate(task: PipelineTask[CalibrateKvConfig], facts: Facts, model: Architecture) -> Peak:
    """The most that it holds on a device, found by running it on tensors without values."""
    from moesaic.recover.calibrate_kv.simulated_memory import calibration_peak  # it loads torch

    return calibration_peak(task.config, facts.shape, model, facts.packed, facts.target is not None)
