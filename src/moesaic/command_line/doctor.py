"""``moesaic doctor``: what is installed, which engines and devices are usable, what to do about the rest."""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    what: str
    usable: bool
    detail: str
    remedy: str = ""


_PACKAGES = {
    "torch": "model",
    "transformers": "model",
    "safetensors": "model",
    "pyarrow": "data",
    "highspy": "search",
    "nemo-automodel": "train",
    "nemo-toolkit": "nemo",
    "trl": "rl",
    "nvidia-modelopt": "kv",
    "matplotlib": "report",
    "boto3": "s3",
    "kfp": "pipelines",
    "mlflow": "pipelines",
}
"""Distributions by the extra that installs them."""

_ENGINES = {
    "vllm": "serving: install vllm on a GPU machine",
    "tensorrt_llm": "serving: use NVIDIA's TensorRT-LLM image",
    "nemo_rl": "reinforcement learning on a cluster: use NVIDIA's NeMo-RL image",
}


def diagnose() -> list[Finding]:
    """Look at this machine; nothing is changed."""
    return [
        *(_package(name, extra) for name, extra in _PACKAGES.items()),
        *_devices(),
        _engine_transformers(),
        *(Finding(name, find_spec(name) is not None, "engine", remedy) for name, remedy in _ENGINES.items()),
        _disk(),
    ]


def print_findings(findings: list[Finding], console: Console) -> None:
    """A table with a remedy for whatever is not usable."""
    table = Table("", "what", "found", "what to do", box=None)
    for finding in findings:
        mark = "[green]yes[/]" if finding.usable else "[yellow]no[/]"
        table.add_row(mark, finding.what, finding.detail, "" if finding.usable else escape(finding.remedy))
    console.print(table)


def _package(name: str, extra: str) -> Finding:
    for distribution in (name, f"{name}-skinny"):  # Images have mlflow-skinny, which is mlflow without its server.
        with suppress(PackageNotFoundError):
            return Finding(name, True, version(distribution))
    return Finding(name, False, "not installed", f"pip install 'moesaic[{extra}]'")


def _devices() -> list[Finding]:
    threads = os.environ.get("OMP_NUM_THREADS")
    cpu = Finding("CPU", True, f"{os.cpu_count()} cores, OMP_NUM_THREADS={threads or 'not set (tasks get 1)'}")
    if find_spec("torch") is None:
        return [cpu]
    import torch

    if not torch.cuda.is_available():
        return [cpu, Finding("GPU", False, "none that torch can use", "not needed for the tiny_cpu recipe")]
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return [cpu, Finding("GPU", True, f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")]


def _engine_transformers() -> Finding:
    installed = find_spec("transformers") is not None
    return Finding("embedded engine", installed, "transformers on this device", "pip install 'moesaic[model]'")


def _disk() -> Finding:
    free_gib = shutil.disk_usage(".").free / 2**30
    return Finding("disk", free_gib > 2, f"{free_gib:.1f} GiB free here", "a demo run needs about 2 GiB; free some")
