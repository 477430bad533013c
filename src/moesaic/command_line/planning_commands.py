"""``moesaic synth`` and ``moesaic plan``: a model of the real layout to practise on, and what a run would take."""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moesaic.command_line.model_option import MODEL, add_revision, find_named
from moesaic.core.config import Config
from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.core.yaml_text import read_yaml
from moesaic.costs.facts import Assumed, Facts, PipelineTask, room_bytes
from moesaic.models.families import PUBLISHED
from moesaic.pipelines import find_pipeline
from moesaic.platform.cluster import read_profile
from moesaic.platform.cluster.agreement import check_agreement
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.planning import MEMORY, Planned, assume_child, plan, released_child, totals
from moesaic.platform.planning.devices import by_stage, check_devices, largest_by_stage
from moesaic.recover.distill.needs import (
    GPUS_PER_NODE,
    check_nodes,
    fewest_nodes,
)
from moesaic.recover.reinforce.needs import policy_memory
from moesaic.recover.reinforce.stage import ReinforceConfig
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.prune_model.stage import PruneModelConfig
from moesaic.stages import STAGES

MIB, GIB = 2**20, 2**30
_MODEL_INPUTS = ("parent", "model", "child", "policies", "bundle")
"""Inputs of stages that are models, whose files a stage reads unless it takes their manifests only."""
_POLICIES = "reinforce_configs"


def add_planning_commands(commands: Any) -> None:
    """Add ``synth`` and ``plan`` to the command line."""
    synth = commands.add_parser("synth", help="write a random checkpoint of a published model's layout, at any size")
    synth.set_defaults(command=_synth)
    synth.add_argument("output", type=Path, help="directory to make")
    synth.add_argument("--like", required=True, help=" or ".join(PUBLISHED))
    synth.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="multiplies hidden size and expert width (to multiples of 32), heads (8 query heads of 64 to a KV head) "
        "and vocabulary (to a multiple of 64); layers and experts stay, so bytes fall with its square "
        "(1 is the full size: 60.8 GiB of gpt-oss-120b)",
    )
    synth.add_argument("--layers", type=int, help="number of layers (the original's)")
    synth.add_argument("--experts", type=int, help="experts of every layer (the original's)")
    synth.add_argument("--shards", type=int, help="number of files (the original's)")
    synth.add_argument("--seed", type=int, default=0, help="of the random weights (%(default)s)")
    synth.add_argument("--dry-run", action="store_true", help="only say what would be written")

    planning = commands.add_parser("plan", help="what a pipeline run would take, before anything is spent")
    planning.set_defaults(command=_plan)
    planning.add_argument("pipeline", help="compress (the whole method) or search")
    planning.add_argument("--recipe", required=True, help="a recipe, such as gpt_oss_120b_h100x8")
    model = planning.add_mutually_exclusive_group(required=True)
    model.add_argument("--parent", help=f"{MODEL}; only its headers are read")
    model.add_argument("--like", help=f"instead of a checkpoint: {' or '.join(PUBLISHED)} at full size")
    add_revision(planning)
    planning.add_argument("--data", type=Path, help="directory of the data sets, to count problems (assumed otherwise)")
    planning.add_argument("--store", help="s3://bucket/prefix of the store, to plan its traffic")
    planning.add_argument(
        "--nodes", type=int, help="nodes of eight GPUs that distill runs on (the fewest that hold it)"
    )
    planning.add_argument("--profile", type=Path, help="cluster profile that must be able to run the recipe")
    planning.add_argument(
        "--simulate",
        action="store_true",
        help="run ranking, scoring, refinement, calibration and a step of distill on tensors without values, for their "
        "true memory on a GPU; it takes minutes",
    )
    planning.add_argument("--json", action="store_true", help="print JSON, every task by itself")


def _synth(options: argparse.Namespace) -> None:
    from moesaic.models.checkpoint import Checkpoint
    from moesaic.models.synthesis import find_model, plan_shards, scale_model, write_synthetic

    model = scale_model(find_model(options.like), options.scale, options.layers, options.experts, options.shards)
    shape, blocks = model.shape, model.architecture.blocks
    print(
        f"{options.like} at scale {options.scale:g}: {model.num_bytes / GIB:.1f} GiB in "
        f"{len(plan_shards(model))} files, "
        f"{len(blocks)} layers of {blocks[-1].num_experts} experts, hidden {shape.hidden_size}, "
        f"{shape.num_heads} heads, vocabulary {shape.vocab_size}"
    )
    if not options.dry_run:
        write_synthetic(model, options.output, options.seed)
        Checkpoint.open(options.output)
        print(options.output)


def _plan(options: argparse.Namespace) -> None:
    from moesaic.pipelines.recipes import find_recipe

    recipe = find_recipe(options.recipe)
    manifest = find_pipeline(options.pipeline, recipe.rounds, recipe.baseline is not None)
    facts, notes = _facts(options, recipe)
    if options.store is not None and not options.store.startswith("s3://"):
        raise ConfigError(f"--store {options.store} is not s3://bucket/prefix; a directory has no traffic to plan")
    tasks = read_tasks(manifest, recipe)
    if options.profile is not None:
        profile = read_profile(options.profile)
        profile.check_stages(STAGES)
        check_agreement(tasks, profile)
    if facts.target is not None:
        nodes = _training_nodes(options, tasks, facts)
        facts = replace(facts, training_gpus=GPUS_PER_NODE * nodes)
        notes += [f"What is trained is planned for {nodes} nodes of {GPUS_PER_NODE} GPUs."]
    planned = plan(tasks, facts, simulate=options.simulate)
    notes += [_spilled(planned)]
    if facts.target is not None:
        check_devices(planned, facts)
    if options.json:
        print(json.dumps(_as_json(options, facts, planned, notes), indent=1))
    else:
        Console().print(_table(planned, traffic=options.store is not None))
        counted = [f"{stage}: {_what(members)}" for stage, members in by_stage(planned).items() if _what(members)]
        print("\n".join(f"- {line}" for line in (*counted, *notes)))
        print("\n".join(["", "On one device at its peak:", *_peaks(planned)]))


def _training_nodes(options: argparse.Namespace, tasks: Iterable[PipelineTask[Config]], facts: Facts) -> int:
    """Nodes for everything that is trained: those asked for, or else the fewest that hold all of it.

    Raises:
        InfeasibleError: if a distillation does not fit, saying what would.
        ConfigError: if its rows cannot be shared.
    """
    distillations = _training("distill", tasks)
    if options.nodes is not None:
        for config in distillations:
            check_nodes(config, facts, options.nodes)
        return int(options.nodes)
    nodes = max((fewest_nodes(config, facts) for config in distillations), default=1)
    policies = _training("reinforce", tasks)
    while any(_is_too_large(policy, facts, nodes) for policy in policies):
        more = 2 * nodes
        if any(config.rows_per_step % (more * GPUS_PER_NODE * config.rows_per_forward) for config in distillations):
            break  # what does not fit is told when all stages are planned
        nodes = more
    return nodes


def _is_too_large(policy: ReinforceConfig, facts: Facts, nodes: int) -> bool:
    memory = policy_memory(policy, replace(facts, training_gpus=GPUS_PER_NODE * nodes))
    return sum(memory.values()) > room_bytes(facts)


def _training(stage: str, tasks: Iterable[PipelineTask[Any]]) -> list[Any]:
    """The different configs of a stage's tasks that train."""
    configs = [task.config for task in tasks if task.stage == stage and task.config.steps]
    return list({config.to_json(): config for config in configs}.values())


def _facts(options: argparse.Namespace, recipe: Any) -> tuple[Facts, list[str]]:
    """The facts to plan with, and notes on what they assume."""
    from moesaic.models import layout

    shape, parent, packed = _sizes(options)
    child = assume_child(parent, recipe.search_architecture)
    target, notes = _target(recipe.measure_costs, shape)
    assumed, source = _assumed(options.data, recipe.evaluate.problems_per_task)
    facts = Facts(shape, parent, packed, child, target, assumed)
    weights = [_size(layout.num_bytes(shape, model, packed)) for model in (parent, child)]
    released = released_child(parent)
    notes = [
        f"The parent has {weights[0]}. The child, not known yet, is planned with {weights[1]}: "
        + (f"the released {released[0]}." if released else "all layers at the recipe's share of experts."),
        f"{source}prompts of {assumed.prompt_tokens} tokens, replies of {assumed.reply_share:.0%} of the longest.",
        *notes,
    ]
    return facts, notes


def _sizes(options: argparse.Namespace) -> tuple[Any, Any, bool]:
    if options.like:
        from moesaic.models.synthesis import find_model

        model = find_model(options.like)
        return model.shape, model.architecture, model.packed
    from moesaic.models.checkpoint import Checkpoint

    find_named(options, "parent")
    checkpoint = Checkpoint.open(options.parent)
    return checkpoint.shape, checkpoint.architecture, checkpoint.packed


def _target(config: MeasureCostsConfig, shape: Any) -> tuple[Any, list[str]]:
    """The hardware to plan time with; none for a recipe that measures its costs on the machine it runs on."""
    from moesaic.costs.hardware import Target
    from moesaic.costs.hardware_tables import read_table

    if config.source == "measure":
        return None, ["Time is not modelled: the recipe measures its costs on the machine it runs on."]
    table = read_table(config.hardware)
    table.check_num_gpus(config.num_gpus, config.expert_parallel)
    note = (
        f"GPU-hours are those of kernels on {config.num_gpus} x {table.name} by its table of {table.date}; reading "
        "weights, communication in training and waiting come on top."
    )
    return Target(table, shape, config.num_gpus, config.kv_cache, config.engine, config.expert_parallel), [note]


def _assumed(data: Path | None, problems_per_task: int) -> tuple[Assumed, str]:
    """Problems in the data sets, or assumptions, and which of them it is; tasks are counted in problems."""
    if data is None:
        usual = Assumed()
        return usual, f"Assumed: {usual.num_prompts:,} prompts, {usual.num_tasks:g} tasks, "
    from moesaic.data.problems import first_of_each_task, read_problems

    for file in ("prompts.jsonl", "test.jsonl"):
        if not (data / file).is_file():
            raise ArtifactError(f"{data} holds no {file}")
    prompts = len(read_problems(data / "prompts.jsonl"))
    tests = len(first_of_each_task(read_problems(data / "test.jsonl"), problems_per_task))
    assumed = Assumed(num_prompts=prompts, num_tasks=tests / problems_per_task)
    return assumed, f"The data has {prompts:,} prompts and {tests:,} test problems to use. Assumed: "


# ---- the compiled pipeline as tasks ----


def read_tasks(manifest: Path, recipe: Any) -> list[PipelineTask[Config]]:
    """The tasks of a compiled pipeline with the recipe's configs, each behind those it takes models from.

    Loops are unrolled: over the recipe's policies, and over the search's baselines.
    """
    content = read_yaml(manifest)
    given = IngestConfig(parent="-", calibration_short="-", calibration_long="-", prompts="-", tests="-")
    arguments = recipe.arguments(given, "-", content["root"]["inputDefinitions"]["parameters"])
    reader = _Reader(content, arguments, recipe.search_architecture.rivals)
    return _in_order(list(reader.tasks()))


class _Reader:
    """Reads the tasks out of a compiled pipeline."""

    def __init__(self, content: Mapping[str, Any], arguments: Mapping[str, Any], rivals: Sequence[str]) -> None:
        self._components = content["components"]
        self._root = content["root"]["dag"]["tasks"]
        self._arguments = arguments
        self._rivals = rivals

    def tasks(self) -> Iterator[PipelineTask[Config]]:
        """All tasks, in no particular order."""
        for name, task in self._root.items():
            component = self._components[task["componentRef"]["name"]]
            if "dag" not in component:
                yield self._task(name, task, {}, "", None)
                continue
            outer = task["inputs"]["artifacts"]
            for index, item in enumerate(self._items(task)):
                for inner, inside in component["dag"]["tasks"].items():
                    yield self._task(inner, inside, outer, f"[{index}]", item)

    def _items(self, loop: Mapping[str, Any]) -> list[str]:
        over = loop["parameterIterator"]["items"]["inputParameter"]
        if over.endswith(_POLICIES):
            return list(self._arguments[_POLICIES])
        return [PruneModelConfig(candidate=name).to_json() for name in self._rivals]

    def _task(
        self, name: str, task: Mapping[str, Any], outer: Mapping[str, Any], suffix: str, item: str | None
    ) -> PipelineTask[Config]:
        from moesaic.stages import find_stage

        stage = find_stage(name.rstrip("0123456789").rstrip("-").replace("-", "_"))
        config = self._config(task, item)
        artifacts = task.get("inputs", {}).get("artifacts", {})
        models = [
            source
            for key in stage.required
            if key in _MODEL_INPUTS and key in artifacts and key not in stage.by_manifest
            for source in self._sources(artifacts[key], outer, suffix)
        ]
        return PipelineTask(name + suffix, stage.name, stage.config.parse(config), tuple(models))

    def _config(self, task: Mapping[str, Any], item: str | None) -> str:
        parameter = task["inputs"]["parameters"]["config"]["componentInputParameter"]
        parameter = parameter.removeprefix("pipelinechannel--")
        if parameter.endswith("-loop-item"):
            assert item is not None, "only tasks of a loop have items"
            return item
        return str(self._arguments[parameter])

    def _sources(self, artifact: Mapping[str, Any], outer: Mapping[str, Any], suffix: str) -> Iterator[str]:
        if "componentInputArtifact" in artifact:
            yield from self._sources(outer[artifact["componentInputArtifact"]], {}, "")
            return
        made = artifact["taskOutputArtifact"]
        producer = made["producerTask"]
        component = self._components[self._root[producer]["componentRef"]["name"]] if producer in self._root else {}
        if "dag" not in component:
            yield producer + suffix
            return
        inner = component["dag"]["outputs"]["artifacts"][made["outputArtifactKey"]]["artifactSelectors"][0]
        for index in range(len(self._items(self._root[producer]))):
            yield f"{inner['producerSubtask']}[{index}]"


def _in_order(tasks: list[PipelineTask[Config]]) -> list[PipelineTask[Config]]:
    """Sort tasks: each after those whose models it takes, otherwise alphabetically."""
    waiting, done, ordered = sorted(tasks, key=lambda task: task.name), set[str](), []
    while waiting:
        ready = next(task for task in waiting if done.issuperset(task.models))
        waiting.remove(ready)
        done.add(ready.name)
        ordered.append(ready)
    return ordered


# ---- what is printed ----


def _by_size(part: tuple[str, float]) -> float:
    return -part[1]


def _peaks(planned: Sequence[Planned]) -> list[str]:
    """A line for each stage: what it holds on a device, what that is, and how it is known."""
    return [
        f"- {one.task.stage}, {'simulated' if one.simulated else 'computed'}: {_size(one.needs.device_bytes)}: "
        + ", ".join(f"{what} {_size(size)}" for what, size in sorted(one.needs.device.items(), key=_by_size) if size)
        for one in largest_by_stage(planned)
    ]


def _spilled(planned: Sequence[Planned]) -> str:
    """A note on hidden states, if any stage keeps some."""
    states = {one.task.stage: one.needs.state_bytes for one in planned if one.needs.state_bytes}
    sizes = ", ".join(f"{stage} {_size(size)}" for stage, size in states.items())
    return (
        f"Hidden states stay on the GPU and in memory as far as there is room, the rest goes to disk; at most: {sizes}."
    )


def _as_json(options: argparse.Namespace, facts: Facts, planned: Sequence[Planned], notes: list[str]) -> dict[str, Any]:
    return {
        "pipeline": options.pipeline,
        "recipe": options.recipe,
        "model": options.like or str(options.parent),
        "child": [block.as_config() for block in facts.child.blocks],
        "notes": notes,
        "tasks": [one.as_json() for one in planned],
        "totals": totals(planned),
    }


def _table(planned: Sequence[Planned], traffic: bool) -> Table:
    """A table with the sums over each stage's tasks; memory is that of the largest task."""
    columns = [
        "tasks",
        "read",
        "written",
        "on a device",
        "host",
        "states",
        "GPU-hours",
        *(["S3 up", "S3 down"] if traffic else []),
    ]
    unit, title = (GIB, "GiB") if (totals(planned)["read_bytes"] or 0) > 100 * GIB else (MIB, "MiB")
    table = Table(title, box=None)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for stage, members in by_stage(planned).items():
        table.add_row(stage, str(len(members)), *_cells(totals(members), unit, traffic))
    table.add_section()
    table.add_row("total", str(len(planned)), *_cells(totals(planned), unit, traffic))
    return table


def _cells(sums: Mapping[str, float | None], unit: int, traffic: bool) -> list[str]:
    keys = ["read_bytes", "written_bytes", *MEMORY]
    hours = sums["gpu_hours"]
    cells = [f"{(sums[key] or 0) / unit:,.1f}" for key in keys]
    cells.append("not modelled" if hours is None else f"{hours:,.1f}")
    if traffic:
        cells += [f"{(sums[key] or 0) / unit:,.1f}" for key in ("upload_bytes", "download_bytes")]
    return cells


def _what(members: Iterable[Planned]) -> str:
    """The counts of a stage's tasks, summed."""
    sums: dict[str, float] = {}
    for one in members:
        for name, value in one.needs.counts.items():
            sums[name] = sums.get(name, 0) + value
    return ", ".join(
        f"{_short(name, value)} {name.removesuffix('_bytes').replace('_', ' ')}" for name, value in sums.items()
    )


def _short(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return _size(value)
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:,.0f}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes > GIB else f"{num_bytes / MIB:,.1f} MiB"
