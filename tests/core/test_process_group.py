"""Two processes score and rank to the same bits as one, and a failure in one of them is told."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moesaic.core import process_group as sharding
from moesaic.core.errors import ConfigError, StageError
from moesaic.core.process_group import BatchShare, num_processes
from moesaic.search.rank_experts import run as rank_experts
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.score_blocks import run as score_blocks
from moesaic.search.score_blocks.stage import ScoreBlocksConfig

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

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


def rank(parent: Path, sets: dict[str, Path], place: Path) -> bytes:
    ranking, scratch = place / "ranking", place / "scratch"
    for directory in (ranking, scratch):
        directory.mkdir(parents=True)
    config = RankExpertsConfig(batch_tokens=40)
    short = sets["calibration_short"]
    rank_experts.run(config, parent=parent, calibration_short=short, output=ranking, scratch=scratch)
    return (ranking / "ranking.json").read_bytes()


def score(parent: Path, sets: dict[str, Path], place: Path) -> bytes:
    """By the ranking that :func:`rank` left there."""
    (place / "scores").mkdir()
    config = ScoreBlocksConfig.model_validate({"space": SPACE, "batch_tokens": 160})
    places = {"ranking": place / "ranking", "output": place / "scores", "scratch": place / "scratch"}
    score_blocks.run(config, parent=parent, **sets, **places)
    return (place / "scores" / "scores.json").read_bytes()


class ForkedRanks:
    """In torchrun's place: the ranks are forks of this process, which has imported torch and transformers already."""

    def __init__(self, command: list[str], env: dict[str, str], stdout: object) -> None:
        self._count = int(command[command.index("--nproc-per-node") + 1])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self._env = env | meeting | {"WORLD_SIZE": str(self._count)}
        self._processes = [self._fork(rank, Path(command[-1])) for rank in range(self._count)]

    def _fork(self, rank: int, job: Path) -> int:
        if (process := os.fork()) == 0:
            status = 1
            try:
                os.environ.update(self._env | {"RANK": str(rank)})
                torch.set_num_threads(1)  # a fork has none of this process's other threads
                sharding.main(job)
                status = 0
            finally:
                os._exit(status)
        return process

    def wait(self) -> int:
        return max(os.waitpid(process, 0)[1] for process in self._processes)

    def poll(self) -> int:
        return 0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As each of several processes has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_and_states_on_disk_change_no_bit(
    tiny_parent: Path, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone, spilled, shared = tmp_path / "alone", tmp_path / "spilled", tmp_path / "shared"
    ranking, scores = rank(tiny_parent, sets, alone), score(tiny_parent, sets, alone)
    monkeypatch.setenv("MOESAIC_STATE_MEMORY_MIB", "0")
    assert rank(tiny_parent, sets, spilled) == ranking and score(tiny_parent, sets, spilled) == scores
    monkeypatch.setenv("MOESAIC_NUM_PROCESSES", "2")
    assert rank(tiny_parent, sets, shared) == ranking, "by torchrun"
    (shared / "scratch" / "job.json").unlink()
    monkeypatch.setattr(sharding.subprocess, "Popen", ForkedRanks)
    assert score(tiny_parent, sets, shared) == scores, "by forks"
    assert json.loads((shared / "scratch" / "job.json").read_text())["stage"] == "moesaic.search.score_blocks.stage"


def test_a_process_that_fails_says_why(
    tiny_parent: Path, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The state budget is read by the processes, and refused there."""
    monkeypatch.setattr(sharding.subprocess, "Popen", ForkedRanks)
    monkeypatch.setenv("MOESAIC_NUM_PROCESSES", "2")
    monkeypatch.setenv("MOESAIC_STATE_MEMORY_MIB", "little")
    with pytest.raises(StageError, match="MOESAIC_STATE_MEMORY_MIB is 'little'"):
        rank(tiny_parent, sets, tmp_path / "failing")


def test_shares_are_every_nth():
    """Five batches for two: 0, 2, 4 and 1, 3."""
    assert [BatchShare(rank, 2).mine("abcde") for rank in (0, 1)] == [["a", "c", "e"], ["b", "d"]]
    assert BatchShare().gather([1, 2]) == [1, 2]


def test_a_wrong_number_of_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOESAIC_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="is 'two'; set it to a number of processes"):
        num_processes()
