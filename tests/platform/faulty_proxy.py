"""An HTTP proxy on loopback in front of the S3 server: it notes what passes, fails on demand, and checks as S3 does.

Real S3 refuses a body that has another SHA-256 than was signed; moto does not, so the proxy does.
"""

import hashlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Kind = Literal[
    "cut request",
    "cut response",
    "status",
    "slow",
    "slow request",
    "hang",
    "corrupt request",
    "corrupt response",
    "drop response",
    "ignore",
]


@dataclass(frozen=True)
class Request:
    """One request as it arrived, and how it ended."""

    method: str
    path: str
    headers: Mapping[str, str]
    num_bytes: int
    status: int
    """0 if it was cut."""

    @property
    def object(self) -> str | None:
        """SHA-256 of the object that it concerns."""
        return self.path.rpartition("/")[2] if "/objects/" in self.path else None

    @property
    def range(self) -> str | None:
        """The range it asks for."""
        return self.headers.get("range")


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests that match."""

    kind: Kind
    matches: Callable[[Request], bool]
    times: int = 1
    status: int = 500
    code: str = "InternalError"
    seconds: float = 0.0
    header: str = ""
    """The one that is ignored."""


@dataclass
class FaultyProxy:
    """Runs until :meth:`stop`."""

    target: tuple[str, int]
    faults: list[Fault] = field(default_factory=list)
    log: list[Request] = field(default_factory=list)
    most_at_once: int = 0
    """Objects under way; one whose answer has just left may still count."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def sent(self) -> list[str]:
        """The objects that arrived whole, in order of arrival."""
        return [one.object for one in self.log if one.object and one.method == "PUT" and one.status == 200]

    def fetched(self) -> list[str]:
        """The objects that were fetched or asked for."""
        return [one.object for one in self.log if one.object and one.method == "GET"]

    def ranges(self) -> list[str]:
        """The ranges that were fetched or asked for."""
        return [one.range for one in self.log if one.method == "GET" and one.range]

    def take_fault(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fault.matches(request):
                    fault.times -= 1
                    return fault
        return None

    @contextmanager
    def counted(self, request: Request) -> Iterator[None]:
        """Note how many transfers there are at once."""
        step = 1 if request.object and request.method in ("PUT", "GET") else 0
        with self._lock:
            self._under_way += step
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= step

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._request = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, length, 0)
        try:
            with self.proxy.counted(self._request):
                self._serve(length, self.proxy.take_fault(self._request))
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # The client went away.

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    def _serve(self, length: int, fault: Fault | None) -> None:
        kind = fault.kind if fault else None
        if kind == "cut request":
            self.rfile.read(length // 2)
            return self._cut()
        body = self._read_slowly(length, fault.seconds) if fault and kind == "slow request" else self.rfile.read(length)
        if kind == "corrupt request":
            body = _corrupted(body)
        if fault and kind == "hang":
            self.connection.recv(1)  # Returns when the client is gone.
            return self._cut()
        if fault and kind == "status":
            return self._refuse(fault.status, fault.code)
        headers = dict(self._request.headers)
        if fault and kind == "ignore":
            headers.pop(fault.header, None)
        if not _digest_fits(body, headers):
            return self._refuse(400, "XAmzContentSHA256Mismatch")
        if fault and kind == "slow":
            time.sleep(fault.seconds)
        status, answered, content = self._ask(body, headers)
        if kind == "drop response":
            return self._cut()
        if kind == "corrupt response":
            content = _corrupted(content)
        if kind == "cut response":
            self.close_connection = True
            content = content[: len(content) // 2]
        self._answer(status, answered, content)

    def _read_slowly(self, length: int, seconds: float) -> bytes:
        pieces = []
        for start in range(0, length, 2**18):
            time.sleep(seconds * 2**18 / length)
            pieces.append(self.rfile.read(min(2**18, length - start)))
        return b"".join(pieces)

    def _ask(self, body: bytes, headers: Mapping[str, str]) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.proxy.target, timeout=60)
        try:
            sent = {name: value for name, value in headers.items() if name not in ("expect", "connection")}
            connection.request(self.command, self.path, body=body or None, headers=sent)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.proxy.log.append(replace(self._request, status=status))
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        content = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        content = b"" if self.command == "HEAD" else content
        self._answer(status, [("Content-Length", str(len(content)))], content)

    def _cut(self) -> None:
        self.proxy.log.append(self._request)
        self.close_connection = True


def _digest_fits(body: bytes, headers: Mapping[str, str]) -> bool:
    return not body or headers.get("x-amz-content-sha256") == hashlib.sha256(body).hexdigest()


def _corrupted(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
