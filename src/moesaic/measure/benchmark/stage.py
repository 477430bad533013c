"""Times prefill and decode of parent and child at several batch sizes and context lengths, interleaved on this device.
Nothing else should run on the device meanwhile.
"""

from moesaic.core.config import Config, Positive, Precision
from moesaic.core.stage import Stage, artifact, model
from moesaic.costs.workload import Workload


class BenchmarkConfig(Config):
    """Decode and prefill speed of parent and child, interleaved on this device."""

    batch_sizes: tuple[Positive, ...] = (1, 8, 32)
    """Concurrent requests."""
    input_tokens: tuple[Positive, ...] = (128, 2048)
    """Context lengths."""
    output_tokens: Positive = 32
    """Generated tokens of each request."""
    workloads: tuple[Workload, ...] = ()
    """Further points: the workloads the search was limited by, so that its predictions can be held against timings."""
    repeats: Positive = 5
    """Timings of each point; the median counts, the spread is kept."""
    precision: Precision = "float32"
    """What the models compute in."""
    by_block: bool = False
    """Time each distinct block by itself and add up, as ``measure_costs`` does: for models that do not fit the device
    unpacked. Medians without a spread."""


STAGE = Stage(
    name="benchmark",
    config=BenchmarkConfig,
    runtime="search",
    inputs=(
        model("parent", "the one to beat"),
        model("child", "the one that should"),
    ),
    outputs=(artifact("measurements", "`measurements.json`: medians and spread per point"),),
    alone=True,
)
