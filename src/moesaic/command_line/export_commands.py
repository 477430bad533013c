"""``moesaic validate``: check the files and layout of a deployment bundle, and let its engine load it."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from moesaic.command_line.config_option import read_config
from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.deploy.export_engine.verdict import Verdict
from moesaic.deploy.validate_bundle.stage import ValidateBundleConfig


def add_export_commands(commands: Any) -> None:
    """Add ``validate`` to the command line."""
    parser = commands.add_parser(
        "validate", help="check files and layout of a bundle of export_engine, and let its engine load it"
    )
    parser.set_defaults(command=_validate)
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    parser.add_argument("--child", type=Path, help="the checkpoint that was exported, to compare logits with")
    parser.add_argument(
        "--engine",
        choices=["vllm"],
        help="load it in this engine, whose environment is made once, and hold its replies against transformers",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="with --engine: problems to ask, JSON lines")
    parser.add_argument(
        "--config", metavar="JSON", default="{}", help="with --engine: what is asked and how much may differ"
    )


def _validate(options: argparse.Namespace) -> None:
    from moesaic.deploy.export_engine.validation import validate

    if options.engine and options.prompts is None:
        raise ConfigError("--engine needs --prompts, a set of problems such as the prompts of a recipe")
    config = ValidateBundleConfig.parse(read_config(options.config))
    for check in validate(options.bundle, options.child):
        print(f"ok  {check}", flush=True)
    verdict = Verdict(passed=True)
    if options.engine:
        from moesaic.deploy.validate_bundle.run import validate_by_engine

        with tempfile.TemporaryDirectory(prefix="moesaic-validate-") as scratch:
            verdict = validate_by_engine(config, options.bundle, options.prompts, Path(scratch))
        for effort, agreement in verdict.replies.items():
            print(f"{effort}: {json.dumps(agreement)}")
    print(f"{options.bundle} is {verdict.words}")
    if not verdict.passed:
        raise ArtifactError("\n".join(verdict.problems))
