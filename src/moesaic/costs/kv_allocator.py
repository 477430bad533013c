"""How serving engines allocate KV memory: the layers that each attention window is paid for.

``moesaic`` and ``tensorrt_llm`` allocate per layer. vLLM allocates for groups of equally many layers, so a window whose
layers do not fill its last group pays for the padding. Its group size follows from the whole model's layout:

``vllm``         release 0.33: the smallest layer count, or the largest if it is less than 1.25 times that.
``vllm_puzzle``  NVIDIA's branch, which serves the released child: a size that pads less. Its exact rule is not known;
                 this one pads the fewest layers, which gives the published size.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Literal

TargetEngine = Literal["moesaic", "tensorrt_llm", "vllm", "vllm_puzzle"]
PER_LAYER: frozenset[TargetEngine] = frozenset(("moesaic", "tensorrt_llm"))
"""Engines whose layers pay each for themselves."""
Layout = Counter[int | None]
"""Layers by attention window; None is full attention."""
_MOST_PADDING = 1.25
"""vLLM pads up to the largest layer count if that is less than this many times the smallest."""


def paid_layers(engine: TargetEngine, layout: Layout) -> Mapping[int | None, int]:
    """Layers that an engine pays for by window, unfilled groups included."""
    if engine in PER_LAYER:
        return layout
    size = _smallest_count(layout) if engine == "vllm" else _least_padding(layout)
    return {window: _padded(count, size) for window, count in layout.items()}


def _padded(num_layers: int, group_size: int) -> int:
    return -(-num_layers // group_size) * group_size


def _smallest_count(layout: Layout) -> int:
    smallest, largest = min(layout.values()), max(layout.values())
    return largest if largest < _MOST_PADDING * smallest else smallest


def _least_padding(layout: Layout) -> int:
    counts = layout.values()
    sizes = range(min(counts), max(counts) + 1)
    return min(sizes, key=lambda size: (sum(_padded(count, size) for count in counts), -size))
