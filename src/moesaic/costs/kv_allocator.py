"""How serving engines allocate KV memory: the layers and the tokens that each attention window is paid for.

``moesaic`` and ``tensorrt_llm`` allocate per layer. vLLM allocates for groups of equally many layers, so a window whose
layers do not fill its last group pays for the padding. Its group size follows from the whole model's layout:

``vllm``         the smallest layer count, or the largest if it is less than 1.5 times that.
``vllm_puzzle``  NVIDIA's branch, which serves the released child: a size that pads less. Its exact rule is not known;
                 this one pads the fewest layers, which gives the published size.

vLLM allocates whole blocks of 16 tokens. A window's tokens are freed once a step is over, and two steps of ``t`` tokens
each are under way at once; one block more is for a window that starts within one. Of ``s`` tokens it holds::

    full(s)      = ceil(s / 16) * 16
    window(s, t) = (ceil(min(w - 1 + 2 t, s) / 16) + 1) * 16

``t`` is 1 for a request that decodes, and up to the tokens of a whole step for one whose prompt is read. When vLLM
starts, it counts every request with a whole step (its "maximum concurrency"). When it runs, it does so for the one that
it is to take in next; the others have what they hold. Requests in flight pay for a step's tokens once together.

Source: vLLM 0.32, ``v1/kv_cache_interface.py`` (``SlidingWindowSpec.max_admission_blocks_per_request``),
``v1/core/kv_cache_utils.py`` (``_get_kv_cache_groups_uniform_page_size``, ``get_max_concurrency_for_kv_cache_config``),
``v1/core/kv_cache_manager.py`` (``allocate_slots``) and ``config/vllm.py`` (``max_in_flight_tokens``).
"""

from collections import Counter
from collections.abc import Mapping
from typing import Literal

TargetEngine = Literal["moesaic", "tensorrt_llm", "vllm", "vllm_puzzle"]
PER_LAYER: frozenset[TargetEngine] = frozenset(("moesaic", "tensorrt_llm"))
"""Engines whose layers pay each for themselves."""
Layout = Counter[int | None]
"""Layers by attention window; None is full attention."""
_MOST_PADDING = 1.5
"""vLLM pads up to the largest layer count if that is less than this many times the smallest."""
_BLOCK_TOKENS = 16
_STEPS_UNDER_WAY = 2
"""By asynchronous scheduling, vLLM's default; tensor and expert parallelism add none."""


def paid_layers(engine: TargetEngine, layout: Layout) -> Mapping[int | None, int]:
    """Layers that an engine pays for by window, unfilled groups included."""
    if engine in PER_LAYER:
        return layout
    size = _smallest_count(layout) if engine == "vllm" else _least_padding(layout)
    return {window: _padded(count, size) for window, count in layout.items()}


def held_tokens(engine: TargetEngine, window: int | None, num_tokens: int, step_tokens: int = 1) -> int:
    """Tokens that one layer has memory for, of a request of ``num_tokens`` which takes ``step_tokens`` a step."""
    if engine in PER_LAYER:
        return num_tokens if window is None else min(num_tokens, window)
    if window is None:
        return _padded(num_tokens, _BLOCK_TOKENS)
    under_way = window - 1 + _STEPS_UNDER_WAY * step_tokens
    return _padded(min(under_way, num_tokens), _BLOCK_TOKENS) + _BLOCK_TOKENS


def _padded(count: int, size: int) -> int:
    return -(-count // size) * size


def _smallest_count(layout: Layout) -> int:
    smallest, largest = min(layout.values()), max(layout.values())
    return largest if largest < _MOST_PADDING * smallest else smallest


def _least_padding(layout: Layout) -> int:
    counts = layout.values()
    sizes = range(min(counts), max(counts) + 1)
    return min(sizes, key=lambda size: (sum(_padded(count, size) for count in counts), -size))
