"""`ask`: one question to an OpenAI-compatible chat endpoint, asked again while the server is busy or not there."""

from __future__ import annotations

import http.client
import json
import logging
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from corrsteer.errors import CorrSteerError

log: logging.Logger = logging.getLogger(__name__)

LONGEST_WAIT = 120.0  # seconds between two tries, whatever the server asks for
TRY_AGAIN = (408, 409, 425, 429)  # and 500 and above: of other statuses the same request gets no better


@dataclass(frozen=True)
class Reply:
    """What a model wrote, and the tokens of the request and of that, as the server counts them."""

    text: str
    prompt_tokens: int
    completion_tokens: int


def checked_url(url: str) -> str:
    """Where chat completions are asked for, of an API's base such as ``http://localhost:8000/v1``.

    Raises
    ------
    CorrSteerError : for what is no such address, and for one that holds a secret, as addresses are recorded.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CorrSteerError(f"url must be that of an API, such as http://localhost:8000/v1, got {url!r}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise CorrSteerError(
            "url must hold no user, password or query, as it is recorded; name the environment variable that holds the "
            "key: key=OPENAI_API_KEY"
        )
    path = parts.path.rstrip("/")
    return (
        f"{parts.scheme}://{parts.netloc}{path if path.endswith('/chat/completions') else path + '/chat/completions'}"
    )


def ask(url: str, body: dict[str, Any], key: str | None, *, timeout: float, retries: int, backoff: float) -> Reply:
    """Send one request, and again where the server is busy (429), fails (500 and above), or does not answer.

    Parameters
    ----------
    body : the request, as JSON holds it.
    key : sent as the bearer's; it stands in no message.
    timeout : seconds without a byte after which a try has failed.
    retries : tries after the first.
    backoff : seconds before the second try; it doubles from try to try, and half of each is drawn at random. A server's
        Retry-After goes first.

    Raises
    ------
    CorrSteerError : for any other status, a reply that is none, and a server that stays busy.
    """
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    said = "nothing"
    for attempt in range(retries + 1):
        try:
            with _OPENER.open(request, timeout=timeout) as response:
                return _reply(url, response.read())
        except urllib.error.HTTPError as error:
            said = f"status {error.code}: {_start_of(error)}"
            if error.code not in TRY_AGAIN and error.code < 500:
                raise CorrSteerError(f"{url} refused with {said}") from None
            asked_for = _seconds(error.headers.get("Retry-After"))
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            said, asked_for = " ".join(str(error).split()) or type(error).__name__, None
        if attempt < retries:
            wait = backoff * 2**attempt * (0.5 + random.random() / 2) if asked_for is None else asked_for
            log.info("%s: %s; asked again in %.1f s", url, said, min(wait, LONGEST_WAIT))
            time.sleep(min(wait, LONGEST_WAIT))
    raise CorrSteerError(f"{url} gave no reply in {retries + 1} tries, at last {said}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A request that went elsewhere would take the key along."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """None: the status is an error as others are."""


_OPENER = urllib.request.build_opener(_NoRedirects)


def _reply(url: str, raw: bytes) -> Reply:
    try:
        found = json.loads(raw)
        text = found["choices"][0]["message"]["content"]
        usage = found.get("usage") or {}
        return Reply(text or "", int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CorrSteerError(
            f"{url} must reply as a chat completion, got {raw[:200]!r}; is it an OpenAI-compatible API?"
        ) from None


def _start_of(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read(300).decode(errors="replace").split()) or str(error.reason)
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _seconds(header: str | None) -> float | None:
    """Of Retry-After; None for a date, which is seldom sent."""
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:
        return None
