"""Configuration of a gpt-oss child whose layers differ in experts, their width, experts per token and attention window.

This file travels inside every child checkpoint, so it depends on transformers alone.
"""

import copy
from typing import Any

from transformers import GptOssConfig

BLOCK_KEYS = ("num_local_experts", "num_experts_per_tok", "intermediate_size", "sliding_window")
"""What may differ between layers."""
_MAY_BE_LEFT_OUT = ("num_experts_per_tok", "intermediate_size")


class BlockConfig(dict[str, int | None]):
    """One layer's entry of ``block_configs``; its values are attributes too, as some engines read them."""

    def __getattr__(self, name: str) -> int | None:
        """The value of this key."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class GptOssPuzzleConfig(GptOssConfig):
    """gpt-oss plus ``block_configs``: per layer the ``BLOCK_KEYS``; ``sliding_window`` None means full.

    An entry without ``num_experts_per_tok`` or ``intermediate_size`` means the model's own. ``per_layer_config``,
    transformers' own spelling, may say the same, or say it alone.
    """

    model_type = "gpt_oss_puzzle"
    block_configs: list[BlockConfig] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Without blocks every layer is its parent's; with them, they must agree with ``layer_types``."""
        per_layer = kwargs.pop("per_layer_config", None)
        super().__post_init__(**kwargs)
        blocks: list[Any] | None = self.block_configs
        if blocks is not None:
            own = {key: getattr(self, key) for key in _MAY_BE_LEFT_OUT}
            blocks = [own | dict(block) for block in blocks]
        if per_layer is not None:
            entries = {int(layer): entry for layer, entry in per_layer.items()}
            spelt = [self._parent_block(kind) | entries.get(layer, {}) for layer, kind in enumerate(self.layer_types)]
            if blocks is not None and blocks != spelt:
                raise ValueError(
                    "block_configs and per_layer_config say different things; engines read the one or the other"
                )
            blocks = spelt
        if blocks is None:
            blocks = [self._parent_block(kind) for kind in self.layer_types]
        self.block_configs = [BlockConfig(block) for block in blocks]
        if len(self.block_configs) != self.num_hidden_layers:
            raise ValueError(f"block_configs has {len(self.block_configs)} entries for {self.num_hidden_layers} layers")
        for layer, (kind, window) in enumerate(zip(self.layer_types, self.windows, strict=True)):
            if (kind == "full_attention") != (window is None):
                raise ValueError(f"layer {layer}: layer_types says {kind}, block_configs says window {window}")

    def _parent_block(self, kind: str) -> dict[str, Any]:
        window = self.sliding_window if kind == "sliding_attention" else None
        return {key: getattr(self, key) for key in BLOCK_KEYS} | {"sliding_window": window}

    @property
    def windows(self) -> list[int | None]:
        """The attention window of each layer, None where it is full."""
        return [block["sliding_window"] for block in self.block_configs or []]

    def get_gpt_oss_config_for_layer(self, layer: int) -> GptOssConfig:
        """This config as transformers' own layer ``layer`` reads it: one value of each key."""
        block = (self.block_configs or [])[layer]
        view = copy.copy(self)
        for key in BLOCK_KEYS:
            setattr(view, key, block[key])
        return view
