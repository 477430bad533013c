"""The parent's replies to prompts, which distillation learns from."""
