"""One run of inspect-ai: the problems of one effort, asked of a server and verified."""

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moesaic.engines.inspect_ai.environment import INSPECT
from moesaic.engines.own_environment import own_variables, program_version
from moesaic.engines.servers import Server
from moesaic.engines.tethered import last_lines, tethered
from moesaic.errors import StageError

_TASK = Path(__file__).with_name("verified_replies.py")
_SERVICE = "moesaic"
_LOOK_AFTER_S = 1.0
_MAX_RETRIES = 5
_CLOSED = re.compile(r"<\|\w+\|>\s*\Z")


@dataclass(frozen=True)
class Question:
    """A problem at one effort."""

    id: str
    task: str
    prompt_ids: tuple[int, ...]
    """What is sent."""
    text: str
    """The same for people to read."""
    answer: str
    verifier: str
    seeds: tuple[int, ...]
    """One for each reply that is wanted."""


@dataclass(frozen=True)
class Answer:
    """A reply, verified."""

    id: str
    epoch: int
    """From 1."""
    text: str
    """Markers included."""
    correct: bool
    tokens: int
    """By the server's count."""
    truncated: bool


@dataclass(frozen=True)
class Rules:
    """How replies are generated."""

    max_tokens: int
    temperature: float
    max_requests: int
    """In flight at once."""
    reply_timeout_s: float


@dataclass(frozen=True)
class Inspect:
    """inspect-ai, found and ready."""

    program: Path
    version: str

    def ask(
        self, server: Server, name: str, questions: Sequence[Question], rules: Rules, directory: Path
    ) -> list[Answer]:
        """Let the server reply to every question, once per seed.

        Args:
            server: any that completes prompts of token ids.
            name: what the log calls it.
            questions: each with as many seeds.
            rules: how to generate.
            directory: for the request and inspect's logs; with those of a killed run, only what they lack is asked.

        Returns:
            All replies to a question together, in the order of the questions.

        Raises:
            StageError: if inspect-ai fails, the server dies, or replies come without the token that ends them.
        """
        directory.mkdir(parents=True, exist_ok=True)
        request, log = directory / "request.json", directory / "inspect.log"
        request.write_text(json.dumps(_request(name, questions, rules, server.text_options)))
        command = [str(self.program), *_arguments(server, request, rules, directory / "logs")]
        with tethered(command, log, _environment(server, directory), _TASK.parent) as process:
            while _is_running(process):
                server.check_alive()
        if process.returncode:
            server.check_alive()
            raise StageError(f"inspect-ai failed with status {process.returncode}; {last_lines(log)}")
        answers = read_answers(self._dump(directory / "logs"))
        return [answers[question.id, epoch + 1] for question in questions for epoch in range(len(question.seeds))]

    def _dump(self, logs: Path) -> dict[str, Any]:
        """The log of the run as JSON; names begin with the time, so that the last is that of the last run."""
        log = max(logs.glob("*.eval"))
        command = [str(self.program), "log", "dump", str(log.absolute())]
        done = subprocess.run(command, capture_output=True, text=True, env=own_variables(), check=False)
        if done.returncode:
            raise StageError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        content: dict[str, Any] = json.loads(done.stdout)
        return content


def find_inspect() -> Inspect:
    """inspect-ai and its version; its environment is made if need be.

    Raises:
        ConfigError: if ``MOESAIC_INSPECT`` names no program.
        StageError: if its environment cannot be made, or it does not start.
    """
    program = INSPECT.find_program()
    return Inspect(program, program_version(program, "--version"))


def read_answers(log: dict[str, Any]) -> dict[tuple[str, int], Answer]:
    """Every reply of a log, by the question's id and the epoch.

    Raises:
        StageError: if the run is not whole, or a reply that ended lacks the token that ended it.
    """
    if log["status"] != "success":
        raise StageError(f"inspect-ai's run is {log['status']!r}, not 'success': {log.get('error')}")
    return {(sample["id"], sample["epoch"]): _answer(sample) for sample in log["samples"]}


def _answer(sample: dict[str, Any]) -> Answer:
    output = sample["output"]
    (choice,) = output["choices"]
    text, truncated = choice["message"]["content"], choice["stop_reason"] == "max_tokens"
    if not truncated and not _CLOSED.search(text):
        raise StageError(
            f"the reply to {sample['id']!r} ended ({choice['stop_reason']}) without a token that ends replies: "
            f"{text[-80:]!r}; the server must leave special tokens and the last one in its text"
        )
    correct = sample["scores"]["verified"]["value"] == "C"
    return Answer(sample["id"], sample["epoch"], text, correct, output["usage"]["output_tokens"], truncated)


def _request(name: str, questions: Sequence[Question], rules: Rules, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "epochs": len(questions[0].seeds),
        "questions": [asdict(question) for question in questions],
        "generation": {
            "max_tokens": rules.max_tokens,
            "temperature": rules.temperature,
            "extra_body": options,
        },
    }


def _arguments(server: Server, request: Path, rules: Rules, logs: Path) -> list[str]:
    """The address is not among what inspect-ai knows a run by: a server may come back on another port."""
    options = {
        "-T": f"request={request.absolute()}",
        "-M": f"client_timeout={rules.reply_timeout_s}",
        "--model": f"openai-api-completions/{_SERVICE}/{server.model}",
        "--model-base-url": f"{server.url}/v1",
        "--log-dir": str(logs.absolute()),
        "--max-samples": str(rules.max_requests),
        "--max-connections": str(rules.max_requests),
        "--max-retries": str(_MAX_RETRIES),
        "--retry-attempts": "0",
        "--display": "plain",
        "--ctl-server": "false",
    }
    return ["eval-set", _TASK.name, *(part for pair in options.items() for part in pair), "--no-log-realtime"]


def _environment(server: Server, directory: Path) -> dict[str, str]:
    """With inspect-ai's own files in one place and none of its options; the server is near, so no proxy is asked."""
    home = str((directory / "home").absolute())
    variables = {name: value for name, value in own_variables().items() if not name.startswith("INSPECT_")}
    return variables | {
        f"{_SERVICE.upper()}_API_KEY": "none",
        "XDG_CACHE_HOME": home,
        "XDG_DATA_HOME": home,
        "NO_PROXY": urlsplit(server.url).hostname or "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _is_running(process: "subprocess.Popen[bytes]") -> bool:
    try:
        process.wait(_LOOK_AFTER_S)
    except subprocess.TimeoutExpired:
        return True
    return False
