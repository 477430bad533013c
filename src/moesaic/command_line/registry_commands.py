"""``moesaic promote | rollback | lineage | reproduce``: the model registry from the command line."""

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.tree import Tree

from moesaic.command_line.config_option import read_config
from moesaic.command_line.outside_option import add_outside_options, read_outside
from moesaic.core.code import code_digest
from moesaic.core.errors import ArtifactError, ConfigError, StageError
from moesaic.core.files import written_atomically
from moesaic.core.version import __version__
from moesaic.platform.promote.gate import Line, gate_table, is_met
from moesaic.platform.promote.run import CONFIG_TAG, ORIGIN_TAG, PROMOTION, examine, register_challenger, store_address
from moesaic.platform.promote.stage import PromoteConfig
from moesaic.platform.registry.registry import CHAMPION, MANIFEST_TAG, Registry, RegistryAddress, Version
from moesaic.platform.runs.lineage import Input, Origin, is_source, origins, sources, trace
from moesaic.platform.store import Address, Store, parse_address

ARTIFACTS = "artifacts"
"""The folder in a run's directory that holds the outputs as Kubeflow has them."""
_OUTCOMES = {
    "promoted": "is the champion now",
    "already": "is the champion already",
    "refused": "is the challenger",
    "superseded": "was champion before and is not any more",
    "overtaken": "was overtaken by another champion",
}
_SHORT = 12
"""The number of a digest's digits that the tree shows."""


def add_registry_commands(commands: Any) -> None:
    """Add the commands of the model registry to the command line."""
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--registry", help="address of MLflow (the value of MLFLOW_TRACKING_URI)")
    where.add_argument("--store", type=parse_address, help="directory or s3://bucket/prefix of the run's store")
    named = argparse.ArgumentParser(add_help=False, parents=[where])
    named.add_argument("--model", default=PromoteConfig().model, help="name of the registered model (%(default)s)")

    promote = commands.add_parser(
        "promote", parents=[where], help="register a run's child; make it the champion if it passes the gate"
    )
    promote.set_defaults(command=_promote)
    promote.add_argument("run", type=Path, help="directory of a finished run, as given to run --output")
    promote.add_argument("--config", default="{}", help="the gate's config: JSON, or a file that holds it")
    promote.add_argument("--bundle", type=Path, help="directory of the exported bundle (the run's)")
    add_outside_options(promote)
    promote.add_argument("--dry-run", action="store_true", help="show the gate and change nothing")
    promote.add_argument("--again", action="store_true", help="even if it was champion before and was replaced")

    rollback = commands.add_parser("rollback", parents=[named], help="go back to the champion before the present one")
    rollback.set_defaults(command=_rollback)
    rollback.add_argument("--from", dest="expected", type=int, help="only if this version is the champion")

    lineage = commands.add_parser("lineage", parents=[named], help="all that a version was made from, by digest")
    lineage.set_defaults(command=_lineage)
    _add_version(lineage)

    reproduce = commands.add_parser(
        "reproduce", parents=[named], help="write the exact recipe and inputs of a version, to run it again"
    )
    reproduce.set_defaults(command=_reproduce)
    _add_version(reproduce)
    reproduce.add_argument("--output", type=Path, required=True, help="directory to make")
    reproduce.add_argument("--no-inputs", action="store_true", help="leave the model and the data sets in the store")


def _add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("version", nargs="?", default=CHAMPION, help="number or alias of a version (%(default)s)")


def _promote(options: argparse.Namespace) -> None:
    config = PromoteConfig.parse(read_config(options.config))
    child, report = options.run / "child", options.run / "report"
    if not child.is_dir() or not report.is_dir():
        raise ArtifactError(f"{options.run} holds no finished run; give the directory that `moesaic run` was given")
    outside = read_outside(options)
    if outside is not None and not config.outside_margin_points:
        raise ConfigError(
            "the gate asks nothing of --outside; name margins in outside_margin_points of --config, by task: "
            + ", ".join(outside.suites)
        )
    store = Store.at(options.store or _from_environment("MOESAIC_STORE") or options.run / "store")
    bundle, verdict = (options.run / ARTIFACTS / name for name in ("bundle", "verdict"))
    evidence = {"report": report, "bundle": options.bundle or bundle} | ({} if options.bundle else {"verdict": verdict})
    given = {name: path for name, path in evidence.items() if path.is_dir()}
    challenger = examine(config, child.resolve().name, given, store, outside)
    Console().print(gate_table(challenger.lines))
    if options.dry_run:
        print("dry run: nothing was changed")
    else:
        local = f"sqlite:///{options.run.absolute() / 'mlflow.db'}"
        promotion = register_challenger(config, challenger, _registry_address(options, local), again=options.again)
        _say_outcome(promotion)
    if not is_met(challenger.lines):
        failed = [line.name for line in challenger.lines if not line.met]
        raise StageError(f"refused: {len(failed)} of {len(challenger.lines)} lines are not met: {', '.join(failed)}")


def _say_outcome(promotion: Mapping[str, Any]) -> None:
    version, champion = (f"version {promotion[key]} of {promotion['model']}" for key in ("version", CHAMPION))
    if promotion["outcome"] == "superseded":
        raise StageError(f"{version} was champion before; now {champion} is. --again makes it champion once more")
    if promotion["outcome"] == "overtaken":
        raise StageError(f"{champion} became champion meanwhile; run again to put {version} in its place")
    print(f"{version} {_OUTCOMES[promotion['outcome']]}")


def say_promotion(run: Path) -> None:
    """Print the outcome of a run's own promotion, if it had one."""
    path = run / "promotion" / PROMOTION
    if not path.is_file():
        return
    promotion = json.loads(path.read_text())
    lines = TypeAdapter(list[Line]).validate_python(promotion["lines"])
    failed = [f"{line.name} {line.shown} (asked: {line.asked})" for line in lines if not line.met]
    print(f"version {promotion['version']} of {promotion['model']} {_OUTCOMES[promotion['outcome']]}", end="")
    print(f"; not met: {', '.join(failed)}" if failed else "")


def _rollback(options: argparse.Namespace) -> None:
    before, champion = _registry(options).roll_back(options.expected)
    print(f"champion of {options.model}: version {before} -> {champion}")


def _lineage(options: argparse.Namespace) -> None:
    version = _registry(options).version(options.version)
    child = _origin(options, version, "child")
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    tree = Tree(f"{options.model} version {version.number}{aliases}", highlight=False)
    _grow(tree, Input("child", version.tags[MANIFEST_TAG], child), set())
    console = Console(soft_wrap=True)
    console.print(tree, markup=False, highlight=False)
    for name, digest in sources(child).items():
        print(f"{name:>18}  {digest}")


def _grow(tree: Tree, given: Input, seen: set[str]) -> None:
    """Add an input and its own inputs to the tree; those shown further up are not repeated."""
    origin = given.origin
    label = f"{given.name} {given.digest[:_SHORT]}"
    if origin is None:
        tree.add(f"{label}: unknown, no record in the store")
        return
    if is_source(given):
        tree.add(f"{label}: given")
        return
    subject = f" of {origin.record.subject}" if origin.record.subject else ""
    made = f"{label}: {origin.stage}{subject}, config {origin.record.config_digest[:_SHORT]}"
    if origin.id in seen:
        tree.add(f"{made}, as above")
        return
    seen.add(origin.id)
    branch = tree.add(made)
    for one in origin.inputs:
        _grow(branch, one, seen)


def _reproduce(options: argparse.Namespace) -> None:
    from moesaic.pipelines.recipe import Recipe
    from moesaic.platform.runs.reproduction import pipeline_of, recipe_values

    version = _registry(options).version(options.version)
    report = _origin(options, version, "report")
    if options.output.exists():
        raise ConfigError(f"--output {options.output} exists already; choose another or remove it")
    beside = [name for name in ("bundle", "verdict") if version.tags.get(f"{ORIGIN_TAG}.{name}")]
    others = [_origin(options, version, name) for name in beside]
    values = recipe_values(report, *others) | {"promote": json.loads(version.tags[CONFIG_TAG])}
    unused: dict[str, Any] = {name: {} for name, field in Recipe.model_fields.items() if field.is_required()}
    recipe = Recipe.parse(json.dumps(unused | {name: values[name] for name in Recipe.model_fields if name in values}))
    store = Store.at(_store_address(options, version))
    digests = sources(report)
    records = {origin.id: json.loads(origin.record.to_json()) for origin in origins(report).values()}
    with written_atomically(options.output) as partial:
        partial.mkdir(parents=True)
        (partial / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json"), indent=1) + "\n")
        (partial / "inputs.json").write_text(json.dumps(digests, indent=1) + "\n")
        (partial / "records.json").write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
        if not options.no_inputs:
            _link_inputs(store, digests, partial)
    _say_differences(report)
    print(_command(pipeline_of(report), options.output, store))


def _link_inputs(store: Store, digests: Mapping[str, str], directory: Path) -> None:
    """Put links to the model, and to each data set, under the names that ``moesaic run`` takes."""
    (directory / "data").mkdir(exist_ok=True)
    for digest in digests.values():
        manifest = store.manifest(digest)
        tree = store.materialize(manifest).absolute()
        links = {directory / "parent": tree}
        if manifest.kind == "dataset":
            links = {directory / "data" / entry.path: tree / entry.path for entry in manifest.files}
        for link, target in links.items():
            link.unlink(missing_ok=True)
            link.symlink_to(target)


def _say_differences(report: Origin) -> None:
    """Differences between this installation and the recorded one; the numbers may differ then."""
    made_by = {(one.record.versions.get("moesaic", ""), one.record.code_digest) for one in origins(report).values()}
    others = [f"moesaic {version}, code {digest[:_SHORT]}" for version, digest in made_by if digest != code_digest()]
    if others:
        print(f"made by {'; '.join(sorted(others))}; here is {__version__}, code {code_digest()[:_SHORT]}")


def _command(pipeline: str, output: Path, store: Store) -> str:
    words = ["moesaic", "run", pipeline, "--recipe", output / "recipe.json", "--parent", output / "parent"]
    words += ["--data", output / "data", "--store", store.root.address, "--output", output / "run"]
    return shlex.join(str(word) for word in words)


def _origin(options: argparse.Namespace, version: Version, name: str) -> Origin:
    """The origin of the child, the report or the bundle of a version."""
    tag = f"{ORIGIN_TAG}.{name}"
    if not version.tags.get(tag):
        raise ArtifactError(
            f"version {version.number} of {options.model} does not say where it comes from; promote it again"
        )
    return trace(Store.at(_store_address(options, version)), version.tags[tag])


def _store_address(options: argparse.Namespace, version: Version) -> Address:
    address: Address = options.store or store_address(version.source)
    return address


def _registry(options: argparse.Namespace) -> Registry:
    return Registry(_registry_address(options), options.model)


def _registry_address(options: argparse.Namespace, otherwise: str | None = None) -> RegistryAddress:
    uri = options.registry or os.environ.get("MLFLOW_TRACKING_URI") or otherwise
    if not uri:
        raise ConfigError("no model registry is named; give --registry or set MLFLOW_TRACKING_URI")
    return RegistryAddress(uri)


def _from_environment(name: str) -> Address | None:
    value = os.environ.get(name)
    return parse_address(value) if value else None
