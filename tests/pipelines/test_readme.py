"""The README's table of stages is the declarations': every stage, its room, and nothing else."""

import re
from pathlib import Path

from moesaic.pipelines import example
from moesaic.stages import STAGES

ROOT = Path(__file__).parents[2]


def test_the_table_has_every_stage_and_its_room() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\[[\w/]+\]\((src/moesaic/[\w/]+)\) \|$", (ROOT / "README.md").read_text(), re.M)
    assert dict(rows) == {name: f"src/{stage.room.replace('.', '/')}" for name, stage in STAGES.items()}
    assert len(rows) == len(STAGES)


def test_every_room_has_what_a_stage_needs() -> None:
    for stage in STAGES.values():
        folder = ROOT / "src" / stage.room.replace(".", "/")
        assert folder.name == stage.name
        assert (folder / "run.py").is_file()
        assert stage.about[0].endswith("."), f"the docstring of {folder}/stage.py says what the stage does"


def test_links_in_the_documents_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_example_is_there() -> None:
    assert (example() / "parent" / "config.json").is_file()
    assert (example() / "data" / "test.jsonl").is_file()
