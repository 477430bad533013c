"""Bills of materials name what is pinned, byte for byte the same; an audit is clean only if every pin was looked up."""

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import moesaic
from images import inventory
from images.requirements import ROOT, RUNTIMES, constraints, path_of, pins_in

BIN = ROOT / "build" / "tools" / "bin"
needs_tools = pytest.mark.skipif(not (BIN / "pip-audit").is_file(), reason="`make sbom` or `make audit` installs them")


def test_everything_audited_is_pinned_and_covers_the_images() -> None:
    for path in inventory.audited().values():
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert lines and all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+( ; .+)?", line) for line in lines)
    pinned = {f"{name}=={version}" for name, version in constraints().items()}
    assert all(set(pins_in(path_of(name))) <= pinned for name in RUNTIMES)


def test_tools_that_are_missing_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("sbom", "audit"):
        assert inventory.main([action, "--tools", str(tmp_path), "--output", str(tmp_path / "bills")]) == 2
        assert "does not exist; `make sbom` and `make audit` install it" in capsys.readouterr().err


@needs_tools
def test_bills_list_the_pins_and_are_the_same_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "RUNTIMES", {"kv": RUNTIMES["kv"]})
    for run in ("first", "second"):
        written = inventory.write_bills(BIN, tmp_path / run, BIN / "python")
    assert [path.name for path in written] == ["environment.json", "kv.json"]
    for path in written:
        text = path.read_text()
        assert text == (tmp_path / "first" / path.name).read_text()
        assert not any(word in text for word in ("timestamp", "serialNumber", str(tmp_path), str(ROOT)))
        assert json.loads(text)["bomFormat"] == "CycloneDX"
    found = json.loads(written[1].read_text())
    subject = found["metadata"]["component"]
    assert (subject["name"], subject["version"]) == ("moesaic-kv", moesaic.__version__)
    assert {f"{one['name']}=={one['version']}" for one in found["components"]} == set(pins_in(path_of("kv")))
    installed = {one["name"] for one in json.loads(written[0].read_text())["components"]}
    assert {"cyclonedx-bom", "pip_audit"} <= installed


class Osv(ThreadingHTTPServer):
    """Answers as api.osv.dev does: one package is vulnerable, one cannot be looked up."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[tuple[str, str]] = []


class Answer(BaseHTTPRequestHandler):
    server: Osv

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = asked["package"]["name"]
        self.server.asked.append((name, asked["version"]))
        content = json.dumps({"vulns": [_advisory(name)]} if name == "rotten" else {}).encode()
        self.send_response(500 if name == "lost" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _advisory(name: str) -> dict[str, Any]:
    fixed = {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}
    package = {"ecosystem": "PyPI", "name": name}
    return {
        "id": "PYSEC-2000-1",
        "summary": "Runs what it reads.",
        "details": "",
        "aliases": [],
        "published": "2000-01-01T00:00:00Z",
        "affected": [{"package": package, "ranges": [fixed], "versions": ["1.0"]}],
    }


@pytest.fixture
def osv() -> Iterator[Osv]:
    server = Osv()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@needs_tools
@pytest.mark.parametrize(
    ("pins", "code", "told"),
    [
        (["sound==1.0", "whole==2.1"], 0, "No known vulnerabilities found"),
        (["sound==1.0", "rotten==1.0"], 1, "PYSEC-2000-1"),
        (["sound==1.0", "lost==1.0"], 1, "ServiceError"),
    ],
)
def test_an_audit_is_clean_only_if_every_pin_was_found_sound(
    pins: list[str],
    code: int,
    told: str,
    osv: Osv,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "pins").write_text("\n".join(pins))
    monkeypatch.setattr(inventory, "audited", lambda: {"pins": tmp_path / "pins"})
    url = f"http://127.0.0.1:{osv.server_port}/v1/query"
    assert inventory.main(["audit", "--tools", str(BIN), "--service", "osv", "--osv-url", url]) == code
    assert osv.asked == [tuple(pin.split("==")) for pin in pins]
    printed = capfd.readouterr()
    assert told in printed.out + printed.err
    assert ("the audit of pins found something, or osv did not answer" in printed.err) == bool(code)
