"""The model that a command is given: a folder, or a name on a Hugging Face hub with a revision."""

import argparse
from typing import Any

from moesaic.core.progress import say

MODEL = "checkpoint directory, or OWNER/NAME on a Hugging Face hub"
"""What the help says of a model."""


def add_revision(parser: Any) -> None:
    """Add ``--revision`` to a command that takes a model."""
    parser.add_argument("--revision", help="branch, tag or commit of a model named on a hub (main)")


def find_named(options: argparse.Namespace, name: str = "model") -> str | None:
    """Put the folder of the model that the option ``name`` names in its place; returns its address on the hub, if any.

    Raises:
        MoesaicError: if it cannot be found or fetched.
    """
    from moesaic.models.named_model import find_model

    found = find_model(getattr(options, name), options.revision)
    setattr(options, name, found.folder)
    if found.source:
        say(f"{found.source}: {found.folder}")
    return found.source
