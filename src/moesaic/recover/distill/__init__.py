"""Global knowledge distillation of a child from its parent."""
