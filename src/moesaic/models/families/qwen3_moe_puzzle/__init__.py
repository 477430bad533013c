"""The config and model class of a Qwen3-MoE child; both modules travel inside its checkpoint."""
