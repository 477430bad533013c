"""The stage ``benchmark_serving``: throughput and latency of parent and child through a server."""
