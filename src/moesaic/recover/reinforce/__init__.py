"""Reinforcement learning of one policy by GRPO, on TRL or on NeMo-RL."""
