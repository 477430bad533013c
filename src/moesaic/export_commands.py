"""``moesaic validate``: check a deployment bundle as far as that goes without its engine."""

import argparse
from pathlib import Path
from typing import Any


def add_export_commands(commands: Any) -> None:
    """Add ``validate`` to the command line's."""
    parser = commands.add_parser("validate", help="check a bundle of export_engine; runs the model module in it")
    parser.set_defaults(command=_validate)
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    parser.add_argument("--child", type=Path, help="the checkpoint that was exported, to compare logits with")


def _validate(options: argparse.Namespace) -> None:
    from moesaic.export.validation import validate

    for check in validate(options.bundle, options.child):
        print(f"ok  {check}", flush=True)
    print(f"{options.bundle} is valid")
