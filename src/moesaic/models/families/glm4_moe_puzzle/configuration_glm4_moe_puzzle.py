"""Configuration of a GLM-4.5 child whose layers differ in experts, their width, experts per token and window.

This file travels inside every child checkpoint, so it depends on transformers alone.
"""

import copy
from typing import Any

from transformers import Glm4MoeConfig

BLOCK_KEYS = {
    "num_local_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "intermediate_size": "moe_intermediate_size",
    "sliding_window": "sliding_window",
}
"""What may differ between layers: the key in ``block_configs``, and what transformers' own layer calls it."""
_NO_EXPERTS = dict.fromkeys(("num_local_experts", "num_experts_per_tok", "intermediate_size"), 0)


class Glm4MoePuzzleConfig(Glm4MoeConfig):
    """GLM-4.5 plus ``block_configs``: per layer the ``BLOCK_KEYS``; ``sliding_window`` None means full.

    The first ``first_k_dense_replace`` layers have 0 experts. Shared experts are ``shared_expert_intermediate_size``
    wide in all others.
    """

    model_type = "glm4_moe_puzzle"
    block_configs: list[dict[str, int | None]] | None = None
    shared_expert_intermediate_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Without blocks every layer is its parent's."""
        super().__post_init__(**kwargs)
        if self.shared_expert_intermediate_size is None:
            self.shared_expert_intermediate_size = self.n_shared_experts * self.moe_intermediate_size
        if self.block_configs is None:
            block = {key: getattr(self, own, None) for key, own in BLOCK_KEYS.items()}
            self.block_configs = [
                block | (_NO_EXPERTS if layer < self.first_k_dense_replace else {})
                for layer in range(self.num_hidden_layers)
            ]
        if len(self.block_configs) != self.num_hidden_layers:
            raise ValueError(f"block_configs has {len(self.block_configs)} entries for {self.num_hidden_layers} layers")

    @property
    def windows(self) -> list[int | None]:
        """The attention window of each layer, None where it is full."""
        return [block["sliding_window"] for block in self.block_configs or []]

    def config_for_layer(self, layer: int) -> Glm4MoeConfig:
        """This config as transformers' own layer ``layer`` reads it: one value of each key."""
        block = (self.block_configs or [])[layer]
        view = copy.copy(self)
        for key, own in BLOCK_KEYS.items():
            setattr(view, own, block[key])
        return view
