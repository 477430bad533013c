"""The model registry in MLflow: versions of one model, the aliases ``challenger`` and ``champion``, and who moved them.

A version stands for one child: its source is the child's manifest in the store, and weights never pass through MLflow.

MLflow can set an alias but not only if it still is what one saw. What it can do is number the versions of a model, one
after the other, whatever the database behind it. So each promotion and rollback is an entry of a second registered
model, ``<name>.promotions``: the record that :mod:`moesaic.platform.registry.champions` reads. The alias follows the
record. A command that moves the alias reads the record again afterwards and corrects the alias if it must. If a command
is killed in between, the next command corrects the alias.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from moesaic.core.errors import ArtifactError, ConfigError, MoesaicError, StageError
from moesaic.core.network import use_site_variables
from moesaic.core.redaction import redact
from moesaic.platform.registry.champions import History, Kind, Move, replay

CHALLENGER, CHAMPION = "challenger", "champion"
_OURS = "moesaic."
MANIFEST_TAG = f"{_OURS}manifest"
_KIND, _VERSION, _AFTER, _BEFORE = (f"{_OURS}move.{name}" for name in ("kind", "version", "after", "before"))
_PAGE = 1000
_SHOWN = 400

Outcome = Literal["promoted", "already", "superseded", "overtaken"]
"""The result of a promotion: the version became champion, is champion already, was champion and has been replaced, or
another version became champion first."""


@dataclass(frozen=True)
class RegistryAddress:
    """Where the registry is, and the run to link new versions to."""

    uri: str
    run_id: str | None = None

    @property
    def shown(self) -> str:
        """The URI without a password."""
        return redact(self.uri, {})


@dataclass(frozen=True)
class Version:
    """One version of the registered model."""

    number: int
    source: str
    """Address of the manifest."""
    tags: Mapping[str, str]
    aliases: tuple[str, ...]


class Registry:
    """One registered model and the record of its champions.

    Every method raises a ConfigError if the registry refuses the user, a StageError if it cannot be reached or fails.
    """

    def __init__(self, address: RegistryAddress, model: str) -> None:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        use_site_variables()
        self.address, self.model = address, model
        self._record = f"{model}.promotions"
        with self._explained():
            self._client = MlflowClient(tracking_uri=address.uri, registry_uri=address.uri)

    def create(self) -> None:
        """Create the registered model and its record, unless they exist."""
        for name in (self.model, self._record):
            if not self._exists(name):
                self._create(name)

    def register(self, manifest_id: str, source: str, tags: Mapping[str, str], description: str) -> Version:
        """Return the version of this child with these tags; it is created if there is none.

        If two writers create one at the same time, the first one stays, and both get it.
        """
        tags = {**tags, MANIFEST_TAG: manifest_id}
        with self._explained():
            if not self._versions_of(manifest_id):
                self._client.create_model_version(
                    self.model,
                    source,
                    run_id=self.address.run_id,
                    tags=tags,
                    description=description,
                    await_creation_for=None,
                )
            kept, *doubles = self._versions_of(manifest_id)
            for double in doubles:
                self._delete(double)
            self._update(kept, tags, description)
        return self.version(str(kept.number))

    def challenge(self, number: int) -> None:
        """Point the alias ``challenger`` at a version."""
        self._point(CHALLENGER, number)

    def version(self, which: str) -> Version:
        """The version of this number or alias.

        Raises:
            ArtifactError: if there is none.
        """
        aliases = self._aliases()
        number = str(aliases.get(which, which))
        if not number.isdecimal():
            known = ", ".join(aliases) or "none"
            raise ArtifactError(f"{self.model} has no alias {which!r}; give a version's number or one of: {known}")
        with self._explained(f"version {number} of {self.model}"):
            return _read_version(self._client.get_model_version(self.model, number), aliases)

    def history(self) -> History:
        """The record of the champions; while it has no moves, the champion is the one that the alias names."""
        moves = self._moves()
        if not moves:
            aliased = self._aliases().get(CHAMPION)
            return History((), () if aliased is None else (aliased,))
        return replay(moves)

    def promote(self, version: Version, known: History, *, again: bool = False) -> Outcome:
        """Make a version the champion, if no other has become it since ``known`` was read.

        A version that was champion before and was replaced or rolled back becomes champion again only with ``again``.
        So a promotion is not repeated when its command is repeated.
        """
        if known.champion == version.number:
            self.settle()
            return "already"
        if known.has_promoted(version.number) and not again:
            return "superseded"
        self._move("promote", version, known)
        return "promoted" if self.settle() == version.number else "overtaken"

    def roll_back(self, expected: int | None = None) -> tuple[int | None, int]:
        """Make the previous champion champion again; returns the numbers of the old and the new one.

        If a rollback was interrupted, this finishes it and does nothing else. ``expected`` is the version to replace.

        Raises:
            ArtifactError: if there is none before it, or another than ``expected`` is champion.
            StageError: if another command moved the champion meanwhile.
        """
        known, alias = self.history(), self._aliases().get(CHAMPION)
        if known.moves and known.moves[-1].kind == "rollback" and alias != known.champion:
            settled = self.settle()
            assert settled is not None, "after a rollback there is a champion"
            return alias, settled
        if expected is not None and known.champion != expected:
            raise ArtifactError(f"the champion of {self.model} is version {known.champion}, not {expected}")
        if known.previous is None:
            raise ArtifactError(f"{self.model} has no champion before version {known.champion}; nothing to go back to")
        self._move("rollback", self.version(str(known.previous)), known)
        if (champion := self.settle()) != known.previous:
            raise StageError(f"version {champion} became champion meanwhile; roll back again if that is still wanted")
        return known.champion, champion

    def settle(self) -> int | None:
        """Point the alias ``champion`` at the record's champion until both agree; returns the champion."""
        while True:
            champion = self.history().champion
            if champion is None or self._aliases().get(CHAMPION) == champion:
                return champion
            self._point(CHAMPION, champion)

    def _point(self, alias: str, number: int) -> None:
        """Set an alias. If two processes create it at once, MLflow refuses one; its second attempt succeeds."""
        from mlflow.exceptions import MlflowException

        with self._explained():
            try:
                self._client.set_registered_model_alias(self.model, alias, str(number))
            except MlflowException as failure:
                if failure.error_code != "BAD_REQUEST":
                    raise
                self._client.set_registered_model_alias(self.model, alias, str(number))

    def _move(self, kind: Kind, version: Version, known: History) -> None:
        tags = {_KIND: kind, _VERSION: str(version.number), _AFTER: str(known.last), _BEFORE: str(known.champion or 0)}
        with self._explained():
            self._client.create_model_version(self._record, version.source, tags=tags, await_creation_for=None)

    def _moves(self) -> list[Move]:
        with self._explained():
            return [_read_move(entry) for entry in self._search(self._record)]

    def _aliases(self) -> dict[str, int]:
        with self._explained():
            model = self._client.get_registered_model(self.model)
            _check_named(model, self.model)
        aliases = model.aliases
        return {alias: int(number) for alias, number in aliases.items()}

    def _versions_of(self, manifest_id: str) -> list[Version]:
        """The versions of one manifest, oldest first."""
        entries = self._search(self.model, f" and tags.`{MANIFEST_TAG}` = '{manifest_id}'")
        return sorted((_read_version(entry, {}) for entry in entries), key=lambda version: version.number)

    def _search(self, model: str, condition: str = "") -> list[Any]:
        entries: list[Any] = []
        token = None
        while True:
            page = self._client.search_model_versions(f"name = '{model}'{condition}", _PAGE, page_token=token)
            entries += page
            if not (token := page.token):
                return entries

    def _update(self, version: Version, tags: Mapping[str, str], description: str) -> None:
        """Set the tags and the description; tags of ours that are no longer given become empty."""
        number = str(version.number)
        stale = {name: "" for name in version.tags if name.startswith(_OURS) and name not in tags}
        for name, value in {**stale, **tags}.items():
            if version.tags.get(name) != value:
                self._client.set_model_version_tag(self.model, number, name, value)
        self._client.update_model_version(self.model, number, description)

    def _delete(self, double: Version) -> None:
        with _accepted("RESOURCE_DOES_NOT_EXIST"):  # Another writer has deleted it.
            self._client.delete_model_version(self.model, str(double.number))

    def _exists(self, name: str) -> bool:
        with self._explained():
            return bool(self._client.search_registered_models(f"name = '{name}'", 1))

    def _create(self, name: str) -> None:
        with self._explained(), _accepted("RESOURCE_ALREADY_EXISTS"):
            _check_named(self._client.create_registered_model(name), name)

    @contextmanager
    def _explained(self, wanted: str = "") -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MoesaicError:
            raise
        except MlflowException as failure:
            raise self._explain(failure, wanted or f"registered model {self.model}") from failure
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as strange:
            said = redact(f"{type(strange).__name__}: {strange}", os.environ)
            raise StageError(
                f"the model registry at {self.address.shown} does not answer as MLflow does, maybe with a page to log "
                f"in ({said}); is MLFLOW_TRACKING_URI right?"
            ) from strange

    def _explain(self, failure: Any, wanted: str) -> Exception:
        where = f"the model registry at {self.address.shown}"
        if failure.error_code == "UNAUTHENTICATED":
            return ConfigError(
                f"{where} does not know the user (401); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_TOKEN"
            )
        if failure.error_code == "PERMISSION_DENIED":
            return ConfigError(
                f"{where} does not allow that (403); ask for the right to edit {self.model} and {self._record} there"
            )
        if failure.error_code == "RESOURCE_DOES_NOT_EXIST":
            return ArtifactError(f"{where} has no {wanted}; `moesaic promote` makes one")
        said = redact(" ".join(str(failure).split()), {**os.environ, "uri": self.address.uri})[:_SHOWN]
        return StageError(f"{where} failed: {said}")


@contextmanager
def _accepted(error_code: str) -> Iterator[None]:
    """Ignore this error code: another writer has already done the same."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as failure:
        if failure.error_code != error_code:
            raise


def _check_named(model: Any, name: str) -> None:
    """Raise ValueError for an answer that is no such registered model: MLflow's client reads any JSON as one."""
    if model.name != name:
        raise ValueError(f"a registered model {name} was expected")


def _read_version(entry: Any, aliases: Mapping[str, int]) -> Version:
    number = int(entry.version)
    own_aliases = tuple(sorted(alias for alias, target in aliases.items() if target == number))
    return Version(number, entry.source, dict(entry.tags), own_aliases)


def _read_move(entry: Any) -> Move:
    kind: Kind = "rollback" if entry.tags[_KIND] == "rollback" else "promote"
    champion, after, before = (int(entry.tags[name]) for name in (_VERSION, _AFTER, _BEFORE))
    return Move(int(entry.version), kind, champion, after, before or None)
