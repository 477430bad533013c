"""The options ``--outside`` and ``--effort``: results of harnesses outside this project, of parent and child."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console

from moesaic.core.config import Effort
from moesaic.core.errors import ConfigError
from moesaic.core.files import write_text_atomically
from moesaic.core.json_text import read_text

if TYPE_CHECKING:
    from moesaic.measure.outside.comparison import Comparison

_ROLES = ("parent", "child")


def add_outside_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a command on a finished run."""
    parser.add_argument(
        "--outside",
        nargs=2,
        metavar=("parent=DIR", "child=DIR"),
        help="results of lm-evaluation-harness or NeMo Evaluator on both models, served",
    )
    parser.add_argument("--effort", choices=get_args(Effort), help="reasoning effort of the results of --outside")


def read_outside(options: argparse.Namespace) -> "Comparison | None":
    """Read and compare the results that were given; None if none were."""
    if options.outside is None:
        if options.effort is not None:
            raise ConfigError("--effort is that of --outside, which is not given")
        return None
    from moesaic.measure.outside.comparison import compare

    given = {role: Path(path) for role, _, path in (pair.partition("=") for pair in options.outside)}
    if {*given} != {*_ROLES}:
        raise ConfigError(f"--outside {' '.join(options.outside)!r} is not parent=DIR child=DIR")
    return compare(given["parent"], given["child"], options.effort)


def show_outside(run: Path, comparison: "Comparison") -> None:
    """Print a table, and write it beside the run's report: a copy of the page that has it, and the numbers."""
    from moesaic.measure.report.page import add_outside
    from moesaic.platform.runs.outcome import outside_table

    summary = comparison.summary()
    Console().print(outside_table(summary))
    for name, reason in comparison.left_out.items():
        print(f"left out: {name} ({reason})")
    page = add_outside(read_text(run / "report" / "report.html"), summary)
    directory = run / ("outside" if comparison.effort is None else f"outside_{comparison.effort}")
    directory.mkdir(exist_ok=True)
    write_text_atomically(directory / "report.html", page)
    write_text_atomically(directory / "outside.json", json.dumps(summary, indent=1) + "\n")
    print(f"Report: {directory / 'report.html'}")
