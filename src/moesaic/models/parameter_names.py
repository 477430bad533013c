"""Names of parameters as a checkpoint has them, whatever a training framework has wrapped their modules in."""

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""Of activation checkpointing, torch.compile and FSDP."""


def unwrapped_name(name: str) -> str:
    """The name of a parameter without the wrappers around its module."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
