"""AutoModel without a GPU: the few calls of its recipe that assume CUDA, answered for CPUs while it sets itself up.

Nothing here has any effect where CUDA is available. What is replaced: counters of GPU memory, of which there is none,
and the function that puts a model on its device, whose body is AutoModel's own with ``cpu`` in place of ``cuda``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from nemo_automodel._transformers.infrastructure import apply_model_infrastructure, instantiate_infrastructure
from nemo_automodel.components.distributed.config import DistributedSetup
from nemo_automodel.recipes.llm import kd, train_ft
from torch import nn

CPU = torch.device("cpu")


@contextmanager
def device_policy() -> Iterator[None]:
    """Within it AutoModel's recipes set up on CPUs, if there is no GPU."""
    if torch.cuda.is_available():
        yield
        return
    with (
        patch.object(torch.cuda, "reset_peak_memory_stats", lambda *_: None),
        patch.object(train_ft, "build_model", _build_child),
        patch.object(kd, "_build_teacher_model", _build_parent),
    ):
        yield


def _build_child(cfg_model: Any, *_: Any, distributed_setup: DistributedSetup, **__: Any) -> nn.Module:
    return _place(cfg_model.instantiate(), distributed_setup)


def _build_parent(cfg_teacher: Any, *_: Any, distributed_setup: DistributedSetup, **__: Any) -> nn.Module:
    return _place(cfg_teacher.instantiate(), distributed_setup).eval()


def _place(model: nn.Module, setup: DistributedSetup) -> nn.Module:
    """Shard a loaded model over the ranks, as AutoModel does for models that are not of its own classes."""
    mesh = setup.mesh_context
    wrapper, pipeline, parallelize, _ = instantiate_infrastructure(
        distributed_config=setup.strategy_config,
        moe_parallel_config=setup.moe_parallel_config,
        activation_checkpointing=setup.activation_checkpointing,
        device=CPU,
        mesh=mesh,
    )
    placed: nn.Module = apply_model_infrastructure(
        model,
        is_meta_device=False,
        device=CPU,
        mesh=mesh,
        model_wrapper=wrapper,
        autopipeline=pipeline,
        parallelize_fn=parallelize,
        pretrained_model_name_or_path=None,
        load_base_model=False,
    )
    return placed
