"""Runs stages one after the other in plain Python, each in a directory of its own, and none twice.

A stage's output is kept under the name of its task. It is made again when its config, the code or anything that it was
made from has changed; a killed stage goes on from its scratch directory.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from moesaic.core.code import code_digest
from moesaic.core.config import Config
from moesaic.core.progress import say
from moesaic.core.stage import Stage

Given = Path | list[Path]
"""An input: a directory or a file, or a list of them."""


class Workbench:
    """Runs the stages of one run in one directory.

    Args:
        directory: holds ``<task>`` for every finished task, and what unfinished ones have so far under ``.work``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._keys: dict[Path, str] = {}

    def run(self, stage: Stage, config: Config, task: str = "", **inputs: Given) -> Path:
        """Run a stage, unless its output exists already; returns the output directory.

        Args:
            stage: what to run.
            config: of the stage's own class.
            task: what the output is called; the stage's name unless a stage runs more than once.
            inputs: by the names that the stage declares.

        Raises:
            MoesaicError: what the stage raises.
        """
        task = task or stage.name
        output, work = self.directory / task, self.directory / ".work" / task
        key = self._key(stage, config, inputs)
        mark = self.directory / ".work" / f"{task}.key"
        if not (output.is_dir() and mark.is_file() and mark.read_text() == key):
            self._make(stage, config, inputs, output, work / key[:16])
            mark.write_text(key)
        self._keys[output] = key
        return output

    def _make(self, stage: Stage, config: Config, inputs: Mapping[str, Given], output: Path, work: Path) -> None:
        say(f"{output.name}: started")
        made, scratch = work / "output", work / "scratch"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        scratch.mkdir(exist_ok=True)
        stage.run(config, **inputs, output=made, scratch=scratch)
        shutil.rmtree(output, ignore_errors=True)
        made.rename(output)
        shutil.rmtree(work.parent)
        say(f"{output.name}: done")

    def _key(self, stage: Stage, config: Config, inputs: Mapping[str, Given]) -> str:
        keys = {name: [self._identity(path) for path in _listed(given)] for name, given in sorted(inputs.items())}
        decisive = [stage.name, config.digest, keys, code_digest()]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def _identity(self, path: Path) -> str:
        """The key of a task's output; for other paths a digest of the names, sizes and times of their files."""
        if path in self._keys:
            return self._keys[path]
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _listed(given: Given) -> list[Path]:
    return given if isinstance(given, list) else [given]
