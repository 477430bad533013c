"""What a finished run found, as tables for a terminal; rows and numbers are those of the report's page."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from moesaic.measure.report.tables import comparison_rows, number, outside_rows, stage_rows, tenths

_QUANTITIES = {
    "parameters": "parameters",
    "experts": "experts",
    "experts_per_token": "experts per token, all layers",
    "expert_width": "width of an expert, all layers",
    "memory_mib": "memory [MiB], {}",
    "kv_mib_per_request": "KV cache [MiB] per request, {}",
    "accuracy": "accuracy, {} effort",
    "tokens_per_request": "tokens per request, {} effort",
    "throughput": "tokens/s, {} tokens, best",
    "served": "tokens/s through the server, {}, best",
    "request_rate": "requests/s over the parent, {} effort",
}
_OF_THE_SEARCHED_MODEL = ("experts", "experts_per_token", "expert_width", "memory_mib", "kv_mib_per_request")
"""Known of the model that the last search began from, which after several rounds is not the parent."""


def outcome_tables(summary: Mapping[str, Any]) -> list[Table]:
    """All there is to show: sizes and speed, what recovery gave if there was one, and the search's baselines."""
    recovery = summary.get("recovery")
    if recovery is None:
        return [comparison_table(summary), rivals_table(summary["rivals"])]
    hidden = () if recovery["searched_parent"] else _OF_THE_SEARCHED_MODEL
    sizes = {**summary, "parameters": recovery["parameters"]}
    return [comparison_table(sizes, hidden), recovery_table(recovery), rivals_table(summary["rivals"])]


def comparison_table(summary: Mapping[str, Any], hidden: Sequence[str] = ()) -> Table:
    """Parent against child."""
    table = Table("", "parent", "child", "child / parent", title="Parent and child")
    for row in comparison_rows(summary):
        if row.quantity not in hidden:
            table.add_row(_QUANTITIES[row.quantity].format(row.of), row.parent, row.child, row.ratio)
    return table


def rivals_table(rivals: Sequence[Mapping[str, Any]]) -> Table:
    """The search against its baselines at equal budget: predicted damage, sizes as sums, measured accuracy."""
    efforts = ", ".join(rivals[0]["accuracy"])
    table = Table(title=f"Search and baselines before any training, at {efforts} effort; sizes are sums over layers")
    table.add_column(no_wrap=True)
    for column in ("damage", "experts", "top-k", "width", "accuracy [%]"):
        table.add_column(column, justify="right", no_wrap=True)
    for rival in rivals:
        means = [accuracy and accuracy["mean"] for accuracy in rival["accuracy"].values()]
        shown = "not measured" if None in means else " ".join(tenths(mean).rjust(5) for mean in means)
        damage = "n/a" if rival["damage"] is None else number(rival["damage"])
        sizes = (number(rival[size]) for size in ("experts", "experts_per_token", "expert_width"))
        table.add_row(rival["name"], damage, *sizes, shown)
    return table


def outside_table(outside: Mapping[str, Any]) -> Table:
    """What harnesses outside this project measured of parent and child."""
    table = Table(title="Outside harnesses" + (f", {outside['effort']} effort" if outside["effort"] else ""))
    table.add_column("task", overflow="fold")
    for column in ("parent [%]", "child [%]", "difference [points]", "problems"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in outside_rows(outside):
        table.add_row(row.name, row.parent, row.child, row.difference, row.problems)
    return table


def recovery_table(recovery: Mapping[str, Any]) -> Table:
    """Parent, child after every stage, and the baseline: accuracy, tokens, and request rate over the parent's."""
    table = Table(title=f"Recovery, at {', '.join(recovery['retention'])} effort")
    table.add_column(no_wrap=True)
    for column in ("accuracy [%]", "tokens/request", "requests/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in stage_rows(recovery):
        accuracies = (accuracy.rjust(5) for accuracy in row.accuracy)
        rates = (rate for rate in row.request_rate if rate)
        table.add_row(row.name, *(" ".join(cells) for cells in (accuracies, row.tokens, rates)))
    return table
