"""A small reasoning model with room above and below."""
