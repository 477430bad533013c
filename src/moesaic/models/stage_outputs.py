"""Readers of stage outputs. Their errors name the file, and the stage whose output should be given or made again."""

from pathlib import Path
from typing import Any

from moesaic.core import json_text
from moesaic.core.errors import ArtifactError
from moesaic.models.architecture import Architecture, ExpertOrder


def read_text(path: Path) -> str:
    """The text of a stage's output file; an ArtifactError if it cannot be read."""
    return json_text.read_text(path, f"{path} does not exist; give its stage's output")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a stage's output file; an ArtifactError if it is missing or broken."""
    return json_text.read_json_object(path, f"{path} does not exist; give its stage's output")


def read_orders(path: Path, parent: Architecture, by: ExpertOrder = "order") -> list[list[int]]:
    """Every layer's experts, most important first, out of a ``ranking.json``.

    Args:
        path: the file.
        parent: whose experts they must be.
        by: which of its orders.

    Raises:
        ArtifactError: if it is no ranking, or not one of all the parent's experts.
    """
    content = json_text.read_json_object(
        path, f"{path} is not a ranking: it does not exist; give the output of rank_experts"
    )
    try:
        orders = [list(layer[by]) for layer in content["layers"]]
        whole = [sorted(order) == list(range(len(order))) for order in orders]
    except (KeyError, TypeError) as broken:
        raise ArtifactError(f"{path} is not a ranking ({broken!r}); give the output of rank_experts") from broken
    if not all(whole) or [len(order) for order in orders] != [block.num_experts for block in parent.blocks]:
        raise ArtifactError(f"{path} is not of the parent given; run rank_experts on this parent")
    return orders
