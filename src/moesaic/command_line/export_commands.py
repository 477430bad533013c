"""``moesaic validate``: check the files and layout of a deployment bundle. No engine loads it."""

import argparse
from pathlib import Path
from typing import Any

from moesaic.deploy.export_engine.verdict import BundleChecks


def add_export_commands(commands: Any) -> None:
    """Add ``validate`` to the command line."""
    parser = commands.add_parser(
        "validate", help="check files and layout of a bundle of export_engine; no engine loads it"
    )
    parser.set_defaults(command=_validate)
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    parser.add_argument("--child", type=Path, help="the checkpoint that was exported, to compare logits with")


def _validate(options: argparse.Namespace) -> None:
    from moesaic.deploy.export_engine.validation import validate

    for check in validate(options.bundle, options.child):
        print(f"ok  {check}", flush=True)
    print(f"{options.bundle} is {BundleChecks(passed=True).words}")
