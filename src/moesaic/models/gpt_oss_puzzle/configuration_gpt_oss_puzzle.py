"""Configuration of a gpt-oss child whose layers differ in expert count and attention window.

This file travels inside every child checkpoint, so it depends on transformers alone.
"""

import copy
from typing import Any

from transformers import GptOssConfig


class GptOssPuzzleConfig(GptOssConfig):
    """gpt-oss plus ``block_configs``: per layer ``num_local_experts`` and ``sliding_window`` (None means full)."""

    model_type = "gpt_oss_puzzle"
    block_configs: list[dict[str, int | None]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Without ``block_configs`` every layer is its parent's; with them, they must agree with ``layer_types``."""
        super().__post_init__(**kwargs)
        if self.block_configs is None:
            self.block_configs = [self._parent_block(kind) for kind in self.layer_types]
        if len(self.block_configs) != self.num_hidden_layers:
            raise ValueError(f"block_configs has {len(self.block_configs)} entries for {self.num_hidden_layers} layers")
        for layer, (kind, window) in enumerate(zip(self.layer_types, self.windows, strict=True)):
            if (kind == "full_attention") != (window is None):
                raise ValueError(f"layer {layer}: layer_types says {kind}, block_configs says window {window}")

    def _parent_block(self, kind: str) -> dict[str, int | None]:
        window = self.sliding_window if kind == "sliding_attention" else None
        return {"num_local_experts": self.num_local_experts, "sliding_window": window}

    @property
    def windows(self) -> list[int | None]:
        """The attention window of each layer, None where it is full."""
        return [block["sliding_window"] for block in self.block_configs or []]

    def get_gpt_oss_config_for_layer(self, layer: int) -> GptOssConfig:
        """This config as transformers' own layer ``layer`` reads it: one expert count, one window."""
        block = (self.block_configs or [])[layer]
        view = copy.copy(self)
        view.num_local_experts = block["num_local_experts"]
        view.sliding_window = block["sliding_window"]
        return view
