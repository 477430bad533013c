"""Block-wise distillation on NVIDIA NeMo (``nemo_toolkit``): every block one experiment, several blocks side by side.

Importing NeMo takes many seconds, so it happens in worker processes only, once in each, and nothing here imports it.
"""

from moesaic.engines.nemo_blocks.jobs import BlockJob, BlockResult
from moesaic.engines.nemo_blocks.workers import check_installed, train_blocks

__all__ = ["BlockJob", "BlockResult", "check_installed", "train_blocks"]
