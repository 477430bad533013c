"""Two stages killed at random moments, by the harness of ``benchmarks/kill_stages.py``; and that it sees faults."""

import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.records import RECORD
from moesaic.search.rank_experts.stage import RankExpertsConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def harness() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import kill_stages

        yield kill_stages


def test_killed_stages_leave_nothing_half_made_and_end_as_if_undisturbed(harness: ModuleType, tmp_path: Path) -> None:
    from tiny_chain import Step, put_inputs

    world, draws = harness.World(tmp_path, tracking=False), random.Random(0)
    parent, sets = put_inputs(world.store, world.directory)
    chain = (
        Step("ingest", IngestConfig(parent=parent, **sets)),
        Step(
            "rank_experts",
            RankExpertsConfig(max_sequences=4, max_tokens=64),
            {"parent": "ingest.parent", "calibration_short": "ingest.calibration_short"},
        ),
    )
    for step, moment in zip(chain, ("commit", "any time"), strict=True):
        findings = harness.harass(world, step, [moment], draws)
        assert [kill["moment"] for kill in findings.kills] == [moment]
        assert findings.half_made == findings.different == []

    expected = harness.observe(world, chain[0])
    (world.place("ingest.parent") / RECORD).unlink()
    damaged = next((world.directory / "store" / "objects").rglob("?" * 64))
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    seen = harness.half_made(world, chain[0], expected)
    assert "output parent without its record" in seen
    assert any(damaged.name in problem for problem in seen)
