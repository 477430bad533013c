"""What a server answers, or one line that says why it cannot be used: its address, the status, and what to do."""

import json
import os
import urllib.request
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError

from moesaic.core.errors import ConfigError, MoesaicError, StageError
from moesaic.core.network import opener
from moesaic.core.redaction import redact

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable of the key that a running server asks for; one that is started here asks for none."""
_ANSWER_WITHIN_S = 10.0
_MOST_BYTES = 16 * 2**20
_SHOWN = 300
_RETRIED = frozenset({408, 425, 429})
"""Besides those of 500 and above: the same request may be answered later."""


class NotYetError(StageError):
    """The server does not answer, or says that it cannot at the moment."""


def fetch(url: str, key: str | None, expected: str, *, shows_certificate: bool = True) -> str:
    """The body of a page.

    Args:
        url: its address.
        key: sent as bearer token.
        expected: what the page is, for messages.
        shows_certificate: False to ask as a client without the site's client certificate.

    Raises:
        NotYetError: if nobody answers, or the server fails.
        ConfigError: if it refuses for good, or sends elsewhere.
        StageError: if the answer breaks off or is no text.
    """
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with opener(url, _NoRedirects(), shows_certificate=shows_certificate).open(
            request, timeout=_ANSWER_WITHIN_S
        ) as answer:
            text = _read(answer).decode()
            if answer.status != 200:
                raise explain(url, answer.status, text, expected)
            return text
    except HTTPError as refusal:
        with refusal:
            said = refusal.read(_MOST_BYTES).decode(errors="replace")
            raise explain(url, refusal.code, said, expected, refusal.headers.get("Location")) from refusal
    except UnicodeDecodeError as strange:
        raise StageError(f"{url} answers with bytes that are no text; {expected} was expected there") from strange
    except (OSError, HTTPException) as failure:
        reason = getattr(failure, "reason", None) or failure
        raise NotYetError(f"{url} does not answer: {type(failure).__name__}: {reason}") from failure


def fetch_json(url: str, key: str | None, expected: str) -> Any:
    """The content of a JSON page; for the rest see :func:`fetch`."""
    text = fetch(url, key, expected)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as strange:
        raise unexpected(url, text, expected) from strange


def explain(url: str, status: int, said: str, expected: str, location: str | None = None) -> MoesaicError:
    """What a status other than 200 means.

    Args:
        url: what was asked.
        status: of the answer.
        said: the beginning of its body.
        expected: what the page is.
        location: where the answer sends to.
    """
    what = f"{url} answers {status} ({shown(said)})"
    if status >= 500 or status in _RETRIED:
        return NotYetError(f"{what}: the server fails, or is too busy; look at its log, and run again later")
    if status in (401, 403):
        return ConfigError(
            f"{what}: it asks for a key, or refuses the one it got; set {KEY_VARIABLE} to one that it takes"
        )
    if 300 <= status < 400:
        return ConfigError(
            f"{url} answers {status} and sends to {shown(location or '')}, maybe to log in; {expected} was expected "
            "there: name the server's own address"
        )
    return ConfigError(f"{what}; {expected} was expected there: is the address right, without the /v1?")


def unexpected(url: str, text: str, expected: str) -> MoesaicError:
    """An answer of status 200 that is something else, such as a page to log in, or breaks off."""
    is_page = text.lstrip()[:1] == "<"
    kind = "a web page, maybe to log in" if is_page else "something else"
    return ConfigError(f"{url} answers 200 with {kind} ({shown(text)}); {expected} was expected: is the address right?")


def shown(text: str) -> str:
    """The beginning of what a server said, in one line, without secrets."""
    return redact(" ".join(text.split()), os.environ)[:_SHOWN] or "and nothing else"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The API knows none; followed to another host, the key would go there."""

    def redirect_request(self, *_: Any) -> None:
        """None: the answer is an error."""


def _read(answer: HTTPResponse) -> bytes:
    body = answer.read(_MOST_BYTES)
    if answer.length:
        raise HTTPException(f"the answer breaks off {answer.length} bytes before its end")
    return body
