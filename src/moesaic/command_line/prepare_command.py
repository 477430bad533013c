"""``moesaic prepare``: the data sets of a run, from public sets or a user's own files."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moesaic.command_line.config_option import read_config
from moesaic.command_line.model_option import MODEL, add_revision, find_named
from moesaic.core.errors import ConfigError


def add_prepare_command(commands: Any) -> None:
    """Add ``prepare`` to the command line."""
    parser = commands.add_parser("prepare", help="make the data sets of a run from public sets or your own files")
    parser.set_defaults(command=_prepare)
    parser.add_argument("config", help="what to prepare: JSON, or a file that holds it (docs/data.md)")
    parser.add_argument("--model", required=True, help=f"whose tokenizer and chat template count: {MODEL}")
    add_revision(parser)
    parser.add_argument(
        "--files",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a file of JSON lines or parquet, or a folder of them, that the config calls NAME",
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to make; run again to go on after a kill")


def _prepare(options: argparse.Namespace) -> None:
    from moesaic.data.prepare.config import PrepareConfig
    from moesaic.data.prepare.run import SUMMARY, prepare

    config = PrepareConfig.parse(read_config(options.config))
    files: dict[str, Path] = {}
    for name, path in map(_named, options.files):
        if name in files:
            raise ConfigError(f"--files {name} is given twice: {files[name]} and {path}")
        files[name] = path
    find_named(options)
    counts = prepare(config, options.model, files, options.output)
    table = Table("set", box=None)
    for name in ("rows", "tokens", "longest", "dropped"):
        table.add_column(name, justify="right")
    for name, counted in counts.items():
        sizes = counted.rows, sum(counted.tokens), max(counted.tokens), sum(counted.dropped.values())
        table.add_row(name, *(f"{size:,}" for size in sizes))
    Console().print(table)
    for name, counted in counts.items():
        for reason, number in counted.dropped.most_common():
            print(f"{name}: {number:,} dropped: {reason}")
    print(f"{options.output}; sources, licences and counts are in {SUMMARY}")


def _named(pair: str) -> tuple[str, Path]:
    name, separator, path = pair.partition("=")
    if not separator or not name or not path:
        raise ConfigError(f"--files {pair!r} is not NAME=PATH")
    return name, Path(path)
