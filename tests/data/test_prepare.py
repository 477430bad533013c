"""Data sets of a run, from the tiny reasoner's files and from a hub on loopback: what is drawn, kept out, counted."""

import json
import random
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from moesaic.command_line.main import main
from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.data.prepare import pool, run
from moesaic.data.prepare.config import PrepareConfig
from moesaic.data.prepare.known_sets import KNOWN_SETS
from moesaic.data.prepare.run import SUMMARY, VALIDATION, prepare
from moesaic.data.sets import FILES, DataSets
from moesaic.pipelines import example
from moesaic.search.rank_experts.run import run as rank_experts
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.score_blocks.run import run as score_blocks
from moesaic.search.score_blocks.stage import ScoreBlocksConfig
from moesaic.search.space import SearchSpace
from tests.hub_server import Repository, serving

ROOT = Path(__file__).parents[2]
PROBLEMS = {"sources": [{"local": "problems"}], "rows": 40}
CONFIG: dict[str, Any] = {
    "calibration_short": {"sources": [{"local": "short"}], "rows": 8, "max_tokens": 400},
    "calibration_long": {"sources": [{"local": "long"}], "rows": 4, "min_tokens": 200, "max_tokens": 4000},
    "prompts": PROBLEMS | {"rows": 60},
    "tests": PROBLEMS,
    "validation_rows": 20,
}


def _config(**changes: Any) -> PrepareConfig:
    return PrepareConfig.parse(json.dumps(CONFIG | changes))


@pytest.fixture(scope="module")
def files() -> dict[str, Path]:
    data = example() / "data"
    return {
        "problems": data / FILES["tests"],
        "short": data / FILES["calibration_short"],
        "long": data / FILES["calibration_long"],
    }


@pytest.fixture(scope="module")
def prepared(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "data"
    prepare(_config(), example() / "parent", files, output)
    return output


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _asked(path: Path) -> set[str]:
    return {message["content"] for row in _rows(path) for message in row.get("prompt") or row["messages"]}


def test_splits_share_no_problem_and_every_file_is_what_its_stages_read(prepared: Path) -> None:
    DataSets.at(prepared).check()
    counts = {name: len(_rows(prepared / name)) for name in (*FILES.values(), VALIDATION)}
    assert counts == {
        "calibration_short.jsonl": 8,
        "calibration_long.jsonl": 4,
        "prompts.jsonl": 60,
        "test.jsonl": 40,
        "validation.jsonl": 20,
    }
    splits = [_asked(prepared / name) for name in ("prompts.jsonl", "test.jsonl", "validation.jsonl")]
    assert len(set.union(*splits)) == sum(map(len, splits)) == 120


def test_stages_run_on_what_was_prepared(prepared: Path, tmp_path: Path) -> None:
    parent = example() / "parent"
    for name in ("ranking", "scores"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.scratch").mkdir()
    ranked = rank_experts(
        RankExpertsConfig(max_sequences=4),
        parent=parent,
        calibration_short=prepared / FILES["calibration_short"],
        output=tmp_path / "ranking",
        scratch=tmp_path / "ranking.scratch",
    )
    assert ranked
    scored = score_blocks(
        ScoreBlocksConfig(space=SearchSpace(expert_counts=(8,)), max_sequences=2),
        parent=parent,
        ranking=tmp_path / "ranking",
        calibration_short=prepared / FILES["calibration_short"],
        calibration_long=prepared / FILES["calibration_long"],
        output=tmp_path / "scores",
        scratch=tmp_path / "scores.scratch",
    )
    assert scored


def test_the_same_seed_draws_the_same_rows_whatever_their_order(
    prepared: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    shuffled = files | {"problems": tmp_path / "problems"}
    lines = files["problems"].read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    shuffled["problems"].mkdir()
    (shuffled["problems"] / "b.jsonl").write_text("".join(lines[:500]))
    (shuffled["problems"] / "a.jsonl").write_text("".join(lines[500:] + lines[:10]))
    prepare(_config(), example() / "parent", shuffled, tmp_path / "again")
    for name in FILES.values():
        assert (tmp_path / "again" / name).read_bytes() == (prepared / name).read_bytes()
    dropped = json.loads((tmp_path / "again" / SUMMARY).read_text())["sets"]["tests"]["dropped"]
    assert set(dropped) <= {"the same as another row", "nearly the same as another row"}
    prepare(_config(seed=1), example() / "parent", files, tmp_path / "other")
    assert _asked(tmp_path / "other" / "test.jsonl") != _asked(prepared / "test.jsonl")


def test_a_killed_run_goes_on_without_reading_again(
    prepared: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_write_sets", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(_config(), example() / "parent", files, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(pool, "iterate_files", killed)
    prepare(_config(), example() / "parent", files, tmp_path / "data")
    assert (tmp_path / "data" / "test.jsonl").read_bytes() == (prepared / "test.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_gives_a_test_away_or_cannot_be_used_is_counted(
    prepared: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    test = _rows(prepared / "test.jsonl")[0]["prompt"][0]["content"]
    reply = {"role": "assistant", "content": "1"}
    held = [{"role": "user", "content": "add 1 1 1 + 2 2 2"}, reply, {"role": "user", "content": test}, reply]
    marker = [{"role": "user", "content": "add <|end|> 1"}, reply]
    short = tmp_path / "short.jsonl"
    rows = [{"messages": messages} for messages in (held, marker, [held[0], reply], [held[0], reply])]
    short.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = CONFIG["calibration_short"] | {"efforts": ["low", "high"]}
    counts = prepare(
        _config(calibration_short=wanted), example() / "parent", files | {"short": short}, tmp_path / "data"
    )
    assert counts["calibration_short"].dropped == {
        "holds a problem of the tests": 1,
        "the same as another row": 1,
    }
    kept, written = sorted(
        _rows(tmp_path / "data" / "calibration_short.jsonl"), key=lambda row: row["messages"] == marker
    )
    assert written["messages"] == marker, "control markers that somebody wrote are text"
    assert kept["effort"] in ("low", "high") and kept["task"] == "short" and kept["messages"] == [held[0], reply]
    assert counts["calibration_short"].tokens[0] > counts["calibration_short"].reply_tokens > 0


def test_sets_of_a_hub_are_fetched_and_named_by_their_commits(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "published"
    (folder / "data").mkdir(parents=True)
    problems = [
        {"prompt": row["prompt"], "reward_model": {"ground_truth": str(number), "style": "rule"}, "ability": "MATH"}
        for number, row in enumerate(_rows(files["problems"])[:200])
    ]
    table = pyarrow.Table.from_pylist(problems * 2)
    parquet.write_table(table, folder / "data" / "dapo-math-17k.parquet", row_group_size=50)
    (folder / "README.md").write_text("a card")
    known = KNOWN_SETS["dapo_math_17k"]
    with serving({f"datasets/{known.hub}": Repository(folder)}, monkeypatch, tmp_path / "cache") as hub:
        wanted = {"sources": [{"known": "dapo_math_17k"}], "rows": 30}
        other = {"hub": known.hub, "files": ["data/*.parquet"], "layout": "dapo_math_17k"}
        config = _config(prompts=wanted, tests={"sources": [other], "rows": 10})
        given = {name: files[name] for name in ("short", "long")}
        prepare(config, example() / "parent", given, tmp_path / "data")
        commit = hub.repositories[f"datasets/{known.hub}"].commit
        assert not any("README" in path for path in hub.asked if "resolve" in path)
    summary = json.loads((tmp_path / "data" / SUMMARY).read_text())
    (named,) = (source for source in summary["sources"] if source["name"] == "dapo_math_17k")
    assert named == {
        "name": "dapo_math_17k",
        "from": f"hf://datasets/{known.hub}@{commit}",
        "licence": "apache-2.0",
        "files": ["data/dapo-math-17k.parquet"],
        "read": 400,
        "left_out": {},
    }
    assert Counter(row["verifier"] for row in _rows(tmp_path / "data" / "prompts.jsonl")) == {"math": 30}
    assert summary["sets"]["prompts"]["sources"] == {"dapo_math_17k": 30}


def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    large = tmp_path / "large.jsonl"
    with large.open("w") as file:
        for number in range(1000):
            prompt = [{"role": "user", "content": f"{number} " + "word " * 1500}]
            file.write(json.dumps({"problem": prompt[0]["content"], "answer": "1"}) + "\n")
    config = _config(tests={"sources": [{"local": "large", "layout": "problem_answer"}], "rows": 2})
    found = run.find_source(config.tests.sources[0], {"large": large})
    tracemalloc.start()
    made = pool.make_pool(found, "problem", 0, tmp_path / "pools")
    drawn = [row for _, (_, row) in zip(range(5), made.rows(), strict=False)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(drawn) == 5 and large.stat().st_size > 7e6 and peak < 1.5e6


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"local": "a", "known": "gsm8k"}, "is one of known, hub and local"),
        ({"known": "gsm9k"}, "there is no known set 'gsm9k'; known are nemotron_v1"),
        ({"local": "a", "layout": "csv"}, "there is no layout 'csv'"),
        ({"known": "gsm8k", "parts": ["dev"]}, "gsm8k has no part 'dev'"),
        ({"hub": "me/mine"}, "name its files and their layout"),
        ({"known": "nemotron_v1"}, "tests needs problems; nemotron_v1 is of the layout 'messages'"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(tests={"sources": [source], "rows": 1})


def test_the_page_has_every_known_set_and_its_examples_are_configs() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    for name, known in KNOWN_SETS.items():
        assert f"| `{name}` | {known.hub} | {known.licence} | {', '.join(known.parts)} | {known.checked} |" in page
    example, shown = (ROOT / "examples" / "prepare" / "gpt_oss.json").read_text(), page.split("```json")[2]
    for text in (example, shown.split("```")[0]):
        assert PrepareConfig.parse(text).tests.rows


def test_files_that_cannot_be_read_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    def refusal(path: Path | None, kind: type[Exception] = ArtifactError) -> str:
        given = files | {"problems": path} if path else {name: files[name] for name in ("short", "long")}
        with pytest.raises(kind) as refused:
            prepare(_config(), example() / "parent", given, tmp_path / "data")
        assert not (tmp_path / "data").exists()
        return str(refused.value)

    assert "--files problems=PATH" in refusal(None, ConfigError)
    with pytest.raises(ConfigError, match=r"--files typo=a: the config names only long, problems, short"):
        prepare(_config(), example() / "parent", files | {"typo": Path("a")}, tmp_path / "data")
    assert "does not exist" in refusal(tmp_path / "gone")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    assert "cannot be read as parquet" in refusal(tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("a,b")
    assert "ends in '.csv'" in refusal(tmp_path / "x.csv")
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": []}) + "\n")
    assert "x.jsonl, line 1" in refusal(tmp_path / "x.jsonl")


def test_the_command_shows_what_was_counted(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for name, path in files.items() for word in ("--files", f"{name}={path}")]
    command = ["prepare", json.dumps(CONFIG), "--model", str(example() / "parent"), "--output", str(tmp_path / "data")]
    assert main([*command, *given]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "validation 20" in shown and "prompts 60" in shown and "summary.json" in shown
    assert main([*command, *given]) == 2
    assert "exists already" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "data")
    assert main([*command, "--files", "problems"]) == 2
    assert "is not NAME=PATH" in capsys.readouterr().err
    assert main([*command, *given, *given[-2:]]) == 2
    assert " is given twice: " in capsys.readouterr().err


def test_why_no_row_can_be_used_is_said(files: dict[str, Path], tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "add 1 + 1"}, {"role": "tool", "content": "2"}]}
    (tmp_path / "tools.jsonl").write_text((json.dumps(row) + "\n") * 3)
    config = _config(calibration_short={"sources": [{"local": "t", "layout": "messages"}], "rows": 1, "max_tokens": 99})
    given = files | {"t": tmp_path / "tools.jsonl"}
    given = {name: given[name] for name in ("long", "problems", "t")}
    with pytest.raises(ArtifactError, match=r"calibration_short: .*'has messages of the role tool': 3"):
        prepare(config, example() / "parent", given, tmp_path / "data")
