"""Where something comes from: each stage's record names the records of its inputs, back to what a run started from.

The store keeps the record of every stage under its *origin*, see :attr:`moesaic.platform.runs.records.Record.origin`.
An input is known if its record is in the store; what a run started from (the outputs of ``ingest``) must also lie there
itself.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from moesaic.core.errors import ArtifactError
from moesaic.platform.runs.records import Record
from moesaic.platform.store import Store

SOURCE = "ingest"
"""The stage that brings in what a run starts from."""


@dataclass(frozen=True)
class Input:
    """Something a stage was given."""

    name: str
    digest: str
    """Of its content."""
    origin: "Origin | None"
    """How it was made; None if no record of that is in the store."""


@dataclass(frozen=True)
class Origin:
    """How something was made, and from what."""

    id: str
    record: Record = field(repr=False)
    inputs: tuple[Input, ...]

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return self.record.stage

    def given(self, name: str) -> "tuple[Origin, ...]":
        """The origins of the input of this name: several of a list, none if it was not given or is not known."""
        return tuple(found.origin for found in self.inputs if found.name == name and found.origin)


def keep_record(store: Store, record: Record) -> None:
    """Put a record into the store; the first of several attempts at the same thing stays."""
    if store.root.size(_key(record.origin)) is None:
        store.root.write(_key(record.origin), record.to_json().encode())


def trace(store: Store, origin: str) -> Origin:
    """Read the history of an origin.

    Raises:
        ArtifactError: if its own record is missing or was changed.
    """
    found = _Tracer(store).origin(origin)
    if found is None:
        raise ArtifactError(
            f"the store at {store.root.address} holds no record {origin}; name the store that the run used"
        )
    return found


def walk(origin: Origin) -> Iterator[Input]:
    """Every input of every stage, each once."""
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
    """It and all it was made from, by id."""
    return {origin.id: origin} | {given.origin.id: given.origin for given in walk(origin) if given.origin}


def sources(origin: Origin) -> dict[str, str]:
    """What the run started from: content digests by name, the parent's and the data sets'."""
    found = ((given.origin, given.digest) for given in walk(origin))
    named = {made.record.subject: digest for made, digest in found if made and made.stage == SOURCE}
    return dict(sorted(named.items()))


def is_source(given: Input) -> bool:
    """Whether it is what a run started from."""
    return given.origin is not None and given.origin.stage == SOURCE


def unknown_inputs(store: Store, origin: Origin) -> list[Input]:
    """The inputs that nothing is known of, and what the run started from where the store no longer holds it."""
    return [
        given
        for given in walk(origin)
        if given.origin is None or (is_source(given) and not _is_held(store, given.digest))
    ]


def find_digest(origin: Origin, digest: str) -> Origin | None:
    """How the input of this content was made, of whichever stage it is an input; None if it is of none."""
    return next((given.origin for given in walk(origin) if given.digest == digest and given.origin), None)


def _is_held(store: Store, manifest_id: str) -> bool:
    try:
        store.manifest(manifest_id)
    except ArtifactError:
        return False
    return True


class _Tracer:
    """Reads each record once."""

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
