"""What a finished run found, as tables for a terminal; the numbers are those of the report's ``summary.json``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

_TOO_FINE = ("tasks", "truncated")
"""Left to the report page."""
_OF_THE_PRUNED_CHILD = ("efforts", "request_efficiency", "recovery")
"""Superseded by what recovery says."""
_OF_THE_SEARCHED_MODEL = ("experts", "memory_mib", "kv_mib_per_request")
"""Known of the model that the last search began from, which after several rounds is not the parent."""
_STAGES = {"fp8_unit": "FP8, unit scales", "fp8": "FP8, calibrated"}
_WORDS = {
    "efforts": "effort",
    "memory_mib": "memory [MiB],",
    "kv_mib_per_request": "KV cache [MiB] per request,",
    "throughput": "tokens/s,",
}
"""What the summary's keys are called in the table, where they are not words themselves."""


def outcome_tables(summary: Mapping[str, Any]) -> list[Table]:
    """All there is to show: sizes and speed, what recovery gave if there was one, and the search's baselines."""
    recovery = summary.get("recovery")
    if recovery is None:
        return [comparison_table(summary), rivals_table(summary["rivals"])]
    superseded = _OF_THE_PRUNED_CHILD if recovery["searched_parent"] else _OF_THE_PRUNED_CHILD + _OF_THE_SEARCHED_MODEL
    sizes = {name: value for name, value in summary.items() if name not in superseded}
    sizes["parameters"] = recovery["parameters"]
    return [comparison_table(sizes), recovery_table(recovery), rivals_table(summary["rivals"])]


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


def recovery_table(recovery: Mapping[str, Any]) -> Table:
    """Parent, child after every stage, and the baseline: accuracy, tokens, and request rate over the parent's."""
    efforts = list(recovery["retention"])
    table = Table(title=f"Recovery, at {', '.join(efforts)} effort")
    table.add_column(no_wrap=True)
    for column in ("accuracy [%]", "tokens/request", "x requests/s"):
        table.add_column(column, justify="right", no_wrap=True)
    efficiency, baseline = recovery["request_efficiency"], recovery["baseline"]
    rates = {**efficiency["models"], "fp8": efficiency["equal_effort_fp8"]}
    _add_recovered(table, "parent", recovery["parent"], dict.fromkeys(efforts, 1.0))
    for stage, found in recovery["stages"].items():
        _add_recovered(table, _STAGES.get(stage, stage), found, rates.get(stage, {}))
    if baseline:
        name = baseline["name"]
        _add_recovered(table, f"{name}, averaged", baseline["stages"]["averaged"], rates.get(name, {}))
    return table


def _add_recovered(table: Table, name: str, found: Mapping[str, Any], rates: Mapping[str, float]) -> None:
    efforts: Mapping[str, Mapping[str, float]] = found["efforts"]
    accuracies = (f"{100 * figures['accuracy']:5.1f}" for figures in efforts.values())
    tokens = (f"{figures['tokens_per_request']:,.1f}" for figures in efforts.values())
    relative = (f"{rates[effort]:.2f}" for effort in efforts if effort in rates)
    table.add_row(name, *("  ".join(figures) for figures in (accuracies, tokens, relative)))


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
