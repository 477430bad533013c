"""What all tests share: random models, and which tests run in the same process of several.

Nothing heavy is imported here: of ``pytest -n`` the process that only hands out the tests reads this file too.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from moesaic.models.checkpoint import Checkpoint

_LONGEST = ("automodel", "pipelines", "mlflow", "tests/command_line/test_installed.py", "tests/deploy/test_served_replies.py")
"""Groups that begin first, so that none is still running when all others are done."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests run in one process, and so do files that name one ``xdist_group``; the longest come first."""
    groups = {}
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))
        marker = item.get_closest_marker("xdist_group")
        assert marker is not None
        groups[item] = marker.args[0]
    items.sort(key=lambda item: _LONGEST.index(groups[item]) if groups[item] in _LONGEST else len(_LONGEST))


@pytest.fixture(scope="session")
def tiny_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed ``gpt_oss`` checkpoint of random weights, with tokenizer and chat template. Read only."""
    from tests.tiny_models import write_parent

    directory = tmp_path_factory.mktemp("models") / "tiny-parent"
    write_parent(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_parent: Path) -> "Checkpoint":
    """The same, opened."""
    from moesaic.models.checkpoint import Checkpoint

    return Checkpoint.open(tiny_parent)


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> bytes:
    """An MLflow database that holds nothing yet. MLflow takes seconds to make one, so all processes share it."""
    from moesaic.core.files import locked

    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent
    path = shared / "empty-mlflow.db"
    with locked(shared / "empty-mlflow.lock"):
        if not path.exists():
            from mlflow import MlflowClient

            MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``qwen3_moe`` checkpoint of random weights in BF16, as transformers' own class writes it. Read only."""
    from tests.tiny_models import write_small_qwen3

    directory = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    write_small_qwen3(directory)
    return directory
