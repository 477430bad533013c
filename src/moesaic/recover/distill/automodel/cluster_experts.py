"""The experts of the cluster's model, which never learn: kept in bfloat16, and run over few tokens at a time.

In bfloat16 they are exactly what a checkpoint holds, packed or not. AutoModel's experts gather the tokens of all ranks
that share them and keep what every expert computed for the gradient: for 8 ranks with rows of 131,072 tokens more than
a GPU has. Here a rank's tokens go through them a chunk at a time, and a chunk is computed again when its gradient is.
Ranks must have equally many tokens, so that they agree on the number of chunks.
"""

import torch
from jaxtyping import Bool, Float, Int
from nemo_automodel.components.moe.experts import GroupedExperts
from torch import Tensor, nn

from moesaic.recover.distill.loss import recomputed


class StreamedExperts(GroupedExperts):
    """AutoModel's experts, a chunk of tokens at a time."""

    chunk_tokens = 8192

    def forward(
        self,
        x: Float[Tensor, "token hidden"],
        token_mask: Bool[Tensor, " token"],
        weights: Float[Tensor, "token slot"],
        indices: Int[Tensor, "token slot"],
    ) -> Float[Tensor, "token hidden"]:
        """Weighted sum of each token's experts.

        Args:
            x: hidden states.
            token_mask: which tokens are no padding.
            weights: the router's weight of each chosen expert.
            indices: the chosen experts.
        """
        parts = (part.split(self.chunk_tokens) for part in (x, token_mask, weights, indices))
        run = super().forward
        return torch.cat([recomputed(run, *chunk) for chunk in zip(*parts, strict=True)])


def limit_experts(model: nn.Module, chunk_tokens: int) -> None:
    """Let so many tokens of this rank go through a layer's experts at once; other models' experts stay as they are."""
    for module in model.modules():
        if isinstance(module, StreamedExperts):
            module.chunk_tokens = chunk_tokens
