"""The command ``moesaic`` and its subcommands."""
