"""Tasks of a local run that do not wait for each other run at once; what takes times runs alone."""

import json
import threading
import time
from pathlib import Path

import pytest
from kfp import compiler, dsl
from rich.console import Console

from moesaic.core.errors import StageError
from moesaic.platform.runs.local import run_compiled
from moesaic.platform.runs.run_context import RunContext
from moesaic.platform.runs.side_by_side import Cores, _urgencies, tasks_side_by_side
from moesaic.stages import STAGES


@dsl.component(base_image="none", install_kfp_package=False)
def evaluate(directory: str, name: str, other: str) -> str:
    """Ends when the other has begun; fails if it never does."""
    import json
    import time
    from pathlib import Path

    began = time.monotonic()
    (Path(directory) / f"{name}.began").touch()
    while not (Path(directory) / f"{other}.began").exists():
        if time.monotonic() > began + 20:
            raise TimeoutError(f"{other} never began")
        time.sleep(0.05)
    (Path(directory) / f"{name}.json").write_text(json.dumps([began, time.monotonic()]))
    return name


@dsl.component(base_image="none", install_kfp_package=False)
def benchmark(directory: str) -> str:
    """Takes a moment."""
    import json
    import time
    from pathlib import Path

    began = time.monotonic()
    time.sleep(0.3)
    (Path(directory) / "benchmark.json").write_text(json.dumps([began, time.monotonic()]))
    return "benchmark"


@dsl.component(base_image="none", install_kfp_package=False)
def report(directory: str, names: list[str]) -> str:
    """Tells what it was given."""
    from pathlib import Path

    (Path(directory) / "report").write_text(" ".join(names))
    return "report"


@dsl.pipeline(name="side-by-side")
def pipeline(directory: str) -> None:
    """Two that need each other and so both cores, one that must be alone, one that follows a loop."""
    benchmark(directory=directory)
    first = evaluate(directory=directory, name="first", other="second")
    evaluate(directory=directory, name="second", other="first")
    with dsl.ParallelFor(["third"]) as name:
        looped = evaluate(directory=directory, name=name, other=name)
    report(directory=directory, names=dsl.Collected(looped.output)).after(first)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "pipeline.yaml"
    compiler.Compiler().compile(pipeline, str(path))
    return path


def _run(manifest: Path, directory: Path) -> None:
    context = RunContext(store=directory / "store", run_directory=directory)
    run_compiled(manifest, {"directory": str(directory)}, context, Console(quiet=True))


def test_what_is_ready_runs_at_once_and_what_takes_times_alone(manifest: Path, tmp_path: Path) -> None:
    _run(manifest, tmp_path)
    spans = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(spans) == ["benchmark", "first", "second", "third"]
    alone = spans.pop("benchmark")
    assert all(ended <= alone[0] or alone[1] <= began for began, ended in spans.values())
    assert (tmp_path / "report").read_text() == "third"


def test_after_a_failure_what_runs_is_finished_and_nothing_is_begun(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "third.json").mkdir()  # where that task wants to write a file
    with pytest.raises(StageError, match="a task was lost"):
        _run(manifest, tmp_path)
    assert not (tmp_path / "report").exists()


def test_one_that_must_be_alone_waits_for_all_cores() -> None:
    cores, order = Cores(2), []

    def task(name: str, alone: bool) -> None:
        with cores.take(alone):
            order.append(name)

    with cores.take(alone=False):
        waiting = threading.Thread(target=task, args=("alone", True))
        waiting.start()
        beside = threading.Thread(target=task, args=("beside", False))
        beside.start()
        beside.join(5)
        assert order == ["beside"]
    waiting.join(5)
    assert order == ["beside", "alone"]
    cores.close()
    with cores.take(alone=True) as is_open:
        assert not is_open


def test_of_those_that_wait_the_most_urgent_runs_first() -> None:
    cores, order = Cores(1), []

    def task(urgency: tuple[int, ...]) -> None:
        with cores.take(alone=False, urgency=urgency):
            order.append(urgency)

    waiting = [threading.Thread(target=task, args=(urgency,)) for urgency in ((2,), (3,), (2, 7), (1, 9), (2,))]
    with cores.take(alone=False):
        for thread in waiting:
            thread.start()
        while len(cores._waiting) < len(waiting):
            time.sleep(0.01)
    for thread in waiting:
        thread.join(5)
    assert order == [(3,), (2, 7), (2,), (2,), (1, 9)]


def test_one_that_is_urgent_and_alone_is_not_overtaken() -> None:
    cores, order = Cores(2), []

    def task(name: str, alone: bool, urgency: tuple[int, ...]) -> None:
        with cores.take(alone, urgency):
            order.append(name)

    tasks = [threading.Thread(target=task, args=args) for args in (("alone", True, (2,)), ("beside", False, (1,)))]
    with cores.take(alone=False):
        for thread in tasks:
            thread.start()
        while len(cores._waiting) < len(tasks):
            time.sleep(0.01)
        time.sleep(0.3)  # time enough to overtake
        assert order == []
    for thread in tasks:
        thread.join(5)
    assert sorted(order) == ["alone", "beside"] and order[0] == "alone"


def test_a_task_is_as_urgent_as_the_chain_behind_it_is_long() -> None:
    needed = {
        "rank": [],
        "costs": [],
        "score": ["rank"],
        "search": ["score", "costs"],
        "evaluate": [],
        "report": ["evaluate", "search"],
    }
    assert _urgencies(needed) == {
        "rank": (4,), "costs": (3,), "score": (3,), "search": (2,), "evaluate": (2,), "report": (1,)
    }  # fmt: skip


def test_kubeflow_is_as_it_was_afterwards() -> None:
    from kfp.local.orchestrator import enhanced_dag_orchestrator as kubeflow

    before = kubeflow.run_enhanced_dag
    with pytest.raises(KeyboardInterrupt), tasks_side_by_side(1):
        assert kubeflow.run_enhanced_dag is not before
        raise KeyboardInterrupt
    assert kubeflow.run_enhanced_dag is before


def test_the_stages_that_time_are_those_that_say_so() -> None:
    assert {name for name, stage in STAGES.items() if stage.alone} == {
        "measure_costs",
        "benchmark",
        "benchmark_serving",
    }
