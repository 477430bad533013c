"""The lineage of an output: each stage's record names the records of its inputs, back to the sources of the run.

The store keeps the record of every stage under its *origin*, see :attr:`moesaic.platform.runs.records.Record.origin`.
An input is known if its record is in the store. A source of the run (an output of ``ingest``) must itself be there too.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from moesaic.core.errors import ArtifactError
from moesaic.platform.runs.records import Record
from moesaic.platform.store import Store

SOURCE = "ingest"
"""The stage whose outputs are the sources of a run."""


@dataclass(frozen=True)
class Input:
    """An input of a stage."""

    name: str
    digest: str
    """Digest of its content."""
    origin: "Origin | None"
    """The origin of its content; None if its record is not in the store."""


@dataclass(frozen=True)
class Origin:
    """How an output was made: its record and its inputs."""

    id: str
    record: Record = field(repr=False)
    inputs: tuple[Input, ...]

    @property
    def stage(self) -> str:
        """The stage that made the output."""
        return self.record.stage

    def given(self, name: str) -> "tuple[Origin, ...]":
        """The origins of the inputs of this name; empty if it was not given or is unknown."""
        return tuple(each.origin for each in self.inputs if each.name == name and each.origin)


def keep_record(store: Store, record: Record) -> None:
    """Put a record into the store, unless it has one of the same origin."""
    if store.root.size(_key(record.origin)) is None:
        store.root.write(_key(record.origin), record.to_json().encode())


def trace(store: Store, origin: str) -> Origin:
    """Read the history of an origin.

    Raises:
        ArtifactError: if its own record is missing or was changed.
    """
    traced = _Tracer(store).origin(origin)
    if traced is None:
        raise ArtifactError(
            f"the store at {store.root.address} holds no record {origin}; name the store that the run used"
        )
    return traced


def walk(origin: Origin) -> Iterator[Input]:
    """All inputs of all stages, each once."""
    seen: set[tuple[str, str, str]] = set()

    def inputs(of: Origin) -> Iterator[Input]:
        for given in of.inputs:
            key = of.id, given.name, given.digest
            if key not in seen:
                seen.add(key)
                yield given
                if given.origin:
                    yield from inputs(given.origin)

    return inputs(origin)


def origins(origin: Origin) -> dict[str, Origin]:
    """The origin and those of all its inputs, by id."""
    return {origin.id: origin} | {given.origin.id: given.origin for given in walk(origin) if given.origin}


def sources(origin: Origin) -> dict[str, str]:
    """Content digests of the sources of the run, the parent and the data sets, by name."""
    digests = {each.origin.record.subject: each.digest for each in walk(origin) if each.origin and is_source(each)}
    return dict(sorted(digests.items()))


def is_source(given: Input) -> bool:
    """Whether the input is a source of the run."""
    return given.origin is not None and given.origin.stage == SOURCE


def unknown_inputs(store: Store, origin: Origin) -> list[Input]:
    """The inputs without a record, and the sources that the store no longer holds."""
    return [
        given
        for given in walk(origin)
        if given.origin is None or (is_source(given) and not _is_held(store, given.digest))
    ]


def find_digest(origin: Origin, digest: str) -> Origin | None:
    """The origin of the input with this content; None if no stage had such an input."""
    return next((given.origin for given in walk(origin) if given.digest == digest and given.origin), None)


def _is_held(store: Store, manifest_id: str) -> bool:
    try:
        store.manifest(manifest_id)
    except ArtifactError:
        return False
    return True


class _Tracer:
    """Reads the records of a history, each once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._found: dict[str, Origin | None] = {}

    def origin(self, id: str) -> Origin | None:
        if id not in self._found:
            self._found[id] = self._read(id) if id else None
        return self._found[id]

    def _read(self, id: str) -> Origin | None:
        try:
            record = Record(**json.loads(self._store.root.read(_key(id))))
        except FileNotFoundError:
            return None
        if record.origin != id:
            raise ArtifactError(f"record {id} in {self._store.root.address} was changed; it cannot be relied on")
        return Origin(id, record, tuple(self._inputs(record)))

    def _inputs(self, record: Record) -> Iterator[Input]:
        for name, digest in record.inputs.items():
            origin = record.origins[name]
            for one, made in zip(digest, origin, strict=True) if isinstance(digest, list) else [(digest, origin)]:
                yield Input(name, one, self.origin(made))


def _key(origin: str) -> str:
    return f"records/{origin}.json"
