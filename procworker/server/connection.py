"""Ask an API once, the way that the settings describe: credentials, TLS, proxies."""

from __future__ import annotations

import logging
import re
import ssl
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies

import anyio
import httpx

from procworker import __version__
from procworker.errors import ConfigurationError
from procworker.redaction import SHORTEST_CREDENTIAL, Mask
from procworker.server.answer import Answer
from procworker.server.plain import TOKEN, PlainHttp
from procworker.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Self

BODY_LIMIT, DECODED_AT_ONCE = 64 * 1024 * 1024, 16 * 1024
UNBOUNDED = re.compile(r",|\b(br|zstd)\b", re.I)
"""Content encodings of which a few bytes may become any number; nobody asked for them."""
REDIRECTS, HIGHEST_PORT = 5, 65535
# httpx looks at each idle connection for every request: four are enough for the pace of flow runs.
CONNECTIONS, IDLE_CONNECTIONS, IDLE_SECONDS = 16, 4, 25.0
LIMITS = httpx.Limits(
    max_connections=CONNECTIONS, max_keepalive_connections=IDLE_CONNECTIONS, keepalive_expiry=IDLE_SECONDS
)
# Servers treat a client that calls itself prefect/x.y as that version, so this one uses its own name.
OWN_HEADERS = {"user-agent": f"procworker/{__version__}", "x-prefect-api-version": "0.8.4"}
CSRF_HEADERS = ("prefect-csrf-token", "prefect-csrf-client")
RESERVED_HEADERS = {"user-agent", "content-length", "transfer-encoding", *CSRF_HEADERS}
HARMLESS_HEADERS = {"host", "accept", "accept-encoding", "content-type"}
HEADER_NAME = re.compile(TOKEN.decode())
HEADER_VALUE = re.compile(r"([!-~]([ -~\t]*[!-~])?)?")

logger = logging.getLogger(__name__)


class Connection:
    """How one API is asked. Plain HTTP has a short way; TLS, proxies and redirects are httpx's.

    Raises ConfigurationError for what cannot be followed of the settings.
    """

    def __init__(
        self, settings: Settings, transport: httpx.AsyncBaseTransport | None = None, headers: Mapping[str, str] = {}
    ) -> None:
        if not settings.api_url:
            raise ConfigurationError("there is no API to talk to: set PREFECT_API_URL")
        self.headers = _headers(settings, headers)
        self._settings = settings
        self._transport = transport
        self._seconds = settings.api_request_timeout
        self._long_way: httpx.AsyncClient | None = None
        self._short_way: PlainHttp | None = None
        with _explained(settings):
            url = httpx.URL(settings.api_url)
            self.base = str(url).rstrip("/")
            self._path = url.raw_path.decode().rstrip("/")
            # Credentials in a URL are something that httpx has rules for.
            if url.scheme == "http" and url.host and not (transport or url.userinfo or proxy_to(settings)):
                own = {"accept": "*/*", "accept-encoding": "identity", **self.headers}
                self._short_way = PlainHttp(url, own, CONNECTIONS, IDLE_CONNECTIONS, IDLE_SECONDS)
        if self._short_way is None:
            self._long_way = self._open()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        for way in (self._short_way, self._long_way):
            if way is not None:
                await way.aclose()

    async def ask(
        self, method: str, target: str, content: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> Answer:
        """Ask once for what is below the API's URL; the names of headers are in lower case.

        Raises httpx's errors, TimeoutError, and OverflowError (body).
        """
        redirect = None
        if self._short_way is not None:
            path = self._path + target
            answer = await self._short_way.ask(method, path, headers, content, self._seconds, BODY_LIMIT)
            if not answer.leads_elsewhere:
                # Nobody asked for an encoding.
                return await _decoded(answer) if "content-encoding" in answer.headers else answer
            redirect = answer
        # httpx bounds each read; this also ends an answer that comes byte by byte.
        with anyio.fail_after(2 * self._seconds):
            return await self._ask_at_length(method, target, content, headers, redirect)

    async def _ask_at_length(
        self, method: str, target: str, content: bytes | None, headers: Mapping[str, str], answer: Answer | None
    ) -> Answer:
        """Ask, following redirects that keep the method; the first answer may be there already.

        httpx keeps Authorization from other origins; those must not see custom headers either. A CSRF token goes along,
        for it was fetched on the same way.
        """
        if self._long_way is None:
            self._long_way = self._open()
        client = self._long_way
        # As the client's own `build_request`, which parses each URL twice.
        everything = {**client.headers, **headers}
        timeouts = {"timeout": client.timeout.as_dict()}
        request = httpx.Request(method, self.base + target, headers=everything, content=content, extensions=timeouts)
        for _ in range(REDIRECTS):
            sending = client.send(request, stream=True) if answer is None else _as_of_httpx(answer, request)
            answer = None
            async with aclosing(await sending) as response:
                following = response.next_request
                if following is None or following.method != request.method:
                    return await _read(response)
            if (following.url.port or 0) > HIGHEST_PORT:
                raise httpx.InvalidURL(f"redirected to port {following.url.port}")
            if not _is_as_trusted(following.url, request.url):
                names = {name.lower() for name in self._settings.client_custom_headers}
                for name in names - HARMLESS_HEADERS:
                    following.headers.pop(name, None)
            request = following
        raise httpx.TooManyRedirects("too many redirects")

    def _open(self) -> httpx.AsyncClient:
        settings = self._settings
        with _explained(settings):
            url = httpx.URL(settings.api_url or "")
            return httpx.AsyncClient(
                headers={"accept-encoding": "gzip, deflate", **self.headers},
                timeout=self._seconds,
                verify=_tls(settings, url.scheme),
                limits=LIMITS,
                http2=settings.api_enable_http2 and find_spec("h2") is not None,
                mounts={f"all://{url.netloc.decode()}": None} if _is_direct(url.host) else None,
                transport=self._transport,
            )


@contextmanager
def _explained(settings: Settings) -> Iterator[None]:
    try:
        yield
    except (httpx.InvalidURL, ValueError, ImportError) as error:  # also a malformed or SOCKS proxy
        text = Mask(settings.secrets(), SHORTEST_CREDENTIAL)(str(error))
        raise ConfigurationError(f"PREFECT_API_URL or a proxy variable cannot be used: {text}") from error


async def _read(response: httpx.Response) -> Answer:
    """Read to the end, or until it is too much."""
    declared, body = response.headers.get("Content-Length", ""), bytearray()
    if UNBOUNDED.search(encoding := response.headers.get("Content-Encoding", "")):
        raise httpx.DecodingError(f"nobody asked for content encoding {encoding}")
    if not (declared.isdecimal() and int(declared[:20]) > BODY_LIMIT):
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > BODY_LIMIT:
                break
        else:
            return Answer(response.status_code, response.reason_phrase, dict(response.headers), bytes(body))
    raise OverflowError("the body is larger than 64 MiB")


async def _as_of_httpx(answer: Answer, request: httpx.Request) -> httpx.Response:
    """Let httpx find out what may be asked for next, and with which headers."""
    reason = {"reason_phrase": answer.reason.encode()}
    headers = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
    given = httpx.Response(answer.status, headers=headers, content=_pieces(answer.body), extensions=reason)
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: given)) as client:
        return await client.send(request, stream=True)


async def _decoded(answer: Answer) -> Answer:
    headers = {b"Content-Encoding": answer.headers["content-encoding"].encode()}
    decoded = await _read(httpx.Response(answer.status, headers=headers, content=_pieces(answer.body)))
    return answer._replace(body=decoded.body)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    """What httpx gets bit by bit it also decodes bit by bit, when it is read."""
    for start in range(0, len(body), DECODED_AT_ONCE):
        yield body[start : start + DECODED_AT_ONCE]


def _is_as_trusted(url: httpx.URL, former: httpx.URL) -> bool:
    """Is this the same origin, or the same host with TLS from now on?"""
    return (url.host, url.port) == (former.host, former.port) and url.scheme in (former.scheme, "https")


def _headers(settings: Settings, given: Mapping[str, str]) -> dict[str, str]:
    """Collect what goes with every request: custom headers win over credentials, basic auth over the key."""
    values = {name.lower(): value.strip(" \t") for name, value in given.items()}
    headers = {name: value for name, value in values.items() if HEADER_VALUE.fullmatch(value)} | OWN_HEADERS
    if settings.api_auth_string:
        basic = b64encode(settings.api_auth_string.get_secret_value().encode())
        headers["authorization"] = f"Basic {basic.decode()}"
    elif settings.api_key:
        headers["authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
    for name, value in settings.client_custom_headers.items():
        if name.lower() in RESERVED_HEADERS:
            logger.warning("PREFECT_CLIENT_CUSTOM_HEADERS: %s is not a custom header and is ignored", name)
        else:
            headers[name.lower()] = value.strip()
    for name, value in headers.items():
        if not (HEADER_NAME.fullmatch(name) and HEADER_VALUE.fullmatch(value)):
            raise ConfigurationError(f"name or value of the HTTP header {name!r} has an illegal character")
    return headers


def _tls(settings: Settings, scheme: str) -> ssl.SSLContext:
    if settings.api_tls_insecure_skip_verify:
        return httpx.create_ssl_context(verify=False)
    if scheme == "https":
        return _verifying(settings.api_ssl_cert_file)
    late = _LateContext(ssl.PROTOCOL_TLS_CLIENT)
    late.file = settings.api_ssl_cert_file
    return late


def _verifying(file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=file) if file else httpx.create_ssl_context()
    except OSError as error:
        raise ConfigurationError(f"PREFECT_API_SSL_CERT_FILE {file} cannot be used: {error}") from error


class _LateContext(ssl.SSLContext):
    """Verify as always, but read the CA bundle (1.2 MB, 25 ms) only if http is redirected to https."""

    file: str | None = None

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return _verifying(self.file).wrap_bio(*args, **kwargs)


def proxy_to(settings: Settings) -> str | None:
    """Tell which proxy leads to the API, with its credentials; None when there is none on the way."""
    url, proxies = httpx.URL(settings.api_url or ""), getproxies()
    if _is_direct(url.host) or proxies.get("no", "").strip() == "*":
        return None
    return proxies.get(url.scheme) or proxies.get("all")


def _is_direct(host: str) -> bool:
    """Say whether no proxy leads to host: it is local, or in NO_PROXY in a form that httpx overlooks."""
    names = [name.strip().lower() for name in getproxies().get("no", "").split(",")]
    try:
        address = ip_address(host)
    except ValueError:
        domains = [name.lstrip("*.") for name in names]
        return host == "localhost" or any(name and f".{host}".endswith(f".{name}") for name in domains)
    return address.is_loopback or any(_contains(name, address) for name in names)


def _contains(network: str, address: Any) -> bool:
    try:
        return address in ip_network(network, strict=False)
    except ValueError:
        return False
