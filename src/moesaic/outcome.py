"""What a finished run found, as tables for a terminal; the numbers are those of the report's ``summary.json``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

_TOO_FINE = ("tasks", "truncated")
"""Left to the report page."""
_WORDS = {
    "efforts": "effort",
    "memory_mib": "memory [MiB],",
    "kv_mib_per_request": "KV cache [MiB] per request,",
    "throughput": "tokens/s,",
}
"""What the summary's keys are called in the table, where they are not words themselves."""


def comparison_table(summary: Mapping[str, Any]) -> Table:
    """Parent against child: a row for whatever the summary gives of both."""
    table = Table("", "parent", "child", "child / parent", title="Parent and child")
    for name, pair in _pairs(summary, ""):
        ratio = pair.get("ratio", pair.get("retention"))
        table.add_row(name, _shown(pair["parent"]), _shown(pair["child"]), "" if ratio is None else f"{ratio:.3f}")
    return table


def rivals_table(rivals: Sequence[Mapping[str, Any]]) -> Table:
    """The search against its baselines at equal budget: predicted damage and measured accuracy."""
    efforts = list(rivals[0]["accuracy"])
    table = Table("", "damage", "experts", *(f"accuracy {effort}" for effort in efforts))
    table.title = "The search and its baselines, under the same limits and before any training"
    for rival in rivals:
        accuracies = (rival["accuracy"][effort] for effort in efforts)
        shown = ["not measured" if found is None else _shown(found["mean"]) for found in accuracies]
        table.add_row(rival["name"], *(_shown(rival[name]) for name in ("damage", "experts")), *shown)
    return table


def _pairs(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, value in values.items():
        if not isinstance(value, Mapping) or name in _TOO_FINE:
            continue
        words = f"{prefix}{_WORDS.get(name, name.replace('_', ' '))}"
        if all(isinstance(value.get(model), int | float) for model in ("parent", "child")):
            yield words, value
        else:
            yield from _pairs(value, f"{words} ")


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.4g}"
