"""``moesaic store ls | verify | gc | send-logs``: look into a store, check it, clean it, send what waits in it.

What waits are runs of stages for MLflow, see :mod:`moesaic.platform.runs.tracking`.
"""

import argparse
import math
import os
from typing import Any

from rich.console import Console
from rich.table import Table

from moesaic.core.errors import ArtifactError, ConfigError, StageError
from moesaic.core.redaction import redact
from moesaic.platform.runs.tracking import Tracker, count_waiting
from moesaic.platform.store import Manifest, Store, parse_address
from moesaic.platform.store.upkeep import GRACE_HOURS, delete, find_garbage, verify


def add_store_commands(commands: Any) -> None:
    """Add ``store`` and its subcommands to the command line."""
    parser = commands.add_parser("store", help="list, verify or clean a store")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument(
        "--store", type=parse_address, help="directory or s3://bucket/prefix (the value of MOESAIC_STORE)"
    )

    listing = actions.add_parser("ls", parents=[where], help="the models and data sets in it")
    listing.set_defaults(command=_ls)

    verifying = actions.add_parser("verify", parents=[where], help="read everything and recompute every digest")
    verifying.set_defaults(command=_verify)
    verifying.add_argument("manifest", nargs="*", help="ids of the manifests to verify, or the start of them (all)")

    collecting = actions.add_parser(
        "gc", parents=[where], help="what no manifest references and is older than the grace period; deletes nothing"
    )
    collecting.set_defaults(command=_gc)
    collecting.add_argument("--delete", action="store_true", help="delete it")
    collecting.add_argument(
        "--grace-hours", type=float, default=GRACE_HOURS, help="keep whatever is younger (%(default)s)"
    )

    sending = actions.add_parser(
        "send-logs", parents=[where], help="tell MLflow (MLFLOW_TRACKING_URI) of the stages that ran while it was down"
    )
    sending.set_defaults(command=_send_logs)


def _open(options: argparse.Namespace) -> Store:
    address = options.store or parse_address(os.environ.get("MOESAIC_STORE", ""))
    if not address:
        raise ConfigError("no store is named; give --store or set MOESAIC_STORE")
    store = Store.at(address)
    if not isinstance(address, str) and not address.is_dir():
        raise ArtifactError(f"there is no store at {address}; give the directory of one")
    return store


def _ls(options: argparse.Namespace) -> None:
    table = Table("manifest", "kind", "producer", "files", "MiB", "from", box=None)
    for manifest in _open(options).manifests():
        size = f"{manifest.size_bytes / 2**20:,.1f}"
        table.add_row(
            manifest.id[:12], manifest.kind, manifest.producer, str(len(manifest.files)), size, manifest.source or ""
        )
    Console().print(table)


def _verify(options: argparse.Namespace) -> None:
    store = _open(options)
    chosen = _chosen(list(store.manifests()), options.manifest)
    if problems := verify(store, chosen):
        raise ArtifactError("\n  ".join([f"{len(problems)} objects are missing or damaged:", *problems]))
    print(f"{len(chosen)} manifests are sound: {sum(manifest.size_bytes for manifest in chosen) / 2**20:,.1f} MiB")


def _chosen(manifests: list[Manifest], starts: list[str]) -> list[Manifest]:
    for start in starts:
        if not any(manifest.id.startswith(start) for manifest in manifests):
            raise ArtifactError(f"the store holds no manifest whose id starts with {start}")
    return [one for one in manifests if not starts or one.id.startswith(tuple(starts))]


def _gc(options: argparse.Namespace) -> None:
    if options.grace_hours < 0:
        raise ConfigError(f"--grace-hours {options.grace_hours} is negative; 0 keeps nothing back")
    store = _open(options)
    garbage = find_garbage(store, options.grace_hours)
    for item in garbage.objects + garbage.leftovers:
        print(f"{item.size_bytes:>16,}  {item.key}")
    for tree in garbage.trees:
        print(f"{'tree':>16}  {tree}")
    if options.delete and (denied := delete(store, garbage)):
        raise StageError("\n  ".join([f"{len(denied)} of these could not be deleted:", *denied]))
    what = f"{len(garbage.objects)} objects, {len(garbage.leftovers)} leftovers, {len(garbage.trees)} trees"
    done = "deleted" if options.delete else "would be deleted with --delete"
    print(f"{what}, {garbage.size_bytes / 2**20:,.1f} MiB: {done}")


def _send_logs(options: argparse.Namespace) -> None:
    if not (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        raise ConfigError("MLFLOW_TRACKING_URI is not set; set it to the address that the stages were to log to")
    store = _open(options)
    sent, kept = Tracker(uri, store=store).send_waiting(limit_s=math.inf)
    others = count_waiting(store) - kept
    print(f"{sent} runs logged; {kept} still wait" + (f", and {others} for other addresses" if others else ""))
    if kept:
        raise StageError(f"MLflow at {redact(uri, {})} did not take {kept} runs; they stay in the store")
