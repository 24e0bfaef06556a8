"""One exchange with the API over the connection that the settings describe: credentials, TLS, proxies."""

from __future__ import annotations

import logging
import re
import ssl
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple
from urllib.request import getproxies

import httpx

from procworker import __version__
from procworker.errors import ConfigurationError
from procworker.redaction import SHORTEST_CREDENTIAL, Mask
from procworker.server.plain import TOKEN, PlainTransport
from procworker.settings import Settings

BODY_LIMIT = 64 * 1024 * 1024
REDIRECTS = 5
# httpx looks at each idle connection for every request: four are enough for the pace of flow runs.
CONNECTIONS, IDLE_CONNECTIONS, IDLE_SECONDS = 16, 4, 25.0
LIMITS = httpx.Limits(
    max_connections=CONNECTIONS, max_keepalive_connections=IDLE_CONNECTIONS, keepalive_expiry=IDLE_SECONDS
)
# Servers treat a client that calls itself prefect/x.y as that version, so this one uses its own name.
OWN_HEADERS = {"user-agent": f"procworker/{__version__}", "x-prefect-api-version": "0.8.4"}
RESERVED_HEADERS = {"user-agent", "prefect-csrf-token", "prefect-csrf-client"}
HEADER_NAME = re.compile(TOKEN.decode())
HEADER_VALUE = re.compile(r"([!-~]([ -~\t]*[!-~])?)?")

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """A response, read to its end."""

    status: int
    reason: str
    headers: httpx.Headers
    body: bytes

    def is_of_the_api(self) -> bool:
        """Prefect explains its refusals in JSON; anything else speaks for a proxy, which knows nothing of runs."""
        return self.body.lstrip().startswith(b"{")

    def refuses_csrf_token(self) -> bool:
        return self.status == 403 and b"CSRF token" in self.body


class _Given(httpx.AsyncBaseTransport):
    """Answers with what there is already."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self._response


class PlainClient(httpx.AsyncClient):
    """A client for one origin in plain HTTP that streams answers without httpx's hooks and cookies: nobody needs them.

    Where a redirect leads elsewhere, another client goes on; until then not even its modules are loaded.
    """

    def __init__(self, url: httpx.URL, beyond: Callable[[], httpx.AsyncClient], **options: Any) -> None:
        self._plain = PlainTransport(CONNECTIONS, IDLE_CONNECTIONS, IDLE_SECONDS)
        super().__init__(base_url=url, transport=self._plain, **options)
        self._origin = url.scheme, url.netloc
        self._make_beyond = beyond
        self._beyond: httpx.AsyncClient | None = None

    async def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        if (request.url.scheme, request.url.netloc) != self._origin:
            if self._beyond is None:
                self._beyond = self._make_beyond()
            return await self._beyond.send(request, stream=stream, **options)
        if not stream or options or self.is_closed:
            return await super().send(request, stream=stream, **options)
        response = await self._plain.handle_async_request(request)
        if response.has_redirect_location:  # httpx knows what may be asked for next, and with which headers
            async with httpx.AsyncClient(transport=_Given(response)) as client:
                return await client.send(request, stream=True)
        response.request = request
        return response

    async def aclose(self) -> None:
        await super().aclose()
        if self._beyond is not None:
            await self._beyond.aclose()


def connect(
    settings: Settings, transport: httpx.AsyncBaseTransport | None, headers: Mapping[str, str]
) -> httpx.AsyncClient:
    """Make the client; a ConfigurationError says which setting cannot be followed."""
    if not settings.api_url:
        raise ConfigurationError("there is no API to talk to: set PREFECT_API_URL")
    own: dict[str, Any] = {"headers": _headers(settings, headers), "timeout": settings.api_request_timeout}
    with _explained(settings):
        url = httpx.URL(settings.api_url)
        # Credentials in a URL are something that httpx has rules for.
        if url.scheme == "http" and not (transport or url.userinfo or proxy_to(settings)):
            return PlainClient(url, partial(_full, settings, None, own), **own)
    return _full(settings, transport, own)


def _full(settings: Settings, transport: httpx.AsyncBaseTransport | None, own: Mapping[str, Any]) -> httpx.AsyncClient:
    with _explained(settings):
        url = httpx.URL(settings.api_url or "")
        return httpx.AsyncClient(
            base_url=url,
            verify=_tls(settings, url.scheme),
            limits=LIMITS,
            http2=settings.api_enable_http2 and find_spec("h2") is not None,
            mounts={f"all://{url.netloc.decode()}": None} if _is_direct(url.host) else None,
            transport=transport,
            **own,
        )


@contextmanager
def _explained(settings: Settings) -> Iterator[None]:
    try:
        yield
    except (httpx.InvalidURL, ValueError, ImportError) as error:  # also a malformed or SOCKS proxy
        text = Mask(settings.secrets(), SHORTEST_CREDENTIAL)(str(error))
        raise ConfigurationError(f"PREFECT_API_URL or a proxy variable cannot be used: {text}") from error


async def exchange(client: httpx.AsyncClient, request: httpx.Request, strip: Iterable[str]) -> Answer:
    """Send a request and read the answer to its end, following redirects that keep the method.

    httpx keeps Authorization from other origins; `strip` names what other hosts must not see either.
    """
    for _ in range(REDIRECTS):
        async with aclosing(await client.send(request, stream=True)) as response:
            following = response.next_request
            if following is None or following.method != request.method:
                body = await _body(response)
                return Answer(response.status_code, response.reason_phrase, response.headers, body)
        if following.url.host != request.url.host:
            for name in strip:
                following.headers.pop(name, None)
        request = following
    raise httpx.TooManyRedirects("too many redirects")


async def _body(response: httpx.Response) -> bytes:
    """Read to the end, or until it is too much."""
    declared, body = response.headers.get("Content-Length", ""), bytearray()
    if not (declared.isdecimal() and int(declared) > BODY_LIMIT):
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > BODY_LIMIT:
                break
        else:
            return bytes(body)
    raise OverflowError("the body is larger than 64 MiB")


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
