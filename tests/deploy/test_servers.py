"""Starting, awaiting, counting and stopping servers; the real one runs in the stage's test."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from moesaic.core.child_processes import last_lines, tethered
from moesaic.core.errors import ArtifactError, ConfigError, StageError
from moesaic.deploy.engines import Server, ServerSpec, adapters, check_available, server_process, started_server
from moesaic.deploy.engines.server_process import read_counters

PAGES = {
    "/health": "",
    "/v1/models": json.dumps({"data": [{"id": "served"}]}),
    "/prometheus/metrics": 'trtllm_request_success_total{reason="stop"} 3.0\ntrtllm_generation_tokens_total 24.0\n',
}


class Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path in PAGES else 404)
        self.end_headers()
        self.wfile.write(PAGES.get(self.path, "").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def spec(directory: Path, role: str = "child") -> ServerSpec:
    return ServerSpec(role, directory, "fp8", "float32", max_requests=8, max_cache_tokens=2**16)


def test_every_server_is_asked_for_all_tokens_of_a_reply() -> None:
    def options(owner: str) -> dict[str, object]:
        return Server("http://127.0.0.1:8000", "model", None, Path("log"), owner).token_options

    assert options("moesaic") == {"return_token_ids": True}
    assert options("vllm") == {"return_token_ids": True, "include_stop_str_in_output": True}
    assert options("tensorrt_llm") == {"detokenize": False, "include_stop_str_in_output": True}
    assert options("another") == options("vllm")


def test_counters_are_summed_over_their_labels() -> None:
    text = (
        "# TYPE vllm:request_success_total counter\n"
        'vllm:request_success_total{reason="stop",note="a {b} c"} 3.0\n'
        'vllm:request_success_total{reason="length"} 4.0 1700000000\n'
        "vllm:request_success_total_created 5\n"
        "vllm:generation_tokens_total 1.2e+03\n"
        "vllm:latency_bucket NaN\n"
    )
    names = ("vllm:request_success_total", "vllm:generation_tokens_total", "vllm:prompt_tokens_total")
    assert read_counters(text, names) == {"vllm:request_success_total": 7, "vllm:generation_tokens_total": 1200}


def test_a_running_server_is_found_by_its_variable_and_counted_by_its_own_names(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="set MOESAIC_SERVER_URL_CHILD"):
        check_available("running", spec(tmp_path))
    monkeypatch.setenv("MOESAIC_SERVER_URL_CHILD", f"{url}/v1/")
    check_available("running", spec(tmp_path))
    with started_server("running", spec(tmp_path), tmp_path / "log", 10) as server:
        assert (server.url, server.model) == (url, "served")
        assert server.counts() == {"requests": 3, "output_tokens": 24}
        server.check_alive()


def test_a_running_server_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_SERVER_URL_CHILD", "http://127.0.0.1:9")
    with (
        pytest.raises(StageError, match=r"http://127.0.0.1:9 was not ready after 0.5 s \(startup_timeout_s\)"),
        started_server("running", spec(tmp_path), tmp_path / "log", 0.5),
    ):
        pass


def test_a_bundle_brings_its_engines_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = adapters.command("tensorrt_llm", spec(tmp_path), 8001)
    assert command[:2] == ["trtllm-serve", str(tmp_path)]
    assert adapters.model_name("tensorrt_llm", spec(tmp_path)) == tmp_path.name
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    assert adapters.environment("tensorrt_llm", spec(tmp_path))["PYTHONPATH"] == f"{tmp_path}:/theirs"
    assert adapters.environment("vllm", spec(tmp_path))["PYTHONPATH"] == str(tmp_path / "vllm_plugin")
    assert command[command.index("--config") + 1] == str(tmp_path / "serve.yaml")
    assert command[command.index("--custom_module_dirs") + 1] == str(tmp_path / "trtllm")

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="'tensorrt_llm' needs trtllm-serve, which is not on the PATH"):
        check_available("tensorrt_llm", spec(tmp_path))
    (tmp_path / "trtllm-serve").touch(mode=0o755)
    with pytest.raises(ArtifactError, match=r"holds no serve.yaml; .* give a bundle of export_engine"):
        check_available("tensorrt_llm", spec(tmp_path))
    (tmp_path / "serve.yaml").touch()
    check_available("tensorrt_llm", spec(tmp_path))


def script(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "timeout_s", "said"),
    [
        (
            "print('out of memory'); raise SystemExit(7)",
            30,
            r"ended with status 7 before it served(.|\n)*out of memory",
        ),
        ("import time; print('loading', flush=True); time.sleep(60)", 2, r"not ready after 2 s(.|\n)*loading"),
    ],
)
def test_a_server_that_does_not_come_up_says_why(
    code: str, timeout_s: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_process, "command", lambda *_: script(code))
    with (
        pytest.raises(StageError, match=said),
        started_server("moesaic", spec(tmp_path), tmp_path / "log", timeout_s),
    ):
        pass


def test_another_server_on_the_port_is_noticed(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "command", lambda *_: script("import time; time.sleep(60)"))
    monkeypatch.setattr(server_process, "_free_port", lambda: int(url.rpartition(":")[2]))
    with (
        pytest.raises(StageError, match=r"serves \['served'\], not 'child': another server took the port"),
        started_server("moesaic", spec(tmp_path), tmp_path / "log", 10),
    ):
        pass


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_running(pid)


def test_the_end_of_the_block_ends_the_command_and_what_it_started(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    log = tmp_path / "log"
    with tethered(script(code), log) as process:
        while not log.read_text().endswith("\n"):
            time.sleep(0.05)
        child = int(log.read_text())
        assert is_running(process.pid)
        assert is_running(child)
    assert gone_within(child, 5)
    assert gone_within(process.pid, 1)
    assert str(child) in last_lines(log)


def test_a_killed_parent_takes_the_command_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import sys, time, pathlib\n"
        "from moesaic.core.child_processes import tethered\n"
        f"with tethered([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'],"
        f" pathlib.Path({str(log)!r})):\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(script(code))
    end = time.monotonic() + 30
    while not (log.is_file() and log.read_text().endswith("\n")) and time.monotonic() < end:
        time.sleep(0.05)
    child = int(log.read_text())
    assert is_running(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone_within(child, 5)


def test_a_process_ends_when_the_one_it_works_for_is_gone() -> None:
    code = (
        "import subprocess, time\n"
        "from moesaic.core.child_processes import end_with\n"
        "driver = subprocess.Popen(['sleep', '0.2'])\n"
        "end_with(driver.pid)\n"
        "driver.wait()\n"
        "time.sleep(60)\n"
    )
    assert subprocess.run(script(code), timeout=30, check=False).returncode == 1


def test_a_process_ends_with_its_parent_even_if_nobody_has_taken_note_of_its_end(tmp_path: Path) -> None:
    """Killed and not waited for, the parent still has its place among the processes."""
    note = tmp_path / "child"
    child = (
        "import os, pathlib, time\n"
        "from moesaic.core.child_processes import end_with\n"
        "end_with(os.getppid())\n"
        f"pathlib.Path({str(note)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(script(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"))
    end = time.monotonic() + 30
    while not (note.is_file() and note.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(parent.pid, signal.SIGKILL)
    assert gone_within(int(note.read_text()), 5)
    parent.wait()
