"""The usable rows of one source in a drawn order, on disk: memory holds sixteen bytes for each row.

Rows are ordered by a hash of seed and content. So the order depends on nothing else, and rows of the same content are
neighbours. A pool is a file of rows and a table of places; a pool that is complete is found again by its key.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moesaic.core.code import code_version
from moesaic.core.files import written_atomically
from moesaic.core.json_text import read_json_object
from moesaic.data.calibration import read_conversation
from moesaic.data.datasets import Row
from moesaic.data.prepare.layouts import LAYOUTS, LeftOutError, Made, content_of, read_row
from moesaic.data.prepare.reading import Found, iterate_files
from moesaic.data.problems import read_problem

_ROWS, _PLACES, _COUNTS = "rows.jsonl", "places.npy", "counts.json"


class Pool:
    """The rows of a source that can be used."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self.name = name
        counts = read_json_object(directory / _COUNTS)
        self.num_read: int = counts["read"]
        """Rows of the source that were read."""
        self.left_out: dict[str, int] = counts["left_out"]
        """Those that cannot be used, by reason."""

    def rows(self) -> Iterator[tuple[int, Made]]:
        """Every row in the drawn order, with the hash of its content."""
        places = np.load(self._directory / _PLACES, mmap_mode="r")
        with (self._directory / _ROWS).open("rb") as file:
            for key, offset in places:
                file.seek(int(offset))
                yield int(key), json.loads(file.readline())


def make_pool(found: Found, makes: str, seed: int, scratch: Path) -> Pool:
    """Read a source into a pool, or find the pool that a killed run made.

    Args:
        found: the source.
        makes: what rows must become: ``conversation`` or ``problem``.
        seed: of the order.
        scratch: the folder of pools.

    Raises:
        ArtifactError: if a file or a row is not of the source's layout.
    """
    source = found.source
    places = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in found.files]
    decisive = json.dumps([source.to_json(), dict(found.origin), places, makes, seed, code_version()])
    directory = scratch / hashlib.sha256(decisive.encode()).hexdigest()[:16]
    if not directory.is_dir():
        with written_atomically(directory) as partial:
            partial.mkdir(parents=True)
            _write(found, source.layout_for(makes), seed, partial)
    return Pool(directory, source.name)


def _write(found: Found, layout: str, seed: int, directory: Path) -> None:
    keys, offsets, left_out, num_read = array("Q"), array("Q"), Counter[str](), 0
    with (directory / _ROWS).open("wb") as file:
        for row in iterate_files(found.files):
            if num_read == found.source.max_rows:
                break
            num_read += 1
            try:
                made = read_row(layout, row, found.source.name)
            except LeftOutError as reason:
                left_out[str(reason)] += 1
                continue
            _check(made, LAYOUTS[layout].makes, row.place)
            keys.append(_key(made, seed))
            offsets.append(file.tell())
            file.write(json.dumps(made).encode() + b"\n")
    table = np.stack([np.frombuffer(keys, np.uint64), np.frombuffer(offsets, np.uint64)], axis=1)
    np.save(directory / _PLACES, table[np.lexsort((table[:, 1], table[:, 0]))])
    (directory / _COUNTS).write_text(json.dumps({"read": num_read, "left_out": left_out}))


def _check(made: Made, makes: str, place: str) -> None:
    """What stages will read must be what they can read."""
    if makes == "conversation":
        read_conversation(Row(made, place))
    else:
        read_problem(Row(made, place))


def _key(made: Made, seed: int) -> int:
    content = json.dumps(content_of(made), sort_keys=True).encode()
    drawn = hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "little", signed=True))
    return int.from_bytes(drawn.digest(), "little")
