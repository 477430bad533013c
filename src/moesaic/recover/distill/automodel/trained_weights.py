"""AutoModel's checkpoints, with of the model only what learns: frozen experts are in the child's own files already."""

from pathlib import Path
from typing import Any

from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


class TrainedWeightsCheckpointer(Checkpointer):
    """Saves and restores the parameters with gradients; everything beside the model is AutoModel's."""

    def save_model(self, model: nn.Module, weights_path: str, **_: Any) -> None:
        """Write the trained parameters below a checkpoint's directory, each rank its shards."""
        save(_trained(model), checkpoint_id=Path(weights_path, "model"))

    def load_model(self, model: nn.Module | list[nn.Module], model_path: str, **_: Any) -> None:
        """Read the trained parameters back, in place."""
        load(_trained(model), checkpoint_id=model_path)


def _trained(model: nn.Module | list[nn.Module]) -> dict[str, Tensor]:
    part = model[0] if isinstance(model, list) else model
    return {name: value.detach() for name, value in part.named_parameters() if value.requires_grad}
