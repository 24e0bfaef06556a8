"""Checks of settings and server: can it be reached, does it let us in, does it suit the flows?"""

from __future__ import annotations

import errno
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import anyio
import httpx

from procworker.cli.doctor.findings import Finding, fail, ok, warn
from procworker.cli.preview.job_view import USER_INFO
from procworker.errors import ApiError, ConfigurationError, Unauthorized, single
from procworker.local.server import knows_passwords, version_of
from procworker.redaction import SHORTEST_CREDENTIAL, Mask
from procworker.server.answer import Answer
from procworker.server.client import Client
from procworker.server.connection import Connection, proxy_to
from procworker.settings import Settings

ANSWER_SECONDS, LONGEST_SECONDS = 4.0, 4.8
"""Each request may take so long, and all that belongs to one answer (a token before, a second try)."""
CLOCK_SECONDS, AGAIN_SECONDS = 5.0, 1.2
LIKE = 0.93
"""How alike two names of settings are of which one may be a typing error of the other."""
URL, KEY, AUTH = "PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING"


@dataclass
class Server:
    """What a server says when it is asked once, each answer or what became of it."""

    settings: Settings
    pool: str | None = None
    answers: dict[str, Any] = field(default_factory=dict)
    health_seconds: float = 0.0
    ahead_seconds: float | None = None
    """By how much our clock is ahead of its; None when it does not tell its time."""
    longer_url: str | None = None
    """The same with /api, where that works better."""

    def said(self, what: str) -> Any:
        """An answer; None where there is none, for whatever reason."""
        answer = self.answers.get(what)
        return None if isinstance(answer, Exception) else answer

    @property
    def is_there(self) -> bool:
        return _is_healthy(self.said("health"))


async def ask(settings: Settings, pool: str | None) -> Server:
    """Ask everything at the same time, which takes five seconds at most."""
    server = Server(settings, pool)
    seconds = min(settings.api_request_timeout, ANSWER_SECONDS)
    brief = settings.model_copy(update={"api_request_timeout": seconds, "client_max_retries": 0})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_kept, server, "health", partial(_health, server, brief))
        tasks.start_soon(_kept, server, "all", partial(_question, server, brief))
    return server


async def _question(server: Server, settings: Settings) -> None:
    async with Client(settings) as client, anyio.create_task_group() as tasks:
        questions: dict[str, Callable[[], Awaitable[Any]]] = {"version": client.api_version}
        if (pool := server.pool) is not None:
            questions |= {
                "pool": partial(client.read_work_pool, pool),
                "queues": partial(client.read_work_queues, pool),
                "workers": partial(client.read_workers_for_work_pool, pool),
                "late": partial(client.read_late_flow_runs, pool),
            }
        for what, question in questions.items():
            tasks.start_soon(_kept, server, what, question)


async def _kept(server: Server, what: str, question: Callable[[], Awaitable[Any]]) -> None:
    try:
        with anyio.fail_after(LONGEST_SECONDS):
            server.answers[what] = await question()
    except Exception as error:
        server.answers[what] = single(error)


async def _health(server: Server, settings: Settings) -> Answer:
    async with Connection(settings) as connection:
        get = partial(connection.ask, "GET")
        asked_at, began = time.time(), time.monotonic()
        answer = await get("/health")
        server.health_seconds = time.monotonic() - began
        server.ahead_seconds = _ahead(answer, asked_at + server.health_seconds / 2)
        if not _is_healthy(answer) and not str(settings.api_url).endswith("/api"):
            if _is_healthy(await get("/api/health")):
                server.longer_url = f"{settings.api_url}/api"
        elif abs(server.ahead_seconds or 0) > CLOCK_SECONDS:
            # A busy server (uvicorn) may show the time of some seconds ago.
            with suppress(httpx.HTTPError, TimeoutError):
                await anyio.sleep(AGAIN_SECONDS)
                if (again := _ahead(await get("/health"), time.time())) is not None:
                    server.ahead_seconds = min(server.ahead_seconds or again, again, key=abs)
        return answer


def _ahead(answer: Answer, now: float) -> float | None:
    """Compare a time of ours with the server's Date header, which is cut to whole seconds."""
    try:
        return now - parsedate_to_datetime(answer.headers["date"]).timestamp() - 0.5
    except (KeyError, ValueError, TypeError, OverflowError, OSError):
        return None


def _is_healthy(answer: Answer | None) -> bool:
    return answer is not None and answer.status == 200 and answer.body.strip() == b"true"


# Settings


def settings_read(settings: Settings, heard: list[str]) -> list[Finding]:
    """Where settings come from, and what in them cannot be meant so."""
    places: dict[str, list[str]] = {}
    for name, place in settings.origins.items():
        places.setdefault(place, []).append(name)
    parts = [f"{', '.join(sorted(names))} ({place})" for place, names in places.items()]
    text = f"profile {settings.profile!r}; {'; '.join(parts) or 'none is set'}"
    found = [Finding("ok", "settings", text)]
    for complaint in heard:
        found += warn("settings", complaint, "correct it there: what is said there is not used")
    known = {f"PREFECT_{name.upper()}" for name in Settings.model_fields}
    for name in sorted(set(settings.exported) - known):
        if meant := get_close_matches(name, known, 1, LIKE):
            place = settings.origins.get(name, "settings")
            found += warn("settings", f"{name} ({place}) is no setting of Prefect's", f"did you mean {meant[0]}?")
    return found


# The server


def reachable(server: Server) -> list[Finding]:
    """Does the API answer, through what, how fast; or why not, as plainly as can be said."""
    settings, answer = server.settings, server.answers.get("health")
    url = shown_url(str(settings.api_url))
    place = settings.origins.get(URL, "settings")
    proxy = proxy_to(settings)
    ways = [f"through proxy {shown_url(proxy)}"] if proxy else []
    if settings.api_ssl_cert_file and str(settings.api_url).startswith("https"):
        ways.append(f"trusting {settings.api_ssl_cert_file}")
    if settings.api_tls_insecure_skip_verify:
        ways.append("certificates are NOT verified")
    way = f" {', '.join(ways)}" if ways else ""
    if isinstance(answer, Exception):
        text, fix = _why_silent(answer, settings, proxy, place)
        return fail("API", f"{url}{way}: {text}", fix)
    if server.is_there:
        text = f"{url} answers in {server.health_seconds * 1000:.0f} ms{way}"
        slow = server.health_seconds > 1
        return warn("API", text, "it is slow: is the server busy, or far away?") if slow else ok("API", text)
    assert isinstance(answer, Answer)
    if server.longer_url:
        return fail("API", f"{url} is no API", f"add /api: {URL}={shown_url(server.longer_url)} ({place})")
    if answer.status in (401, 403, 407):
        text = f"{url}{way}: {answer.status} {answer.reason}".rstrip()
        return fail("API", text, "somebody before the server wants other credentials: a proxy or gateway")
    if answer.status >= 500 or answer.status in (408, 429):
        return fail(
            "API", f"{url}{way}: {answer.status} {answer.reason}".rstrip(), "the server or a proxy is ill: see its log"
        )
    return fail("API", f"{url}{way}: no Prefect server answers there ({answer.status})", f"correct {URL} ({place})")


def _why_silent(error: Exception, settings: Settings, proxy: str | None, place: str) -> tuple[str, str]:
    """What kept an answer from coming, and what to change."""
    url = httpx.URL(settings.api_url or "")
    host, port = url.host, url.port or (443 if url.scheme == "https" else 80)
    causes = list(_causes(error))
    correct = f"correct {URL} ({place})"
    if isinstance(error, ConfigurationError):
        return str(error), "correct what is named"
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _certificate(cause, host)
        if isinstance(cause, ssl.SSLError):
            return (
                f"no TLS is spoken there ({cause.reason or cause})",
                f"for a server without TLS {URL} begins with http://",
            )
    if any(isinstance(cause, httpx.ProxyError) for cause in causes):
        text = Mask(settings.secrets(), SHORTEST_CREDENTIAL)(USER_INFO.sub("***", str(error)))
        return f"the proxy refuses: {text}", "correct HTTPS_PROXY, HTTP_PROXY or ALL_PROXY, or add the host to NO_PROXY"
    if proxy:
        correct = f"{correct}, or the proxy (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY)"
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            unknown = httpx.URL(proxy).host if proxy else host
            return f"the host name {unknown!r} is not known", f"{correct}, or mend name resolution"
    numbers = {getattr(cause, "errno", None) for cause in causes}
    if errno.ECONNREFUSED in numbers:
        return f"nothing listens at {host}:{port}", f"start the server there (prefect server start), or {correct}"
    if any(isinstance(cause, httpx.TimeoutException | TimeoutError) for cause in causes):
        return (
            f"no answer within {ANSWER_SECONDS:g} s",
            f"is the server overloaded, or a firewall on the way? Else {correct}",
        )
    text = Mask(settings.secrets(), SHORTEST_CREDENTIAL)(USER_INFO.sub("***", str(error))) or type(error).__name__
    if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError) and url.scheme == "http":
        return f"no HTTP is spoken there ({text})", f"for a server with TLS {URL} begins with https://; else {correct}"
    return text, correct


def _certificate(error: ssl.SSLCertVerificationError, host: str) -> tuple[str, str]:
    reason = error.verify_message
    if error.verify_code == 10:
        return "the server's certificate has expired", "have it renewed; is the clock of this host right?"
    if error.verify_code in (62, 64):
        return f"the server's certificate is for another name than {host!r}", f"use the name it is made for in {URL}"
    trust = "PREFECT_API_SSL_CERT_FILE names the file with the CA to trust"
    return f"the server's certificate is not trusted ({reason})", trust


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        for inner in getattr(error, "exceptions", ()):
            yield from _causes(inner)
        error = error.__cause__ or error.__context__


def shown_url(url: str) -> str:
    """A URL without its credentials."""
    return USER_INFO.sub("***", url)


def admitted(server: Server) -> list[Finding]:
    """Are the credentials good?"""
    settings = server.settings
    used = AUTH if settings.api_auth_string else KEY if settings.api_key else None
    if httpx.URL(str(settings.api_url)).username:  # httpx prefers them
        used = URL
    named = f"{used} ({settings.origins.get(used, 'settings')})" if used else ""
    named = f"the credentials in {named}" if used == URL else named
    refused = [answer for answer in server.answers.values() if isinstance(answer, Unauthorized)]
    if any(error.status_code == 401 for error in refused):
        if not used:
            return fail(
                "auth", "the server wants credentials, and none are set", f"set {AUTH}, or {KEY} for Prefect Cloud"
            )
        other = KEY if used == AUTH else AUTH
        return fail(
            "auth", f"the server refuses {named}", f"correct it, or set {other} instead: one is used by each server"
        )
    if refused:
        return fail(
            "auth",
            f"the server forbids this: {refused[0]}",
            "check the workspace in PREFECT_API_URL and what you may do",
        )
    if isinstance(error := server.answers.get("version"), ApiError):
        return warn("auth", f"not found out: {error}", "try again")
    return ok("auth", f"accepted, with {named}" if used else "none needed")


def versions(server: Server, flows: str | None) -> list[Finding]:
    """Does the flows' Prefect get on with the server's? As seen in README, "Servers and flows of other Prefects"."""
    what, version = "versions", server.answers.get("version")
    if isinstance(version, Exception):
        return []  # which is told elsewhere
    if version is None:
        return ok(what, "the server keeps its version to itself, as Prefect Cloud does")
    text = f"server {version}, flows {flows or 'unknown'}"
    if flows is None:
        return ok(what, text)
    theirs, ours = version_of(version), version_of(flows)
    if theirs < (3,) <= ours:
        fix = "use a server of 3.x, or name a Python with Prefect 2.20 by --python"
        return fail(what, f"{text}: Prefect 3 refuses a server of 2.x", fix)
    if server.settings.api_auth_string and not knows_passwords(flows):
        fix = "name a Python with a newer Prefect by --python, or use a server without password"
        return fail(what, f"{text}: Prefect before 3.1.10 knows no passwords", fix)
    if theirs < (3, 6) and ours >= (3, 6, 14):
        return warn(
            what, f"{text}: no task runs will be shown", "use a newer server, or an older Prefect for the flows"
        )
    if server.settings.api_auth_string and (3,) <= ours < (3, 6, 14):
        return warn(what, f"{text}: no task runs will be shown", "flows before 3.6.14 send them without the password")
    return ok(what, text)


def clock(server: Server) -> list[Finding]:
    """Is our clock that of the server?"""
    ahead = server.ahead_seconds
    if ahead is None:
        return ok("clock", "the server does not tell its time")
    text = f"{_span(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} the server's"
    if abs(ahead) <= CLOCK_SECONDS:
        return ok("clock", "that of the server, as far as its header tells")
    effect = "runs are taken too early" if ahead > 0 else "runs are taken too late"
    return warn("clock", f"{text}: {effect}, and times in logs and states are off", "set the clock (NTP) here or there")


def _span(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
