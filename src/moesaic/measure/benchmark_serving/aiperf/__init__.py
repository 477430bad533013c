"""AIPerf, NVIDIA's load client for inference servers, in a virtual environment of its own with its own pins."""

from moesaic.measure.benchmark_serving.aiperf.client import Client, Load, check_certificates, find_client
from moesaic.measure.benchmark_serving.aiperf.export import read_export

__all__ = ["Client", "Load", "check_certificates", "find_client", "read_export"]
