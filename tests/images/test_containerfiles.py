"""What every image promises, read off its Containerfile; `make test-cluster` runs them."""

import re
from pathlib import Path

import pytest
import yaml

from components import images as named
from images.build import base_of
from images.requirements import PYTHON, RUNTIMES, constraints, moesaic_requirements, path_of

FOLDER = Path(__file__).parents[2] / "images"
NAMES = list(RUNTIMES)
INSTRUCTIONS = {"ARG", "FROM", "USER", "RUN", "ENV", "LABEL", "WORKDIR", "ENTRYPOINT", "CMD"}


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Containerfile in order, continued lines joined."""
    lines = [line for line in (FOLDER / name / "Containerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word, rest) for word, _, rest in found]


def values(name: str, word: str) -> list[str]:
    return [rest for instruction, rest in instructions(name) if instruction == word]


def test_there_is_one_image_per_runtime() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/Containerfile")} == set(NAMES)
    assert {name.lower() for name in vars(named) if name.lower() in NAMES} == set(NAMES)
    used = {yaml.safe_load(path.read_text())["runtime"] for path in FOLDER.parent.glob("components/*/metadata.yaml")}
    assert used <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_known_instructions_only_and_begins_with_its_base(name: str) -> None:
    found = instructions(name)
    assert {word for word, _ in found} <= INSTRUCTIONS
    assert [word for word, _ in found[:2]] == ["ARG", "FROM"]
    assert values(name, "FROM") == ["${BASE_IMAGE}"]


@pytest.mark.parametrize("name", NAMES)
def test_the_base_is_nvidias_or_pythons_and_pinned(name: str) -> None:
    nvidias = r"nvcr\.io/nvidia/[a-z-]+(/release)?:v?\d+(\.\d+)+(-py3)?"
    pythons = rf"docker\.io/library/python:{PYTHON}\.\d+-slim-[a-z]+"
    assert re.fullmatch(pythons if name == "cpu" else nvidias, base_of(name))


def test_the_rl_base_is_the_version_whose_source_the_engine_was_written_for() -> None:
    from moesaic.recover.reinforce.nemo_rl.surface import IMAGE

    assert base_of("rl") == IMAGE


@pytest.mark.parametrize("name", NAMES)
def test_tasks_are_no_root_and_write_only_to_volumes(name: str) -> None:
    assert values(name, "USER") == ["root", "10001:0"]
    last_run = max(index for index, (word, _) in enumerate(instructions(name)) if word == "RUN")
    assert instructions(name).index(("USER", "10001:0")) > last_run
    assert values(name, "WORKDIR") == ["/scratch"]
    (environment,) = values(name, "ENV")
    assert {"HOME=/scratch", "PYTHONDONTWRITEBYTECODE=1", "MOESAIC_CACHE=/scratch/cache"} <= set(environment.split())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_comes_from_the_network_and_no_secret_goes_in(name: str) -> None:
    text = (FOLDER / name / "Containerfile").read_text()
    assert not re.search(r"\b(curl|wget|git clone|pip install|apt-get|ADD)\b", text)
    arguments = {argument.partition("=")[0] for argument in values(name, "ARG")}
    assert arguments == {"BASE_IMAGE", "VERSION", "REVISION"}
    assert not re.search(r"(?i)secret|token|password|credential", text)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is_and_can_be_asked_for_its_health(name: str) -> None:
    (labels,) = values(name, "LABEL")
    for label in ("title", "licenses", "version", "revision", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels
    assert values(name, "CMD") == ['["moesaic", "doctor"]']


@pytest.mark.parametrize("name", NAMES)
def test_committed_pins_are_what_the_extras_need(name: str) -> None:
    committed = path_of(name).read_text().splitlines()
    assert committed == RUNTIMES[name].requirements(), "run `python -m images.requirements`"
    pins = constraints()
    assert all(pins[line.partition("==")[0]] == line.partition("==")[2] for line in committed)
    if name != "cpu":
        assert {line.partition("==")[0] for line in committed} & {"torch", "numpy", "triton"} == set()


@pytest.mark.parametrize("name", NAMES)
def test_extras_exist_and_all_they_ask_for_is_brought_by_someone(name: str) -> None:
    runtime = RUNTIMES[name]
    asked = {requirement.name.lower().replace("_", "-") for requirement in moesaic_requirements(runtime.extras)}
    brought = {line.partition("==")[0] for line in path_of(name).read_text().splitlines()}
    from images.requirements import Requirement, closure

    assert asked <= brought | closure(map(Requirement, runtime.base_brings))
    assert "kfp" in brought
    needless = {"kfp-server-api", "google-cloud-storage"} | ({"kubernetes"} - asked)
    assert runtime.runs_pipelines or not needless & brought, "kfp comes without its dependencies"
