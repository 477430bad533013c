"""NeMo-RL's own source, and that of the AutoModel that it pins, with what they import on CPUs; made once.

The registry has no package of NeMo-RL, so its source is the repository's at a commit (`surface.COMMIT`), from GitHub,
or from a folder with checkouts ``RL`` and ``Automodel`` that ``MOESAIC_NEMO_RL_SOURCE`` names.
"""

import os
import tarfile
import urllib.request
from pathlib import Path

from moesaic.core.cache import cache_directory
from moesaic.core.errors import StageError
from moesaic.core.files import written_atomically
from moesaic.core.own_environment import OwnEnvironment
from moesaic.recover.reinforce.nemo_rl.surface import AUTOMODEL_COMMIT, COMMIT

SOURCE = "MOESAIC_NEMO_RL_SOURCE"
ENVIRONMENT = OwnEnvironment(
    title="NeMo-RL",
    program="python",
    variable="MOESAIC_NEMO_RL",
    pins=Path(__file__).with_name("nemo_rl_pins.txt"),
    torch="cpu",
)
_REPOSITORIES = {"RL": COMMIT, "Automodel": AUTOMODEL_COMMIT}


def find_sources() -> list[Path]:
    """The checkouts, in the order of `PYTHONPATH`.

    Raises:
        StageError: if they are not there and cannot be fetched.
    """
    if given := os.environ.get(SOURCE):
        return [Path(given) / name for name in _REPOSITORIES]
    return [_fetch(name, commit) for name, commit in _REPOSITORIES.items()]


def _fetch(name: str, commit: str) -> Path:
    folder = cache_directory() / "nemo-rl" / f"{name}-{commit}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        address = f"https://codeload.github.com/NVIDIA-NeMo/{name}/tar.gz/{commit}"
        try:
            with (
                written_atomically(folder) as partial,
                urllib.request.urlopen(address, timeout=60) as answer,
                tarfile.open(fileobj=answer, mode="r|gz") as archive,
            ):
                archive.extractall(partial, filter="data")
        except OSError as failure:
            raise StageError(f"{address} cannot be fetched ({failure}); let {SOURCE} name checkouts") from failure
    (checkout,) = folder.iterdir()
    return checkout
