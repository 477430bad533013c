"""Models and data sets by their names on a Hugging Face hub, fetched by ``huggingface_hub``.

Its own rules hold: the cache (``HF_HOME``), the address (``HF_ENDPOINT``), the token (``HF_TOKEN`` or a login), the
offline switch (``HF_HUB_OFFLINE``), proxies. A revision is resolved to a commit before anything is fetched.
"""

import errno
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from huggingface_hub import constants, errors, get_session, get_token, set_client_factory, snapshot_download
from huggingface_hub.utils import tqdm

from moesaic.core.errors import ArtifactError, ConfigError, MoesaicError, StageError
from moesaic.core.network import CLIENT_CERTIFICATE, tls_context

Kind = Literal["model", "dataset"]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_GB = 10**9
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@dataclass(frozen=True)
class Snapshot:
    """Files of a repository at one commit."""

    folder: Path
    """They lie here under their paths in the repository; read only."""
    repo: str
    kind: Kind
    commit: str

    @property
    def source(self) -> str:
        """The address of these files: ``hf://[datasets/]OWNER/NAME@COMMIT``."""
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.repo}@{self.commit}"


def is_hub_name(given: str) -> bool:
    """Whether this can only be ``OWNER/NAME`` on a hub: it has that form, and no file or folder here is called so."""
    return bool(_NAME.fullmatch(given)) and not Path(given).exists()


def fetch(repo: str, revision: str | None, kind: Kind, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> Snapshot:
    """The files of a repository that match a pattern of ``wanted`` and none of ``unwanted``, from the cache or the hub.

    Args:
        repo: OWNER/NAME.
        revision: a branch, tag or commit; None: the main branch.
        kind: what the repository holds.
        wanted: patterns of paths as of ``fnmatch``, whose ``*`` matches ``/`` too.
        unwanted: patterns of paths that are left out.

    Raises:
        ArtifactError: if there is no such repository, revision or file, or one may not have it.
        ConfigError: if HF_ENDPOINT is no address, or the folder of the cache cannot be written to.
        StageError: if the hub cannot be reached, fails, or the disk of the cache is full.
    """
    options = {
        "repo_type": kind,
        "revision": revision,
        "allow_patterns": list(wanted),
        "ignore_patterns": list(unwanted),
    }
    _check_address()
    try:
        if os.environ.get(CLIENT_CERTIFICATE):
            _show_certificate()
        _check_room(repo, options)
        folder = Path(snapshot_download(repo, **options))
    except MoesaicError:
        raise
    except Exception as failure:  # of the network, the server, the cache and the disk, of many kinds
        raise _explained(failure, repo, revision, kind) from failure
    if not any(path.is_file() for path in folder.rglob("*")):
        raise ArtifactError(f"{_title(repo, revision, kind)} has none of the files {', '.join(wanted)}")
    return Snapshot(folder, repo, kind, folder.name)


def _check_address() -> None:
    try:
        parts = urlsplit(constants.ENDPOINT)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_one = False
    if not is_one:
        raise ConfigError(
            f"HF_ENDPOINT is {constants.ENDPOINT!r}, which is no address; it begins with https:// or http://"
        )


def _show_certificate() -> None:
    """Let the library's connections show the site's client certificate, of which it knows nothing."""
    usual = get_session()
    hooks = usual.event_hooks
    set_client_factory(
        lambda: type(usual)(verify=tls_context(), event_hooks=hooks, follow_redirects=True, timeout=None)
    )


class _NoBar(tqdm):
    """A progress bar that is not shown."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"disable": True})


def _check_room(repo: str, options: dict[str, Any]) -> None:
    """Refuse to begin what the disk of the cache cannot hold, if the hub can be asked how much it is."""
    try:
        files = snapshot_download(repo, dry_run=True, tqdm_class=_NoBar, **options)
    except errors.DryRunError:
        return
    missing = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    present = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(present).free
    if missing > free:
        raise StageError(
            f"{repo} takes {missing / _GB:.1f} GB more, and the disk of {cache} has {free / _GB:.1f} GB free; free "
            "some, or let HF_HOME name a folder on another disk"
        )


def _title(repo: str, revision: str | None, kind: Kind) -> str:
    what = "the model" if kind == "model" else "the data set"
    return f"{what} {repo}{f' at revision {revision}' if revision else ''} on {constants.ENDPOINT}"


def _explained(failure: Exception, repo: str, revision: str | None, kind: Kind) -> MoesaicError:
    title = _title(repo, revision, kind)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    if isinstance(failure, errors.GatedRepoError):
        done = "the account of your token has not been let in" if get_token() else "there is no token in HF_TOKEN"
        return ArtifactError(f"{title} is gated, and {done}: accept its conditions at {page}, then set HF_TOKEN")
    if isinstance(failure, errors.RevisionNotFoundError):
        return ArtifactError(f"{title}: there is no such branch, tag or commit; see {page}/commits/main")
    if isinstance(failure, errors.RepositoryNotFoundError):
        return ArtifactError(
            f"{title} does not exist, or is private and your token (HF_TOKEN) does not open it; nor is there a folder "
            f"{Path(repo).absolute()}, if that was meant"
        )
    if isinstance(failure, errors.DisabledRepoError):
        return ArtifactError(f"{title} was disabled by its owner; take another, or a copy as a local folder")
    if isinstance(failure, errors.HfHubHTTPError):
        return _refused(failure, title)
    if isinstance(failure, errors.LocalEntryNotFoundError):
        return _not_cached(failure, repo, title)
    if isinstance(failure, errors.HFValidationError):
        return ArtifactError(f"{repo!r} is neither a folder here nor a name on a hub, which is OWNER/NAME")
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return StageError(
            f"the disk of {constants.HF_HUB_CACHE} is full; free some, or let HF_HOME name a folder on another disk, "
            "and run again: it goes on"
        )
    if isinstance(failure, OSError) and failure.errno in _UNWRITABLE:
        return ConfigError(
            f"{failure.filename or constants.HF_HUB_CACHE} cannot be written to ({failure.strerror}); let HF_HOME "
            "name a folder of yours for the cache"
        )
    if isinstance(failure, ValueError):
        return StageError(
            f"{title}: what answers there does not speak a hub's language ({failure}); look at HF_ENDPOINT and proxies"
        )
    return StageError(
        f"{title} cannot be fetched: {_words(failure)}; run again: it goes on where it stopped{_of_xet(failure)}"
    )


def _refused(failure: errors.HfHubHTTPError, title: str) -> MoesaicError:
    status = failure.response.status_code
    if status in (401, 403):
        return ArtifactError(
            f"{title}: the server refuses the token ({_words(failure)}); look at HF_TOKEN; what is public needs none"
        )
    return StageError(
        f"{title}: the server answers {status} ({_words(failure)}){_of_xet(failure) or '; try again later'}"
    )


def _of_xet(failure: BaseException) -> str:
    """What to do where a failure is of the hub's newer storage, which a mirror or a proxy may not pass on."""
    return "; without its newer storage it may go: HF_HUB_DISABLE_XET=1" if "xet" in str(failure).lower() else ""


def _not_cached(failure: Exception, repo: str, title: str) -> MoesaicError:
    part = "only a part of it is" if isinstance(failure, errors.IncompleteSnapshotError) else "it is not"
    here = f"{part} in the cache {constants.HF_HUB_CACHE}"
    if constants.is_offline_mode():
        return ArtifactError(
            f"{title}: HF_HUB_OFFLINE is set, and {here}; fetch it once with a network, or give a folder ("
            f"{Path(repo).absolute()} does not exist)"
        )
    return StageError(f"{title} cannot be reached ({_words(failure.__cause__ or failure)}), and {here}")


def _words(failure: BaseException) -> str:
    """The first line that a failure says, and its type."""
    said = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {said}" if said else type(failure).__name__
