"""The memory that a step of distillation takes on one GPU of many, found by running the step without GPUs or weights.

The program is the real one: the recipe's own step, our model class and loss, AutoModel's parallelizer as the rendered
settings have it (FSDP2, shared experts, activation checkpointing) and the optimizer, on fake tensors, which have
shapes and no values, in a process group of any size that passes no messages. PyTorch's memory tracker adds up what is
alive. Gradients of earlier rows and the optimizer's moments are there from the beginning, as in every step but the
first.

What stands in for something else:

- the compiled FlexAttention: a function that allocates what the kernel does, outputs, log-sum-exp and gradients;
- values that decide on sizes: every token is a response token, and ranks that share experts get equally many tokens;
- chunks of tokens behind a layer's first: they take what the first one took, and only their inputs and outputs remain.

Functions that a GPU compiles are run operation by operation, which takes somewhat more. Not counted: CUDA's own
memory, NCCL's buffers and what the allocator cannot hand out because of fragmentation; see ``costs.facts.ROOM``.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from nemo_automodel.components.distributed.config import DistributedSetup
from nemo_automodel.components.distributed.model_parallelizer import parallelize_model
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.moe.experts import GroupedExperts
from nemo_automodel.components.utils.model_utils import apply_parameter_freezing, parse_freeze_config
from nemo_automodel.recipes._dist_utils import parse_distributed_section
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesaic.models import layout
from moesaic.models.architecture import Architecture
from moesaic.models.families.family import ModelShape
from moesaic.models.families.gpt_oss_puzzle.configuration_gpt_oss_puzzle import GptOssPuzzleConfig
from moesaic.models.peak import Peak
from moesaic.models.synthesis import Model, model_config
from moesaic.recover.distill.automodel import cluster_model
from moesaic.recover.distill.automodel.cluster_experts import StreamedExperts, limit_experts
from moesaic.recover.distill.automodel.cpu import CPU
from moesaic.recover.distill.automodel.recipe import DistillationRecipe
from moesaic.recover.distill.automodel.settings import Job, render
from moesaic.recover.distill.loss import recomputed
from moesaic.recover.distill.stage import DistillConfig

_PARTS = {
    "weights": ("Sharded Param", "Buffer"),
    "optimizer": ("OptState",),
    "gradients": ("Sharded Grad", "Unsharded Grad", "Reduce Scatter"),
    "gathered weights": ("Unsharded Param", "All Gather"),
    "activations": ("Activation", "Inputs"),
    "temporary": ("Temp",),
}
"""The tracker's categories by ours. The last are tensors made in the backward pass, gradients of activations too."""


def simulate(
    config: DistillConfig,
    shape: ModelShape,
    parent: Architecture,
    child: Architecture,
    job: Job,
    fused: bool = True,
    all_chunks: bool = False,
    worst_routing: bool = False,
) -> Peak:
    """Run a step of rank 0 of the job's processes, two or more, and return the peak.

    Args:
        config: what to train.
        shape: sizes of both models; nothing is read.
        parent: blocks of the teacher.
        child: blocks of what learns.
        job: its devices; its paths are not used.
        fused: attention by the compiled kernel's stand-in, else by the CPU's own function.
        all_chunks: run every chunk of tokens through the experts, which takes longer and finds the same within 1 %.
        worst_routing: all tokens of the ranks that share experts go to this rank's, all of the time.
    """
    with ExitStack() as stack:
        stack.enter_context(_process_group(job.num_processes))
        stack.enter_context(_stand_ins(fused, all_chunks))
        step = Step(config, shape, parent, child, job)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_KnownValues(config, 1 if worst_routing else job.expert_parallel_size))
        step.materialize()
        return step.peak(full_batch(config))


class Step(DistillationRecipe):
    """The recipe's step with models of given sizes, without files; to be materialized on fake tensors or real ones."""

    def __init__(
        self,
        config: DistillConfig,
        shape: ModelShape,
        parent: Architecture,
        child: Architecture,
        job: Job,
        device: torch.device = CPU,
    ) -> None:
        """Build both models without memory, sharded as the job's settings have it; the device is where it will be."""
        self.settings, self.job, self.device = config, job, device
        self.step_scheduler = SimpleNamespace(step=0)
        self._rendered = render(config, job)
        section = parse_distributed_section(self._rendered["distributed"])
        setup = DistributedSetup.build(
            section["strategy_config"],
            section["parallelism_sizes"],
            moe_parallel_config=section["moe_parallel_config"],
            activation_checkpointing=section["activation_checkpointing"],
        )
        self.device_mesh, self.moe_mesh = setup.mesh_context.device_mesh, setup.mesh_context.moe_mesh
        self.teacher_model = self._build(shape, parent, "teacher_model", setup).eval()
        self.model_parts = [self._build(shape, child, "model", setup).train()]

    def _build(self, shape: ModelShape, architecture: Architecture, section: str, setup: DistributedSetup) -> nn.Module:
        settings = self._rendered[section]
        dtype = getattr(torch, settings["torch_dtype"])
        content = layout.child_config(model_config(Model(shape, architecture, 1)), architecture)
        backend = {name: value for name, value in settings["backend"].items() if name != "_target_"}
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                model = cluster_model.GptOssPuzzleForCausalLM(
                    GptOssPuzzleConfig.from_dict({**content, "dtype": settings["torch_dtype"]}),
                    backend=BackendConfig(**backend),
                )
        finally:
            torch.set_default_dtype(usual)
        if section == "model":
            apply_parameter_freezing(model, parse_freeze_config(self._rendered["freeze_config"]), strict=True)
        else:
            model.requires_grad_(False)
        limit_experts(model, self.settings.expert_chunk_tokens)
        sharded: nn.Module = parallelize_model(model, setup.mesh_context)
        return sharded

    def materialize(self) -> None:
        """Give the weights memory, and the optimizer its moments, as after a first step."""
        for model in (self.teacher_model, *self.model_parts):
            model.to_empty(device=self.device)
        learning = [parameter for parameter in self.model_parts[0].parameters() if parameter.requires_grad]
        values = {name: value for name, value in self._rendered["optimizer"].items() if name != "_target_"}
        self.optimizer = [torch.optim.AdamW(learning, **values)]
        self.lr_scheduler = [SimpleNamespace(step=lambda _: None)]
        for parameter in learning:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer[0].step()
        if self.settings.rows_per_step == self.job.num_processes * self.settings.rows_per_forward:
            self.optimizer[0].zero_grad()

    def peak(self, batch: dict[str, Tensor]) -> Peak:
        """Run the step on a batch of this rank and return the most that was alive."""
        with _StepMemory(self) as memory:
            self._run_train_optim_step([batch], self.settings.optimizer.max_gradient_norm)
        found = memory.get_tracker_snapshot("peak")[self.device]
        return Peak({name: sum(found.get(key, 0) for key in keys) for name, keys in _PARTS.items()})


class _StepMemory(FSDPMemTracker):
    """PyTorch's tracker for two sharded models at once; it keeps the peak of all of it and none of single modules."""

    def __init__(self, step: Step) -> None:
        (child,), (optimizer,) = step.model_parts, step.optimizer
        super().__init__(child, optimizer)
        self._root_mod = nn.ModuleList([step.teacher_model, child])  # type: ignore[assignment]

    def __enter__(self) -> "_StepMemory":
        super().__enter__()
        if self._depth == 1:
            for parameter in self._root_mod.parameters():  # those that FSDP leaves alone, too
                self._update_and_maybe_create_winfos(parameter, _FSDPRefType.SHARDED_PARAM)
                if parameter.grad is not None:
                    self._update_and_maybe_create_winfos(parameter.grad, _FSDPRefType.SHARDED_GRAD)
        return self

    def _update_peak_stats(self, _peak_state: Any) -> None:
        for device, alive in self._curr_mem_snap.items():
            if alive["Total"] > self._peak_mem.get(device, 0):
                self._peak_mem[device], self._peak_mem_snap[device] = alive["Total"], dict(alive)


class _KnownValues(TorchDispatchMode):
    """Answers for fake tensors where a value decides on a size."""

    def __init__(self, config: DistillConfig, sharing: int) -> None:
        """Every rank's experts get 1 in ``sharing`` of the tokens that all of them have."""
        super().__init__()  # type: ignore[no-untyped-call]
        tokens = config.rows_per_forward * config.sequence_tokens
        self._chunk, self._sharing = min(tokens, config.expert_chunk_tokens), sharing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and all(not isinstance(one, FakeTensor) and not one.is_meta for one in tensors):  # a device mesh's
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        aten, first = torch.ops.aten, tensors[0] if tensors else torch.empty(0)
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True, torch.int64: self._chunk}.get(first.dtype, 1.0)
        if func is aten.nonzero.default:
            return first.new_empty((first.numel() // self._sharing, first.ndim), dtype=torch.int64)
        if func is aten.bincount.default:
            return first.new_empty((args[2],))
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            return func(first, [first.new_empty((len(first) // self._sharing,), dtype=torch.int64)])
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """What the compiled FlexAttention allocates; the values are of no meaning."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        output = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, sinks, output, log_sums)
        return torch.empty_like(output)  # scaled by the sinks

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        query, key, value, sinks, output, log_sums = ctx.saved_tensors
        _unscaled, _delta = torch.empty_like(output), torch.empty_like(log_sums)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), torch.empty_like(sinks)


class _LikeTheFirst(torch.autograd.Function):
    """A chunk of tokens whose memory the chunk before has taken and given back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.empty_like(gradients[0])


def _first_chunk(self: StreamedExperts, x: Tensor, *others: Tensor) -> Tensor:
    first = [part[: self.chunk_tokens] for part in (x, *others)]
    outputs = [recomputed(GroupedExperts.forward, self, *first)]
    others_like_it = x[self.chunk_tokens :].split(self.chunk_tokens)
    outputs += [_LikeTheFirst.apply(chunk) for chunk in others_like_it]  # type: ignore[no-untyped-call]
    return torch.cat(outputs)


@contextmanager
def _stand_ins(fused: bool, all_chunks: bool) -> Iterator[None]:
    def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, *_: Any) -> Any:
        return _FusedAttention.apply(query, key, value, sinks)  # type: ignore[no-untyped-call]

    with (
        patch.object(StreamedExperts, "forward", StreamedExperts.forward if all_chunks else _first_chunk),
        patch.object(cluster_model, "runs_flex_attention", lambda _device: fused),
        patch.object(cluster_model, "flex_sink_attention", attend),
        _uncompiled(),
    ):
        yield


@contextmanager
def _uncompiled() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


@contextmanager
def _process_group(size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def full_batch(config: DistillConfig) -> dict[str, Tensor]:
    """Full rows of nothing but response tokens, for one forward pass."""
    rows = torch.zeros(config.rows_per_forward, config.sequence_tokens, dtype=torch.int64)
    names = ("input_ids", "position_ids", "labels")
    return {name: rows for name in names} | {"responses": torch.arange(rows.numel()), "reply_share": rows.float()}
