"""What learns, inside NeMo-RL's policy workers; no NeMo-RL in it.

NeMo-RL's DTensor worker can freeze towers of a multi-modal model, not tensors by name. It builds its optimiser over
what requires a gradient as soon as the model is loaded, so the freezing has to sit between the two: the model class it
loads by is wrapped, and what comes out of ``from_pretrained`` is frozen but for the names we want.
"""

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from moesaic.core.errors import StageError
from moesaic.models.parameter_names import unwrapped_name


class PartlyTrainable:
    """Wraps a model class: loads by it and lets only the named tensors learn."""

    def __init__(self, model_class: Any, names: Collection[str]) -> None:
        self._model_class, self._names = model_class, frozenset(names)

    def from_pretrained(self, *arguments: Any, **options: Any) -> nn.Module:
        """Load by the model class, then freeze."""
        model: nn.Module = self._model_class.from_pretrained(*arguments, **options)
        freeze_all_but(model, self._names)
        return model


def freeze_all_but(model: nn.Module, names: Collection[str]) -> None:
    """Let the named tensors learn and no other.

    Args:
        model: AutoModel's or a plain one; the former knows its tensors' names in a checkpoint.
        names: in the checkpoint.

    Raises:
        StageError: if the model lacks one of them: half a policy would be trained.
    """
    wanted = set(names)
    checkpoint_name = _checkpoint_naming(model)
    for name, parameter in model.named_parameters():
        known_as = checkpoint_name(name)
        parameter.requires_grad_(known_as in wanted)
        wanted.discard(known_as)
    if wanted:
        raise StageError(
            f"the policy's model has no tensor {min(wanted)} ({len(wanted)} such names); nothing was trained"
        )


def _checkpoint_naming(model: nn.Module) -> Callable[[str], str]:
    adapter = getattr(model, "state_dict_adapter", None)

    def name_of(name: str) -> str:
        name = unwrapped_name(name)
        return name if adapter is None else str(adapter.checkpoint_name(name))

    return name_of
