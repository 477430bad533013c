"""What Moesaic is made of, and what is known against it: bills of materials, and an audit of every pin.

Run by ``make sbom`` and ``make audit``, which put the programs into an environment of their own (``tools.txt``).
Bills are CycloneDX JSON without times or serial numbers: the same packages give the same bytes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import moesaic
from images.requirements import FOLDER, ROOT, RUNTIMES, path_of
from moesaic.core.errors import ConfigError, MoesaicError, StageError

BILLS = ROOT / "build" / "sbom"
TOOLS = FOLDER / "tools.txt"
SERVICES = ("pypi", "osv")


def programs() -> dict[str, Path]:
    """The pins of programs that have an environment of their own inside an image."""
    return {f"{name}-{program}": path for name in RUNTIMES for program, path in RUNTIMES[name].programs.items()}


def audited() -> dict[str, Path]:
    """All pins there are: what images add is among the constraints, the bases' packages are NVIDIA's to audit."""
    return {"constraints": ROOT / "constraints.txt", **programs(), "tools": TOOLS}


def write_bills(tools: Path, directory: Path, python: Path) -> list[Path]:
    """A bill of this environment, and of what each image adds to its base.

    Args:
        tools: where the programs are.
        directory: where the bills go.
        python: the environment's.

    Raises:
        StageError: if the program fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sources = {"environment": ["environment", str(python)]}
    added = {name: path_of(name) for name in RUNTIMES} | programs()
    sources |= {name: ["requirements", str(path)] for name, path in added.items()}
    written = []
    with tempfile.TemporaryDirectory() as place:
        for name, source in sources.items():
            about, bill = Path(place) / "pyproject.toml", Path(place) / f"{name}.json"
            about.write_text(_subject(name))
            options = ["--output-reproducible", "--pyproject", str(about), "--output-file", str(bill)]
            quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
            if subprocess.run([program(tools, "cyclonedx-py"), *source, *options], env=quiet, check=False).returncode:
                raise StageError(f"the bill of {name} could not be written; see above")
            written.append(Path(shutil.copyfile(bill, directory / bill.name)))
    return written


def audit(tools: Path, service: str, osv_url: str | None) -> None:
    """Look every pin up among the known vulnerabilities.

    Raises:
        StageError: if there is one, or if a pin could not be looked up: no answer is not a good answer.
    """
    options = ["--strict", "--disable-pip", "--no-deps", "--progress-spinner=off", f"--vulnerability-service={service}"]
    options += [f"--osv-url={osv_url}"] if osv_url else []
    bad = []
    for name, path in audited().items():
        print(f"{name}:", file=sys.stderr, flush=True)
        if subprocess.run([program(tools, "pip-audit"), *options, f"--requirement={path}"], check=False).returncode:
            bad.append(name)
    if bad:
        raise StageError(
            f"the audit of {', '.join(bad)} found something, or {service} did not answer (see above); raise what is "
            f"vulnerable in constraints.txt, or ask another service (SERVICE={' or '.join(SERVICES)}, OSV_URL=)"
        )


def program(tools: Path, name: str) -> str:
    """The path of one of the tools.

    Raises:
        ConfigError: if it is not installed there.
    """
    path = tools / name
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; `make sbom` and `make audit` install it from {TOOLS}")
    return str(path)


def _subject(name: str) -> str:
    """What the bill is about: our own pyproject.toml with this version, and the image's name."""
    text = (ROOT / "pyproject.toml").read_text()
    text = text.replace('dynamic = ["version"]', f'version = "{moesaic.__version__}"', 1)
    return text if name == "environment" else text.replace('name = "moesaic"', f'name = "moesaic-{name}"', 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the bills, or audit the pins; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("sbom", "audit"))
    parser.add_argument("--tools", type=Path, required=True, help="directory of cyclonedx-py and pip-audit")
    parser.add_argument("--output", type=Path, default=BILLS, help="where the bills go (%(default)s)")
    parser.add_argument("--service", choices=SERVICES, default=SERVICES[0], help="who is asked (%(default)s)")
    parser.add_argument("--osv-url", help="a server of your own that answers as OSV does")
    given = parser.parse_args(arguments)
    try:
        if given.action == "sbom":
            print(*write_bills(given.tools, given.output, Path(sys.executable)), sep="\n")
        else:
            audit(given.tools, given.service, given.osv_url)
    except MoesaicError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
