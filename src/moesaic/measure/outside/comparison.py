"""Parent against child, by what harnesses outside this project measured of both."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moesaic.core.config import Effort
from moesaic.core.errors import ArtifactError
from moesaic.core.files import file_digest
from moesaic.measure.outside import lm_eval, nemo_evaluator
from moesaic.measure.outside.results import Score, Task, check_settings
from moesaic.measure.paired import Difference, difference, unpaired_difference


@dataclass(frozen=True)
class Suite:
    """One metric of one task, of both models."""

    task: str
    metric: str
    harness: str
    parent: float
    child: float
    difference: Difference


@dataclass(frozen=True)
class Comparison:
    """All that was measured of parent and child, at one effort."""

    effort: Effort | None
    """As people say; None if they do not."""
    suites: Mapping[str, Suite]
    """By the name of the task; with ``/METRIC`` where the task has several metrics, compared or left out."""
    left_out: Mapping[str, str]
    """By task and metric, why there is no difference."""
    models: Mapping[str, str]
    """By role, the names under which the harnesses knew the models."""
    files: Mapping[str, Mapping[str, str]]
    """By role, digests of the files that were read, by their path in the directory given."""

    def digest(self, role: str) -> str:
        """What stands for all files of a role."""
        lines = "".join(f"{path}\0{digest}\n" for path, digest in sorted(self.files[role].items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def named(self, name: str) -> Difference | None:
        """The difference in a suite; None if it was not measured.

        Raises:
            ArtifactError: if a task was named that has several metrics.
        """
        several = [suite for suite, of in self.suites.items() if of.task == name]
        if name not in self.suites and several:
            raise ArtifactError(f"task {name} has several metrics; name one of them: {', '.join(several)}")
        return self.suites[name].difference if name in self.suites else None

    def summary(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def compare(parent: Path, child: Path, effort: Effort | None = None) -> Comparison:
    """Read the results in two directories, however deep, and compare them task by task.

    Raises:
        ArtifactError: if there are none, a file is damaged, or parent and child were asked something else.
    """
    read = {role: _read(directory) for role, directory in (("parent", parent), ("child", child))}
    of_parent, of_child = read.values()
    for lacking, names in (
        ("child", of_parent.keys() - of_child.keys()),
        ("parent", of_child.keys() - of_parent.keys()),
    ):
        if names:
            raise ArtifactError(
                f"the {lacking} has no results of {', '.join(sorted(names))}; run the same tasks on both"
            )
    suites: dict[str, Suite] = {}
    left_out: dict[str, str] = {}
    for name, old in of_parent.items():
        new = of_child[name]
        check_settings(old, new)
        _check_effort(old, effort)
        reasons = {**old.left_out, **new.left_out}
        metrics = dict.fromkeys([*old.scores, *new.scores, *reasons])
        for metric in metrics:
            full = name if len(metrics) == 1 else f"{name}/{metric}"
            old_score, new_score = old.scores.get(metric), new.scores.get(metric)
            found = _difference(full, new_score, old_score) if old_score and new_score else None
            if old_score and new_score and found:
                suites[full] = Suite(name, metric, old.harness, old_score.value, new_score.value, found)
            else:
                left_out[full] = reasons.get(metric, "known problem by problem of one model only")
    return Comparison(
        effort=effort,
        suites=suites,
        left_out=left_out,
        models={role: ", ".join(sorted({task.model for task in tasks.values()})) for role, tasks in read.items()},
        files=_digests({"parent": (parent, of_parent), "child": (child, of_child)}),
    )


def _read(directory: Path) -> dict[str, Task]:
    """The tasks of all results in a directory, by name.

    A ``results.yml`` over files of lm-evaluation-harness sums these up, as NeMo's container of it does; they are read.
    """
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is not a directory; give the one that the harness wrote its results to")
    tasks = [task for path in sorted(directory.rglob(lm_eval.RESULTS)) for task in lm_eval.read(path)]
    sums = [path for path in directory.rglob(nemo_evaluator.YAML) if not any(path.parent.rglob(lm_eval.RESULTS))]
    tasks += [task for path in sorted(sums) for task in nemo_evaluator.read_yaml(path)]
    bundles = [path for path in directory.rglob(nemo_evaluator.BUNDLE) if path.with_name(nemo_evaluator.ROWS).is_file()]
    tasks += [task for path in sorted(bundles) for task in nemo_evaluator.read_bundle(path)]
    if not tasks:
        kinds = f"{lm_eval.RESULTS}, {nemo_evaluator.YAML}, or {nemo_evaluator.BUNDLE} beside {nemo_evaluator.ROWS}"
        raise ArtifactError(f"{directory} holds no results of a harness ({kinds}); see docs/evaluation.md")
    found: dict[str, Task] = {}
    for task in tasks:
        if (first := found.setdefault(task.name, task)) is not task:
            raise ArtifactError(
                f"{task.name} was measured twice, in {first.files[0]} and {task.files[0]}; give one of them"
            )
    return found


def _check_effort(task: Task, effort: Effort | None) -> None:
    if effort is not None and task.efforts - {effort}:
        raise ArtifactError(
            f"task {task.name} was asked at {', '.join(sorted(task.efforts))} effort by its own settings, "
            f"and --effort says {effort}"
        )


def _difference(name: str, child: Score, parent: Score) -> Difference | None:
    """Problem by problem if both are known so, else of the means; None if one has no standard error."""
    if child.verdicts is not None and parent.verdicts is not None:
        pairs = [
            ({*child.verdicts.get(task, {})}, {*parent.verdicts.get(task, {})})
            for task in {**parent.verdicts, **child.verdicts}
        ]
        if differing := sorted(problem for new, old in pairs for problem in new ^ old):
            raise ArtifactError(
                f"{name}: parent and child were asked different problems, {len(differing)} of one alone, such as "
                f"{differing[0]}; run the harness on both with the same data"
            )
        return difference(child.verdicts, parent.verdicts)
    return unpaired_difference(child.mean, parent.mean) if child.mean and parent.mean else None


def _digests(given: Mapping[str, tuple[Path, Mapping[str, Task]]]) -> dict[str, dict[str, str]]:
    files = {
        role: {
            path.relative_to(directory).as_posix(): file_digest(path)
            for path in sorted({path for task in tasks.values() for path in task.files})
        }
        for role, (directory, tasks) in given.items()
    }
    if {*files["parent"].values()} == {*files["child"].values()}:
        raise ArtifactError("parent and child are the same files; give the results of two models")
    return files
