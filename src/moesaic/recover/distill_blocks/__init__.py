"""Local distillation: every changed block learns its parent block's output."""
