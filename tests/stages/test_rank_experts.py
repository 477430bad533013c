"""rank_experts on a tiny model: files in, ranking out."""

import json
import random
from pathlib import Path

import pytest
import torch

from moesaic import blocks, streaming
from moesaic.calibration import load_batches
from moesaic.checkpoint import Checkpoint
from moesaic.configs import RankExpertsConfig
from moesaic.errors import ArtifactError
from moesaic.ranking import rank_layer
from moesaic.stages import rank_experts


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve conversations of random words."""
    rng = random.Random(0)
    words = [f"w{index}" for index in range(40)]
    rows = []
    for _ in range(12):
        answer = {"role": "assistant", "content": " ".join(rng.choices(words, k=rng.randint(5, 40)))}
        rows.append(
            {"effort": "low", "messages": [{"role": "user", "content": " ".join(rng.choices(words, k=20))}, answer]}
        )
    path = tmp_path_factory.mktemp("calibration") / "short.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rank(parent: Path, calibration: Path, directory: Path, **config: object) -> dict[str, object]:
    directory.mkdir()
    settings = RankExpertsConfig.model_validate(config)
    rank_experts.run(settings, parent=parent, calibration_short=calibration, output=directory, scratch=directory)
    return json.loads((directory / "ranking.json").read_text())


@pytest.mark.parametrize("criterion", ["removal_difference", "ranked_choice", "reap", "frequency", "random"])
def test_ranks_every_expert_of_every_layer(criterion: str, tiny_parent: Path, calibration: Path, tmp_path: Path):
    ranking = rank(tiny_parent, calibration, tmp_path / "a", criterion=criterion)
    assert ranking["criterion"] == criterion
    assert [sorted(layer["order"]) for layer in ranking["layers"]] == [list(range(8))] * 4
    for layer in ranking["layers"]:
        along = [layer["scores"][expert] for expert in layer["order"]]
        assert along == sorted(along, reverse=True)
    assert rank(tiny_parent, calibration, tmp_path / "b", criterion=criterion) == ranking


def test_padding_and_batches_do_not_matter(tiny_parent: Path, calibration: Path, tmp_path: Path):
    together = rank(tiny_parent, calibration, tmp_path / "a", batch_tokens=10_000)
    alone = rank(tiny_parent, calibration, tmp_path / "b", batch_tokens=1)
    assert together["num_tokens"] == alone["num_tokens"]
    for one, other in zip(together["layers"], alone["layers"], strict=True):
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-4)


def test_later_layers_see_what_the_parent_computes(
    tiny_parent: Path, tiny_checkpoint: Checkpoint, calibration: Path, tmp_path: Path
):
    """Layer 3's scores from the states that running blocks 0 to 2 gives."""
    ranking = rank(tiny_parent, calibration, tmp_path / "a", batch_tokens=10_000)
    (batch,) = load_batches(calibration, tiny_parent, max_sequences=128, max_tokens=8192, batch_tokens=10_000)
    (hidden,) = blocks.embed(tiny_checkpoint, [batch.token_ids])
    turns = blocks.rotary(tiny_checkpoint, batch.num_positions)
    for layer in range(3):
        module = blocks.load_block(tiny_checkpoint, layer)
        hidden = blocks.run_block(module, hidden, turns, tiny_checkpoint.architecture.blocks[layer].window)
    module = blocks.load_block(tiny_checkpoint, 3)
    attended = blocks.attend(module, hidden, turns, None)
    routing = blocks.route(module, module.post_attention_layernorm(attended[batch.is_token]), num_spare=1)
    assert ranking["layers"][3]["scores"] == pytest.approx(rank_layer("removal_difference", [routing]).scores, rel=1e-4)
    assert ranking["num_tokens"] == int(batch.is_token.sum())


def test_random_reads_no_weights(tiny_parent: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "load_block", None)
    first = rank(tiny_parent, calibration, tmp_path / "a", criterion="random", seed=1)
    other = rank(tiny_parent, calibration, tmp_path / "b", criterion="random", seed=2)
    assert first["layers"] != other["layers"]
    assert first["layers"][0]["order"] != first["layers"][1]["order"]


def test_one_layer_in_memory_at_a_time(
    tiny_parent: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded: list[int] = []
    build_block = streaming.build_block
    monkeypatch.setattr(streaming, "build_block", lambda *a: (loaded.append(a[1]), build_block(*a))[1])
    rank(tiny_parent, calibration, tmp_path / "a", precision="bfloat16")
    assert loaded == [0, 1, 2, 3]
    assert torch.is_grad_enabled()


def test_missing_inputs_write_nothing(tiny_parent: Path, calibration: Path, tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"config\.json does not exist"):
        rank(tmp_path / "nowhere", calibration, tmp_path / "a")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ArtifactError, match="is empty"):
        rank(tiny_parent, empty, tmp_path / "b")
    assert not list((tmp_path / "a").iterdir()) and not list((tmp_path / "b").iterdir())
