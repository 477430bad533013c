"""Block-wise distillation on NVIDIA NeMo (``nemo_toolkit``): every block one experiment, several blocks side by side.

Importing NeMo takes many seconds, so it happens in worker processes only, once in each, and nothing here imports it.
"""

from moesaic.recover.distill_blocks.nemo.jobs import BlockJob, BlockResult
from moesaic.recover.distill_blocks.nemo.workers import check_installed, train_blocks

__all__ = ["BlockJob", "BlockResult", "check_installed", "train_blocks"]
