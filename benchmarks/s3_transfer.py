"""Speed of the S3 store against boto3's own transfers (the engine of ``aws s3 cp``), interleaved, on the same server.

Starts moto's S3 server on loopback and prints JSON: MiB/s of every round, and the ratio of the medians.
``store`` verifies a SHA-256 of each part and of the whole; boto3 sends with the checksums it uses by default.

Run: python benchmarks/s3_transfer.py [--mib 256] [--rounds 5]
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig

from moesaic.store import S3Options
from moesaic.store.root import object_key
from moesaic.store.s3 import S3Root

PART_BYTES, CONNECTIONS = 64 * 2**20, 8
SERVER = """
import time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(36000)
"""


def measure(directory: Path, endpoint: str, mib: int, rounds: int) -> dict[str, list[float]]:
    """MiB/s of every round, by what was done; the store and boto3 take turns, and so does who begins."""
    client = boto3.session.Session().client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="benchmark")
    settings = TransferConfig(
        multipart_threshold=PART_BYTES + 1, multipart_chunksize=PART_BYTES, max_concurrency=CONNECTIONS
    )
    options = S3Options(endpoint, "us-east-1", part_bytes=PART_BYTES, connections=CONNECTIONS)
    root = S3Root("s3://benchmark/store", directory / "cache", options)
    found: dict[str, list[float]] = {}
    source, copy = directory / "source", directory / "copy"
    for index in range(rounds):
        source.write_bytes(os.urandom(mib * 2**20))
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        key, name = object_key(digest), f"boto3/{uuid.uuid4().hex}"
        up: list[tuple[str, Callable[[], object]]] = [
            ("up store", lambda key=key, digest=digest: root.put_file(key, source, digest, move=False)),
            ("up boto3", lambda name=name: client.upload_file(str(source), "benchmark", name, Config=settings)),
        ]
        down: list[tuple[str, Callable[[], object]]] = [
            ("down store", lambda key=key, digest=digest: root.local_file(key, digest)),
            (
                "down boto3",
                lambda name=name: client.download_file("benchmark", name, str(copy), Config=settings),
            ),
        ]
        for pair in (up, down):
            for what, action in pair if index % 2 else reversed(pair):
                start = time.perf_counter()
                action()
                found.setdefault(what, []).append(round(mib / (time.perf_counter() - start), 1))
        root.local_file(key, digest).unlink()
        for item in client.list_objects_v2(Bucket="benchmark")["Contents"]:
            client.delete_object(Bucket="benchmark", Key=item["Key"])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="size of the file (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s")
    given = parser.parse_args()
    os.environ.update({"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"})
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        with tempfile.TemporaryDirectory() as directory:
            endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
            rounds = measure(Path(directory), endpoint, given.mib, given.rounds)
    finally:
        server.kill()
        server.communicate()
    medians = {what: statistics.median(values) for what, values in rounds.items()}
    ratios = {way: round(medians[f"{way} store"] / medians[f"{way} boto3"], 3) for way in ("up", "down")}
    print(json.dumps({"mib": given.mib, "mib_per_s": rounds, "store_over_boto3": ratios}, indent=1))


if __name__ == "__main__":
    main()
