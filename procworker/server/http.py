"""The one place that asks the API: bounds, retries, CSRF, and errors named by what the caller can do."""

from __future__ import annotations

import json as jsonlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from uuid import uuid4

import anyio
import httpx
from pydantic import AwareDatetime, ValidationError

from procworker.errors import ApiError, ObjectNotFound, Rejected, Unauthorized, Unreachable
from procworker.redaction import SHORTEST_CREDENTIAL, Mask
from procworker.server.answer import Answer
from procworker.server.connection import CSRF_HEADERS, Connection
from procworker.server.models import Shape
from procworker.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Self

LONGEST_BACKOFF, LONGEST_PAUSE, LONGEST_MAINTENANCE = 10.0, 60.0, 600.0
EXCERPT, LONGEST_LINE = 200, 500
"""Characters, of what the server or httpx says."""
PASSING_CODES = frozenset({408, 429, 502, 503})
TOO_LARGE = frozenset({413, 414, 431})
# OverflowError: a body over the limit. UnicodeError: a host name that cannot be encoded. OSError: a timeout.
LASTING = (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL, OverflowError, UnicodeError)
NO_ANSWER = (httpx.HTTPError, OSError, *LASTING)

logger = logging.getLogger(__name__)

Parse = Callable[[bytes], Any]


class CsrfToken(Shape):
    """The server's leave to change things, for an hour or so."""

    token: str
    expiration: AwareDatetime


class _Passing(Exception):
    """An attempt failed in a way that the next one may not; with `once`, one more attempt is enough."""

    def __init__(self, error: ApiError, headers: Mapping[str, str] = {}, once: bool = False) -> None:
        self.error, self.once = error, once
        self.retry_after = _retry_after(headers.get("retry-after", ""))
        self.in_maintenance = headers.get("prefect-maintenance", "").lower() == "true"


class Http:
    """Ask one API; whatever does not succeed is an ApiError that says so in one line, without secrets."""

    first_pause = 2.0

    def __init__(
        self,
        settings: Settings,
        transport: httpx.AsyncBaseTransport | None = None,
        headers: Mapping[str, str] = {},
    ) -> None:
        self.maintenance_ends_at: float | None = None
        self._settings = settings
        self._connect = partial(Connection, settings, transport, headers)
        self._answered = False
        self._dated: tuple[str | None, float] = None, 0.0
        self._may_need_csrf = settings.client_csrf_support_enabled and not settings.is_cloud
        self._needs_csrf = self._may_need_csrf
        self._csrf: CsrfToken | None = None
        self._csrf_client = str(uuid4())
        self._csrf_lock = anyio.Lock()

    async def __aenter__(self) -> Self:
        self._connection = self._connect()
        proof = self._connection.headers.get("authorization", "").split()[1:]
        self._mask = Mask({*self._settings.secrets(), *proof}, SHORTEST_CREDENTIAL)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._connection.__aexit__(*error)

    @property
    def clock_offset(self) -> float | None:
        """Seconds by which the server's clock was ahead of ours at its last answer; None where it does not tell."""
        text, at = self._dated
        try:
            return parsedate_to_datetime(text).timestamp() - at if text else None
        except (ValueError, TypeError, OverflowError, OSError):
            return None

    async def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, str] | None = None,
        parse: Parse = lambda body: jsonlib.loads(body) if body else None,
        retries: int | None = None,
        deadline: float | None = None,
    ) -> Any:
        """Return the parsed answer or raise the last failure; no retry starts after deadline (anyio's clock).

        Attempts that meet the server's maintenance are not counted, unless retries is 0.
        """
        # A lone surrogate (a file name that is not UTF-8) would make the server refuse everything.
        content = None if json is None else jsonlib.dumps(json, ensure_ascii=False).encode(errors="replace")
        headers = {} if json is None else {"content-type": "application/json"}
        target = path + (f"?{urlencode(params)}" if params else "")
        ask = partial(self._exchange, method, target, content, headers)
        allowed = self._settings.client_max_retries if retries is None else retries
        attempts = used = 0
        while True:
            try:
                return await self._attempt(method, path, ask, parse)
            except _Passing as failure:
                attempts += 1
                pause = self._pause(failure, attempts)
                if not (failure.in_maintenance and allowed):
                    used += max(1, allowed) if failure.once else 1
                late = deadline is not None and anyio.current_time() + pause > deadline
                if late or used > allowed:
                    failure.error.retry_after = None if failure.retry_after is None else pause
                    raise failure.error from failure.__cause__
                level = logging.WARNING if failure.in_maintenance else logging.DEBUG
                logger.log(level, "%s; trying again in %.0f s", failure.error, pause)
            await anyio.sleep(pause)

    def _pause(self, failure: _Passing, attempts: int) -> float:
        """Choose how long to wait: what the server says, if that is sane, or twice as long each time."""
        jitter = self._settings.client_retry_jitter_factor
        if failure.retry_after is None:
            pause = min(self.first_pause * 2.0 ** min(attempts - 1, 9), LONGEST_BACKOFF)
            pause *= random.uniform(max(0, 1 - jitter), 1 + jitter)
        else:
            longest = LONGEST_MAINTENANCE if failure.in_maintenance else LONGEST_PAUSE
            pause = min(failure.retry_after, longest) * random.uniform(1, 1 + jitter)
        if failure.in_maintenance:
            pause = max(pause, self.first_pause)  # nothing else slows these attempts down
            self.maintenance_ends_at = anyio.current_time() + pause
        return pause

    async def _attempt(
        self, method: str, path: str, ask: Callable[[Mapping[str, str]], Awaitable[Answer]], parse: Parse
    ) -> Any:
        """Ask once, or twice if the server wants a new CSRF token; however many answers that takes, time is bounded."""
        route = f"{method} {path}"
        try:
            with anyio.fail_after(2 * self._settings.api_request_timeout):
                proof = await self._csrf_proof(method)
                answer = await ask(proof)
                if answer.refuses_csrf_token() and self._may_need_csrf:
                    self._needs_csrf = True
                    if self._csrf and self._csrf.token in proof.values():  # else somebody was faster
                        self._csrf = None
                    answer = await ask(await self._csrf_proof(method))
        except NO_ANSWER as error:
            raise self._silence(route, error) from error
        return self._read(route, answer, parse)

    async def _csrf_proof(self, method: str) -> Mapping[str, str]:
        """Fetch a token if a change needs one; most servers say, once, that they want none."""
        if method == "GET" or not self._needs_csrf:
            return {}
        async with self._csrf_lock:
            fresh = self._csrf is not None and self._csrf.expiration > datetime.now(timezone.utc)
            if self._needs_csrf and not fresh:
                client = urlencode({"client": self._csrf_client})
                answer = await self._exchange("GET", f"/csrf-token?{client}", None, {}, {})
                self._needs_csrf = answer.status not in (404, 405, 422)
                if self._needs_csrf:
                    self._csrf = self._read("GET /csrf-token", answer, CsrfToken.model_validate_json)
        if not self._needs_csrf or self._csrf is None:
            return {}
        return dict(zip(CSRF_HEADERS, (self._csrf.token, self._csrf_client), strict=True))

    async def _exchange(
        self, method: str, target: str, content: bytes | None, headers: Mapping[str, str], proof: Mapping[str, str]
    ) -> Answer:
        answer = await self._connection.ask(method, target, content, {**headers, **proof})
        self._answered = True
        self._dated = answer.headers.get("date"), time.time()
        return answer

    def _silence(self, route: str, error: Exception) -> Exception:
        """Explain a missing answer; a connection that is refused before any answer came is not retried."""
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, (httpx.TimeoutException, TimeoutError)):
            text = f"no answer within {self._settings.api_request_timeout:g} s"
        elif "CERTIFICATE_VERIFY_FAILED" in text:
            text += " (PREFECT_API_SSL_CERT_FILE names the CA to trust)"
        elif isinstance(error, httpx.ConnectError) and not self._settings.embedded_server:
            text += f" (PREFECT_API_URL is {self._settings.api_identity})"
        failure = Unreachable(f"{route}: {self._line(text)[:LONGEST_LINE]}")
        first = isinstance(error, httpx.ConnectError) and not self._answered
        return failure if first or isinstance(error, LASTING) else _Passing(failure)

    def _read(self, route: str, answer: Answer, parse: Parse) -> Any:
        """Return the parsed body of a good answer; raise what any other answer means."""
        good = 200 <= answer.status < 300
        text = f"{route}: {answer.status} {self._line(answer.reason)[:EXCERPT]}".rstrip()
        if good:
            try:
                return parse(answer.body)
            except (ValueError, RecursionError) as error:
                text += f", but the body is no use: {_complaint(error)[:EXCERPT]}"
        elif location := answer.headers.get("location"):
            text += f" to {self._mask(location)[:EXCERPT]}"
        if (good or answer.status == 404) and not self._connection.base.endswith("/api") and not answer.is_of_the_api():
            text += " (most PREFECT_API_URL end in /api)"
        excerpt = self._excerpt(answer.body) if not good or answer.is_a_page() else ""
        failure = _kind(answer)(f"{self._line(text)}: {excerpt}".rstrip(": "), answer.status)
        if good or answer.status in PASSING_CODES | self._settings.client_retry_extra_codes:
            raise _Passing(failure, answer.headers, once=good)
        raise failure

    def _excerpt(self, body: bytes) -> str:
        """The beginning of a body, not cut amid a secret: half of it would not be known as one."""
        end, _ = self._mask.seam(body[: 10 * EXCERPT + self._mask.longest], 10 * EXCERPT)
        return self._line(body[:end].decode(errors="replace"))[:EXCERPT]

    def _line(self, text: str) -> str:
        """Make one printable line without secrets."""
        return " ".join("".join(c if c.isprintable() else " " for c in self._mask(text)).split())


def _kind(answer: Answer) -> type[ApiError]:
    if answer.status == 404:
        return ObjectNotFound if answer.is_of_the_api() else Unreachable
    if answer.status in (401, 403):
        return Unreachable if answer.refuses_csrf_token() else Unauthorized
    if answer.status in TOO_LARGE:  # whoever says so, it will not get smaller
        return Rejected
    refused = 400 <= answer.status < 500 and answer.status not in PASSING_CODES
    return Rejected if refused and (not answer.body or answer.is_of_the_api()) else Unreachable


def _complaint(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))


def _retry_after(text: str) -> float | None:
    """Read seconds, or a date that is still to come; anything else counts as nothing."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError, OSError):
            return None
    return seconds if 0 <= seconds < math.inf else None
