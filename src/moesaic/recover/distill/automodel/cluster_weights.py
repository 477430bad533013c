"""Weights between our checkpoints and the cluster model: names, layouts, MXFP4 and reading back.

On disk layer i holds ``E_i`` experts under Hugging Face's names, packed (``_blocks`` and ``_scales``, see
``moesaic.models.mxfp4``) or not; in AutoModel's blocks the experts are ``gate_and_up_projs`` and ``down_projs``, each
``[expert, in, out]``. AutoModel's adapter does the renaming; ours adds the sizes of any model, where its own are those
of gpt-oss-120b, and unpacks experts that ranks share unevenly.

Reading back goes the way recovery needs it: tensors outside the experts, whole and under their checkpoint names, for
``moesaic.models.checkpoint.rewrite_checkpoint``, which leaves the frozen experts' shards as they are, byte for byte.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from nemo_automodel.components.models.gpt_oss.state_dict_adapter import GPTOSSStateDictAdapter
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import empty as empty_distributed

from moesaic.core.errors import ArtifactError
from moesaic.models import mxfp4
from moesaic.models.families.gpt_oss import PACKED_PROJECTIONS
from moesaic.models.parameter_names import unwrapped_name


class PuzzleStateDictAdapter(GPTOSSStateDictAdapter):
    """AutoModel's gpt-oss adapter for any sizes, and for a different number of experts in every layer."""

    def checkpoint_name(self, fqn: str) -> str:
        """The checkpoint's name of one tensor of the model."""
        ends = ((ours, theirs) for ours, theirs in self.internal_to_hf_map.items() if fqn.endswith(ours))
        ours, theirs = next(ends, ("", ""))
        return fqn.removesuffix(ours) + theirs

    def convert_single_tensor_to_hf(self, fqn: str, tensor: Tensor, **kwargs: Any) -> list[tuple[str, Tensor]]:
        """One tensor of the model under the checkpoint's name.

        With ``quantization=True`` an expert weight becomes the empty packed pair that a loader fills in; its values
        are not packed, because recovery never changes them.
        """
        name = self.checkpoint_name(fqn)
        if kwargs.get("quantization") and name.endswith(PACKED_PROJECTIONS):
            experts, columns, rows = tensor.shape
            packed = (experts, rows, columns // mxfp4.BLOCK)
            return [
                (f"{name}_blocks", _empty_bytes(tensor, (*packed, mxfp4.BLOCK // 2))),
                (f"{name}_scales", _empty_bytes(tensor, packed)),
            ]
        converted: list[tuple[str, Tensor]] = super().convert_single_tensor_to_hf(fqn, tensor, **kwargs)
        return converted

    def _convert_moe_packed_tensors(
        self, blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16, rows_per_chunk: int = 0
    ) -> Tensor:
        """Unpacked experts [expert, in, out], each rank's own of them where they are shared out, evenly or not."""
        if not isinstance(blocks, DTensor):
            return _unpack(blocks, scales, dtype)
        assert isinstance(scales, DTensor)
        experts, rows, columns = *blocks.shape[:2], blocks.shape[2] * mxfp4.BLOCK
        local = _unpack(blocks.to_local(), scales.to_local(), dtype)
        return DTensor.from_local(
            local,
            blocks.device_mesh,
            blocks.placements,
            shape=torch.Size((experts, columns, rows)),
            stride=(columns * rows, rows, 1),
        )


def _unpack(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """One expert at a time, so that what is held beside the result is small."""
    experts, rows, num_blocks, _ = blocks.shape
    weight = torch.empty((experts, num_blocks * mxfp4.BLOCK, rows), dtype=dtype, device=blocks.device)
    for expert, packed in enumerate(zip(blocks, scales, strict=True)):
        weight[expert] = mxfp4.dequantize(*packed, dtype).T
    return weight


def _empty_bytes(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Room for packed bytes where the weight is; if it is sharded, only by expert, so that rows stay whole."""
    if not isinstance(like, DTensor):
        return torch.empty(shape, dtype=torch.uint8, device=like.device)
    placements = [place if place == Shard(0) else Replicate() for place in like.placements]
    return empty_distributed(shape, dtype=torch.uint8, device_mesh=like.device_mesh, placements=placements)


def checkpoint_tensors(model: nn.Module, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, whole and on the CPU, one at a time; on several ranks all of them must iterate together.

    Args:
        model: of the class in ``cluster_model``, sharded or not.
        names: checkpoint names of tensors outside the experts, such as ``layout.trainable_names`` gives.

    Raises:
        ArtifactError: for a name that the model does not have, before anything is gathered.
    """
    parameters = {checkpoint_name(model, name): parameter for name, parameter in model.named_parameters()}
    unknown = sorted(set(names) - set(parameters))
    if unknown:
        raise ArtifactError(f"the model has no tensor {unknown[0]} ({len(unknown)} such names)")
    for name in names:
        tensor = parameters[name].detach()
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def checkpoint_name(model: nn.Module, name: str) -> str:
    """What a checkpoint calls a parameter of the model, wrapped or not; an expert weight by its unpacked name."""
    adapter = model.state_dict_adapter
    assert isinstance(adapter, PuzzleStateDictAdapter)
    renamed: str = adapter.checkpoint_name(unwrapped_name(name))
    return renamed
