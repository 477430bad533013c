"""Loaded by vLLM's scheduler and workers: a KV cache that is full already, so that decoding is timed at any context.

The engine's own ``DecodeBenchConnector`` fills a new request's cache instead of computing it. Here a request says
whether it wants that, by ``filled`` in its ``kv_transfer_params``: prompts whose reading is timed do not.
"""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector


class FilledCache(DecodeBenchConnector):
    """Fills the cache of the requests that ask for it, all but their last token."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens of a request need not be computed, and that they are there at once."""
        if not (request.kv_transfer_params or {}).get("filled"):
            return 0, False
        matched: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return matched
