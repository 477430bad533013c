"""score_blocks on a tiny model: every variant a row, gates, resuming, and what it refuses."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from moesaic.core.errors import ArtifactError, ConfigError, StageError
from moesaic.models.architecture import Block
from moesaic.search.rank_experts import run as rank_experts
from moesaic.search.rank_experts.channels import shuffle_channels
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.score_blocks import run as score_blocks
from moesaic.search.score_blocks import scoring
from moesaic.search.score_blocks.stage import ScoreBlocksConfig
from tests.damaged_checkpoints import damaged_copy

SPACE = {"expert_counts": [4, 6], "windows": [4, 16]}
WORDS = [f"w{index}" for index in range(40)]


def write_set(path: Path, num_rows: int, question: int, answer: int) -> Path:
    rng = random.Random(num_rows)
    rows = []
    for _ in range(num_rows):
        asked, said = (" ".join(rng.choices(WORDS, k=rng.randint(size // 2, size))) for size in (question, answer))
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows.append({"effort": "low", "messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def inputs(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("inputs")
    short = write_set(directory / "short.jsonl", 6, 4, 10)
    ranking = directory / "ranking"
    ranking.mkdir()
    rank_experts.run(
        RankExpertsConfig(), parent=tiny_parent, calibration_short=short, output=ranking, scratch=directory
    )
    long = write_set(directory / "long.jsonl", 5, 30, 20)
    return {"parent": tiny_parent, "ranking": ranking, "calibration_short": short, "calibration_long": long}


def score(inputs: dict[str, Path], place: Path, **config: object) -> dict[str, Any]:
    """Run the stage; a scratch directory that exists already is used again."""
    output, scratch = place / "output", place / "scratch"
    output.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    settings = ScoreBlocksConfig.model_validate({"space": SPACE, **config})
    score_blocks.run(settings, **inputs, output=output, scratch=scratch)
    return json.loads((output / "scores.json").read_text())


@pytest.fixture(scope="module")
def scores(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return score(inputs, tmp_path_factory.mktemp("scores"), batch_tokens=400)


def test_every_variant_of_every_layer_is_a_row(scores: dict[str, Any]):
    found = {(row["layer"], Block.from_config(row)) for row in scores["rows"]}
    full = {Block(count, 2, 64, window) for count in (8, 6, 4) for window in (None, 16, 4)}
    windowed = {Block(count, 2, 64, 8) for count in (8, 6, 4)}
    assert found == {(layer, block) for layer in range(4) for block in (full if layer % 2 else windowed)}
    assert len(scores["rows"]) == len(found) == 2 * 9 + 2 * 3
    assert scores["parent"] == [Block(8, 2, 64, None if layer % 2 else 8).as_config() for layer in range(4)]


def test_the_parents_own_block_does_no_damage_and_others_do(scores: dict[str, Any]):
    for row in scores["rows"]:
        own = Block.from_config(row) == Block(8, 2, 64, None if row["layer"] % 2 else 8)
        assert (row["damage"] < 1e-9) if own else (row["damage"] > 1e-5), row
        assert set(row["short"]) == set(row["long"]) == {"hidden_mse", "kl", "lm_loss", "cosine", "top1"}


def test_windows_hurt_where_the_context_is_long(scores: dict[str, Any]):
    """Short sequences fit into 30 tokens, so a window of 16 costs more on the long set."""
    for layer in (1, 3):
        (row,) = (r for r in scores["rows"] if (r["layer"], Block.from_config(r)) == (layer, Block(8, 2, 64, 16)))
        assert row["long"]["hidden_mse"] > 2 * row["short"]["hidden_mse"]


def test_damage_combines_the_configured_metric(scores: dict[str, Any], inputs: dict[str, Path], tmp_path: Path):
    other = score(inputs, tmp_path, batch_tokens=400, metric="kl", long_weight=3)
    assert (other["metric"], other["long_weight"]) == ("kl", 3)
    for before, after in zip(scores["rows"], other["rows"], strict=True):
        assert before["damage"] == before["short"]["hidden_mse"] + before["long"]["hidden_mse"]
        assert after["damage"] == after["short"]["kl"] + 3 * after["long"]["kl"]
        assert before["short"] == after["short"]


def test_resumes_after_the_last_finished_layer(
    scores: dict[str, Any], inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed while layer 2 is scored; the second run scores layers 2 and 3 and writes the same file."""
    asked: list[int] = []
    score_layer = score_blocks.score_layer

    def killed(parent, layer, *rest, **options):
        asked.append(layer)
        if asked == [0, 1, 2]:
            raise KeyboardInterrupt
        return score_layer(parent, layer, *rest, **options)

    monkeypatch.setattr(score_blocks, "score_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        score(inputs, tmp_path, batch_tokens=400)
    assert not list((tmp_path / "output").iterdir())
    assert score(inputs, tmp_path, batch_tokens=400) == scores
    assert asked == [0, 1, 2, 2, 3]


def test_the_identity_gate_holds_in_bfloat16(inputs: dict[str, Path], tmp_path: Path):
    rows = score(inputs, tmp_path, precision="bfloat16")["rows"]
    assert [row["damage"] for row in rows if Block.from_config(row) == Block(8, 2, 64)] == [0.0, 0.0]


def test_narrower_experts_are_scored_with_their_best_channels(inputs: dict[str, Path], tmp_path: Path):
    """Fewer channels hurt; as many chosen at random hurt more."""
    with pytest.raises(ConfigError, match="expert width 48 cannot be stored in MXFP4, which packs multiples of 32"):
        score(inputs, tmp_path / "packed", space={"expert_counts": [], "expert_widths": [48]})
    shuffled = shutil.copytree(inputs["ranking"], tmp_path / "ranking")
    orders = {str(layer): shuffle_channels(8, 64, seed=layer) for layer in range(4)}
    save_file(orders, shuffled / "channels.safetensors")
    space = {"expert_counts": [], "expert_widths": [32]}
    damages = {}
    for name, ranking in (("best", inputs["ranking"]), ("random", shuffled)):
        rows = score(inputs | {"ranking": ranking}, tmp_path / name, space=space, max_sequences=4)["rows"]
        assert [row["intermediate_size"] for row in rows] == [64, 32] * 4
        damages[name] = sum(row["damage"] for row in rows if row["intermediate_size"] == 32)
    assert 0.01 < damages["best"] < 0.8 * damages["random"]


def test_a_failing_gate_stops_the_stage(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mix = scoring.mix
    wrong = lambda block, attended, kept=None, *rest: mix(block, attended, kept and kept[1:], *rest)  # noqa: E731
    monkeypatch.setattr(scoring, "mix", wrong)
    with pytest.raises(StageError, match="layer 0: masking all but"):
        score(inputs, tmp_path)
    assert not list((tmp_path / "output").iterdir())


@pytest.mark.parametrize(
    ("space", "error", "message"),
    [
        ({"expert_counts": [1]}, ConfigError, "expert count 1 is below the 2"),
        (
            {"expert_counts": [4], "windows": [512]},
            ConfigError,
            "window 512 is not smaller than the parent's context of 512",
        ),
        ({"expert_counts": [4], "windows": [4, 300]}, ArtifactError, "a window of 300 cannot do harm"),
        ({"expert_counts": [4], "windows": [300]}, ArtifactError, "no response token at or beyond position 300"),
    ],
)
def test_refuses_useless_spaces(
    space: dict[str, Any], error: type[Exception], message: str, inputs: dict[str, Path], tmp_path: Path
):
    with pytest.raises(error, match=message):
        score(inputs, tmp_path, space=space)
    assert not list((tmp_path / "output").iterdir())


def test_config_refuses_indivisible_counts_and_windows_of_nothing():
    with pytest.raises(ConfigError, match="not divisible by expert_parallel_size 4"):
        ScoreBlocksConfig.parse('{"space": {"expert_counts": [6], "expert_parallel_size": 4}}')
    with pytest.raises(ConfigError, match=r"windows\.0 = 0: Input should be greater than or equal to"):
        ScoreBlocksConfig.parse('{"space": {"expert_counts": [6], "windows": [0]}}')


def test_refuses_foreign_rankings_and_empty_sets(inputs: dict[str, Path], tmp_path: Path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(ArtifactError, match="is not a ranking"):
        score({**inputs, "ranking": foreign}, tmp_path / "a")
    (foreign / "ranking.json").write_text(json.dumps({"layers": [{"order": [0, 1, 2]}] * 4}))
    with pytest.raises(ArtifactError, match="is not of the parent"):
        score({**inputs, "ranking": foreign}, tmp_path / "b")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(ArtifactError, match="is empty"):
        score({**inputs, "calibration_long": empty}, tmp_path / "c")


def test_a_weight_that_is_not_finite_stops_scoring_by_its_name(inputs: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.down_proj_bias"
    parent = damaged_copy(inputs["parent"], tmp_path / "parent", name, float("inf"))
    with pytest.raises(ArtifactError, match=f"{name} has numbers that are not finite"):
        score({**inputs, "parent": parent}, tmp_path)


def test_states_that_overflow_stop_scoring_with_the_layer(inputs: dict[str, Path], tmp_path: Path) -> None:
    parent = damaged_copy(inputs["parent"], tmp_path / "parent", "model.layers.1.self_attn.o_proj.weight", 3e38)
    with pytest.raises(StageError, match="layer 1: the parent's states are not finite"):
        score({**inputs, "parent": parent}, tmp_path)
