"""A server on loopback that speaks the part of a Hugging Face hub's API that reading needs, and logs what it is asked.

Repositories are folders. Large files are redirected to another path, as to the hub's storage, which serves ranges.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

_LARGE = (".safetensors", ".parquet", ".bin")
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """What the hub has under one name."""

    folder: Path
    token: str | None = None
    """Whoever reads it must have this."""
    gated: bool = False
    revisions: tuple[str, ...] = ("main",)
    """Branches and tags, all of the one commit."""

    @property
    def commit(self) -> str:
        """Changes with the files."""
        names = sorted(path.relative_to(self.folder).as_posix() for path in self.files())
        content = b"".join(name.encode() + (self.folder / name).read_bytes() for name in names)
        return hashlib.sha1(content).hexdigest()

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]


@dataclass
class Hub:
    """The server's state."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    """By name; of data sets behind ``datasets/``."""
    asked: list[str] = field(default_factory=list)
    """Paths of requests, with their method."""
    ranges: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    cut_after: int | None = None
    """The next answer from the storage ends after so many bytes."""
    moved: dict[str, str] = field(default_factory=dict)
    """Names that repositories had before."""
    status: int | None = None
    """Answer every request so."""
    xet: bool = False
    """Name a storage of xet for large files, as the hub does, and have none."""
    html: bool = False
    """Answer every request with a page, as a proxy's login does."""
    url: str = ""

    @property
    def storage(self) -> str:
        """Where large files lie: on another host, which is not sent the token."""
        return self.url.replace("127.0.0.1", "localhost") + "/storage"

    def fetched(self) -> set[str]:
        """The files whose content was asked for."""
        return {path.rpartition("/")[2] for path in self.asked if path.startswith("GET") and "/resolve/" in path}

    def use(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let huggingface_hub in this process ask this server; what it reads of variables, it reads when imported."""
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)

    def variables(self, home: Path) -> dict[str, str]:
        """The same for a process of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {unquote(path)}")
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token.removeprefix("Bearer "))
            assert not path.startswith("/storage/"), "the token is for the hub alone"
        if self.hub.html:
            self._answer(200, b"<html>log in</html>", {"Content-Type": "text/html"})
        elif self.hub.status:
            self._answer(self.hub.status, b"{}")
        elif old := next((name for name in self.hub.moved if f"/{name}/" in f"{path}/"), None):
            self._answer(307, b"", {"Location": path.replace(old, self.hub.moved[old])})
        elif called := _API.fullmatch(path):
            self._api(*map(_text, called.groups()))
        elif resolved := _RESOLVE.fullmatch(path):
            self._resolve(*map(_text, resolved.groups()))
        elif path.startswith("/storage/"):
            self._storage(Path(unquote(path).removeprefix("/storage")))
        else:
            self._answer(404, b"{}")

    def _open(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if found is None:
            self._answer(401 if not token else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif found.token and token != found.token:
            if found.gated:
                self._answer(403 if token else 401, b"{}", {"X-Error-Code": "GatedRepo"})
            else:
                self._answer(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        else:
            return found
        return None

    def _at(self, repository: Repository, revision: str) -> bool:
        if revision in (*repository.revisions, repository.commit):
            return True
        self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return False

    def _api(self, kind: str, name: str, what: str | None, revision: str | None) -> None:
        repository = self._open(name if kind == "models" else f"datasets/{name}")
        if repository is None or not self._at(repository, revision or "main"):
            return
        paths = {path.relative_to(repository.folder).as_posix(): path for path in sorted(repository.files())}
        if what == "tree":
            self._answer(200, json.dumps([self._entry(name, path) for name, path in paths.items()]).encode())
        else:
            siblings = [{"rfilename": path} for path in paths]
            info = {
                "_id": "0",
                "id": name,
                "sha": repository.commit,
                "siblings": siblings,
                "private": False,
                "tags": [],
            }
            self._answer(200, json.dumps(info | {"downloads": 0, "likes": 0}).encode())

    def _entry(self, name: str, path: Path) -> dict[str, object]:
        content = path.read_bytes()
        entry: dict[str, object] = {
            "type": "file",
            "path": name,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }
        if path.suffix in _LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _resolve(self, prefix: str | None, name: str, revision: str, file: str) -> None:
        repository = self._open((prefix or "") + name)
        if repository is None or not self._at(repository, revision):
            return
        path = repository.folder / file
        if not path.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit})
            return
        content = path.read_bytes()
        commit = {"X-Repo-Commit": repository.commit}
        if path.suffix in _LARGE:
            digest = hashlib.sha256(content).hexdigest()
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            if self.hub.xet:
                token = f"{self.hub.url}/api/models/{name}/xet-read-token/{repository.commit}"
                linked |= {"X-Xet-Hash": digest, "Link": f'<{token}>; rel="xet-auth"'}
            self._answer(302, b"", commit | linked | {"Location": f"{self.hub.storage}{path}"})
        else:
            self._answer(200, content, commit | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _storage(self, path: Path) -> None:
        content, start, status = path.read_bytes(), 0, 200
        headers = {"Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            self.hub.ranges.append(wanted)
            start, status = int(wanted.removeprefix("bytes=").partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut, self.hub.cut_after = self.hub.cut_after, None
        self._answer(status, content[start:], headers, cut)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        usual = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in (usual | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def _text(quoted: str | None) -> Any:
    return quoted and unquote(quoted)


@contextmanager
def serving(repositories: dict[str, Repository], patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub in a thread of this process, which huggingface_hub in this process asks."""
    hub = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    hub.use(patch, cache)
    yield hub
    server.shutdown()
    server.server_close()
