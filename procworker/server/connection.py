"""The httpx client that the settings describe: credentials, headers, TLS, proxies."""

from __future__ import annotations

import logging
import re
import ssl
from base64 import b64encode
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.request import getproxies

import httpx

from procworker import __version__
from procworker.errors import ConfigurationError
from procworker.settings import Settings

LIMITS = httpx.Limits(max_connections=16, max_keepalive_connections=8, keepalive_expiry=25)
# The server reads the User-Agent: whoever calls himself prefect/x.y is treated as that version.
OWN_HEADERS = {"user-agent": f"procworker/{__version__}", "x-prefect-api-version": "0.8.4"}
RESERVED_HEADERS = {"user-agent", "prefect-csrf-token", "prefect-csrf-client"}
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HEADER_VALUE = re.compile(r"([!-~]([ -~\t]*[!-~])?)?")

logger = logging.getLogger(__name__)


def connect(
    settings: Settings, transport: httpx.AsyncBaseTransport | None, headers: Mapping[str, str]
) -> httpx.AsyncClient:
    """Make the client; ConfigurationError says which setting cannot be followed."""
    if not settings.api_url:
        raise ConfigurationError("there is no API to talk to: set PREFECT_API_URL")
    try:
        url = httpx.URL(settings.api_url)
        return httpx.AsyncClient(
            base_url=url,
            headers=_headers(settings, headers),
            verify=_tls(settings, url.scheme),
            timeout=settings.api_request_timeout,
            limits=LIMITS,
            http2=settings.api_enable_http2 and find_spec("h2") is not None,
            mounts={f"all://{url.netloc.decode()}": None} if _is_direct(url.host) else None,
            transport=transport,
        )
    except (httpx.InvalidURL, ValueError, ImportError) as error:  # also for a malformed or SOCKS proxy
        text = mask(str(error), settings.secrets())
        raise ConfigurationError(f"PREFECT_API_URL or a proxy variable is no use: {text}") from error


def authorization(settings: Settings) -> str | None:
    """Build the header that proves who we are; basic auth wins over the key."""
    if settings.api_auth_string:
        return "Basic " + b64encode(settings.api_auth_string.get_secret_value().encode()).decode()
    return f"Bearer {settings.api_key.get_secret_value()}" if settings.api_key else None


def mask(text: str, secrets: Iterable[str]) -> str:
    """Put stars in the place of every secret."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "********") if secret else text
    return text


def _headers(settings: Settings, extra: Mapping[str, str]) -> dict[str, str]:
    """Collect what goes with every request; custom headers win over Authorization, never over our name."""
    values = {name.lower(): value.strip(" \t") for name, value in extra.items()}
    headers = {name: value for name, value in values.items() if HEADER_VALUE.fullmatch(value)} | OWN_HEADERS
    if proof := authorization(settings):
        headers["authorization"] = proof
    for name, value in settings.client_custom_headers.items():
        if name.lower() in RESERVED_HEADERS:
            logger.warning("PREFECT_CLIENT_CUSTOM_HEADERS: %s is ours to set and stays as it is", name)
        else:
            headers[name.lower()] = value.strip()
    for name, value in headers.items():
        if not (HEADER_NAME.fullmatch(name) and HEADER_VALUE.fullmatch(value)):
            raise ConfigurationError(f"name or value of the HTTP header {name!r} has an illegal character")
    return headers


def _tls(settings: Settings, scheme: str) -> ssl.SSLContext:
    if settings.api_tls_insecure_skip_verify:
        return httpx.create_ssl_context(verify=False)
    if settings.api_ssl_cert_file:
        try:
            return ssl.create_default_context(cafile=settings.api_ssl_cert_file)
        except OSError as error:
            file = settings.api_ssl_cert_file
            raise ConfigurationError(f"PREFECT_API_SSL_CERT_FILE {file} cannot be used: {error}") from error
    return httpx.create_ssl_context() if scheme == "https" else _LateContext(ssl.PROTOCOL_TLS_CLIENT)


class _LateContext(ssl.SSLContext):
    """Verify as always, but read the CA bundle (1.2 MB, 25 ms) only if http is redirected to https."""

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return httpx.create_ssl_context().wrap_bio(*args, **kwargs)


def _is_direct(host: str) -> bool:
    """Say whether no proxy leads to host: it is local, or in NO_PROXY in a form that httpx overlooks."""
    names = [name.strip().lower() for name in getproxies().get("no", "").split(",")]
    try:
        address = ip_address(host)
    except ValueError:
        domains = [name.lstrip("*.") for name in names]
        return host == "localhost" or any(name and f".{host}".endswith(f".{name}") for name in domains)
    networks = [address.is_loopback]
    for name in names:
        with suppress(ValueError):
            networks.append(address in ip_network(name, strict=False))
    return any(networks)
