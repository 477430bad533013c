"""Results of outside harnesses: what is read, how parent and child are compared, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.core.errors import ArtifactError, MoesaicError
from moesaic.measure.outside.comparison import Comparison, compare
from moesaic.measure.paired import difference
from moesaic.measure.report.page import add_outside
from tests.measure.outside_results import (
    lm_eval_sample,
    write_lm_eval,
    write_nemo_bundle,
    write_nemo_skills,
    write_nemo_yaml,
)

OLD, NEW = (1, 1, 0, 1), (1, 0, 0, 1)
"""Of four problems the parent solves three; the child loses one of them."""

Write = Callable[..., Path]


def only(comparison: Comparison) -> Any:
    (suite,) = comparison.suites.values()
    return suite


def shares(solved: Sequence[float]) -> dict[str, dict[str, float]]:
    return {"task": {str(problem): float(share) for problem, share in enumerate(solved)}}


def test_lm_eval_is_paired_by_document(tmp_path: Path) -> None:
    parent = write_lm_eval(tmp_path / "p", {"sums": OLD}, model="parent")
    child = write_lm_eval(tmp_path / "c", {"sums": NEW})
    found = compare(parent, child, "high")
    assert found.suites["sums"].difference == difference(shares(NEW), shares(OLD))
    assert found.named("sums") == only(found).difference
    assert (only(found).parent, only(found).child, found.models) == (0.75, 0.5, {"parent": "parent", "child": "child"})
    assert only(found).harness == "lm-evaluation-harness 0.4.12"
    assert len(found.files["parent"]) == 2
    assert found.digest("parent") != found.digest("child")
    assert found.named("other") is None


def test_a_group_is_all_problems_of_its_tasks(tmp_path: Path) -> None:
    """Sizes differ: the mean of all six problems, not of the two tasks."""
    parent = write_lm_eval(tmp_path / "p", {"one": OLD, "two": (1, 1)}, model="parent", group="both")
    child = write_lm_eval(tmp_path / "c", {"one": NEW, "two": (1, 1)}, group="both")
    found = compare(parent, child)
    assert [*found.suites] == ["both"]
    assert only(found).difference.points == pytest.approx(-100 / 6)
    assert only(found).difference.problems == 6


def test_every_metric_and_filter_has_a_line(tmp_path: Path) -> None:
    """One strict and one flexible; a task that has several must be named in full."""

    def write(directory: Path, strict: Sequence[float], model: str) -> Path:
        (path := write_lm_eval(directory, {"sums": strict}, model=model)).mkdir(exist_ok=True)
        (results,), (samples,) = path.rglob("results_*.json"), path.rglob("samples_*.jsonl")
        content = json.loads(results.read_text())
        scores = {"acc,strict": content["results"]["sums"]["acc,none"], "acc,flexible": 1.0, "perplexity,none": 3.0}
        content["results"]["sums"] = scores | {"acc_stderr,strict": 0.2, "acc_stderr,flexible": "N/A"}
        content["higher_is_better"]["sums"]["perplexity"] = False
        results.write_text(json.dumps(content))
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        rows = [row | {"filter": "strict"} for row in rows] + [row | {"filter": "flexible", "acc": 1} for row in rows]
        samples.write_text("\n".join(map(json.dumps, rows)))
        return path

    found = compare(write(tmp_path / "p", OLD, "parent"), write(tmp_path / "c", NEW, "child"))
    assert {name: suite.difference.points for name, suite in found.suites.items()} == {
        "sums/acc/strict": -25,
        "sums/acc/flexible": 0,
    }
    assert found.left_out == {"sums/perplexity": "less is better, or the harness does not say what is"}
    with pytest.raises(ArtifactError, match="task sums has several metrics; name one of them: sums/acc/strict, sums/"):
        found.named("sums")


def test_means_alone_are_not_paired(tmp_path: Path) -> None:
    """Without samples: -25 points, +-1.96 times 0.1 for either model."""
    parent = write_lm_eval(tmp_path / "p", {"sums": OLD}, model="parent", samples=False)
    child = write_lm_eval(tmp_path / "c", {"sums": NEW}, samples=False)
    found = only(compare(parent, child)).difference
    assert not found.paired
    assert found.points == -25
    assert found.high_points == pytest.approx(-25 + 196 * 0.1 * 2**0.5, abs=0.01)


@pytest.mark.parametrize("error", ["N/A", 0.0])
def test_a_mean_without_a_standard_error_is_left_out(tmp_path: Path, error: float | str) -> None:
    parent = write_lm_eval(tmp_path / "p", {"sums": OLD}, model="parent", samples=False, error=error)
    child = write_lm_eval(tmp_path / "c", {"sums": NEW}, samples=False, error=error)
    found = compare(parent, child)
    assert (found.suites, found.left_out) == ({}, {"sums": "known only as a mean without a standard error"})


def test_a_metric_that_is_no_mean_of_its_rows_is_not_paired(tmp_path: Path) -> None:
    directories = [write_lm_eval(tmp_path / model, {"sums": OLD}, model=model) for model in ("parent", "child")]
    for path in tmp_path.rglob("results_*.json"):
        path.write_text(path.read_text().replace('"acc,none": 0.75', '"acc,none": 0.7'))
    assert not only(compare(*directories)).difference.paired


def test_results_yml_is_unpaired_and_may_be_in_percent(tmp_path: Path) -> None:
    parent = write_nemo_yaml(tmp_path / "p", 71.5, 3.0, model="parent")
    child = write_nemo_yaml(tmp_path / "c", 70.5, 4.0)
    found = compare(parent, child, "high")
    assert only(found).difference.points == pytest.approx(-1)
    assert only(found).difference.low_points == pytest.approx(-1 - 1.96 * 5, abs=0.01)
    assert only(found).harness == "NeMo Evaluator 0.2.6"
    share = write_nemo_yaml(tmp_path / "s", 0.7)
    with pytest.raises(ArtifactError, match=re.escape("differ in unit ('1/100' of the parent, '1/1' of the child)")):
        compare(parent, share)


def test_replies_of_nemo_skills_are_paired(tmp_path: Path) -> None:
    """Two repeats of three problems: the child loses one reply of six, half a problem of three."""
    parent = write_nemo_skills(tmp_path / "p", [[True, True, False], [True, False, False]], model="parent")
    child = write_nemo_skills(tmp_path / "c", [[True, True, False], [False, False, False]])
    found = only(compare(parent, child)).difference
    assert found == difference(shares((0.5, 0.5, 0)), shares((1, 0.5, 0)))


def test_bundles_are_paired_by_problem_over_repeats(tmp_path: Path) -> None:
    parent = write_nemo_bundle(tmp_path / "p", [(1, 1), (1, 0), (0, 0)], model="parent")
    child = write_nemo_bundle(tmp_path / "c", [(1, 0), (1, 0), (0, 0)])
    found = compare(parent, child)
    assert only(found).difference == difference(shares((0.5, 0.5, 0)), shares((1, 0.5, 0)))
    assert "full_config.yaml" in found.files["child"]


def test_bundles_converted_from_a_container_are_its_results(tmp_path: Path) -> None:
    """The mean in ``results.yml`` counts; a bundle beside it only repeats that."""
    for model, value in (("parent", 0.7), ("child", 0.6)):
        write_nemo_bundle(write_nemo_yaml(tmp_path / model, value, model=model), [(1,)], framework="container")
    found = compare(tmp_path / "parent", tmp_path / "child")
    assert [*found.suites] == ["gpqa_diamond"]


def test_a_container_of_lm_eval_is_read_by_problem(tmp_path: Path) -> None:
    """Its ``results.yml`` gives the same task once more, by its mean."""
    for model, solved in (("parent", OLD), ("child", NEW)):
        write_lm_eval(write_nemo_yaml(tmp_path / model, 0.7, model=model, name="sums"), {"sums": solved}, model=model)
    assert only(compare(tmp_path / "parent", tmp_path / "child")).difference.paired


REFUSED: dict[str, tuple[Write, dict[str, Any], dict[str, Any], str]] = {
    "harness": (write_lm_eval, {}, {"lm_eval_version": "0.4.9"}, "version of the harness ('0.4.12' of the parent"),
    "task version": (write_lm_eval, {}, {"versions": {"sums": 2.0}}, "version of the task (1.0 of the parent, 2.0 of"),
    "few-shots": (write_lm_eval, {}, {"n-shot": {"sums": 5}}, "few-shot examples (2 of the parent, 5 of the child)"),
    "template": (write_lm_eval, {}, {"chat_template_sha": "ab"}, "chat template (none of the parent, 'ab' of"),
    "effort": (
        write_lm_eval,
        {},
        {"config": {"model": "local-completions", "gen_kwargs": {"reasoning_effort": "low"}}},
        "reasoning_effort ('high' of the parent, 'low' of the child)",
    ),
    "temperature": (write_nemo_yaml, {}, {"temperature": 0.6}, "temperature (1.0 of the parent, 0.6 of the child)"),
    "repeats": (write_nemo_yaml, {}, {"extra": {"num_repeats": 4}}, "extra.num_repeats (none of the parent, 4 of"),
    "payload": (write_nemo_yaml, {}, {"effort": "low"}, "payload_modifier.params_to_add.reasoning_effort"),
    "generation": (write_nemo_bundle, {}, {"temperature": 0.5}, "generation.temperature (1.0 of the parent, 0.5 of"),
    "other task": (
        write_nemo_yaml,
        {},
        {"name": "mmlu"},
        "the child has no results of gpqa_diamond; run the same tasks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_was_not_asked_alike_is_refused(tmp_path: Path, case: str) -> None:
    write, of_parent, of_child, message = REFUSED[case]
    solved: Any = {write_lm_eval: {"sums": OLD}, write_nemo_yaml: 0.5, write_nemo_bundle: [(1,), (0,)]}[write]
    parent = write(tmp_path / "p", solved, model="parent", **of_parent)
    child = write(tmp_path / "c", solved, **of_child)
    with pytest.raises(ArtifactError, match=re.escape(message)) as refused:
        compare(parent, child)
    assert "\n" not in str(refused.value)


def test_other_prompts_and_other_problems_are_refused(tmp_path: Path) -> None:
    parent = write_lm_eval(tmp_path / "p", {"sums": OLD}, model="parent")
    child = write_lm_eval(tmp_path / "c", {"sums": NEW})
    (samples,) = child.rglob("samples_*.jsonl")
    whole = samples.read_text()
    samples.write_text("\n".join(json.dumps(lm_eval_sample("sums", id, acc, "none")) for id, acc in enumerate(NEW)))
    with pytest.raises(ArtifactError, match="differ in problems and prompts"):
        compare(parent, child)
    samples.write_text("\n".join(whole.splitlines()[:3]))
    with pytest.raises(ArtifactError, match="holds 3 of 4 problems under one filter"):
        compare(parent, child)
    samples.write_text("\n".join(whole.splitlines()[:3] * 2))
    with pytest.raises(ArtifactError, match="line 4 has problem 0 again"):
        compare(parent, child)
    asked = [write_nemo_bundle(tmp_path / str(number), [(1,)] * number) for number in (2, 3)]
    with pytest.raises(ArtifactError, match="were asked different problems, 1 of one alone"):
        compare(*asked)


def test_the_same_or_no_or_doubled_results_are_refused(tmp_path: Path) -> None:
    child = write_nemo_yaml(tmp_path / "c", 0.5)
    with pytest.raises(ArtifactError, match="are the same files"):
        compare(child, child)
    with pytest.raises(ArtifactError, match="is not a directory"):
        compare(child, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=re.escape("holds no results of a harness (results_*.json, results.yml")):
        compare(tmp_path / "empty", child)
    write_nemo_yaml(child / "again", 0.6)
    with pytest.raises(ArtifactError, match="gpqa_diamond was measured twice"):
        compare(child, child)


def test_the_effort_must_be_the_one_that_was_asked(tmp_path: Path) -> None:
    parent, child = (write_nemo_yaml(tmp_path / model, 0.5, model=model) for model in ("parent", "child"))
    assert compare(parent, child, "high").effort == "high"
    with pytest.raises(ArtifactError, match="was asked at high effort by its own settings, and --effort says low"):
        compare(parent, child, "low")


def test_the_page_says_which_results_are_unpaired(tmp_path: Path) -> None:
    parent, child = (write_nemo_yaml(tmp_path / model, 0.5, model=model) for model in ("<parent>", "child"))
    page = add_outside("<p><!-- results of outside harnesses --></p>", compare(parent, child, "high").summary())
    assert "Results of outside harnesses, high effort" in page
    assert "<td>+0.0 [-8.3, +8.3]</td><td>unpaired</td><td>NeMo Evaluator 0.2.6</td>" in page
    assert "&lt;parent&gt; (parent)" in page
    with pytest.raises(ArtifactError, match="run report again"):
        add_outside("<p></p>", {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of both models by every harness."""
    directory = tmp_path_factory.mktemp("whole")
    for model in ("parent", "child"):
        place = directory / model
        write_lm_eval(place, {"sums": OLD, "differences": NEW}, model=model, group="arithmetic")
        write_nemo_yaml(place / "container", 0.5, model=model)
        write_nemo_skills(place / "skills", [[True, False], [True, True]], model=model)
        write_nemo_bundle(place / "own", [(1, 0), (1, 1)], model=model)
    assert [*compare(directory / "parent", directory / "child").suites] == [
        *("arithmetic", "gpqa_diamond", "aime25", "gsm8k")
    ]
    return directory


ODD = st.sampled_from([None, -1, 0, 10**400, 1e400, "", "x", [], {}, [[]], True, "../x", "a\0b"])
CHANGES = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), ODD)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.integers(0, 7), cut=st.integers(0, 400), changed=st.binary(max_size=4), change=st.none() | CHANGES)
def test_damaged_files_are_refused_or_read(
    whole: Path, tmp_path: Path, file: int, cut: int, changed: bytes, change: Any
) -> None:
    """Bytes lost or changed, or one value of a JSON file that is something else: never another error than ours."""
    child = tmp_path / "child"
    shutil.rmtree(child, ignore_errors=True)
    shutil.copytree(whole / "child", child)
    files = sorted(path for path in child.rglob("*") if path.is_file())
    path = files[file % len(files)]
    content = path.read_bytes()
    if change is not None and path.suffix == ".json":
        value = json.loads(content)
        places = _places(value)
        container, key = places[change[0] % len(places)]
        container[key] = change[2]
        path.write_text(json.dumps(value))
    else:
        path.write_bytes(content[: cut * len(content) // 400] + changed + content[cut * len(content) // 400 + 1 :])
    try:
        found = compare(whole / "parent", child)
    except MoesaicError as refused:
        assert str(refused)
    else:
        json.dumps(found.summary(), allow_nan=False)
