"""What one server takes on at most; everything beyond is refused, never queued without bound."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerLimits:
    """Limits of one server, each at least 1."""

    max_context: int
    """Tokens of a prompt and its reply together."""
    max_batch: int = 64
    """Replies generated at once."""
    max_waiting: int = 1024
    """Replies that wait for their place in the batch; a request that would exceed it gets 429."""
    max_cache_tokens: int = 262_144
    """Tokens the KV cache has room for: replies in the batch times the longest of them, at its full length. A single
    request is always let in."""
    max_choices: int = 16
    """Replies one request may ask for: ``n`` for each of its prompts."""
    max_body_bytes: int = 4 * 2**20
    """Bytes of a request's body."""
