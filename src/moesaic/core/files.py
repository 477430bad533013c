"""Files: written atomically, even if the process is killed, shared by several users, identified by path and digest."""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moesaic.core.errors import ConfigError, StageError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A digest in hexadecimal."""
_DENIED = frozenset({errno.EPERM, errno.EACCES, errno.EROFS})
_NO_PATH = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR})
_REFUSED = _DENIED | {errno.ENOSYS, errno.EOPNOTSUPP}
"""For another user's files, or on a file system that has no modes, times or links, as some of NFS, SMB and FUSE."""


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; its file or directory is renamed to ``path`` when the block succeeds.

    What a killed run left at the temporary path is removed first. One process at a time may write a path. A file is
    replaced; a directory must not exist yet.
    """
    partial = path.with_name(f".{path.name}.partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    yield partial
    partial.replace(path)


def write_text_atomically(path: Path, text: str) -> None:
    """Write or replace a text file atomically."""
    with written_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")


def make_folder(folder: Path, root: Path) -> None:
    """Make a folder below ``root``, which is made too; whoever may read and write ``root`` may do so in the folder.

    The umask of a process decides about ``root`` alone, so that what it makes there can be shared.
    """
    if folder.is_dir():
        return
    if folder == root:
        folder.mkdir(parents=True, exist_ok=True)
        return
    make_folder(folder.parent, root)
    try:
        folder.mkdir()
    except FileExistsError:  # Another process has made it.
        return
    set_mode(folder, folder.stat().st_mode | root.stat().st_mode & 0o1077)


def set_mode(path: Path, mode: int) -> None:
    """Set the mode of a file, if its file system keeps modes and it belongs to this user."""
    with where_allowed():
        path.chmod(stat.S_IMODE(mode))


@contextmanager
def where_allowed() -> Iterator[None]:
    """Go on where the file system, or another user's ownership, does not allow a change that can be done without."""
    try:
        yield
    except OSError as refusal:
        if refusal.errno not in _REFUSED:
            raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a lock file; whoever may write to its folder may hold it.

    Raises:
        StageError: if the file system has no locks.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT), "r+") as lock:
        with where_allowed():
            os.fchmod(lock.fileno(), path.parent.stat().st_mode & 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as refusal:
            if refusal.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            raise StageError(
                f"the file system of {path} has no locks ({refusal.strerror}), by which processes wait for each other; "
                "mount it with locks, or put the store, or MOESAIC_CACHE, elsewhere"
            ) from refusal
        yield


@contextmanager
def explained_file_errors(directory: Path) -> Iterator[None]:
    """Turn the operating system's errors of paths, disks and permissions into errors that say where and what to do."""
    try:
        yield
    except OSError as failure:
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StageError(f"the disk that holds {directory} is full; free space and run again") from failure
        if failure.errno in _DENIED:
            raise StageError(describe_denial(failure, directory)) from failure
        if failure.errno in _NO_PATH:
            raise ConfigError(f"{os.fsdecode(failure.filename or directory)!r}: {failure.strerror}") from failure
        raise


def describe_denial(failure: OSError, directory: Path) -> str:
    """Who was denied what, and whose it is; ``directory`` is where it happened if the failure names no file."""
    path = Path(os.fsdecode(failure.filename or directory))
    groups = ", ".join(str(group) for group in sorted({os.getegid(), *os.getgroups()}))
    owners = [describe_owner(place) for place in (path, path.parent) if os.path.lexists(place)]
    return (
        f"{path}: {failure.strerror} for the user {os.geteuid()} of the groups {groups}; {'; '.join(owners)}. Let the "
        "folder and what is in it belong to one of these groups and be writable for it (chgrp -R, chmod -R g+rwX)"
    )


def describe_owner(path: Path) -> str:
    """A path with its owner, group and mode."""
    status = path.lstat()
    return f"{path} belongs to the user {status.st_uid} and the group {status.st_gid}, {stat.filemode(status.st_mode)}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ListedFile(BaseModel):
    """One file of a list: where it lies inside a tree and what its content is."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: str
    """Relative, with forward slashes; it cannot leave the tree."""
    size_bytes: Annotated[int, Field(ge=0)]
    """Length of the content."""
    sha256: Sha256
    """Digest of the content."""

    @model_validator(mode="after")
    def _inside(self) -> Self:
        pure = PurePosixPath(self.path)
        plain = str(pure) == self.path and "\\" not in self.path and "\0" not in self.path
        if not plain or pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise ValueError(f"path {self.path!r} must be relative and stay inside the tree")
        return self
