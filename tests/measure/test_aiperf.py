"""AIPerf's surroundings: its environment, what it is told and what it reports. It really runs in the stage's test."""

import json
import os
import re
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest

from moesaic.core.errors import ConfigError, StageError
from moesaic.core.own_environment import own_variables
from moesaic.core.virtual_environment import VirtualEnvironment, pins_here
from moesaic.measure.benchmark_serving.aiperf import client
from moesaic.measure.benchmark_serving.aiperf.client import Client, Load, find_client
from moesaic.measure.benchmark_serving.aiperf.environment import AIPERF
from moesaic.measure.benchmark_serving.aiperf.export import EXPORT, read_export
from moesaic.measure.benchmark_serving.load_sweep import Counts, Latency, LoadPoint
from tests.measure.aiperf_export import export, metric
from tests.odd_answers import KEY
from tests.site_servers import HOST, site_servers

LOAD = Load(LoadPoint("short", 32, 8, 2), requests=6, warmup_requests=2, vocab_size=64, seed=0)


def read(content: dict[str, Any], directory: Path) -> Any:
    path = directory / EXPORT
    path.write_text(json.dumps(content))
    return read_export(path)


def test_the_export_is_read_into_the_sweeps_terms(tmp_path: Path) -> None:
    found = read(export(), tmp_path)
    assert found.counts == Counts(6, 192, 48)
    assert found.warmup == Counts(2, 64, 16)
    assert found.errors == 0
    assert (found.requests_per_s, found.tokens_per_s, found.mean_output_tokens) == (13.079, 104.632, 8.0)
    assert found.ttft_ms == Latency(68.4, 71.7, 92.5)
    assert found.itl_ms == Latency(10.7, 12.2, 16.6)
    assert found.request_ms == Latency(143.3, 157.4, 200.9)
    assert found.tokens_per_s_per_user == pytest.approx(8 / 0.1433)


def test_no_warmup_counts_nothing_and_errors_of_both_phases_count(tmp_path: Path) -> None:
    assert read({**export(), "warmup_metrics": None}, tmp_path).warmup == Counts(0, 0, 0)
    failed = export() | {"error_request_count": metric(2.0)}
    failed["warmup_metrics"] |= {"error_request_count": metric(1.0)}
    assert read(failed, tmp_path).errors == 3


def test_an_export_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="AIPerf did not finish: it ran out of time"):
        read(export() | {"is_complete": False, "incomplete_reason": "it ran out of time"}, tmp_path)
    content = export() | {"error_summary": [{"error_details": {"message": "HTTP 503"}, "count": 6}]}
    del content["output_sequence_length"]
    with pytest.raises(StageError, match=r"no whole export of AIPerf \(KeyError.*requests failed: .*HTTP 503"):
        read(content, tmp_path)
    with pytest.raises(StageError, match="no whole export"):
        read_export(tmp_path / "nowhere" / EXPORT)


def test_requests_are_exact_different_and_the_same_every_time(tmp_path: Path) -> None:
    client._write_inputs(tmp_path / "a.json", "parent", LOAD)
    client._write_inputs(tmp_path / "b.json", "parent", LOAD)
    client._write_inputs(tmp_path / "c.json", "parent", replace(LOAD, seed=1))
    first, again, other = (json.loads((tmp_path / name).read_text())["data"] for name in ("a.json", "b.json", "c.json"))
    assert first == again != other
    bodies = [body for session in first for body in session["payloads"]]
    assert len(bodies) == len({tuple(body["prompt"]) for body in bodies}) == 8
    for body in bodies:
        assert len(body["prompt"]) == 32
        assert all(0 <= token < 64 for token in body["prompt"])
        assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (8, 8, True)
        assert body["stream_options"] == {"include_usage": True}


def program(directory: Path, body: str) -> Path:
    path = directory / "aiperf"
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_client_that_fails_or_takes_too_long_says_what_it_printed(tmp_path: Path) -> None:
    failing = Client(program(tmp_path, "print('no server there'); raise SystemExit(3)"), "0")
    with pytest.raises(StageError, match=r"AIPerf failed with status 3 at LoadPoint(.|\n)*  no server there"):
        failing.run("http://127.0.0.1:1", "parent", LOAD, tmp_path / "failing", 60)
    slow = Client(program(tmp_path, "import time; print('waiting', flush=True); time.sleep(60)"), "0")
    with pytest.raises(StageError, match=r"not done .* after 2 s \(point_timeout_s\)(.|\n)*  waiting"):
        slow.run("http://127.0.0.1:1", "parent", LOAD, tmp_path / "slow", 2)


TELLS = """
import json, os, sys
settings = json.load(open(sys.argv[sys.argv.index('--config') + 1]))
print(json.dumps({'argv': sys.argv, 'settings': settings, 'key': os.environ.get('OPENAI_API_KEY')}))
raise SystemExit(3)
"""


@pytest.mark.parametrize("key", ["sk-nobody-may-see-this", "12345", None])
def test_a_key_is_in_no_command_line_and_no_file(
    key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another server's")
    with pytest.raises(StageError, match="failed with status 3"):
        Client(program(tmp_path, TELLS), "0").run("http://127.0.0.1:1", "m", LOAD, tmp_path / "out", 60, key)
    told = json.loads((tmp_path / "out/aiperf.log").read_text())
    endpoint = told["settings"]["benchmark"]["endpoint"]
    assert told["key"] == key
    assert endpoint.get("headers") == ({"Authorization": "Bearer ${OPENAI_API_KEY}"} if key else None)
    assert key is None or key not in json.dumps([told["argv"], told["settings"]])


class KeyedServer(BaseHTTPRequestHandler):
    """Streams eight tokens to those who have the key, and looks who else of this machine has read it meanwhile."""

    heard: ClassVar[set[tuple[bool, bool]]] = set()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
        self.heard.add((self.headers["authorization"] == f"Bearer {KEY}", any(KEY.encode() in line for line in lines)))
        usage = {
            "prompt_tokens": len(asked["prompt"]),
            "completion_tokens": 8,
            "total_tokens": len(asked["prompt"]) + 8,
        }
        chunks = [{"choices": [{"index": 0, "text": "a"}]}] * 8 + [{"choices": [], "usage": usage}]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(
                b"data: " + json.dumps({"object": "text_completion", "model": "m"} | chunk).encode() + b"\n\n"
            )
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.engine
@pytest.mark.timeout(3600)
def test_the_real_client_sends_a_key_that_nobody_else_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a site's proxy, to a server whose certificate is of the site's own authority."""
    with site_servers(tmp_path, KeyedServer) as site:
        monkeypatch.setenv("https_proxy", site.proxy)
        monkeypatch.setenv("SSL_CERT_FILE", str(site.authorities))
        found = find_client().run(site.url, "m", LOAD, tmp_path / "out", 300, KEY)
        assert set(site.tunnels) == {f"{HOST}:443"}
    assert (found.counts, found.warmup, found.errors) == (Counts(6, 192, 48), Counts(2, 64, 16), 0)
    assert KeyedServer.heard == {(True, False)}
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_server_that_asks_for_a_certificate_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What answers everybody, or nobody yet, is left alone."""
    with site_servers(tmp_path) as site:
        site.status = 200
        monkeypatch.setenv("https_proxy", site.proxy)
        monkeypatch.setenv("SSL_CERT_FILE", str(site.authorities))
        monkeypatch.setenv("SSL_CLIENT_CERT", str(site.certificate))
        with pytest.raises(
            ConfigError, match=r"AIPerf shows none \(.*; name an address of this server that asks for none"
        ):
            client.check_certificates(site.url)
        assert [path for _, path, _ in site.asked] == ["/v1/models"], "the other one came to no request"
        site.status = 401
        with pytest.raises(ConfigError, match=r"401.*set OPENAI_API_KEY"):
            client.check_certificates(site.url)
        site.status = 503
        client.check_certificates(site.url)
        monkeypatch.delenv("SSL_CLIENT_CERT")
        client.check_certificates(site.url)


def test_the_environments_of_others_do_not_reach_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image sets these for its own packages; AIPerf has others."""
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MOESAIC_AIPERF", str(program(tmp_path, "import os; print(sorted(os.environ), '0.13.0')")))
    assert find_client() == Client(tmp_path / "aiperf", "0.13.0")
    assert {"PYTHONPATH", "HF_HUB_OFFLINE"}.isdisjoint(own_variables())
    assert "PATH" in own_variables()


def test_a_program_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_AIPERF", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"MOESAIC_AIPERF is '.*nothing', which is no program"):
        AIPERF.find_program()
    monkeypatch.setenv("MOESAIC_AIPERF", str(program(tmp_path, "raise SystemExit('broken')")))
    with pytest.raises(StageError, match="--version failed: broken"):
        find_client()


def test_constraints_pin_everything_exactly() -> None:
    pins = pins_here(AIPERF.pins)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    assert sum(pin.startswith("aiperf==") for pin in pins) == 1


def test_the_environment_is_filled_once_and_one_that_is_not_as_pinned_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making it and installing into it are left out: they take minutes, and ``tests/images`` does them."""
    monkeypatch.delenv("MOESAIC_AIPERF", raising=False)
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    done: list[tuple[object, ...]] = []

    def make(self: VirtualEnvironment) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        done.append(("made", self.folder))

    monkeypatch.setattr(VirtualEnvironment, "make", make)
    monkeypatch.setattr(VirtualEnvironment, "install", lambda self, *what: done.append(what))
    monkeypatch.setattr(VirtualEnvironment, "compile", lambda self: done.append(("compiled",)))
    monkeypatch.setattr(VirtualEnvironment, "differences", lambda self, pins: ["aiperf is missing"] * len(done[3:]))
    home = AIPERF.directory
    for _ in range(2):
        assert AIPERF.find_program() == home / "bin" / "aiperf"
        assert done == [("made", home), ("--requirement", AIPERF.pins), ("compiled",)]
    (home / ".complete").unlink()
    with pytest.raises(StageError, match=r"not as pinned: aiperf is missing(.|\n)*let MOESAIC_AIPERF name aiperf"):
        AIPERF.find_program()
    assert done[3:] == [("made", home), ("--requirement", AIPERF.pins)]


def test_other_pins_have_an_environment_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "pins.txt").write_text("aiperf==9\n")
    assert replace(AIPERF, pins=tmp_path / "pins.txt").directory != AIPERF.directory
