"""Builds a bundle's model out of its engine module, against a stand-in of the engine, in a process of its own.

The module is imported the way TensorRT-LLM does it, as a package of ``--custom_module_dirs``. The process, a fork of
this one, sees the bundle's config through transformers, and its tensors as shapes.
"""

import importlib
import json
import os
import sys
import tempfile
import traceback
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from torch import Tensor

from moesaic.core.errors import ArtifactError
from moesaic.deploy.export_engine import tensorrt_llm
from moesaic.deploy.export_engine.bundle_manifest import BundleManifest
from moesaic.models import layout
from moesaic.models.checkpoint import Checkpoint
from tests.export_standins import tensorrt_llm as engine


def built(bundle: Path) -> list[dict[str, Any]]:
    """What each layer would be in the engine: experts, experts loaded, window and RoPE.

    Raises:
        ArtifactError: if the module cannot be imported, the model not built or not loaded.
    """
    with tempfile.TemporaryFile("w+") as answer, tempfile.TemporaryFile("w+") as said:
        if (process := os.fork()) == 0:
            _answer(bundle, answer, said)
        _, status = os.waitpid(process, 0)
        answer.seek(0), said.seek(0)
        if status:
            last = (said.read().strip() or "nothing").splitlines()[-1]
            raise ArtifactError(f"{bundle}: its engine module does not build the model: {last}")
        layers: list[dict[str, Any]] = json.load(answer)
    return layers


def check_built(bundle: Path) -> None:
    """Check that every layer would be built and loaded with its own experts, window and RoPE.

    Raises:
        ArtifactError: at the first layer that would not.
    """
    checkpoint = Checkpoint.open(bundle)
    layers = built(bundle)
    if len(layers) != checkpoint.num_layers:
        raise ArtifactError(f"{bundle}: the engine module builds {len(layers)} layers of {checkpoint.num_layers}")
    rope = checkpoint.config["rope_parameters"]
    turns = [rope[key] for key in ("rope_theta", "factor", "original_max_position_embeddings")]
    turns += [rope["beta_fast"], rope["beta_slow"]]
    for index, (found, block) in enumerate(zip(layers, checkpoint.architecture.blocks, strict=True)):
        expected: dict[str, Any] = {
            "num_experts": block.num_experts,
            "num_loaded": block.num_experts,
            "experts_per_token": block.experts_per_token,
            "expert_width": block.expert_width,
            "window": block.window,
            "rope": turns,
        }
        for what, value in expected.items():
            if found[what] != value:
                raise ArtifactError(
                    f"{bundle}: layer {index} would have {what} {found[what]} in the engine; it has {value}"
                )


def _answer(bundle: Path, answer: TextIO, said: TextIO) -> NoReturn:
    """Write into the files what the module builds, or why it does not, and end this process."""
    status = 1
    try:
        sys.dont_write_bytecode = True
        with redirect_stderr(said):
            json.dump(_build(bundle), answer)
        status = 0
    except Exception:
        traceback.print_exc(file=said)
    finally:
        answer.flush(), said.flush()
        os._exit(status)


def _build(bundle: Path) -> list[dict[str, Any]]:
    manifest = BundleManifest.read(bundle)
    engine.enter()
    sys.path.insert(0, str(bundle))
    importlib.import_module(tensorrt_llm.MODULES)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(bundle, trust_remote_code=False, local_files_only=True)
    return engine.build(config, _weights(bundle), manifest.config.expert_parallel_size)


def _weights(bundle: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint: scales as they are, others without content, layer after layer as in its files."""
    checkpoint = Checkpoint.open(bundle)
    scales = set(layout.kv_scale_names(checkpoint.num_layers))
    return {
        name: checkpoint.tensor(name) if name in scales else torch.empty(checkpoint.shape_of(name), device="meta")
        for name, _ in sorted(checkpoint.files.items(), key=lambda item: (item[1], item[0]))
    }
