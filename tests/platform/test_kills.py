"""A stage killed while it commits, by the harness of ``benchmarks/kill_stages.py``; and that it sees faults."""

import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.records import RECORD

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def harness() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import kill_stages

        yield kill_stages


def test_a_killed_stage_leaves_nothing_half_made_and_ends_as_if_undisturbed(
    harness: ModuleType, tmp_path: Path
) -> None:
    from tiny_chain import Step, put_inputs

    world, draws = harness.World(tmp_path, tracking=False), random.Random(0)
    parent, sets = put_inputs(world.store, world.directory)
    step = Step("ingest", IngestConfig(parent=parent, **sets))
    findings = harness.harass(world, step, ["commit"], draws)
    assert [kill["moment"] for kill in findings.kills] == ["commit"]
    assert findings.half_made == findings.different == []

    expected = harness.observe(world, step)
    (world.place("ingest.parent") / RECORD).unlink()
    damaged = next((world.directory / "store" / "objects").rglob("?" * 64))
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    seen = harness.half_made(world, step, expected)
    assert "output parent without its record" in seen
    assert any(damaged.name in problem for problem in seen)
