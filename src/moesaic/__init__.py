"""Moesaic: deployment-optimised mixture-of-experts reasoning models by block-wise architecture search."""

import logging
from typing import TYPE_CHECKING, Any

from moesaic.core.version import __version__

if TYPE_CHECKING:
    from moesaic.method import compress

__all__ = ["__version__", "compress"]

for _chatter in ("torchao", "torch.utils._pytree"):
    # When transformers imports torchao on a machine without GPU, they warn of nothing a user could do about.
    logging.getLogger(_chatter).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """``moesaic.compress``, imported when it is asked for: set-up imports this package before anything is installed."""
    if name == "compress":
        from moesaic.method import compress

        return compress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
