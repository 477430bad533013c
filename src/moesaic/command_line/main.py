"""The command line. Exit codes: 0 done, 1 failed, 2 the input cannot be used."""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moesaic.command_line.config_option import read_config
from moesaic.command_line.export_commands import add_export_commands
from moesaic.command_line.model_option import MODEL, add_revision, find_named
from moesaic.command_line.outside_option import add_outside_options, read_outside, show_outside
from moesaic.command_line.planning_commands import add_planning_commands, read_tasks
from moesaic.command_line.prepare_command import add_prepare_command
from moesaic.command_line.registry_commands import ARTIFACTS, add_registry_commands, say_promotion
from moesaic.command_line.serve_command import add_serve_command
from moesaic.command_line.store_commands import add_store_commands
from moesaic.command_line.submit_commands import add_submit_commands
from moesaic.core.errors import ArtifactError, ConfigError, MoesaicError
from moesaic.core.files import explained_file_errors
from moesaic.core.network import use_site_variables
from moesaic.core.redaction import redact
from moesaic.core.version import __version__
from moesaic.data.sets import FILES, DataSets
from moesaic.pipelines import example, find_pipeline
from moesaic.platform.planning.inputs import check_inputs
from moesaic.platform.store import Address, parse_address


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    use_site_variables()
    try:
        with explained_file_errors(Path.cwd()):
            options.command(options)
    except MoesaicError as failure:
        print(f"error: {redact(str(failure), os.environ)}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt as stopped:
        said = str(stopped) or "interrupted; the same command goes on from the last finished stage"
        print(said, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moesaic",
        description="Turn a mixture-of-experts reasoning model into a smaller, faster one.",
        epilog="Exit codes: 0 done, 1 failed, 2 the input cannot be used.",
    )
    parser.add_argument("--version", action="version", version=f"moesaic {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a whole pipeline on this machine; goes on where a killed run stopped")
    run.set_defaults(command=_run)
    _add_choice(run)
    run.add_argument("--output", type=Path, default=Path("runs/compress"), help="directory of the run (%(default)s)")
    run.add_argument("--store", type=parse_address, help="directory or s3://bucket/prefix of the store (OUTPUT/store)")

    run.add_argument(
        "--engine",
        choices=["vllm", "moesaic"],
        help="server to measure through (the recipe's; moesaic where vLLM cannot be installed)",
    )
    run.add_argument("--at-once", type=int, metavar="N", help="tasks that run at once, at most (as many as cores)")

    _add_stage(commands)
    add_prepare_command(commands)

    inspect = commands.add_parser("inspect", help="sizes and layout of a checkpoint, from its headers alone")
    inspect.set_defaults(command=_inspect)
    inspect.add_argument("model", help=MODEL)
    add_revision(inspect)

    report = commands.add_parser("report", help="show the outcome of a finished run")
    report.set_defaults(command=_report)
    report.add_argument("run", type=Path, help="directory of the run, as given to run --output")
    add_outside_options(report)

    add_planning_commands(commands)

    add_store_commands(commands)

    add_export_commands(commands)

    add_registry_commands(commands)

    add_serve_command(commands)

    add_submit_commands(commands, _add_choice, _choose, _prepare)

    doctor = commands.add_parser("doctor", help="what is installed and usable here, and what to do about the rest")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_stage(commands: Any) -> None:
    stage = commands.add_parser("stage", help="run one stage on directories, without Kubeflow")
    stage.set_defaults(command=_stage)
    stage.add_argument("name", help="name of a stage, such as rank_experts")
    stage.add_argument("config", help="its config: JSON, or a file that holds it; '{}' for the defaults")
    stage.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an input directory; repeat it for every input, and for every member of a list",
    )
    stage.add_argument("--output", type=Path, required=True, help="directory to make")
    stage.add_argument(
        "--store", type=parse_address, help="directory or s3://bucket/prefix of the store, where an input is a manifest"
    )


def _add_choice(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the pipeline, the recipe and the inputs."""
    parser.add_argument("pipeline", help="compress (the whole method) or search")
    parser.add_argument("--recipe", required=True, help="a recipe, such as tiny_cpu, or a file")
    parser.add_argument("--fast", action="store_true", help="take the recipe's shorter form, RECIPE_fast")
    parser.add_argument(
        "--seed", type=int, default=0, help="another number draws anew in all that learns (%(default)s)"
    )
    parser.add_argument("--parent", default=str(example() / "parent"), help=f"{MODEL} (the tiny reasoner)")
    add_revision(parser)
    parser.add_argument(
        "--data", type=Path, default=example() / "data", help=f"directory of {', '.join(FILES.values())} (its data)"
    )


def _run(options: argparse.Namespace) -> None:
    from moesaic.platform.runs.local import run_compiled
    from moesaic.platform.runs.run_context import RunContext
    from moesaic.platform.runs.tracking import pipeline_run

    if options.at_once is not None and options.at_once < 1:
        raise ConfigError(f"--at-once {options.at_once}: at least 1 task runs at a time")
    manifest, recipe, name = _choose(options)
    console = Console(stderr=True)
    recipe = _served(recipe, options.engine, console)
    options.output.mkdir(parents=True, exist_ok=True)
    context = RunContext.for_local_run(options.output, options.store)
    arguments = _prepare(options, manifest, recipe, context.store)
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
    assert context.tracking_uri is not None, "a local run always has an address for its MLflow runs"
    console.print(f"{name}: the run lies in {options.output}", highlight=False)
    with pipeline_run(context.tracking_uri, name, arguments, digest) as run_id:
        outputs = run_compiled(manifest, arguments, context.in_pipeline_run(run_id), console, options.at_once)
    _link_outputs(options.output, context.store, outputs)
    _show_outcome(options.output)
    print(f"\nEvery stage's configs, metrics and records: mlflow ui --backend-store-uri {context.tracking_uri}")


def _served(recipe: Any, engine: str | None, console: Console) -> Any:
    """The recipe with the server that was asked for; with our own where the recipe's cannot be installed."""
    from moesaic.deploy.engines.vllm.environment import why_unsupported

    if engine is None and recipe.benchmark_serving.engine == "vllm" and (why := why_unsupported()):
        console.print(f"vLLM cannot be installed here ({why}): moesaic serve is measured instead", highlight=False)
        engine = "moesaic"
    return recipe if engine is None else recipe.served_by(engine)


def _choose(options: argparse.Namespace) -> tuple[Path, Any, str]:
    """Check the inputs; returns the compiled pipeline, its recipe, and a name for the run."""
    from moesaic.pipelines.recipes import find_recipe

    wanted = options.recipe + "_fast" * options.fast
    recipe = find_recipe(wanted).seeded(options.seed)
    manifest = find_pipeline(options.pipeline, recipe.rounds, recipe.baseline is not None)
    data = DataSets.at(options.data)
    data.check()
    options.source = find_named(options, "parent")
    _check_parent(options.parent)
    data.check_template(options.parent)
    check_inputs(read_tasks(manifest, recipe), options.parent, data)
    labelled = recipe.labelled(manifest.stem, Path(wanted).stem)
    return manifest, labelled, f"{manifest.stem} ({wanted}, seed {options.seed})"


def _prepare(options: argparse.Namespace, manifest: Path, recipe: Any, store: Address) -> dict[str, Any]:
    """Put the inputs into the store; returns the arguments of the pipeline."""
    from moesaic.core.code import code_version
    from moesaic.platform.runs.local import parameters_of

    inputs = _add_inputs(store, options.parent, options.data, options.source)
    arguments: dict[str, Any] = recipe.arguments(inputs, code_version(), parameters_of(manifest))
    return arguments


def _check_parent(parent: Path) -> None:
    """Raise an error for an unusable parent before anything is copied or started; name what of it nothing uses."""
    from moesaic.models.checkpoint import Checkpoint
    from moesaic.platform.ingest.run import check_model

    check_model(parent)
    for what, which in Checkpoint.open(parent).left_out.items():
        print(f"{parent}: {what}: {which}", file=sys.stderr)


def _add_inputs(store: Address, parent: Path, data: Path, source: str | None = None) -> Any:
    from moesaic.models.checkpoint import Checkpoint
    from moesaic.platform.ingest.stage import IngestConfig
    from moesaic.platform.store import Store

    contents = Store.at(store)
    parts = Checkpoint.open(parent).parts
    model = contents.add_directory(parent, "model", format="safetensors", producer="ingest", source=source, only=parts)
    sets = {
        name: contents.add_file(file, "dataset", format="jsonl", producer="ingest").id
        for name, file in DataSets.at(data).by_name().items()
    }
    return IngestConfig(parent=model.id, **sets)


def _link_outputs(run: Path, store: Address, outputs: dict[str, Path]) -> None:
    """Give each output a short path in the run's directory; a model's leads to its files in the store.

    Under ``artifacts/`` lie the outputs as Kubeflow has them: of a model its manifest, and every record.
    """
    from moesaic.platform.store import Manifest, Store
    from moesaic.platform.store.manifest import MANIFEST

    (run / ARTIFACTS).mkdir(exist_ok=True)
    for name, path in outputs.items():
        whole = Store.at(store).materialize(Manifest.read(path)) if (path / MANIFEST).is_file() else path
        _link(run / name, whole)
        _link(run / ARTIFACTS / name, path)


def _link(link: Path, target: Path) -> None:
    """Create or replace a relative link atomically."""
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(target, link.parent.absolute()))
    new.replace(link)


def _show_outcome(run: Path) -> None:
    from moesaic.platform.runs.outcome import outcome_tables

    summary = run / "report" / "summary.json"
    if not summary.is_file():
        raise ArtifactError(f"{run} holds no finished run; `moesaic run --output {run}` makes one or goes on with it")
    console = Console()
    console.print(*outcome_tables(json.loads(summary.read_text())))
    say_promotion(run)
    for name, path in (("Report", "report/report.html"), ("Child", "child"), ("Bundle", "bundle")):
        if (run / path).exists():
            print(f"{name + ':':<7} {run / path}")


def _stage(options: argparse.Namespace) -> None:
    from moesaic.platform.registry.registry import RegistryAddress
    from moesaic.platform.runs.runtime import perform, plan_stage
    from moesaic.platform.store import Store
    from moesaic.stages import find_stage

    given = _named_paths(options.input, find_stage(options.name).lists)
    run = plan_stage(
        options.name, read_config(options.config), given, Store.at(options.store) if options.store else None
    )
    if options.output.exists():
        raise ConfigError(f"--output {options.output} exists already; choose another or remove it")
    work = options.output.with_name(f".{options.output.name}.{run.key[:12]}")
    output, scratch = work / "output", work / "scratch"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    scratch.mkdir(exist_ok=True)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    record = perform(run, output, scratch, options.store, RegistryAddress(uri) if uri else None)
    output.rename(options.output)
    shutil.rmtree(work)
    table = Table("metric", "value", box=None)
    for name, value in record.metrics.items():
        table.add_row(name, f"{value:.6g}")
    Console().print(table)
    print(f"{options.output} ({record.duration_s:.1f} s, {record.peak_memory_mib:.0f} MiB)")


def _named_paths(pairs: Sequence[str], lists: Sequence[str]) -> dict[str, Path | list[Path]]:
    """Parse ``NAME=PATH`` options; an input that takes a list becomes a list even with one member."""
    named: dict[str, Path | list[Path]] = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator:
            raise ConfigError(f"--input {pair!r} is not NAME=PATH")
        if name in lists:
            members = named.setdefault(name, [])
            assert isinstance(members, list)
            members.append(Path(path))
        elif name in named:
            raise ConfigError(f"--input {name} is given twice")
        else:
            named[name] = Path(path)
    return named


def _inspect(options: argparse.Namespace) -> None:
    from moesaic.costs import block_costs as costs
    from moesaic.models import layout
    from moesaic.models.architecture import AXES
    from moesaic.models.checkpoint import Checkpoint

    find_named(options)
    checkpoint = Checkpoint.open(options.model)
    shape, architecture = checkpoint.shape, checkpoint.architecture
    console = Console()
    sizes = Table("", "", box=None, show_header=False)
    sizes.add_row("parameters", f"{layout.num_parameters(shape, architecture):,}")
    sizes.add_row("weights", f"{layout.num_bytes(shape, architecture, checkpoint.packed) / 2**20:,.1f} MiB")
    used = sorted({block.experts_per_token for block in architecture.blocks if not block.is_dense})
    sizes.add_row("experts", f"{architecture.num_experts}, top-{' or '.join(map(str, used))}")
    sizes.add_row("expert format", "MXFP4" if checkpoint.packed else "as the other weights")
    sizes.add_row("hidden size", f"{shape.hidden_size}, {shape.num_heads} heads of {shape.head_dim}")
    tokens = shape.max_positions
    caches = (
        f"{costs.request_kv_bytes(shape, architecture, tokens, kind, 'moesaic') / 2**20:,.1f} MiB in {kind}"
        for kind in ("bf16", "fp8")
    )
    sizes.add_row("KV cache", f"{', '.join(caches)}, of one request of {tokens:,} tokens")
    sizes.add_row("layouts", ", ".join(f"{n} x {window or 'full'}" for window, n in architecture.layouts.items()))
    for what, which in checkpoint.left_out.items():
        sizes.add_row(what, which)
    console.print(sizes)
    layers = Table("layer", *(axis.title for axis in AXES.values()), box=None)
    for layer, block in enumerate(architecture.blocks):
        pairs = zip(AXES.values(), block.values, strict=True)
        layers.add_row(str(layer), *(axis.text(value) for axis, value in pairs))
    console.print(layers)


def _report(options: argparse.Namespace) -> None:
    outside = read_outside(options)
    _show_outcome(options.run)
    if outside is not None:
        show_outside(options.run, outside)


def _doctor(options: argparse.Namespace) -> None:
    from moesaic.command_line.doctor import diagnose, print_findings

    print_findings(diagnose(), Console())


if __name__ == "__main__":
    sys.exit(main())
