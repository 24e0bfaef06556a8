"""The one place that asks the API: CSRF, retries, bounds, and errors named by what the caller can do."""

from __future__ import annotations

import json as jsonlib
import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import anyio
import httpx
from pydantic import ValidationError

from procworker.errors import ApiError, ObjectNotFound, Rejected, Unauthorized, Unreachable
from procworker.server.connection import authorization, connect, mask
from procworker.server.models import CsrfToken
from procworker.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Self

BODY_LIMIT = 64 * 1024 * 1024
REDIRECTS = 5
LONGEST_PAUSE, LONGEST_MAINTENANCE = 60.0, 600.0
PASSING_CODES = frozenset({408, 429, 502, 503})
TOO_LARGE = "the body is larger than 64 MiB"
# UnicodeError: a host name that cannot be encoded. OverflowError: TOO_LARGE. OSError: TimeoutError too.
LASTING = (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL, UnicodeError, OverflowError)
NO_ANSWER = (httpx.HTTPError, OSError, *LASTING)

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """A response, read to its end."""

    status: int
    reason: str
    headers: httpx.Headers
    body: bytes

    def refuses_csrf_token(self) -> bool:
        return self.status == 403 and b"CSRF token" in self.body


class _Passing(Exception):
    """An attempt failed in a way that the next one may not."""

    def __init__(self, error: ApiError, headers: Mapping[str, str] = {}, once: bool = False) -> None:
        self.error, self.once = error, once
        self.retry_after = _retry_after(headers.get("Retry-After", ""))
        self.in_maintenance = headers.get("Prefect-Maintenance", "").lower() == "true"


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
        self._connect = partial(connect, settings, transport, headers)
        self._secrets = {*settings.secrets(), (authorization(settings) or "").partition(" ")[2]}
        self._answered = False
        self._csrf: CsrfToken | None = None
        self._csrf_client = str(uuid4())
        self._csrf_lock = anyio.Lock()
        self._may_need_csrf = settings.client_csrf_support_enabled and not settings.is_cloud
        self._needs_csrf = self._may_need_csrf

    async def __aenter__(self) -> Self:
        self._client = self._connect()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    async def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, str] | None = None,
        parse: Callable[[bytes], Any] = lambda body: jsonlib.loads(body) if body else None,
        retries: int | None = None,
        deadline: float | None = None,
    ) -> Any:
        """Return the parsed answer or raise the last failure; no retry starts after deadline (anyio's clock).

        Attempts that meet the server's maintenance are not counted, unless retries is 0.
        """
        # A lone surrogate, as in a file name that is not UTF-8, would make the server refuse everything.
        content = None if json is None else jsonlib.dumps(json, ensure_ascii=False).encode(errors="replace")
        kind = {} if content is None else {"Content-Type": "application/json"}
        request = self._client.build_request(method, path, params=params, content=content, headers=kind)
        allowed = self._settings.client_max_retries if retries is None else retries
        attempts = used = 0
        while True:
            try:
                return await self._attempt(f"{method} {path}", request, parse)
            except _Passing as failure:
                attempts += 1
                pause = self._pause(failure, attempts)
                if not (failure.in_maintenance and allowed):
                    used += max(1, allowed) if failure.once else 1
                late = deadline is not None and anyio.current_time() + pause > deadline
                if late or used > allowed:
                    raise failure.error from failure.__cause__
                level = logging.WARNING if failure.in_maintenance else logging.DEBUG
                logger.log(level, "%s; trying again in %.0f s", failure.error, pause)
            await anyio.sleep(pause)

    def _pause(self, failure: _Passing, attempts: int) -> float:
        """Choose how long to wait: what the server says if it is sane, else twice as long each time."""
        jitter = self._settings.client_retry_jitter_factor
        longest = LONGEST_MAINTENANCE if failure.in_maintenance else LONGEST_PAUSE
        if failure.retry_after is not None:
            pause = min(failure.retry_after, longest) * random.uniform(1, 1 + jitter)
        else:
            pause = min(self.first_pause * 2.0 ** (attempts - 1), LONGEST_PAUSE)
            pause *= random.uniform(max(0, 1 - jitter), 1 + jitter)
        if failure.in_maintenance:
            pause = max(pause, self.first_pause)  # nothing else bounds these attempts
            self.maintenance_ends_at = anyio.current_time() + pause
        return pause

    async def _attempt(self, route: str, request: httpx.Request, parse: Callable[[bytes], Any]) -> Any:
        """Ask once, or twice if the server wants a new CSRF token."""
        try:
            # httpx bounds each read; this also stops a server that sends one byte at a time.
            with anyio.fail_after(2 * self._settings.api_request_timeout):
                await self._add_csrf_token(request)
                answer = await self._exchange(request)
                if answer.refuses_csrf_token() and self._may_need_csrf:
                    self._needs_csrf, self._csrf = True, None
                    await self._add_csrf_token(request)
                    answer = await self._exchange(request)
        except NO_ANSWER as error:
            raise self._silence(route, error) from error
        return self._read(route, answer, parse)

    async def _add_csrf_token(self, request: httpx.Request) -> None:
        """Fetch a token when a change needs one; most servers say, once, that they want none."""
        if request.method == "GET" or not self._needs_csrf:
            return
        async with self._csrf_lock:
            now = datetime.now(timezone.utc)
            if self._needs_csrf and (self._csrf is None or self._csrf.expiration <= now):
                params = {"client": self._csrf_client}
                answer = await self._exchange(self._client.build_request("GET", "/csrf-token", params=params))
                self._needs_csrf = answer.status not in (404, 405, 422)
                if self._needs_csrf:
                    self._csrf = self._read("GET /csrf-token", answer, CsrfToken.model_validate_json)
        if self._needs_csrf and self._csrf is not None:
            request.headers["Prefect-Csrf-Token"] = self._csrf.token
            request.headers["Prefect-Csrf-Client"] = self._csrf_client

    async def _exchange(self, request: httpx.Request) -> Answer:
        """Send a request and read the answer to its end, following redirects that keep the method."""
        for _ in range(REDIRECTS):
            async with aclosing(await self._client.send(request, stream=True)) as response:
                self._answered = True
                following = response.next_request
                if following is None or following.method != request.method:
                    body = await _body(response)
                    return Answer(response.status_code, response.reason_phrase, response.headers, body)
            if following.url.host != request.url.host:
                # httpx takes only Authorization away from strangers.
                for name in self._settings.client_custom_headers:
                    following.headers.pop(name, None)
            request = following
        raise httpx.TooManyRedirects("too many redirects")

    def _silence(self, route: str, error: Exception) -> Exception:
        """Explain a missing answer; where nothing ever answered, a refused connection is not tried again."""
        if isinstance(error, (httpx.TimeoutException, TimeoutError)):
            text = f"no answer within {self._settings.api_request_timeout:g} s"
        else:
            text = f"{type(error).__name__}: {error}"
        if "CERTIFICATE_VERIFY_FAILED" in text:
            text += " (PREFECT_API_SSL_CERT_FILE names the CA to trust)"
        failure = Unreachable(f"{route}: {self._line(text)}")
        first = isinstance(error, httpx.ConnectError) and not self._answered
        return failure if first or isinstance(error, LASTING) else _Passing(failure)

    def _read(self, route: str, answer: Answer, parse: Callable[[bytes], Any]) -> Any:
        """Return the parsed body of a good answer; raise what any other answer means."""
        text = f"{route}: {answer.status} {answer.reason}"
        excerpt = self._line(answer.body[:2000].decode(errors="replace"))[:200]
        if 200 <= answer.status < 300:
            try:
                return parse(answer.body)
            except (ValueError, RecursionError) as error:
                text += f", but the body is no use: {_complaint(error)}: {excerpt}"
                raise _Passing(Unreachable(text, answer.status), once=True) from None
        if location := answer.headers.get("Location"):
            text += f" to {self._line(location)[:200]}"
        failure = _kind(answer)(f"{text}: {excerpt}".rstrip(": "), answer.status)
        if answer.status in PASSING_CODES | self._settings.client_retry_extra_codes:
            raise _Passing(failure, answer.headers)
        raise failure

    def _line(self, text: str) -> str:
        """Make one printable line without secrets."""
        return " ".join("".join(c if c.isprintable() else " " for c in mask(text, self._secrets)).split())


def _kind(answer: Answer) -> type[ApiError]:
    if answer.status == 404:
        return ObjectNotFound
    if answer.status in (401, 403):
        return Unreachable if answer.refuses_csrf_token() else Unauthorized
    return Rejected if 400 <= answer.status < 500 and answer.status not in PASSING_CODES else Unreachable


def _complaint(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ".".join(map(str, first["loc"])) + f": {first['msg']}" if first["loc"] else first["msg"]


async def _body(response: httpx.Response) -> bytes:
    """Read to the end, but never more than the limit and one chunk."""
    declared = response.headers.get("Content-Length", "")
    body = bytearray()
    if declared.isdecimal() and int(declared) > BODY_LIMIT:
        raise OverflowError(TOO_LARGE)
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > BODY_LIMIT:
            raise OverflowError(TOO_LARGE)
    return bytes(body)


def _retry_after(text: str) -> float | None:
    """Read seconds or an HTTP date that are still to come; anything else counts as nothing."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError, OSError):
            return None
    return seconds if 0 <= seconds < math.inf else None
