"""vLLM's share of a bundle: the arguments of ``vllm serve``; its plugin lies beside them.

The engine reads the scales of an FP8 cache from the checkpoint, through the plugin, and only when it is started with
``--kv-cache-dtype fp8``. It shares experts out over all GPUs of a tensor-parallel group or over none.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any, NoReturn

from moesaic.core.errors import ArtifactError
from moesaic.deploy.export_engine.bundle_manifest import BundleManifest
from moesaic.models.families.family import Family

VERSIONS = ">=0.29,<0.34"
PLUGIN = "vllm_plugin"
"""The folder of the plugin; with it on ``PYTHONPATH`` the engine finds it, and nothing is installed."""
SHARED = "engine_checks.py"
"""The module that the plugins of all families have."""
ARGUMENTS = "serve.args"


def files(manifest: BundleManifest) -> dict[str, str]:
    """The engine's files by name: the arguments, one a line."""
    return {ARGUMENTS: "".join(f"{line}\n" for line in _lines(manifest))}


def package(family: Family) -> str:
    """The name of the plugin's package for a family's children."""
    return f"{family.child_type}_vllm"


def installed_plugin(family: Family) -> dict[str, str]:
    """The files, by name, that an installer would write: by them the engine's processes find the plugin."""
    name = package(family)
    folder = f"{PLUGIN}/{name}-1.0.dist-info"
    return {
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n",
        f"{folder}/entry_points.txt": f"[vllm.general_plugins]\n{family.child_type} = {name}:register\n",
    }


def _lines(manifest: BundleManifest) -> list[str]:
    config = manifest.config
    lines = [
        f"--tensor-parallel-size {config.tensor_parallel_size}",
        f"--max-model-len {manifest.max_seq_len}",
        f"--max-num-seqs {config.max_batch_size}",
        f"--max-num-batched-tokens {config.max_num_tokens}",
        f"--gpu-memory-utilization {config.memory_fraction}",
        "--enable-prefix-caching" if config.prefix_reuse else "--no-enable-prefix-caching",
    ]
    if config.expert_parallel_size > 1:
        lines.append("--enable-expert-parallel")
    if config.kv_cache != "bf16":
        lines.append("--kv-cache-dtype fp8")
    return lines


class _Arguments(argparse.ArgumentParser):
    """The arguments that a bundle may give, of all those that the engine has."""

    def __init__(self, path: Path) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._path = path
        for name in ("tensor-parallel-size", "max-model-len", "max-num-seqs", "max-num-batched-tokens"):
            self.add_argument(f"--{name}", type=int, required=True)
        self.add_argument("--gpu-memory-utilization", type=float, required=True)
        self.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
        self.add_argument("--enable-expert-parallel", action="store_true")
        self.add_argument("--kv-cache-dtype", choices=["fp8"])

    def error(self, message: str) -> NoReturn:
        raise ArtifactError(f"{self._path}: {message}")


def check(bundle: Path, manifest: BundleManifest) -> None:
    """Check the engine's files against the manifest.

    Raises:
        ArtifactError: for an argument that does not belong there, or a value that does not fit the bundle.
    """
    path = bundle / ARGUMENTS
    given, expected = _parse(path, path.read_text()), _parse(path, "\n".join(_lines(manifest)))
    for name, value in expected.items():
        if given[name] != value:
            raise ArtifactError(f"{path}: {name} is {given[name]}; the bundle was exported for {value}")


def _parse(path: Path, text: str) -> dict[str, Any]:
    return vars(_Arguments(path).parse_args(shlex.split(text, comments=True)))
