"""OpenAI-compatible servers, one way to start, await, count and stop them all.

``moesaic serve`` is the default and runs anywhere. ``vllm serve``, which has run on CPUs, and ``trtllm-serve``, which
has never run, take an export bundle. A server that runs already is named by an environment variable.
"""

from moesaic.deploy.engines.adapters import URL_VARIABLE, ServerSpec, check_available, running_url
from moesaic.deploy.engines.server_process import Server, started_server

__all__ = ["URL_VARIABLE", "Server", "ServerSpec", "check_available", "running_url", "started_server"]
