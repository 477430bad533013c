"""Two processes score and rank to the same bits as one, and a failure in one of them is told."""

import json
from pathlib import Path

import pytest

from moesaic.configs import RankExpertsConfig, ScoreBlocksConfig
from moesaic.errors import ConfigError, StageError
from moesaic.stages import rank_experts, score_blocks
from moesaic.stages.sharding import Shards, num_processes

SPACE = {"expert_counts": [4], "windows": [4]}


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Path]:
    """Three conversations of other lengths, so that no two batches are alike."""
    rows = [
        [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": " ".join(f"w{i}" for i in range(size))}]
        for size in (8, 12, 20)
    ]
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps({"messages": row, "effort": "low"}) + "\n" for row in rows))
    return {"calibration_short": path, "calibration_long": path}


def rank_and_score(parent: Path, sets: dict[str, Path], place: Path) -> tuple[bytes, bytes]:
    ranking, scores, scratch = place / "ranking", place / "scores", place / "scratch"
    for directory in (ranking, scores, scratch):
        directory.mkdir(parents=True)
    short = sets["calibration_short"]
    rank = RankExpertsConfig(batch_tokens=40)
    rank_experts.run(rank, parent=parent, calibration_short=short, output=ranking, scratch=scratch)
    score = ScoreBlocksConfig.model_validate({"space": SPACE, "batch_tokens": 160})
    score_blocks.run(score, parent=parent, ranking=ranking, **sets, output=scores, scratch=scratch)
    return (ranking / "ranking.json").read_bytes(), (scores / "scores.json").read_bytes()


def test_two_processes_and_states_on_disk_change_no_bit(
    tiny_parent: Path, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = rank_and_score(tiny_parent, sets, tmp_path / "alone")
    monkeypatch.setenv("MOESAIC_STATE_MEMORY_MIB", "0")
    assert rank_and_score(tiny_parent, sets, tmp_path / "spilled") == alone
    monkeypatch.setenv("MOESAIC_NUM_PROCESSES", "2")
    assert rank_and_score(tiny_parent, sets, tmp_path / "shared") == alone
    assert (tmp_path / "shared" / "scratch" / "job.json").is_file()


def test_a_process_that_fails_says_why(
    tiny_parent: Path, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The state budget is read by the processes, and refused there."""
    monkeypatch.setenv("MOESAIC_NUM_PROCESSES", "2")
    monkeypatch.setenv("MOESAIC_STATE_MEMORY_MIB", "little")
    with pytest.raises(StageError, match="MOESAIC_STATE_MEMORY_MIB is 'little'"):
        rank_and_score(tiny_parent, sets, tmp_path / "failing")


def test_shares_are_every_nth():
    """Five batches for two: 0, 2, 4 and 1, 3."""
    assert [Shards(rank, 2).mine("abcde") for rank in (0, 1)] == [["a", "c", "e"], ["b", "d"]]
    assert Shards().gather([1, 2]) == [1, 2]


def test_a_wrong_number_of_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOESAIC_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="is 'two'; set it to a number of processes"):
        num_processes()
