"""``moesaic serve``: an OpenAI-compatible server of one model."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from moesaic.command_line.model_option import MODEL, find_named
from moesaic.core.config import EmulatedCache, Precision
from moesaic.core.errors import ConfigError

_NEEDS = ("fastapi", "uvicorn", "torch", "transformers")


def add_serve_command(commands: Any) -> None:
    """Add ``serve`` to the command line."""
    parser = commands.add_parser(
        "serve",
        help="serve a parent or a child to any OpenAI client",
        description="Serve a parent or a child to any OpenAI client: /v1/chat/completions, /v1/completions, "
        "/v1/models, /health, /metrics; /docs describes them. Prints one line with the URL when it is ready. "
        "Requests are generated together; they join and leave between tokens. SIGTERM or Ctrl-C: new requests get 503, "
        "those taken on are finished.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(command=_serve)
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--revision", help="branch, tag or commit of a model named on a hub", default=None)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all of this machine's")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--name", help="what clients call the model (the directory's name)", default=argparse.SUPPRESS)
    parser.add_argument(
        "--kv-cache-dtype",
        choices=get_args(EmulatedCache),
        default="bf16",
        help="what the KV cache rounds to, emulated; fp8 by the checkpoint's own scales, fp8_unit without scales",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default=argparse.SUPPRESS,
        help="what the model computes in (float32 on a CPU, bfloat16 on an accelerator)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-batch", type=_positive, default=64, help="replies generated at once")
    limits.add_argument("--max-waiting", type=_positive, default=1024, help="replies that wait; beyond them 429")
    limits.add_argument(
        "--max-context",
        type=_positive,
        default=argparse.SUPPRESS,
        help="tokens of a prompt and its reply together (the model's positions)",
    )
    limits.add_argument(
        "--max-cache-tokens",
        type=_positive,
        default=262_144,
        help="room of the KV cache: replies in the batch times the longest, at full length",
    )
    limits.add_argument("--max-choices", type=_positive, default=16, help="replies that one request may ask for")
    limits.add_argument("--max-body-mib", type=_positive, default=4, help="size of a request's body")
    parser.add_argument(
        "--stop-within-s", type=float, default=30.0, help="seconds that running replies get after SIGTERM"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _serve(options: argparse.Namespace) -> None:
    missing = [package for package in _NEEDS if find_spec(package) is None]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}; pip install 'moesaic[serve]'")
    from moesaic.deploy.server.limits import ServerLimits
    from moesaic.deploy.server.process import bind, load, serve

    given = vars(options)
    limits = ServerLimits(
        max_context=given.get("max_context", 2**31),
        max_batch=options.max_batch,
        max_waiting=options.max_waiting,
        max_cache_tokens=options.max_cache_tokens,
        max_choices=options.max_choices,
        max_body_bytes=options.max_body_mib * 2**20,
    )
    called = options.model
    find_named(options)
    name = given.get("name") or Path(called).resolve().name
    with bind(options.host, options.port) as listener:
        served = load(options.model, name, options.kv_cache_dtype, given.get("precision"), limits)
        host = f"[{options.host}]" if ":" in options.host else options.host
        url = f"http://{host}:{listener.getsockname()[1]}/v1"
        serve(served, listener, options.stop_within_s, lambda: print(f"serving {name} at {url}", flush=True))
