"""`ask`: one question to an OpenAI-compatible chat endpoint, asked again while the server is busy or not there."""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import random
import threading
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


class Stopped(Exception):
    """A wait was ended by who asked; the reply is no longer wanted."""


def checked_url(url: str) -> str:
    """Where chat completions are asked for, of an API's base such as ``http://localhost:8000/v1``.

    Raises
    ------
    CorrSteerError : for what is no such address, and for one that holds a secret, as addresses are recorded.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # half a bracket, or a port that is no number
        parts, good = None, False
    if parts is None or not good:
        got = "one with a user or query, which is not shown" if "@" in url or "?" in url else repr(url)
        raise CorrSteerError(f"url must be that of an API, such as http://localhost:8000/v1, got {got}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise CorrSteerError(
            "url must hold no user, password or query, as it is recorded; name the environment variable that holds the "
            "key: key=OPENAI_API_KEY"
        )
    path = parts.path.rstrip("/")
    return (
        f"{parts.scheme}://{parts.netloc}{path if path.endswith('/chat/completions') else path + '/chat/completions'}"
    )


def check_key_is_safe(url: str) -> None:
    """Raise CorrSteerError where a key would go over a network unencrypted, of an address that `checked_url` took."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not _is_this_machine(parts.hostname or ""):
        raise CorrSteerError(
            f"url must be https where there is a key, unless it is of this machine, got {url!r}; anyone on the "
            f"way could read the key"
        )


def ask(
    url: str, body: dict[str, Any], key: str | None, *, timeout: float, retries: int, backoff: float,
    stopped: threading.Event | None = None,
) -> Reply:  # fmt: skip
    """Send one request, and again where the server is busy (429), fails (500 and above), or does not answer.

    Parameters
    ----------
    body : the request, as JSON holds it.
    key : sent as the bearer's; it stands in no message.
    timeout : seconds without a byte after which a try has failed.
    retries : tries after the first.
    backoff : seconds before the second try; it doubles from try to try, and half of each is drawn at random. A server's
        Retry-After makes it longer, never shorter.
    stopped : ends the wait between two tries when it is set.

    Raises
    ------
    CorrSteerError : for any other status, a reply that is none, and a server that stays busy.
    Stopped : where `stopped` is set during a wait.
    """
    stopped = stopped or threading.Event()
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    said = "nothing"
    for attempt in range(retries + 1):
        try:
            with _OPENER.open(request, timeout=timeout) as response:
                return _reply(url, response.read(), key)
        except urllib.error.HTTPError as error:
            said = f"status {error.code}: {_start_of(error, key)}"
            if error.code not in TRY_AGAIN and error.code < 500:
                raise CorrSteerError(f"{url} refused with {said}") from None
            asked_for = _seconds(error.headers.get("Retry-After"))
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            said, asked_for = _without(key, " ".join(str(error).split())) or type(error).__name__, 0.0
        if attempt < retries:
            wait = min(max(backoff * 2**attempt * (0.5 + random.random() / 2), asked_for), LONGEST_WAIT)
            log.info("%s: %s; asked again in %.1f s", url, said, wait)
            if stopped.wait(wait):
                raise Stopped
    raise CorrSteerError(f"{url} gave no reply in {retries + 1} tries, at last {said}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A request that went elsewhere would take the key along."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """None: the status is an error as others are."""


_OPENER = urllib.request.build_opener(_NoRedirects)


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def _without(key: str | None, text: str) -> str:
    """A text for a message: servers may repeat the key that they were sent."""
    return text.replace(key, "(the key)") if key else text


def _reply(url: str, raw: bytes, key: str | None) -> Reply:
    try:
        found = json.loads(raw)
        text = found["choices"][0]["message"]["content"]
        usage = found.get("usage") or {}
        return Reply(text or "", int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        start = _without(key, raw.decode(errors="replace"))
        raise CorrSteerError(
            f"{url} must reply as a chat completion, got {start[:200]!r}; is it an OpenAI-compatible API?"
        ) from None


def _start_of(error: urllib.error.HTTPError, key: str | None) -> str:
    try:  # more than is shown, so that no part of a key is left at the cut
        text = " ".join(error.read(65536).decode(errors="replace").split()) or str(error.reason)
    except (OSError, http.client.HTTPException):
        text = str(error.reason)
    return _without(key, text)[:300]


def _seconds(header: str | None) -> float:
    """Of Retry-After; 0 without one, and for a date, which is seldom sent."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
