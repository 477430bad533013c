"""Runs while an image is built, in it: ``python3 install.py RUNTIME`` installs what build.py laid beside this file.

Our packages go into a folder of their own in front of the base's, so that nothing which NVIDIA built against its
PyTorch is replaced. Then all that moesaic needs must be there: from us, or from the base.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

CONTEXT = Path(__file__).parent
TARGET = "/opt/moesaic"
SCRATCH = Path("/scratch")
USER_ID, GROUP_ID = 10001, 0
"""No root. Group 0 owns nothing that it could write to; clusters that choose a user id of their own keep it."""


def install(pins: Path, target: str, *more: str) -> None:
    """Put pinned packages into a folder of their own, from the wheels in the context alone."""
    tool = [sys.executable, "-m", "pip"] if find_spec("pip") else ["uv", "pip"]
    wheels = ["--no-index", "--find-links", str(CONTEXT / "wheels"), "--no-deps", "--target", target]
    environment = {**os.environ, "PIP_CONSTRAINT": "", "PIP_ROOT_USER_ACTION": "ignore"}
    if tool[0] == "uv":
        wheels += ["--compile-bytecode", "--python", sys.executable]  # as pip does: no task could keep it
    subprocess.run([*tool, "install", *wheels, "--requirement", str(pins), *more], env=environment, check=True)


def install_program(pins: Path, target: str) -> None:
    """A command with packages of its own, which neither sees ours nor is seen by them."""
    install(pins, target)
    program = Path(target).with_name(pins.stem)
    program.write_text(f'#!/bin/sh\nPYTHONPATH={target} exec {sys.executable} {target}/bin/{pins.stem} "$@"\n')
    program.chmod(0o755)


def add_user() -> None:
    """The user that tasks run as, and the one folder beside /tmp that it may write to."""
    identity = ["--uid", str(USER_ID), "--gid", str(GROUP_ID), "--no-create-home", "--home-dir", str(SCRATCH)]
    subprocess.run([shutil.which("useradd") or "/usr/sbin/useradd", *identity, "moesaic"], check=True)
    SCRATCH.mkdir()
    os.chown(SCRATCH, USER_ID, GROUP_ID)
    SCRATCH.chmod(0o770)


def missing(wanted: list[str], opaque: list[str], without: list[str]) -> list[str]:
    """Packages that the wanted ones need, however deep, and that are not there, but for those that it does without.

    Into opaque ones we do not look.
    """
    from packaging.requirements import Requirement  # It may have come only now.
    from packaging.utils import canonicalize_name

    todo, seen, lacking = [Requirement(one) for one in wanted], set(), []
    while todo:
        requirement = todo.pop()
        if (key := (canonicalize_name(requirement.name), *sorted(requirement.extras))) in seen:
            continue
        seen.add(key)
        if key[0] in without:
            continue
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            lacking.append(requirement.name)
            continue
        if not requirement.specifier.contains(found.version, prereleases=True):
            print(f"note: {found.name} {found.version} is not {requirement}", file=sys.stderr)
        if key[0] not in opaque:
            extras = [{"extra": extra} for extra in ("", *requirement.extras)]
            needed = map(Requirement, found.requires or [])
            todo += [one for one in needed if one.marker is None or any(map(one.marker.evaluate, extras))]
    return sorted(lacking)


def main(runtime: str) -> None:
    """Install, then check."""
    folder = CONTEXT / runtime
    facts = json.loads((folder / "runtime.json").read_text())
    install(folder / "requirements.txt", TARGET, "moesaic")
    for program in facts["programs"]:
        install_program(folder / f"{program}.txt", f"/opt/{program}/packages")
    add_user()
    sys.path.insert(0, TARGET)
    importlib.invalidate_caches()
    if lacking := missing(facts["wanted"], facts["opaque"], facts["without"]):
        sys.exit(f"neither the base nor images/{runtime}/requirements.txt brings {', '.join(lacking)}")


if __name__ == "__main__":
    main(sys.argv[1])
