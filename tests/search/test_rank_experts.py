"""rank_experts on a tiny model: files in, ranking out."""

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from moesaic.core.errors import ArtifactError, StageError
from moesaic.core.process_group import BatchShare
from moesaic.data.calibration import load_batches
from moesaic.models import layers, loading, streaming
from moesaic.models.channel_orders import CHANNELS, read_channels
from moesaic.models.checkpoint import Checkpoint
from moesaic.search.rank_experts import run as rank_experts
from moesaic.search.rank_experts import saved_progress as ranking_progress
from moesaic.search.rank_experts.ranking import LayerRanking, rank_layer
from moesaic.search.rank_experts.saved_progress import RankingProgress
from moesaic.search.rank_experts.stage import RankExpertsConfig
from tests.damaged_checkpoints import damaged_copy


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
    orders = read_channels(tmp_path / "a", Checkpoint.open(tiny_parent).architecture)
    assert [tuple(order.shape) for order in orders] == [(8, 64)] * 4
    assert (tmp_path / "a" / CHANNELS).read_bytes() == (tmp_path / "b" / CHANNELS).read_bytes()


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
    (hidden,) = loading.embed(tiny_checkpoint, [batch.token_ids])
    rotary = loading.rotary(tiny_checkpoint, batch.num_positions)
    for layer in range(3):
        module = loading.load_block(tiny_checkpoint, layer)
        hidden = layers.run_block(module, hidden, rotary, tiny_checkpoint.architecture.blocks[layer].window)
    module = loading.load_block(tiny_checkpoint, 3)
    attended = layers.attend(module, hidden, rotary, None)
    routing = layers.route(module, module.post_attention_layernorm(attended[batch.is_token]), num_spare=1)
    scores = routing.energies * layers.down_norms(module.mlp.experts)
    along = scores.gather(1, read_channels(tmp_path / "a", tiny_checkpoint.architecture)[3])
    assert bool((along[:, :-1] >= along[:, 1:] * (1 - 1e-4)).all()), "the best channel first"
    assert ranking["layers"][3]["scores"] == pytest.approx(rank_layer("removal_difference", [routing]).scores, rel=1e-4)
    assert ranking["num_tokens"] == int(batch.is_token.sum())


def test_every_ranking_has_reaps_order_too(tiny_parent: Path, calibration: Path, tmp_path: Path):
    own = [layer["order"] for layer in rank(tiny_parent, calibration, tmp_path / "reap", criterion="reap")["layers"]]
    ranking = rank(tiny_parent, calibration, tmp_path / "a")
    assert [layer["reap"] for layer in ranking["layers"]] == own != [layer["order"] for layer in ranking["layers"]]


def test_random_depends_on_the_seed_and_the_layer(tiny_parent: Path, calibration: Path, tmp_path: Path):
    shuffled = {"criterion": "random", "channel_criterion": "random"}
    first = rank(tiny_parent, calibration, tmp_path / "a", **shuffled, seed=1)
    other = rank(tiny_parent, calibration, tmp_path / "b", **shuffled, seed=2)
    assert [layer["order"] for layer in first["layers"]] != [layer["order"] for layer in other["layers"]]
    assert [layer["reap"] for layer in first["layers"]] == [layer["reap"] for layer in other["layers"]]
    assert first["layers"][0]["order"] != first["layers"][1]["order"]
    assert (tmp_path / "a" / CHANNELS).read_bytes() != (tmp_path / "b" / CHANNELS).read_bytes()


def test_one_layer_in_memory_at_a_time(
    tiny_parent: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded: list[int] = []
    build_block = streaming.build_block
    monkeypatch.setattr(streaming, "build_block", lambda *a: (loaded.append(a[1]), build_block(*a))[1])
    rank(tiny_parent, calibration, tmp_path / "a", precision="bfloat16")
    assert loaded == [0, 1, 2, 3]
    assert torch.is_grad_enabled()


def test_a_killed_pass_goes_on_behind_the_layers_it_has_ranked(
    tiny_parent: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed as layer 2 is loaded; the next attempt loads layers 2 and 3 alone and writes the same bytes."""
    rank(tiny_parent, calibration, tmp_path / "whole", batch_tokens=100, precision="bfloat16")
    loaded: list[int] = []
    build_block = streaming.build_block

    def build(checkpoint: Checkpoint, layer: int, *rest: object) -> object:
        loaded.append(layer)
        if loaded == [0, 1, 2]:
            raise KeyboardInterrupt
        return build_block(checkpoint, layer, *rest)

    monkeypatch.setattr(streaming, "build_block", build)
    monkeypatch.setattr(ranking_progress, "_EVERY_S", 0.0)
    config = RankExpertsConfig.model_validate({"batch_tokens": 100, "precision": "bfloat16"})
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    for directory in (output, scratch):
        directory.mkdir()
    given = {"parent": tiny_parent, "calibration_short": calibration, "output": output, "scratch": scratch}
    with pytest.raises(KeyboardInterrupt):
        rank_experts.run(config, **given)
    assert sorted(place.name for place in scratch.glob("ranked*")) == ["ranked-0-002", "ranked.json"]
    rank_experts.run(config, **given)
    assert loaded == [0, 1, 2, 2, 3]
    for name in ("ranking.json", CHANNELS):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Threads(BatchShare):
    """Processes played by threads."""

    parts: ClassVar[dict[int, list[object]]] = {}
    barrier: ClassVar[threading.Barrier] = threading.Barrier(2, timeout=30)

    def gather(self, parts):
        self.parts[self.rank] = list(parts)
        self.barrier.wait()
        found = [part for rank in range(self.count) for part in self.parts[rank]]
        self.barrier.wait()
        return found


def test_processes_keep_their_own_states_and_agree_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first process's clock decides, the second one's says never; other numbers of processes begin anew."""
    offloader = streaming.StateOffloader(2**20, tmp_path / "states", torch.device("cpu"))
    layers = [LayerRanking((1, 0), (0.25, 0.5), (0, 1)), LayerRanking((0, 1), (1 / 3, 0.0), (1, 0))]

    def work(rank: int) -> None:
        progress = RankingProgress(tmp_path, Threads(rank, 2))
        progress._kept_s += rank * 10**9
        for count in (1, 2):
            progress.keep(
                layers[:count], [offloader.offload(torch.tensor([10.0 * rank + count, part])) for part in (0, 1)]
            )

    monkeypatch.setattr(ranking_progress, "_EVERY_S", 0.0)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (0, 1)))
    for rank in (0, 1):
        again = RankingProgress(tmp_path, Threads(rank, 2))
        assert again.layers() == layers
        assert [state.tolist() for state in again.states(2)] == [[10.0 * rank + 2, 0.0], [10.0 * rank + 2, 1.0]]
    assert sorted(path.name for path in tmp_path.glob("ranked-*")) == ["ranked-0-002", "ranked-1-002"]
    assert RankingProgress(tmp_path, BatchShare()).layers() == []


def test_nothing_is_kept_before_its_time_or_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    offloader = streaming.StateOffloader(2**20, tmp_path / "states", torch.device("cpu"))
    states = [offloader.offload(torch.zeros(100))]
    RankingProgress(tmp_path, BatchShare()).keep([], states)
    monkeypatch.setattr(ranking_progress, "_EVERY_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(ranking_progress.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 400 - 1))
        RankingProgress(tmp_path, BatchShare()).keep([], states)
    assert not list(tmp_path.glob("ranked*"))
    RankingProgress(tmp_path, BatchShare()).keep([], states)
    assert len(list(tmp_path.glob("ranked*"))) == 2


def test_missing_inputs_write_nothing(tiny_parent: Path, calibration: Path, tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"config\.json does not exist"):
        rank(tmp_path / "nowhere", calibration, tmp_path / "a")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ArtifactError, match="is empty"):
        rank(tiny_parent, empty, tmp_path / "b")
    assert not list((tmp_path / "a").iterdir()) and not list((tmp_path / "b").iterdir())


@pytest.mark.parametrize("criterion", ["removal_difference", "ranked_choice", "reap", "frequency"])
@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.router.bias", "model.layers.1.self_attn.sinks", "model.embed_tokens.weight"]
)
def test_a_weight_that_is_not_finite_stops_ranking_by_its_name(
    criterion: str, name: str, tiny_parent: Path, calibration: Path, tmp_path: Path
) -> None:
    parent = damaged_copy(tiny_parent, tmp_path / "parent", name, float("nan"))
    with pytest.raises(ArtifactError, match=f"{name} has numbers that are not finite"):
        rank(parent, calibration, tmp_path / "out", criterion=criterion)
    assert not (tmp_path / "out" / "ranking.json").exists()


def test_states_that_overflow_stop_ranking_with_the_layer(tiny_parent: Path, calibration: Path, tmp_path: Path) -> None:
    """Every weight is finite; the router's product with them is not."""
    parent = damaged_copy(tiny_parent, tmp_path / "parent", "model.layers.2.mlp.router.weight", 3e38)
    with pytest.raises(StageError, match="layer 2: the router's logits are not finite"):
        rank(parent, calibration, tmp_path / "out")
