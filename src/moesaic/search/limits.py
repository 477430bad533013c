"""The limits of a search in linear form (paper B, the constraints of its MIP).

Every limit reads ``fixed + sum_i usage[i, choice_i] <= bound``. A throughput limit is linear in runtime: with ``N``
output tokens of all concurrent requests, ``N / runtime >= t`` is ``runtime <= N / t``, runtime being the prompts'
prefill and all decode steps. Only the number of distinct windows (layouts) is no sum; it is kept beside the others.
Nor is KV memory, where the target engine allocates it for groups of layers (``GroupedCache``); at a given number of
layers per window it is a constant, and ``LimitSet.at`` states everything in sums.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from moesaic.core.errors import ConfigError
from moesaic.costs.block_costs import MIB, AssemblyCost, output_tokens
from moesaic.costs.kv_allocator import PER_LAYER, Layout, TargetEngine, paid_layers
from moesaic.costs.workload import Workload
from moesaic.search.library import BlockLibrary, Choice, Table, total
from moesaic.search.search_architecture.stage import SearchArchitectureConfig

Windows = tuple[tuple[int | None, ...], ...]
"""The window of every variant of every layer."""
TOLERANCE = 1e-9
"""A limit holds if it is kept within this share of its bound; sums of floats are no more exact."""


@dataclass(frozen=True)
class GroupedCache:
    """KV memory of an engine that allocates it for groups of layers."""

    engine: TargetEngine
    windows: Windows
    per_layer: Mapping[int | None, float]
    """What one layer with this window takes for all requests."""

    def used(self, choice: Choice) -> float:
        """What an assembly takes."""
        return self.of(_layout(self.windows, choice))

    def of(self, layout: Layout) -> float:
        """What any assembly with so many layers of each window takes."""
        layers = paid_layers(self.engine, layout)
        return sum(self.per_layer[window] * count for window, count in layers.items())


@dataclass(frozen=True, eq=False)
class Limit:
    """One limit. ``bound`` and ``usage`` are in the unit that adds up; people read ``shown`` values."""

    name: str
    unit: str
    usage: Table
    fixed: float
    bound: float
    tokens: float | None = None
    """Output tokens of a throughput limit, whose usage is milliseconds; None for every other."""
    cache: GroupedCache | None = None
    """What comes on top by groups of layers."""

    def used(self, choice: Choice) -> float:
        """What an assembly uses of it."""
        cache = self.cache.used(choice) if self.cache else 0.0
        return self.fixed + total(self.usage, choice) + cache

    def excess(self, choice: Choice) -> float:
        """By which share of the bound an assembly exceeds it; zero if it holds."""
        return self.excess_of(self.used(choice))

    def excess_of(self, used: float) -> float:
        """By which share of the bound a used amount exceeds it; zero if it does not."""
        over = (used - self.bound) / max(abs(self.bound), 1e-12)
        return over if over > TOLERANCE else 0.0

    def shown(self, used: float) -> float:
        """A used amount as people read it: tokens per second for throughput, counts without a sign."""
        return 1000 * self.tokens / used if self.tokens else abs(used)

    @property
    def at_least(self) -> bool:
        """Whether people read this limit as a lower bound."""
        return self.tokens is not None or self.bound < 0

    def describe(self) -> str:
        """The limit in words, such as ``memory of long <= 20 MiB``."""
        return f"{self.name} {'>=' if self.at_least else '<='} {self.shown(self.bound):.6g} {self.unit}".rstrip()


@dataclass(frozen=True)
class LimitSet:
    """All limits of one search."""

    linear: tuple[Limit, ...]
    windows: Windows
    max_layouts: int | None = None

    @property
    def grouped(self) -> bool:
        """Whether a limit counts KV memory by groups of layers."""
        return any(limit.cache for limit in self.linear)

    def layouts(self) -> list[Layout]:
        """Every number of layers per window that an assembly may have, of at most ``max_layouts`` windows."""
        names = list({window: None for row in self.windows for window in row})
        found = {(0,) * len(names)}
        for row in self.windows:
            offered = {names.index(window) for window in row}
            found = {tuple(n + (i == at) for i, n in enumerate(counts)) for counts in found for at in offered}
        layouts = (+Counter(dict(zip(names, counts, strict=True))) for counts in sorted(found))
        return [layout for layout in layouts if len(layout) <= (self.max_layouts or len(names))]

    def at(self, layout: Layout) -> "LimitSet":
        """The same for assemblies with exactly so many layers of each window, in sums alone."""
        linear = [
            replace(limit, fixed=limit.fixed + (limit.cache.of(layout) if limit.cache else 0.0), cache=None)
            for limit in self.linear
        ]
        for window in {window for row in self.windows for window in row}:
            counted = tuple(tuple(float(other == window) for other in row) for row in self.windows)
            linear.append(Limit(f"layers with window {window}", "", counted, 0.0, layout[window]))
        return LimitSet(tuple(linear), self.windows)

    def without(self, name: str) -> "LimitSet":
        """All limits except the one of this name."""
        return replace(self, linear=tuple(limit for limit in self.linear if limit.name != name))

    def with_limit(self, limit: Limit) -> "LimitSet":
        """All limits and one more."""
        return replace(self, linear=(*self.linear, limit))

    def num_layouts(self, choice: Choice) -> int:
        """Distinct windows of an assembly, full attention counting as one."""
        return len(_layout(self.windows, choice))

    def excess(self, choice: Choice) -> float:
        """The sum over limits of the share by which each is exceeded; zero exactly if all hold."""
        return sum(limit.excess(choice) for limit in self.linear) + self._layout_excess(choice)

    def holds(self, choice: Choice) -> bool:
        """Whether an assembly keeps all limits."""
        return self.excess(choice) == 0

    def broken(self, choice: Choice) -> list[str]:
        """The limits an assembly breaks, in words."""
        names = [
            f"{limit.describe()} (it has {limit.shown(limit.used(choice)):.6g})"
            for limit in self.linear
            if limit.excess(choice)
        ]
        if self._layout_excess(choice):
            names.append(f"distinct windows <= {self.max_layouts} (it has {self.num_layouts(choice)})")
        return names

    def _layout_excess(self, choice: Choice) -> float:
        return 0.0 if self.max_layouts is None else max(0, self.num_layouts(choice) / self.max_layouts - 1)


def limits_of(library: BlockLibrary, config: SearchArchitectureConfig) -> LimitSet:
    """Translate a config into limits on this library.

    Raises:
        ConfigError: if a limit names a workload without costs.
    """
    workloads = {workload.name: workload for workload in library.costs.workloads}
    unknown = sorted(set(config.limits) - set(workloads))
    if unknown:
        raise ConfigError(
            f"limits name the workload {unknown[0]!r}, which was not costed; the cost table has {sorted(workloads)}"
        )
    parent = library.costs.evaluate(library.parent)
    linear = [*_size_limits(library, config, parent), *_window_limits(library, config)]
    for name in config.limits:
        linear += _workload_limits(library, config, parent, workloads[name])
    return LimitSet(tuple(linear), _windows(library), config.max_layouts)


def _windows(library: BlockLibrary) -> Windows:
    return tuple(tuple(block.window for block in options) for options in library.variants)


def _layout(windows: Windows, choice: Choice) -> Layout:
    return Counter(row[index] for row, index in zip(windows, choice, strict=True))


def _size_limits(library: BlockLibrary, config: SearchArchitectureConfig, parent: AssemblyCost) -> Iterator[Limit]:
    most = _tighter(config.max_parameters, config.max_parameters_ratio, parent.parameters)
    if most is not None:
        usage = library.cost_table(lambda cost: cost.parameters)
        yield Limit("parameters", "", usage, library.costs.fixed.parameters, most)
    if config.max_experts_ratio is not None:
        usage = library.table(lambda block: block.num_experts)
        yield Limit("experts", "", usage, 0, math.floor(config.max_experts_ratio * parent.num_experts + TOLERANCE))


def _window_limits(library: BlockLibrary, config: SearchArchitectureConfig) -> Iterator[Limit]:
    full = [block.window is None for block in library.parent.blocks]
    least = math.ceil(config.min_windowed_share * sum(full) - TOLERANCE)
    if least:
        usage = tuple(
            tuple(-1.0 if was_full and block.window is not None else 0.0 for block in options)
            for was_full, options in zip(full, library.variants, strict=True)
        )
        yield Limit("full layers turned into windows", "", usage, 0, -least)


def _workload_limits(
    library: BlockLibrary, config: SearchArchitectureConfig, parent: AssemblyCost, workload: Workload
) -> Iterator[Limit]:
    name, limits, fixed = workload.name, config.limits[workload.name], library.costs.fixed
    most = _tighter(limits.memory_mib, limits.memory_ratio, parent.memory_mib[name])
    if most is not None:
        yield _memory_limit(library, workload, most)
    most = _tighter(limits.latency_ms, limits.latency_ratio, parent.latency_ms[name])
    if most is not None:
        usage = library.cost_table(lambda cost: cost.workloads[name].decode_ms)
        yield Limit(f"latency of {name}", "ms", usage, fixed.workloads[name].decode_ms, most)
    required = [limits.throughput_tokens_per_s]
    if limits.throughput_ratio is not None:
        required.append(limits.throughput_ratio * parent.throughput_tokens_per_s[name])
    least = max((tokens_per_s for tokens_per_s in required if tokens_per_s is not None), default=None)
    if least is not None:
        yield throughput_limit(library, workload, least)


def _memory_limit(library: BlockLibrary, workload: Workload, most: float) -> Limit:
    name, fixed = f"memory of {workload.name}", library.costs.fixed.memory_bytes / MIB

    def kv_mib(window: int | None) -> float:
        return library.costs.cache_bytes(window, workload) / MIB

    if library.costs.engine in PER_LAYER:
        usage = library.table(lambda block: library.costs.blocks[block].memory_bytes / MIB + kv_mib(block.window))
        return Limit(name, "MiB", usage, fixed, most)
    windows = _windows(library)
    per_layer = {window: kv_mib(window) for row in windows for window in row}
    usage = library.cost_table(lambda cost: cost.memory_bytes / MIB)
    return Limit(name, "MiB", usage, fixed, most, cache=GroupedCache(library.costs.engine, windows, per_layer))


def throughput_limit(library: BlockLibrary, workload: Workload, tokens_per_s: float) -> Limit:
    """At least this many output tokens per second, as a limit on runtime in milliseconds."""
    name, steps = workload.name, workload.output_tokens
    usage = library.cost_table(lambda cost: cost.workloads[name].prefill_ms + steps * cost.workloads[name].decode_ms)
    fixed = library.costs.fixed.workloads[name]
    tokens = output_tokens(workload)
    bound = 1000 * tokens / tokens_per_s
    return Limit(f"throughput of {name}", "tokens/s", usage, fixed.prefill_ms + steps * fixed.decode_ms, bound, tokens)


def sweep_limit(library: BlockLibrary) -> Limit:
    """What the frontier sweeps: throughput of the first workload, or parameters; the bound is to be set."""
    if library.costs.workloads:
        return throughput_limit(library, library.costs.workloads[0], 1.0)
    usage = library.cost_table(lambda cost: cost.parameters)
    return Limit("parameters", "", usage, library.costs.fixed.parameters, math.inf)


def _tighter(absolute: float | None, ratio: float | None, whole: float) -> float | None:
    bounds = [bound for bound in (absolute, None if ratio is None else ratio * whole) if bound is not None]
    return min(bounds, default=None)


def check_assembly(library: BlockLibrary, config: SearchArchitectureConfig, choice: Choice) -> None:
    """Judge an assembly by the cost table and the config alone, past all linear forms.

    Raises:
        AssertionError: if it breaks a limit; the fault is then in the search.
    """
    architecture = library.architecture(choice)
    architecture.check_child_of(library.parent)
    child, parent = (library.costs.evaluate(each) for each in (architecture, library.parent))
    pairs = list(zip(library.parent.blocks, architecture.blocks, strict=True))
    num_full = sum(whole.window is None for whole, _ in pairs)
    num_turned = sum(whole.window is None and block.window is not None for whole, block in pairs)
    _at_most("parameters", child.parameters, config.max_parameters)
    _at_most("parameters", child.parameters / parent.parameters, config.max_parameters_ratio)
    _at_most("experts", child.num_experts / parent.num_experts, config.max_experts_ratio)
    _at_most("distinct windows", len(architecture.layouts), config.max_layouts)
    _at_most("layers that must be windowed", config.min_windowed_share * num_full, num_turned)
    for name, limits in config.limits.items():
        _at_most(f"memory of {name}", child.memory_mib[name], limits.memory_mib)
        _at_most(f"memory of {name}", child.memory_mib[name] / parent.memory_mib[name], limits.memory_ratio)
        _at_most(f"latency of {name}", child.latency_ms[name], limits.latency_ms)
        _at_most(f"latency of {name}", child.latency_ms[name] / parent.latency_ms[name], limits.latency_ratio)
        throughput, old = child.throughput_tokens_per_s[name], parent.throughput_tokens_per_s[name]
        _at_most(f"required throughput of {name}", limits.throughput_tokens_per_s or 0, throughput)
        _at_most(f"required throughput of {name}", limits.throughput_ratio or 0, throughput / old)


def _at_most(what: str, value: float, most: float | None) -> None:
    if most is not None and value > most + 1e-6 * abs(most) + TOLERANCE:
        raise AssertionError(f"the search returned an assembly that breaks its limit: {what} is {value}, over {most}")
