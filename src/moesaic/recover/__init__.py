"""Stages that recover a pruned child: distillation, reinforcement learning, averaging, KV calibration."""
