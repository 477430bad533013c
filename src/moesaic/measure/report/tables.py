"""Rows of the tables on the page and in the terminal, and the format of numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.measure.paired import Difference
from moesaic.measure.report.recovery import AVERAGED, FP8, FP8_UNIT

_STAGE_NAMES = {FP8_UNIT: "FP8, unit scales", FP8: "FP8, calibrated"}


def number(value: float) -> str:
    """A number with at least three significant digits and separated thousands."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return "undefined" if value is None else f"{100 * value:.{digits}f} %"


def tenths(value: float | None) -> str:
    """A share in percent, where the table's head names the unit."""
    return "undefined" if value is None else f"{100 * value:.1f}"


def points(difference: Mapping[str, Any]) -> str:
    """A difference in accuracy in points, with its interval."""
    return str(Difference(**difference))


def ratio(value: float) -> str:
    """A ratio, such as ``1.25x``."""
    return f"{value:.2f}x"


def tokens(value: float) -> str:
    """A mean number of tokens."""
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def stage_name(stage: str) -> str:
    """The label of a stage of recovery."""
    return _STAGE_NAMES.get(stage, stage)


@dataclass(frozen=True)
class ComparedRow:
    """A row that compares a quantity of parent and child, as text."""

    quantity: str
    of: str
    """The effort, workload or context; empty if the quantity depends on none."""
    parent: str
    child: str
    ratio: str
    """Child over parent; of accuracies the difference in points, with its interval."""


def comparison_rows(summary: Mapping[str, Any]) -> list[ComparedRow]:
    """Parent against child. Accuracy and what follows from it are the pruned child's, so recovery supersedes them."""
    sizes = ("parameters", "experts", "experts_per_token", "expert_width")
    rows = [_compared(size, "", summary[size]) for size in sizes]
    for quantity in ("memory_mib", "kv_mib_per_request"):
        rows += [_compared(quantity, workload, figures) for workload, figures in summary[quantity].items()]
    pruned = {} if summary.get("recovery") else summary["efforts"]
    rows += [_compared_accuracy(effort, entry["accuracy"]) for effort, entry in pruned.items()]
    rows += [_compared("tokens_per_request", effort, entry["tokens_per_request"]) for effort, entry in pruned.items()]
    rows += [_compared("throughput", context, entry["best"]) for context, entry in summary["throughput"].items()]
    if serving := summary.get("serving"):
        rows += [_compared("served", workload, figures) for workload, figures in serving["tokens_per_s"].items()]
    for effort in pruned:
        gain = summary["request_efficiency"]["child_over_parent"][effort]
        rows.append(_compared("request_rate", effort, {"parent": 1.0, "child": gain, "ratio": gain}, ratio))
    return rows


def _compared(
    quantity: str,
    of: str,
    figures: Mapping[str, float],
    shown: Callable[[float], str] = number,
    shown_ratio: Callable[[float], str] = ratio,
) -> ComparedRow:
    return ComparedRow(quantity, of, shown(figures["parent"]), shown(figures["child"]), shown_ratio(figures["ratio"]))


def _compared_accuracy(effort: str, accuracy: Mapping[str, Any]) -> ComparedRow:
    parent, child = percent(accuracy["parent"]), percent(accuracy["child"])
    return ComparedRow("accuracy", effort, parent, child, points(accuracy["difference"]))


@dataclass(frozen=True)
class OutsideRow:
    """A suite of a harness outside this project, as text."""

    name: str
    harness: str
    parent: str
    child: str
    difference: str
    problems: str
    """Their number if the models were paired; else that they were not."""


def outside_rows(outside: Mapping[str, Any]) -> list[OutsideRow]:
    """Parent against child, by task."""
    rows = []
    for name, suite in outside["suites"].items():
        found = Difference(**suite["difference"])
        problems = number(found.problems) if found.paired else "unpaired"
        figures = tenths(suite["parent"]), tenths(suite["child"]), str(found), problems
        rows.append(OutsideRow(name, suite["harness"], *figures))
    return rows


@dataclass(frozen=True)
class StageRow:
    """The figures of a model after a stage of recovery, as text by effort; empty where they do not apply."""

    name: str
    is_child: bool
    """Whether this is the recovered child."""
    accuracy: list[str]
    kept: list[str]
    difference: list[str]
    """From the parent's accuracy, in points."""
    tokens: list[str]
    request_rate: list[str]
    """Over the parent's at equal effort and KV cache."""


def stage_rows(recovery: Mapping[str, Any]) -> list[StageRow]:
    """The parent, the child after every stage, and the averaged baseline if there is one."""
    efficiency, baseline = recovery["request_efficiency"], recovery["baseline"]
    rates = {**efficiency["models"], FP8: efficiency["equal_effort_fp8"]}
    rows = [_stage_row("parent", recovery["parent"]["efforts"], dict.fromkeys(recovery["retention"], 1.0))]
    for stage, entry in recovery["stages"].items():
        rows.append(_stage_row(stage_name(stage), entry["efforts"], rates.get(stage, {}), stage == AVERAGED))
    if baseline:
        name, averaged = baseline["name"], baseline["stages"][AVERAGED]
        rows.append(_stage_row(f"{name}, averaged", averaged["efforts"], rates.get(name, {})))
    return rows


def _stage_row(
    name: str, efforts: Mapping[str, Mapping[str, Any]], rates: Mapping[str, float], is_child: bool = False
) -> StageRow:
    return StageRow(
        name=name,
        is_child=is_child,
        accuracy=[tenths(figures["accuracy"]) for figures in efforts.values()],
        kept=[tenths(figures["retention"]) if "retention" in figures else "" for figures in efforts.values()],
        difference=[points(figures["difference"]) if "difference" in figures else "" for figures in efforts.values()],
        tokens=[tokens(figures["tokens_per_request"]) for figures in efforts.values()],
        request_rate=[ratio(rates[effort]) if effort in rates else "" for effort in efforts],
    )
