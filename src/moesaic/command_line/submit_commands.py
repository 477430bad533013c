"""``moesaic submit | status | cancel | retry``: pipelines on a cluster's Kubeflow."""

import argparse
import hashlib
import shlex
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from moesaic.command_line.planning_commands import read_tasks
from moesaic.core.errors import ConfigError, StageError
from moesaic.core.files import describe_owner
from moesaic.platform.cluster import ClusterProfile, placed_text, read_profile
from moesaic.platform.cluster.agreement import check_agreement
from moesaic.platform.cluster.following import RunStatus, follow, no_names
from moesaic.platform.cluster.submission import HOST_VARIABLE, Kubeflow
from moesaic.platform.store import Address, parse_address
from moesaic.stages import STAGES

_PROFILE = Path("manifests/profiles/single-node.yaml")
_EXPERIMENT = "moesaic"
_DIGITS = 12
"""The number of digits of the placed pipeline's digest in the name of its version."""
Choose = Callable[[argparse.Namespace], tuple[Path, Any, str]]
"""Returns the compiled pipeline, the recipe and the name of the run, as the options ask for."""
Prepare = Callable[[argparse.Namespace, Path, Any, Address], Mapping[str, Any]]
"""Puts the inputs into a store and returns the arguments of the pipeline."""


def add_submit_commands(
    commands: Any, add_choice: Callable[[argparse.ArgumentParser], None], choose: Choose, prepare: Prepare
) -> None:
    """Add the commands to the command line; ``add_choice`` adds the options that ``moesaic run`` has too."""
    server = argparse.ArgumentParser(add_help=False)
    server.add_argument("--host", help=f"address of Kubeflow Pipelines (the value of {HOST_VARIABLE})")
    server.add_argument("--profile", type=Path, default=_PROFILE, help="what the cluster has (%(default)s)")
    cluster = argparse.ArgumentParser(add_help=False, parents=[server])
    cluster.add_argument("--experiment", default=_EXPERIMENT, help="Kubeflow's group of runs (%(default)s)")

    submit = commands.add_parser("submit", parents=[cluster], help="run a whole pipeline on a cluster, and follow it")
    add_choice(submit)
    submit.add_argument(
        "--store", type=parse_address, help="the cluster's store as seen from here (the profile's MOESAIC_STORE)"
    )
    submit.add_argument("--no-wait", action="store_true", help="start the run and leave it")
    submit.set_defaults(command=lambda options: _submit(options, choose, prepare))

    status = commands.add_parser("status", parents=[cluster], help="the latest runs on a cluster, or the tasks of one")
    status.set_defaults(command=_status)
    status.add_argument("run", nargs="?", help="id of a run (all of the experiment)")
    status.add_argument("--follow", action="store_true", help="until it ends; exits as `moesaic submit` does")

    cancel = commands.add_parser("cancel", parents=[server], help="end a run on a cluster")
    cancel.set_defaults(command=_cancel)
    cancel.add_argument("run", help="id of a run")

    retry = commands.add_parser("retry", parents=[server], help="run the failed tasks of a run again, and what follows")
    retry.set_defaults(command=_retry)
    retry.add_argument("run", help="id of a run that failed or was cancelled")
    retry.add_argument("--follow", action="store_true", help="until it ends")


def _submit(options: argparse.Namespace, choose: Choose, prepare: Prepare) -> None:
    manifest, recipe, name = choose(options)
    profile = read_profile(options.profile)
    store = _shared_store(options.store, profile)
    text = placed_text(manifest, profile, STAGES)
    check_agreement(read_tasks(manifest, recipe), profile)
    server = Kubeflow.connect(options.host)
    print(server.check_namespace(profile.namespace))
    arguments = prepare(options, manifest, recipe, store)
    version_name = f"{manifest.stem}-{hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]}"
    pipeline = manifest.stem.rpartition("-")[0]
    version = server.upload(pipeline, version_name, text, profile.namespace)
    print(f"{version_name}: {'uploaded' if version.is_new else 'known to the server'}")
    experiment = server.experiment(options.experiment, profile.namespace)
    run_id = server.start(name, version, experiment, arguments, profile.service_account)
    print(f"run {run_id}: {server.link(run_id)}", flush=True)
    if not options.no_wait:
        _follow(server, run_id)


def _shared_store(given: Address | None, profile: ClusterProfile) -> Address:
    """Return the address of the store in which the tasks find the inputs.

    Raises:
        ConfigError: if it is another bucket than the tasks', or a volume that is not mounted here.
    """
    named = profile.environment.get("MOESAIC_STORE")
    theirs = parse_address(named) if named else None
    store = given or theirs
    if store is None:
        raise ConfigError("the cluster profile sets no MOESAIC_STORE; set it there, or give --store")
    if isinstance(theirs, str) and str(store).rstrip("/") != theirs.rstrip("/"):
        raise ConfigError(f"--store {store} is not where the cluster's tasks look, which is {theirs}")
    if isinstance(theirs, Path) and not (isinstance(store, Path) and store.is_dir()):
        raise ConfigError(
            f"the tasks' store is the volume at {theirs}, and {store} is no directory here; run this where the volume "
            "is mounted, and give --store if it is mounted elsewhere"
        )
    if isinstance(store, Path) and not _is_writable(store, profile.user_id):
        print(
            f"warning: tasks run as the user {profile.user_id} in group 0, who cannot write to "
            f"{describe_owner(store)}, if the cluster sees the same; chgrp 0 and chmod g+rwx let them",
            file=sys.stderr,
        )
    return store


def _is_writable(directory: Path, user: int) -> bool:
    """Whether a task, of group 0, may write to the directory."""
    status = directory.stat()
    right = stat.S_IWUSR if status.st_uid == user else stat.S_IWGRP if status.st_gid == 0 else stat.S_IWOTH
    return bool(status.st_mode & right)


def _status(options: argparse.Namespace) -> None:
    server = Kubeflow.connect(options.host)
    if options.run is None:
        runs = server.runs(options.experiment, read_profile(options.profile).namespace)
        Console().print(_runs_table(runs))
    elif options.follow:
        _follow(server, options.run)
    else:
        run = server.run(options.run)
        print(f"{run.name}: {run.state.lower()}{_took(run)}\n{server.link(run.id)}")
        Console().print(_tasks_table(run))
        if run.named_until:
            print(no_names(run))


def _cancel(options: argparse.Namespace) -> None:
    server = Kubeflow.connect(options.host)
    server.cancel(options.run)
    print(f"run {options.run} is being cancelled: {server.link(options.run)}")


def _retry(options: argparse.Namespace) -> None:
    server = Kubeflow.connect(options.host)
    server.retry(options.run)
    print(f"run {options.run} runs again: {server.link(options.run)}", flush=True)
    if options.follow:
        _follow(server, options.run)


def _follow(server: Kubeflow, run_id: str) -> None:
    """Show the progress of a run until it ends.

    Raises:
        StageError: if it does not succeed.
        KeyboardInterrupt: saying how to go on.
    """
    console = Console(stderr=True, soft_wrap=True)
    again = f"`moesaic status {run_id} --follow --host {shlex.quote(server.host)}`"
    try:
        run = follow(lambda: server.run(run_id), lambda line: console.print(line, markup=False, highlight=False))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"no longer followed; the run goes on: {again} follows it again") from None
    if run.state != "SUCCEEDED":
        raise StageError(_explanation(run, server.link(run_id)))
    print(f"{run.name}: succeeded{_took(run)}")


def _explanation(run: RunStatus, link: str) -> str:
    lines = [f"{run.name}: {run.state.lower()}{_took(run)}{f': {run.message}' if run.message else ''}"]
    for task in run.failures:
        reason = task.message or "neither Kubeflow nor a log says why; its error is in MLflow, as `moesaic.error`"
        lines.append(f"  {task.name}: {reason}")
    return "\n".join([*lines, f"Logs: {link}"])


def _took(run: RunStatus) -> str:
    return f" after {run.seconds_until(run.ended):.0f} s" if run.finished and run.ended else ""


def _runs_table(runs: list[RunStatus]) -> Table:
    table = Table(Column("run", no_wrap=True), Column("name", overflow="fold"), "state", "created", box=None)
    for run in runs:
        table.add_row(run.id, escape(run.name), run.state.lower(), f"{run.created:%Y-%m-%d %H:%M}")
    return table


def _tasks_table(run: RunStatus) -> Table:
    table = Table(Column("task", no_wrap=True), "state", "s", "attempt", "message", box=None)
    for task in run.tasks:
        took = "" if task.duration_s is None else f"{task.duration_s:.0f}"
        attempt = task.changes[-1].attempt if task.changes else 1
        state = "from the cache" if task.cached else task.state.lower()
        if run.named_until and task.state == "RUNNING":
            state = f"running at {run.seconds_until(run.named_until):.0f} s"
        table.add_row(escape(task.name), state, took, str(attempt) if attempt > 1 else "", escape(task.message))
    return table
