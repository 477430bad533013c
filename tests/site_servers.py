"""A site on loopback: its own certificate authority, a TLS server that asks for a client's certificate, and a proxy."""

import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOST = "server.site.test"
"""Only the proxy knows where that is."""


@dataclass
class Site:
    """Files and addresses, and what was asked."""

    authorities: Path
    certificate: Path
    """The client's, with its key."""
    url: str = f"https://{HOST}"
    proxy: str = ""
    status: int = 401
    """What the server answers those who show a certificate."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path, and who the client's certificate is for."""
    tunnels: list[str] = field(default_factory=list)
    """What the proxy was asked to connect to."""


@contextmanager
def site_servers(folder: Path, handler: type[BaseHTTPRequestHandler] | None = None) -> Iterator[Site]:
    """The server and the proxy, while the block runs; with a handler of its own the server asks for no certificate."""
    site = Site(folder / "authorities.pem", folder / "client.pem")
    write_certificates(folder)

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            assert isinstance(self.connection, ssl.SSLSocket)
            subject: Any = self.connection.getpeercert()
            site.asked.append((self.command, self.path, subject["subject"][0][0][1]))
            body = b'{"message": "this site answers nobody"}'
            self.send_response(site.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_POST = do_HEAD = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    class Proxy(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            site.tunnels.append(self.path)
            with socket.create_connection(("127.0.0.1", server.server_port)) as upstream:
                self.send_response(200)
                self.end_headers()
                back = threading.Thread(target=_pump, args=(upstream, self.connection), daemon=True)
                back.start()
                _pump(self.connection, upstream)
                back.join(5)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    context.load_verify_locations(site.authorities)
    context.verify_mode = ssl.CERT_NONE if handler else ssl.CERT_REQUIRED
    with Quiet(("127.0.0.1", 0), handler or Server) as server, Quiet(("127.0.0.1", 0), Proxy) as proxy:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        for one in (server, proxy):
            threading.Thread(target=one.serve_forever, args=(0.05,), daemon=True).start()
        site.proxy = f"http://127.0.0.1:{proxy.server_port}"
        yield site
        for one in (server, proxy):
            one.shutdown()


class Quiet(ThreadingHTTPServer):
    """Handshakes that fail are part of the tests."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def write_certificates(folder: Path, host: str = HOST) -> None:
    """An authority, and what it has signed: the server's certificate and a client's, each with its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), _name("authority")
    root = _certificate(name, key.public_key(), name, key, is_authority=True)
    (folder / "authorities.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    for file, subject in (("server.pem", host), ("client.pem", "a client of the site")):
        own = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(_name(subject), own.public_key(), name, key, is_authority=False, host=host)
        secret = own.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / file).write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + secret)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _certificate(
    subject: x509.Name, public: Any, issuer: x509.Name, key: Any, is_authority: bool, host: str = HOST
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    hour = datetime.timedelta(hours=1)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    builder = (
        builder.serial_number(x509.random_serial_number()).not_valid_before(now - hour).not_valid_after(now + hour)
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
    )
    usage = x509.KeyUsage(True, False, False, False, False, is_authority, is_authority, False, False)
    builder = builder.add_extension(usage, critical=True)
    if not is_authority:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
    return builder.sign(key, hashes.SHA256())
