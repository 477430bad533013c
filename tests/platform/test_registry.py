"""The registry in a file, and on a real MLflow server with PostgreSQL and basic auth: the same tests on both."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest

from moesaic.core.errors import ArtifactError, ConfigError, MoesaicError, StageError
from moesaic.platform.registry.registry import CHAMPION, Registry, RegistryAddress, Version

from .mlflow_server import ADMIN, PASSWORD, MlflowServer

_RACERS = """
import json, os, sys
import mlflow
from moesaic.platform.registry.registry import Registry, RegistryAddress

other = os.fork()
asked, answers = map(int, sys.argv[1 if other else 2].split(","))
with open(asked) as lines, open(answers, "w", buffering=1) as answers:
    print("ready", file=answers)
    for line in lines:
        uri, model, action, value = json.loads(line)
        registry = Registry(RegistryAddress(uri), model)
        if action == "read":
            known, version, answer = registry.history(), registry.version(str(value)), None
        elif action == "promote":
            answer = registry.promote(version, known)
        elif action == "register":
            answer = registry.register(value, "moesaic:///store/manifests/x.json", {}, "").number
        elif action == "rollback":
            try:
                answer = registry.roll_back(value)
            except Exception as failure:
                answer = type(failure).__name__
        print(json.dumps(answer), file=answers)
if other:
    sys.exit(os.waitpid(other, 0)[1])
"""
_ROUNDS = 6


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: bytes) -> Path:
    path = tmp_path_factory.mktemp("registry") / "mlflow.db"
    path.write_bytes(empty_mlflow)
    return path


@pytest.fixture(params=["sqlite", "server"], scope="module")
def address(request: pytest.FixtureRequest, database: Path) -> RegistryAddress:
    if request.param == "sqlite":
        return RegistryAddress(f"sqlite:///{database}")
    running: MlflowServer = request.getfixturevalue("mlflow_server")
    return RegistryAddress(running.uri)


@pytest.fixture(autouse=True)
def admin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", ADMIN)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@pytest.fixture
def registry(address: RegistryAddress) -> Registry:
    """Of a model of this test's own."""
    registry = Registry(address, f"child-{uuid.uuid4().hex[:12]}")
    registry.create()
    return registry


def register(registry: Registry, content: str, **tags: str) -> Version:
    return registry.register(content * 64, f"moesaic:///store/manifests/{content * 64}.json", tags, f"about {content}")


@dataclass
class Racer:
    """A process of its own that does as it is told."""

    asked: TextIO
    answers: TextIO

    def tell(self, registry: Registry, action: str, value: Any) -> None:
        self.asked.write(json.dumps([registry.address.uri, registry.model, action, value]) + "\n")

    def answer(self) -> Any:
        return json.loads(self.answers.readline())


@pytest.fixture(scope="module")
def racers() -> Iterator[list[Racer]]:
    """For both kinds of address; one of them imports MLflow, which takes seconds, and forks the other."""
    theirs, racers = [], []
    for _ in range(2):
        (asked, ask), (answers, answer) = os.pipe(), os.pipe()
        theirs.append((asked, answer))
        racers.append(Racer(os.fdopen(ask, "w", buffering=1), os.fdopen(answers)))
    command = [sys.executable, "-W", "ignore", "-c", _RACERS, *(f"{asked},{answer}" for asked, answer in theirs)]
    ends = [end for both in theirs for end in both]
    user = {"MLFLOW_TRACKING_USERNAME": ADMIN, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    with subprocess.Popen(command, pass_fds=ends, env=os.environ | user) as process:
        for end in ends:
            os.close(end)
        assert [racer.answers.readline() for racer in racers] == ["ready\n"] * 2
        yield racers
        for racer in racers:
            racer.asked.close(), racer.answers.close()
    assert process.returncode == 0


def together(racers: list[Racer], registry: Registry, action: str, values: list[Any]) -> list[Any]:
    for racer, value in zip(racers, values, strict=True):
        racer.tell(registry, action, value)
    return [racer.answer() for racer in racers]


def test_one_version_per_child_with_its_latest_tags(registry: Registry) -> None:
    first = register(registry, "a", **{"moesaic.figure": "1", "moesaic.gone": "2", "anothers": "yes"})
    assert (first.number, first.aliases) == (1, ())
    assert register(registry, "b").number == 2
    again = register(registry, "a", **{"moesaic.figure": "3"})
    assert again.number == 1
    assert again.source == f"moesaic:///store/manifests/{'a' * 64}.json"
    assert again.tags == {
        "moesaic.manifest": "a" * 64,
        "moesaic.figure": "3",
        "moesaic.gone": "",
        "anothers": "yes",
    }
    registry.challenge(1)
    assert registry.version("challenger").aliases == ("challenger",)


def test_a_version_is_linked_to_the_run_that_made_it(address: RegistryAddress) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(address.uri)
    run = client.create_run(client.create_experiment(uuid.uuid4().hex)).info.run_id
    registry = Registry(RegistryAddress(address.uri, run), f"child-{uuid.uuid4().hex[:12]}")
    registry.create()
    register(registry, "a")
    assert client.get_model_version(registry.model, "1").run_id == run


def test_champions_come_and_go_back(registry: Registry) -> None:
    one, two, three = (register(registry, content) for content in "abc")
    with pytest.raises(ArtifactError, match="no champion before version None"):
        registry.roll_back()
    for version in (one, two, three):
        assert registry.promote(version, registry.history()) == "promoted"
        assert registry.version(CHAMPION).number == version.number
    assert registry.promote(three, registry.history()) == "already"
    with pytest.raises(ArtifactError, match=r"champion of .* is version 3, not 2"):
        registry.roll_back(2)
    assert registry.roll_back(3) == (3, 2)
    assert registry.promote(three, registry.history()) == "superseded", "rolled back, so not by repeating a command"
    assert registry.version(CHAMPION).number == 2
    assert registry.promote(three, registry.history(), again=True) == "promoted"
    assert [registry.roll_back() for _ in range(2)] == [(3, 2), (2, 1)]
    with pytest.raises(ArtifactError, match="no champion before version 1"):
        registry.roll_back()
    assert registry.version(CHAMPION).number == 1


def test_a_champion_set_by_hand_is_gone_back_to(registry: Registry) -> None:
    one, two = (register(registry, content) for content in "ab")
    registry._client.set_registered_model_alias(registry.model, CHAMPION, str(one.number))
    assert registry.history().champion == 1
    assert registry.promote(two, registry.history()) == "promoted"
    assert registry.roll_back() == (2, 1)


def test_only_one_of_two_processes_wins(registry: Registry, racers: list[Racer]) -> None:
    """Both decide against the same champion; whoever is second must decide anew."""
    for attempt in range(_ROUNDS):
        versions = [register(registry, content).number for content in "abcdefghijkl"[2 * attempt : 2 * attempt + 2]]
        together(racers, registry, "read", versions)
        outcomes = together(racers, registry, "promote", versions)
        assert sorted(outcomes) == ["overtaken", "promoted"]
        champion = versions[outcomes.index("promoted")]
        assert registry.version(CHAMPION).number == registry.history().champion == champion
    assert len(registry.history().moves) == _ROUNDS
    before = registry.history().champions
    rolled = together(racers, registry, "rollback", [before[-1]] * 2)
    assert [list(before[-1:-3:-1])] == [one for one in rolled if isinstance(one, list)][:1]
    assert registry.version(CHAMPION).number == before[-2], "of two that went back from the same champion, one counts"


def test_two_processes_register_one_child_once(registry: Registry, racers: list[Racer]) -> None:
    for content in "abcdef":
        numbers = together(racers, registry, "register", [content * 64] * 2)
        assert numbers[0] == numbers[1]
        (kept,) = registry._versions_of(content * 64)
        assert kept.number == numbers[0]


class Killed(BaseException):
    """The process ends here; nothing after it runs."""


def kill_at(registry: Registry, call: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the registry's client make so many calls and no more; returns those that it made."""
    made: list[str] = []
    client = registry._client

    class Client:
        def __getattr__(self, name: str) -> Any:
            def called(*given: Any, **named: Any) -> Any:
                if len(made) == call:
                    raise Killed
                made.append(name)
                return getattr(client, name)(*given, **named)

            return called

    monkeypatch.setattr(registry, "_client", Client())
    return made


def stride(address: RegistryAddress) -> int:
    """From one moment of death to the next: every call in the file; every third on the server, which is slow."""
    return 1 if address.uri.startswith("sqlite:") else 3


def promote_whole(registry: Registry, content: str) -> None:
    """What the stage does."""
    registry.create()
    known = registry.history()
    version = register(registry, content)
    registry.challenge(version.number)
    registry.promote(version, known)


def test_a_promotion_killed_anywhere_is_finished_by_the_next_one(
    address: RegistryAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, finished = 0, False
    while not finished:
        registry = Registry(address, f"killed-{uuid.uuid4().hex[:12]}")
        with monkeypatch.context() as patch:
            made = kill_at(registry, call, patch)
            try:
                promote_whole(registry, "a")
                finished = True
            except Killed:
                call += stride(address)
        promote_whole(registry, "a")
        versions = registry._search(registry.model)
        assert [(int(entry.version), entry.tags["moesaic.manifest"]) for entry in versions] == [(1, "a" * 64)]
        assert registry.version(CHAMPION).aliases == ("challenger", CHAMPION)
        assert len(registry._moves()) == 1
    assert made.count("create_model_version") == 2, "the child and the move"


def test_a_rollback_killed_anywhere_goes_back_once(address: RegistryAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    call, finished = 0, False
    while not finished:
        registry = Registry(address, f"killed-{uuid.uuid4().hex[:12]}")
        for content in "ab":
            promote_whole(registry, content)
        with monkeypatch.context() as patch:
            made = kill_at(registry, call, patch)
            try:
                registry.roll_back()
                finished = True
            except Killed:
                call += stride(address)
        if registry.version(CHAMPION).number == 2:
            assert registry.roll_back() == (2, 1)
        assert registry.version(CHAMPION).number == registry.history().champion == 1
    assert made.count("set_registered_model_alias") == 1


def test_what_is_not_there(registry: Registry) -> None:
    with pytest.raises(ArtifactError, match="has no alias 'champion'; give a version's number or one of: none"):
        registry.version(CHAMPION)
    with pytest.raises(ArtifactError, match=r"has no version 4 of child-\w+; `moesaic promote` makes one"):
        registry.version("4")
    with pytest.raises(ArtifactError, match="has no registered model nobody"):
        Registry(registry.address, "nobody").version("1")


def test_a_deleted_move_is_noticed(registry: Registry) -> None:
    for content in "ab":
        promote_whole(registry, content)
    registry._client.delete_model_version(f"{registry.model}.promotions", "1")
    with pytest.raises(ArtifactError, match="move 1 is missing from the record of promotions"):
        registry.settle()


def test_whom_the_server_does_not_know(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-wrong-password")
    with pytest.raises(ConfigError, match=r"does not know the user \(401\); set MLFLOW_TRACKING_USERNAME") as refused:
        Registry(RegistryAddress(mlflow_server.uri), "child").create()
    assert "a-wrong-password" not in str(refused.value)


def test_who_may_only_read_cannot_promote(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(RegistryAddress(mlflow_server.uri), f"child-{uuid.uuid4().hex[:12]}")
    promote_whole(registry, "a")
    version = register(registry, "b")
    reader = f"reader-{uuid.uuid4().hex[:8]}"
    mlflow_server.add_user(reader, "a-password-of-a-reader")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", reader)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-password-of-a-reader")
    assert registry.version(CHAMPION).number == 1
    for change in (
        lambda: registry.promote(version, registry.history()),
        lambda: register(registry, "c"),
        lambda: registry.challenge(2),
    ):
        with pytest.raises(ConfigError, match=f"ask for the right to edit {registry.model} and {registry.model}.prom"):
            change()
    assert registry.history().champions == (1,)


def test_a_server_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address = RegistryAddress("http://somebody:a-secret@127.0.0.1:9")
    with pytest.raises(MoesaicError, match=r"registry at http://somebody:\*\*\*@127.0.0.1:9 failed") as failure:
        Registry(address, "child").create()
    assert isinstance(failure.value, StageError)
    assert "a-secret" not in str(failure.value)
