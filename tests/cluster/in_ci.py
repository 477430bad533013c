"""``python -m tests.cluster.in_ci``: what of `make test-cluster` needs no image, for `.ci/run`; about three minutes.

Overlays applied twice and removed, the rights of their accounts, and what webhooks and admission take and refuse. On
the cluster that ``KUBECONFIG`` names; or on one that the command ``MOESAIC_CLUSTER_UP`` starts, as root, printing the
path of its kubeconfig, and that ``MOESAIC_CLUSTER_DOWN`` removes. Without a cluster that can be had and has room for
the overlays, it says why in a line and ends well.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UP, DOWN = "MOESAIC_CLUSTER_UP", "MOESAIC_CLUSTER_DOWN"
MANIFESTS = Path(__file__).parents[2] / "manifests"
UP_S = 240
"""How long a start may take; the tests take two minutes after it, and no more than six are there for both."""


class NoClusterError(Exception):
    """There is none, for this reason."""


def main() -> int:
    try:
        with cluster() as kubeconfig:
            check(kubeconfig)
            tests = [sys.executable, "-m", "pytest", "-m", "cluster", "tests/cluster/test_manifests_applied.py"]
            return subprocess.run(tests, env=os.environ | {"KUBECONFIG": kubeconfig}, check=False).returncode
    except NoClusterError as reason:
        print(f"tests on a cluster are skipped: {reason}")
        return 0


@contextmanager
def cluster() -> Iterator[str]:
    """The kubeconfig of the cluster that is there, or of one that is started for this."""
    if kubeconfig := os.environ.get("KUBECONFIG"):
        yield kubeconfig
        return
    up, down = os.environ.get(UP), os.environ.get(DOWN)
    if not (up and down):
        raise NoClusterError(f"KUBECONFIG names none, and {UP} and {DOWN} name no commands that start and remove one")
    if os.geteuid():
        raise NoClusterError(f"{UP} needs root")
    try:
        said = call(shlex.split(up), UP_S)
        if not said:
            raise NoClusterError(f"{UP} printed no path of a kubeconfig")
        yield said.splitlines()[-1]
    finally:
        with suppress(OSError):
            subprocess.run(shlex.split(down), stdout=subprocess.DEVNULL, check=False)


def check(kubeconfig: str) -> None:
    """Whether the cluster answers, knows every kind of object of the overlays, and has none of them."""
    from tests.cluster.pods import KUBECTL

    for overlay in sorted((MANIFESTS / "overlays").iterdir()):
        words = ["get", "--request-timeout=20s", "--ignore-not-found", "-o", "name", "-k", str(overlay)]
        if found := call([KUBECTL, *words], 60, KUBECONFIG=kubeconfig).split():
            raise NoClusterError(f"the cluster has {found[0]}, which they would remove")


def call(command: list[str], seconds: float, **variables: str) -> str:
    """What a command says; its last words are the reason, if it fails."""
    environment = os.environ | variables
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError) as failure:
        words = getattr(failure, "stderr", None) or str(failure)
        last = (words if isinstance(words, str) else words.decode()).strip().splitlines()[-1]
        raise NoClusterError(f"`{' '.join(command[:3])} ...`: {last}") from failure
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
