"""What the loss compares, taken out of a model while it runs: response tokens only, and no logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nemo_automodel.components.utils.model_utils import filter_forward_kwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.utils.hooks import RemovableHandle

from moesaic.recover.distill.loss import States


def compute_states(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, responses: Tensor, compared: Tensor
) -> States:
    """Run a model over packed rows and keep its hidden states where the next token is the parent's reply.

    Args:
        model: transformers' class or the cluster's, sharded or not.
        input_ids: [batch, token].
        position_ids: restart at 0 at every document.
        responses: places in the flattened batch where the loss is.
        compared: those of them, by number, where layers are compared.
    """
    with _kept_states(model, responses, responses[compared]) as kept:
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, "logits_to_keep": 1}
        model(**filter_forward_kwargs(model, inputs))
    *layers, final = kept
    return States(layers, final, _whole(model.get_parameter("lm_head.weight")))


@contextmanager
def _kept_states(model: nn.Module, responses: Tensor, compared: Tensor) -> Iterator[list[Tensor]]:
    """The output of every decoder layer at ``compared`` and, last, of the final norm at ``responses``."""
    kept: list[Tensor] = []

    def keep(places: Tensor, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        kept.append(hidden.flatten(0, 1).index_select(0, places))

    body = model.get_submodule("model")
    places = [(layer, compared) for layer in body.get_submodule("layers").children()]
    places.append((body.get_submodule("norm"), responses))
    handles: list[RemovableHandle] = [
        module.register_forward_hook(lambda _module, _inputs, output, chosen=chosen: keep(chosen, output))
        for module, chosen in places
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _whole(weight: Tensor) -> Tensor:
    """A weight with all of its rows. Of a sharded one, gradients are averaged over ranks, as FSDP's own are."""
    if not isinstance(weight, DTensor):
        return weight
    whole = weight.redistribute(placements=[Replicate()] * weight.device_mesh.ndim)
    averaged = [Partial("avg")] * weight.device_mesh.ndim
    gathered: Tensor = whole.to_local(grad_placements=averaged)
    return gathered


def gather_trained(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Tensors by checkpoint name, whole and on the CPU; all ranks must call it together."""
    if hasattr(model, "state_dict_adapter"):
        from moesaic.recover.distill.automodel.cluster_weights import checkpoint_tensors

        return dict(checkpoint_tensors(model, names))
    parameters = dict(model.named_parameters())
    return {name: _gathered(parameters[name].detach()) for name in names}


def reshard(model: nn.Module) -> None:
    """Give up what a forward pass without a backward pass left gathered, so that parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _gathered(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.to("cpu", torch.float32)
