"""What all tests share: random models, and which tests run in the same process of several.

Nothing heavy is imported here: of ``pytest -n`` the process that only hands out the tests reads this file too.
"""

import gc
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from moesaic.models.checkpoint import Checkpoint

_TOGETHER = (
    # They import AutoModel, and train in forks of the process that has.
    (
        "tests/recover/test_distill.py",
        "tests/recover/test_automodel_cluster_model.py",
        "tests/recover/test_simulation.py",
        "tests/pipelines/test_families.py",
    ),
    # Their pipelines' tasks are forks of one process.
    ("tests/pipelines/test_method.py", "tests/pipelines/test_local.py"),
    # One MLflow server is started for both.
    ("tests/platform/test_mlflow_down.py", "tests/platform/test_registry.py"),
    ("tests/command_line/test_installed.py",),
    ("tests/deploy/test_served_replies.py",),
)
"""Files whose tests run in one process of several. These are also the longest, so they begin first."""
_GROUPS = {file: number for number, files in enumerate(_TOGETHER) for file in files}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As ``--dist loadfile``, but what stands together above stays together."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return f"group {_GROUPS[file]}" if file in _GROUPS else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that none is still running when all others are done."""
    items.sort(key=lambda item: _GROUPS.get(item.nodeid.split("::")[0], len(_TOGETHER)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported here is never freed: the garbage collector need not look for it, now or in any test."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="module")
def one_thread() -> Generator[None]:
    """For tests that time blocks: threads that wait for one another on a busy machine are slower by any factor."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    from tests.tiny_models import write_qwen3, write_small

    directory = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    write_small(write_qwen3, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_glm4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``glm4_moe`` checkpoint of random weights in BF16, as transformers' own class writes it. Read only."""
    from tests.tiny_models import write_glm4, write_small

    directory = tmp_path_factory.mktemp("models") / "tiny-glm4"
    write_small(write_glm4, directory)
    return directory
