"""Environment, `.env`, toml files and the active profile become one frozen Settings."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
import tempfile
from base64 import b64encode
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, SecretStr, ValidationError, field_validator

from procworker.errors import ConfigurationError
from procworker.home import default_state_home
from procworker.redaction import secrets_in

Layer = tuple[object, dict[str, str]]
tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
log = logging.getLogger(__name__)

EPHEMERAL = {"PREFECT_SERVER_EPHEMERAL_ENABLED": "true"}
PACKAGED_PROFILES: dict[str, dict[str, Any]] = {
    "ephemeral": EPHEMERAL,
    "local": {"PREFECT_API_URL": "http://127.0.0.1:4200/api"},
    "test": EPHEMERAL | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:///:memory:"},
    "cloud": {},
    "default": {},
}
RENAMED = {  # old spelling: the one that Prefect 3 prefers
    "PREFECT_LOCAL_STORAGE_PATH": "PREFECT_RESULTS_LOCAL_STORAGE_PATH",
    "PREFECT_LOGGING_SETTINGS_PATH": "PREFECT_LOGGING_CONFIG_PATH",
}
HEADERS = "PREFECT_CLIENT_CUSTOM_HEADERS"  # the one setting that is a table in toml
EXPORTED = re.compile(r"PREFECT_(?!_|PROFILE$|PROFILES_PATH$)")
STRIPPED = ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING")  # files of secrets end in a newline
HTTP_URL = re.compile(r"https?://([^/\s]*@)?(\[[0-9a-f:.]+\]|[^/\s:@\[\]]+)(:\d+)?(/\S*)?", re.I)
USER_INFO = re.compile(r"[^/@\s]*@")
DOTENV_LINE = re.compile(
    r"""(?sm)^[ \t]*(?:(?:export[ \t]+)?(?P<key>[^=#\s'"]+)[ \t]*=(?:(?P<plain>(?![ \t]*['"])[^\n]*)"""
    r"""|[ \t]*(?P<quote>['"])(?P<quoted>(?:\\.|(?!(?P=quote))[^\\])*)(?P=quote)[ \t]*(?:#[^\n]*)?)"""
    r"""|[^\s#][^\n]*)$"""
)

Stripped = BeforeValidator(lambda value: value.strip() or None if isinstance(value, str) else value)
Split = BeforeValidator(lambda value: value.split(",") if value and isinstance(value, str) else value or ())
Decoded = BeforeValidator(lambda value: json.loads(value) if isinstance(value, str) else value)
Upper = BeforeValidator(str.upper)
Text = Annotated[str | None, Stripped]
Secret = Annotated[SecretStr | None, Stripped]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Interval = Annotated[float, Field(gt=0)]


class Settings(BaseModel, frozen=True, hide_input_in_errors=True, validate_default=True, allow_inf_nan=False):
    """Everything a worker reads; names are Prefect's, lower-cased, without PREFECT_."""

    api_url: Text = Field(default=None, repr=False)
    api_key: Secret = None
    api_auth_string: Secret = None
    api_request_timeout: Interval = 60
    api_tls_insecure_skip_verify: bool = False
    api_ssl_cert_file: Text = None
    api_enable_http2: bool = False
    cloud_api_url: str = "https://api.prefect.cloud/api"
    cloud_max_log_size: Count = 25_000
    client_max_retries: Count = 5
    client_retry_jitter_factor: Seconds = 0.2
    client_retry_extra_codes: Annotated[frozenset[Annotated[int, Field(ge=100, le=599)]], Split] = frozenset()
    client_csrf_support_enabled: bool = True
    client_custom_headers: Annotated[dict[str, str], Decoded] = Field(default={}, repr=False)
    worker_heartbeat_seconds: Interval = 30
    worker_query_seconds: Seconds | None = None
    worker_prefetch_seconds: Seconds = 10
    worker_webserver_host: str = "127.0.0.1"
    worker_webserver_port: int = Field(default=8080, ge=0, le=65535)
    debug_mode: bool = False
    logging_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], Upper] = "INFO"
    logging_to_api_enabled: bool = True
    logging_to_api_batch_interval: Seconds = 2.0
    logging_to_api_batch_size: Count = 4_000_000
    logging_to_api_max_log_size: Count = 1_000_000
    ui_url: Text = None
    home: Path = Path(os.path.expanduser("~/.prefect"))
    state_home: Path = Path(os.path.expanduser("~/.local/state/procworker"))
    profile: str = "ephemeral"
    exported: dict[str, str] = Field(default={}, repr=False)
    origins: dict[str, str] = Field(default={}, repr=False)
    """Where each exported variable comes from: the environment, or which file or profile."""
    embedded_server: str | None = None

    @classmethod
    def load(
        cls, environ: Mapping[str, str] | None = None, cwd: Path | None = None, profile: str | None = None
    ) -> Settings:
        """Read all sources; a ConfigurationError names the source and what to change."""
        # Sorted, so that the upper-case spelling of a name wins over any other.
        variables = sorted((os.environ if environ is None else environ).items(), reverse=True)
        env = {name.upper(): value for name, value in variables}
        user_home = env.get("HOME") or env.get("USERPROFILE") or os.path.expanduser("~")
        if user_home == "~":  # a container whose uid is not in passwd
            user_home = f"{tempfile.gettempdir()}/procworker-{os.getuid()}"
        cwd = (cwd or Path()).absolute()

        def place(path: str) -> Path:
            return cwd / (user_home + path[1:] if path.startswith("~/") else path)

        dotenv, prefect, pyproject = cwd / ".env", cwd / "prefect.toml", cwd / "pyproject.toml"
        layers: list[Layer] = [
            ("environment", env),
            (dotenv, {key.upper(): value for key, value in read_dotenv(dotenv)}),
            (prefect, dict(_flat("PREFECT_", _read(prefect)))),
            (pyproject, {key[5:]: text for key, text in _flat("", _read(pyproject)) if key[:5] == "TOOL_"}),
        ]
        found = ChainMap(*(values for _, values in layers))
        path = found.get("PREFECT_PROFILES_PATH") or "$PREFECT_HOME/profiles.toml"
        path = path.replace("$PREFECT_HOME", found.get("PREFECT_HOME") or "~/.prefect")
        name, layer = _profile(place(path), env.get("PREFECT_PROFILE"), profile)
        layers.insert(0 if profile else len(layers), layer)
        found = ChainMap(*({new: v[old] for old, new in RENAMED.items() if old in v} | v for _, v in layers))
        known: dict[str, Any] = {"api_ssl_cert_file": env.get("SSL_CERT_FILE")}
        known |= {f: found[key] for f in cls.model_fields if (key := f"PREFECT_{f.upper()}") in found}
        known["home"] = place(known.get("home") or "~/.prefect")
        known["state_home"] = place(found.get("PROCWORKER_HOME") or default_state_home(env))
        exported = {key: value for key, value in found.items() if EXPORTED.match(key)}
        for internal in ("embedded_server", "origins"):
            known.pop(internal, None)
        known["exported"] = {k: v.strip() if k in STRIPPED else v for k, v in exported.items()}
        known["origins"] = {key: _origin(key, layers) for key in exported}
        try:
            return cls(**known | {"profile": name})
        except ValidationError as error:
            raise ConfigurationError("; ".join(_explained(e, layers) for e in error.errors())) from None

    @property
    def is_cloud(self) -> bool:
        return bool(self.cloud_api_url) and (self.api_url or "").startswith(self.cloud_api_url)

    @property
    def api_identity(self) -> str:
        """Name the API, without credentials; an embedded server has another port each time."""
        return self.embedded_server or USER_INFO.sub("", self.api_url or "")

    def at_server(self, api_url: str, auth_string: str | None, name: str | None = None) -> Settings:
        """Return the same settings for another server, in what is exported too."""
        own = {"PREFECT_API_URL": api_url} | ({"PREFECT_API_AUTH_STRING": auth_string} if auth_string else {})
        credentials = ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING")
        exported = {name: value for name, value in self.exported.items() if name not in credentials} | own
        changes = {"api_url": api_url, "api_auth_string": auth_string, "api_key": None, "ui_url": None}
        changes["embedded_server"] = name
        origins = {key: value for key, value in self.origins.items() if key in exported}
        origins |= dict.fromkeys(own, "embedded server" if name else "server")
        return Settings(**dict(self) | changes | {"exported": exported, "origins": origins})

    def secrets(self) -> frozenset[str]:
        """List every known value that no output may show."""
        key, auth = (s.get_secret_value() if s else "" for s in (self.api_key, self.api_auth_string))
        basic = b64encode(auth.encode()).decode()
        own = {"KEY": key, "AUTH": auth, "PASSWORD": auth.partition(":")[2], "TOKEN": basic, "URL": self.api_url}
        return secrets_in(own) | secrets_in(self.exported) | secrets_in(self.client_custom_headers)

    @field_validator("api_url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if match := HTTP_URL.fullmatch(url):
            if int((match[3] or ":0")[1:]) > 65535:
                raise ValueError("a port is at most 65535")
            return url.rstrip("/")
        meant = USER_INFO.sub("", url.rpartition("://")[2]).strip("/") or "127.0.0.1:4200"
        meant += "" if "/" in meant else "/api"
        meant = meant if HTTP_URL.fullmatch(f"http://{meant}") else "127.0.0.1:4200/api"
        raise ValueError(f"not an http or https URL; did you mean 'http://{meant}'?")

    @field_validator("logging_level", "logging_to_api_max_log_size", "ui_url")
    @classmethod
    def _combine(cls, value: Any, info: Any) -> Any:
        """Apply what the settings declared before it mean for this one."""
        given = cls.model_construct(**info.data)
        if info.field_name == "logging_level":
            return "DEBUG" if given.debug_mode else value
        if info.field_name == "ui_url":
            page = USER_INFO.sub("", given.api_url or "").replace("://api.", "://app.", given.is_cloud)
            page = page.removesuffix("/api").replace("/api/", "/").replace("/accounts/", "/account/")
            return value or page.replace("/workspaces/", "/workspace/") or None
        if value > (batch := given.logging_to_api_batch_size):
            raise ValueError(f"lower it to PREFECT_LOGGING_TO_API_BATCH_SIZE, {batch}, or raise that")
        return min(value, given.cloud_max_log_size) if given.is_cloud else value


def _profile(path: Path, active: str | None, chosen: str | None) -> tuple[str, Layer]:
    """Return the name of the profile to use, and its source and values."""
    file = _read(path)
    profiles = PACKAGED_PROFILES | (file["profiles"] if isinstance(file.get("profiles"), dict) else {})
    name = str(chosen or active or file.get("active") or "ephemeral")
    if name not in profiles:
        problem = f"profile {name!r} is not in {path}; choose one of: {', '.join(sorted(profiles))}"
        if chosen:
            raise ConfigurationError(problem)
        log.warning("%s; using 'ephemeral'", problem)
        name = "ephemeral"
    return name, (f"profile {name!r} in {path}", dict(_flat("", profiles[name])))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield a toml value as the environment variables that mean the same."""
    name = prefix.upper().removesuffix("_")
    if isinstance(value, dict) and not name.endswith(HEADERS):
        for key, inner in value.items():
            yield from _flat(f"{prefix}{key}_", inner)
    elif isinstance(value, list):
        yield name, ",".join(map(str, value))
    else:
        yield name, json.dumps(value) if isinstance(value, dict) else str(value)


def _read(path: Path, parse: Callable[[str], Any] = tomllib.loads) -> Any:
    """Return what a file says; a missing one is empty."""
    try:
        return parse(path.read_text("utf-8-sig") if path.is_file() else "")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be used: {error}; correct that file") from None


def read_dotenv(path: Path) -> Iterator[tuple[str, str]]:
    """Yield names and values of a file in dotenv syntax; what is no NAME=VALUE is warned of."""
    text = _read(path, str)
    for line in DOTENV_LINE.finditer(text):
        key, quote, quoted, plain = line.group("key", "quote", "quoted", "plain")
        if not key:
            log.warning("%s, line %d: ignored, not NAME=VALUE", path, text.count("\n", 0, line.start()) + 1)
        elif quote:
            escape = r"\\[\\']" if quote == "'" else r"\\[\\'\"abfnrtv]"
            yield key, re.sub(escape, lambda m: m[0].encode().decode("unicode-escape"), quoted)
        else:
            yield key, re.sub(r"\s+#.*", "", plain).strip()


def _origin(name: str, layers: list[Layer]) -> str:
    """The first layer that has the name, or its old spelling."""
    old = next((old for old, new in RENAMED.items() if new == name), name)
    return str(next(source for source, values in layers if name in values or old in values))


def _explained(error: Any, layers: list[Layer]) -> str:
    name = f"PREFECT_{error['loc'][0]}".upper()
    source, values = next((row for row in layers if name in row[1]), ("default", {name: error["input"]}))
    if name == HEADERS:  # they may be credentials
        return f'{name} ({source}): not a JSON object of texts, such as {{"X-Name": "value"}}'
    shown = USER_INFO.sub("***@", str(values[name]))[:80]
    return f"{name} {shown!r} ({source}): {error['msg'].removeprefix('Value error, ')}"
