"""Memory of calibration on the device that computes, simulated; see ``models.simulated_memory``.

A layer runs on the largest batch there can be, without ModelOpt's quantisers, whose copies of K and V are small.
"""

from functools import cache

from moesaic.models.architecture import Architecture
from moesaic.models.families.family import ModelShape
from moesaic.models.layers import run_block
from moesaic.models.peak import Peak
from moesaic.models.simulated_memory import SimulatedLayers, peak_of, rows_of_batch, without_values
from moesaic.recover.calibrate_kv.stage import CalibrateKvConfig


@cache
def calibration_peak(
    config: CalibrateKvConfig, shape: ModelShape, model: Architecture, packed: bool, on_gpu: bool
) -> Peak:
    """The most that ``calibrate_kv`` holds on its device; its states are on the host."""
    rows = rows_of_batch(config.batch_tokens, config.max_tokens, config.max_sequences)
    largest = Architecture.of([max(model.blocks, key=lambda block: (block.window is None, block.num_experts))])

    def run() -> None:
        loader = SimulatedLayers(shape, largest, packed, config.precision, on_gpu)
        rotary = loader.rotary(config.max_tokens)
        block = loader.load(0)
        run_block(block, loader.states(rows, config.max_tokens), rotary, largest.blocks[0].window)

    with without_values(on_gpu):
        return peak_of(run)
