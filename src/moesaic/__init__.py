"""Moesaic: deployment-optimised mixture-of-experts reasoning models by block-wise architecture search."""

import logging

from moesaic.compress import compress
from moesaic.core.version import __version__

__all__ = ["__version__", "compress"]

for _chatter in ("torchao", "torch.utils._pytree"):
    # When transformers imports torchao on a machine without GPU, they warn of nothing a user could do about.
    logging.getLogger(_chatter).setLevel(logging.ERROR)
