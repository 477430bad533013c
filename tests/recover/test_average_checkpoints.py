"""Averages of small checkpoints: every tensor by hand, shared files untouched, foreign checkpoints refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.models import layout
from moesaic.models.checkpoint import Checkpoint, read_recovery, rewrite_checkpoint
from moesaic.recover.average_checkpoints import run as average_checkpoints
from moesaic.recover.average_checkpoints.stage import AverageCheckpointsConfig

QUERY, NORM = "model.layers.1.self_attn.q_proj.weight", layout.FINAL_NORM
EXPERTS = "model.layers.2.mlp.experts.down_proj_bias"
EQUAL = AverageCheckpointsConfig()


@pytest.fixture
def policy(tiny_parent: Path, tmp_path: Path) -> Callable[..., Path]:
    """A policy whose two tensors are the parent's plus a shift."""

    def write(name: str, shift: float) -> Path:
        source = Checkpoint.open(tiny_parent)
        replaced = {tensor: source.tensor(tensor).float() + shift for tensor in (QUERY, NORM)}
        rewrite_checkpoint(source, tmp_path / name, replaced, {"stage": "reinforce", "policy": name})
        return tmp_path / name

    return write


def average(
    policies: list[Path], output: Path, config: AverageCheckpointsConfig = EQUAL
) -> tuple[dict[str, float], Checkpoint]:
    output.mkdir()
    metrics = average_checkpoints.run(config, policies=policies, output=output, scratch=output)
    return metrics, Checkpoint.open(output)


def test_every_tensor_is_the_mean(policy: Callable[..., Path], tiny_parent: Path, tmp_path: Path) -> None:
    high, mixed, third = policy("high", 1.0), policy("mixed", -3.0), policy("third", 0.5)
    weights = AverageCheckpointsConfig(weights=(1, 2, 5))
    metrics, mean = average([high, mixed, third], tmp_path / "mean", weights)
    opened = [Checkpoint.open(path) for path in (high, mixed, third)]
    for name in (QUERY, NORM):
        first, second, last = (checkpoint.tensor(name).float() for checkpoint in opened)
        assert torch.equal(mean.tensor(name), ((first + 2 * second + 5 * last) / 8).bfloat16())
    assert metrics == {"num_policies": 3, "num_tensors_averaged": 2}
    assert read_recovery(tmp_path / "mean") == [
        {"stage": "reinforce", "policy": "high"},
        {"stage": "average_checkpoints", "policies": ["high", "mixed", "third"], "weights": [1, 2, 5]},
    ]
    changed = {"model-outer.safetensors", "model-layer-001-rest.safetensors"}
    for shard in tiny_parent.glob("*.safetensors"):
        assert (shard.read_bytes() == (tmp_path / "mean" / shard.name).read_bytes()) == (shard.name not in changed)


def test_order_does_not_matter_when_weights_move_along(policy: Callable[..., Path], tmp_path: Path) -> None:
    high, mixed = policy("high", 1.0), policy("mixed", -3.0)
    _, first = average([high, mixed], tmp_path / "first", AverageCheckpointsConfig(weights=(1, 3)))
    _, second = average([mixed, high], tmp_path / "second", AverageCheckpointsConfig(weights=(3, 1)))
    assert all(torch.equal(first.tensor(name), second.tensor(name)) for name in first.files)


def test_a_single_policy_is_handed_on_as_it_is(policy: Callable[..., Path], tmp_path: Path) -> None:
    """As in recipes for a budget, which train one policy."""
    high = policy("high", 1.0)
    metrics, _ = average([high], tmp_path / "mean")
    assert metrics == {"num_policies": 1, "num_tensors_averaged": 0}
    assert all(shard.read_bytes() == (tmp_path / "mean" / shard.name).read_bytes() for shard in high.glob("model*"))


def test_the_average_of_a_policy_with_its_copy_is_the_policy(policy: Callable[..., Path], tmp_path: Path) -> None:
    high = policy("high", 1.0)
    copy = Path(shutil.copytree(high, tmp_path / "copy"))
    metrics, _ = average([high, copy], tmp_path / "mean")
    assert metrics["num_tensors_averaged"] == 0
    assert all(shard.read_bytes() == (tmp_path / "mean" / shard.name).read_bytes() for shard in high.glob("model*"))


def _edit(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    shard = Checkpoint.open(directory).files[name]
    tensors = load_file(shard)
    tensors[name] = change(tensors[name])
    shard.unlink()  # the file may be the parent's own, by hard link
    save_file(tensors, shard, metadata={"format": "pt"})


def test_frozen_experts_must_be_the_same_bytes(policy: Callable[..., Path], tmp_path: Path) -> None:
    high, other = policy("high", 1.0), policy("other", 1.0)
    _edit(other, EXPERTS, lambda tensor: tensor + 1)
    with pytest.raises(ArtifactError, match=rf"{EXPERTS} differs.*freezes experts"):
        average([high, other], tmp_path / "mean")


def test_a_diverged_policy_is_refused_and_nothing_written(policy: Callable[..., Path], tmp_path: Path) -> None:
    high, other = policy("high", 1.0), policy("other", float("nan"))
    with pytest.raises(ArtifactError, match=rf"mean of ({QUERY}|{NORM}) is not finite"):
        average([high, other], tmp_path / "mean")
    assert not list((tmp_path / "mean").iterdir())


def test_the_first_difference_is_named(policy: Callable[..., Path], tmp_path: Path) -> None:
    high, wider, longer, windowed = (policy(name, 1.0) for name in ("high", "wider", "longer", "windowed"))
    config = json.loads((windowed / "config.json").read_text())
    (windowed / "config.json").write_text(json.dumps(config | {"sliding_window": 9}))
    with pytest.raises(ArtifactError, match=r"layer 0 is 8e/top-2/64w/9, the other.s 8e/top-2/64w/8"):
        average([high, windowed], tmp_path / "a")

    source = Checkpoint.open(wider)
    shutil.rmtree(tmp_path / "longer")
    rewrite_checkpoint(source, longer, {}, {"stage": "x"}, added={"model.extra": torch.ones(1)})
    with pytest.raises(ArtifactError, match=r"only .*longer has model.extra"):
        average([high, longer], tmp_path / "b")

    _edit(wider, NORM, lambda tensor: tensor.float())
    with pytest.raises(ArtifactError, match=rf"{NORM} is torch.float32 in .*wider, torch.bfloat16"):
        average([high, wider], tmp_path / "c")


def test_weights_and_policies_must_match(policy: Callable[..., Path], tmp_path: Path) -> None:
    high, mixed = policy("high", 1.0), policy("mixed", 2.0)
    with pytest.raises(ConfigError, match=r"weights = \[1.0, 1.0, 1.0\] are 3 for 2 policies"):
        average([high, mixed], tmp_path / "b", AverageCheckpointsConfig(weights=(1, 1, 1)))
