"""Workloads: the kinds of requests under which blocks are costed and the search sets limits."""

from moesaic.core.config import Config, Positive


class Workload(Config):
    """A kind of request the child must serve, and how many of them at once."""

    name: str
    """What limits and plots call it, such as ``long`` or ``short``."""
    input_tokens: Positive
    """Prompt tokens of one request."""
    output_tokens: Positive
    """Generated tokens of one request."""
    concurrency: Positive
    """Requests in flight."""
