"""A server on loopback that answers every request in one odd way, as servers behind gateways and logins do."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOGIN = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Sign in with SSO</body></html>"
KEY = "sk-nobody-may-see-this"


@dataclass(frozen=True)
class Answer:
    """One way to answer."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    short_by: int = 0
    """Bytes that are announced and never come."""


ODD: dict[str, Answer] = {
    "401": Answer(401, b'{"error": {"message": "no key ' + KEY.encode() + b'"}}', {"content-type": "application/json"}),
    "401 page": Answer(401, LOGIN, {"content-type": "text/html"}),
    "403": Answer(403, b"RBAC: access denied", {"content-type": "text/plain"}),
    "404": Answer(404, b"404 page not found", {"content-type": "text/plain"}),
    "404 page": Answer(404, LOGIN, {"content-type": "text/html"}),
    "302 to a page": Answer(302, b"", {"location": "/login?next=there"}),
    "page": Answer(200, LOGIN, {"content-type": "text/html; charset=utf-8"}),
    "page called JSON": Answer(200, LOGIN, {"content-type": "application/json"}),
    "no JSON": Answer(200, b"ok", {"content-type": "application/json"}),
    "cut JSON": Answer(200, b'{"object": "list", "da', {"content-type": "application/json"}),
    "cut body": Answer(200, b'{"object": "list", "da', {"content-type": "application/json"}, short_by=100),
    "other JSON": Answer(200, b'{"detail": "Not authenticated"}', {"content-type": "application/json"}),
    "JSON list": Answer(200, b"[1, null]", {"content-type": "application/json"}),
    "JSON null": Answer(200, b"null", {"content-type": "application/json"}),
    "no text": Answer(200, b"\xff\xfe\x00{}", {"content-type": "application/json"}),
    "nothing": Answer(200, b"", {"content-type": "application/json"}),
    "204": Answer(204),
    "418": Answer(418, b"I am a teapot", {"content-type": "text/plain"}),
    "502 page": Answer(502, LOGIN, {"content-type": "text/html"}),
}


@dataclass
class OddServer:
    """What is answered, and what was asked."""

    url: str
    answer: Answer
    asked: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)
    """Method, path and headers (in lower case)."""


@contextmanager
def odd_server() -> Iterator[OddServer]:
    """The server; its ``answer`` may be set anew at any time."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            odd.asked.append((self.command, self.path, {name.lower(): value for name, value in self.headers.items()}))
            answer = odd.answer if self.path != "/login?next=there" else ODD["page"]
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if answer.status != 204:
                self.send_header("content-length", str(len(answer.body) + answer.short_by))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_POST = do_HEAD = do_PUT = do_DELETE = do_PATCH = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        odd = OddServer(f"http://127.0.0.1:{server.server_port}", ODD["404"])
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield odd
        server.shutdown()
