"""Average policies that were trained from one checkpoint; one tensor of each is in memory at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.core.progress import track
from moesaic.models import layout
from moesaic.models.checkpoint import Checkpoint, read_recovery, rewrite_checkpoint
from moesaic.recover.average_checkpoints.averaging import same_bytes, weighted_mean
from moesaic.recover.average_checkpoints.stage import AverageCheckpointsConfig


def run(config: AverageCheckpointsConfig, *, policies: list[Path], output: Path, scratch: Path) -> dict[str, float]:
    """Write the first policy's checkpoint with every tensor that the policies do not share replaced by its mean.

    A single policy is handed on as it is.
    """
    weights = _weights(config, len(policies))
    opened = [Checkpoint.open(policy) for policy in policies]
    for other in opened[1:]:
        _check_alike(opened[0], other)
    means = _Means(opened, weights, _different(opened))
    _check_finite(means)
    step = {
        "stage": "average_checkpoints",
        "policies": [_policy_name(policy) for policy in policies],
        "weights": list(weights),
    }
    rewrite_checkpoint(opened[0], output, means, step)
    return {"num_policies": float(len(policies)), "num_tensors_averaged": float(len(means))}


def _weights(config: AverageCheckpointsConfig, num_policies: int) -> tuple[float, ...]:
    weights = config.weights or (1.0,) * num_policies
    if len(weights) != num_policies:
        raise ConfigError(f"weights = {list(weights)} are {len(weights)} for {num_policies} policies; give one each")
    return weights


def _policy_name(policy: Path) -> str:
    """What the checkpoint calls the policy that it is."""
    return next((str(step["policy"]) for step in reversed(read_recovery(policy)) if "policy" in step), "unnamed")


def _check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Raise an ArtifactError that names the first difference which no mean could bridge."""
    place = f"{other.directory} cannot be averaged with {first.directory}"
    if other.shape != first.shape:
        raise ArtifactError(f"{place}: its sizes are {other.shape}, the other's {first.shape}")
    blocks = zip(first.architecture.blocks, other.architecture.blocks, strict=False)
    for layer, (block, differing) in enumerate(blocks):
        if differing != block:
            raise ArtifactError(f"{place}: its layer {layer} is {differing.label}, the other's {block.label}")
    if other.num_layers != first.num_layers:
        raise ArtifactError(f"{place}: it has {other.num_layers} layers, the other {first.num_layers}")
    for name in sorted(set(first.files) ^ set(other.files)):
        raise ArtifactError(f"{place}: only {first.directory if name in first.files else other.directory} has {name}")
    for name in first.files:
        if other.shape_of(name) != first.shape_of(name):
            raise ArtifactError(f"{place}: its {name} is {other.shape_of(name)}, the other's {first.shape_of(name)}")


def _different(policies: Sequence[Checkpoint]) -> list[str]:
    """The tensors that the policies do not share, in the order of the layout.

    Raises:
        ArtifactError: if an expert's tensor is among them, or two policies store one in different dtypes.
    """
    names = sorted(policies[0].files)
    return [name for name in track(names, len(names), "comparing tensors") if not _is_shared(policies, name)]


def _is_shared(policies: Sequence[Checkpoint], name: str) -> bool:
    first = policies[0]
    others = [other for other in policies[1:] if not other.files[name].samefile(first.files[name])]
    tensor = first.tensor(name) if others else torch.empty(0)
    for other in others:
        compared = other.tensor(name)
        if compared.dtype != tensor.dtype:
            raise ArtifactError(f"{name} is {compared.dtype} in {other.directory}, {tensor.dtype} in {first.directory}")
        if not same_bytes(tensor, compared):
            if layout.is_expert_weight(name):
                raise ArtifactError(
                    f"{name} differs between {first.directory} and {other.directory}; recovery freezes experts, "
                    "so these are not policies of one checkpoint"
                )
            return False
    return True


def _check_finite(means: Mapping[str, Tensor]) -> None:
    for name, mean in track(means.items(), len(means), "averaging tensors"):
        if not mean.isfinite().all():
            raise ArtifactError(f"the mean of {name} is not finite; a policy that has diverged cannot be averaged")


@dataclass(frozen=True)
class _Means(Mapping[str, Tensor]):
    """The mean of each named tensor, computed when it is asked for."""

    policies: Sequence[Checkpoint]
    weights: Sequence[float]
    names: Sequence[str]

    def __getitem__(self, name: str) -> Tensor:
        return weighted_mean([policy.tensor(name) for policy in self.policies], self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
