"""Settings: where values come from, which one wins, what travels to the child, and what a mistake says."""

from __future__ import annotations

import logging
import os
import pwd
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from procworker.errors import ConfigurationError
from procworker.redaction import secrets_in
from procworker.settings import Settings, default_state_home

CLOUD = "https://api.prefect.cloud/api/accounts/1/workspaces/2"
Load = Callable[..., Settings]


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    """Where the worker is started."""
    path = tmp_path / "cwd"
    path.mkdir()
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The user's home, with an empty .prefect in it."""
    path = tmp_path / "home"
    (path / ".prefect").mkdir(parents=True)
    return path


@pytest.fixture
def load(cwd: Path, home: Path) -> Load:
    """Load with a home and the given variables, and nothing else."""

    def load(profile: str | None = None, **environ: str) -> Settings:
        return Settings.load({"HOME": str(home), **environ}, cwd, profile)

    return load


def write_profiles(home: Path, text: str) -> Path:
    path = home / ".prefect" / "profiles.toml"
    path.write_text(text)
    return path


def message(load: Load, **environ: str) -> str:
    """The one line that a mistake leads to."""
    with pytest.raises(ConfigurationError) as caught:
        load(**environ)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- which source wins


def test_sources_win_in_prefects_order(load: Load, cwd: Path, home: Path) -> None:
    profiles = write_profiles(home, 'active = "mine"\n[profiles.mine]\nPREFECT_WORKER_QUERY_SECONDS = "5"\n')
    (cwd / "pyproject.toml").write_text("[tool.prefect.worker]\nquery_seconds = 4\n")
    (cwd / "prefect.toml").write_text("[worker]\nquery_seconds = 3\n")
    (cwd / ".env").write_text("PREFECT_WORKER_QUERY_SECONDS=2\n")

    assert load(PREFECT_WORKER_QUERY_SECONDS="1").worker_query_seconds == 1
    for seconds, path in enumerate((cwd / ".env", cwd / "prefect.toml", cwd / "pyproject.toml", profiles), 2):
        settings = load()
        assert settings.worker_query_seconds == seconds
        assert settings.exported["PREFECT_WORKER_QUERY_SECONDS"] == str(seconds)
        path.unlink()
    assert load().worker_query_seconds is None


def test_an_explicit_profile_wins_over_the_environment_and_replaces_the_active_one(load: Load, home: Path) -> None:
    write_profiles(
        home,
        'active = "a"\n[profiles.a]\nPREFECT_UI_URL = "http://a"\nPREFECT_LOGGING_LEVEL = "ERROR"\n'
        '[profiles.b]\nPREFECT_UI_URL = "http://b"\n',
    )

    settings = load("b", PREFECT_UI_URL="http://env", PREFECT_PROFILE="a")

    assert (settings.profile, settings.ui_url, settings.logging_level) == ("b", "http://b", "INFO")
    assert settings.exported["PREFECT_UI_URL"] == "http://b"
    assert load(PREFECT_UI_URL="http://env").ui_url == "http://env"


def test_names_are_read_in_any_case_and_the_upper_case_one_wins(load: Load, cwd: Path) -> None:
    (cwd / ".env").write_text("prefect_worker_prefetch_seconds=4\n")

    settings = load(prefect_worker_query_seconds="1", PREFECT_UI_URL="http://upper", prefect_ui_url="http://lower")

    assert (settings.worker_query_seconds, settings.worker_prefetch_seconds) == (1, 4)
    assert settings.ui_url == "http://upper"
    assert settings.exported["PREFECT_WORKER_QUERY_SECONDS"] == "1"


def test_an_old_name_in_a_stronger_source_beats_the_new_name_in_a_weaker_one(load: Load, home: Path) -> None:
    write_profiles(home, 'active = "x"\n[profiles.x]\nPREFECT_LOGGING_CONFIG_PATH = "/profile"\n')

    exported = load(PREFECT_LOGGING_SETTINGS_PATH="/env").exported
    assert exported["PREFECT_LOGGING_CONFIG_PATH"] == exported["PREFECT_LOGGING_SETTINGS_PATH"] == "/env"

    both = load(PREFECT_LOGGING_SETTINGS_PATH="/old", PREFECT_LOGGING_CONFIG_PATH="/new").exported
    assert both["PREFECT_LOGGING_CONFIG_PATH"] == "/new"


def test_each_setting_knows_its_source(load: Load, cwd: Path, home: Path) -> None:
    profiles = write_profiles(home, 'active = "x"\n[profiles.x]\nPREFECT_UI_URL = "http://x"\nPREFECT_API_KEY = "k"\n')
    (cwd / "prefect.toml").write_text("[logging]\nlevel = 'DEBUG'\n")
    (cwd / ".env").write_text("PREFECT_API_KEY=k\n")
    settings = load(prefect_logging_settings_path="/old", PREFECT_ORIGINS="{}")

    assert settings.origins == {
        "PREFECT_API_KEY": f"{cwd}/.env",
        "PREFECT_LOGGING_CONFIG_PATH": "environment",
        "PREFECT_LOGGING_SETTINGS_PATH": "environment",
        "PREFECT_LOGGING_LEVEL": f"{cwd}/prefect.toml",
        "PREFECT_ORIGINS": "environment",
        "PREFECT_UI_URL": f"profile 'x' in {profiles}",
    }
    there = settings.at_server("http://s/api", "me:word", "embedded").origins
    assert (there["PREFECT_API_URL"], there["PREFECT_API_AUTH_STRING"]) == ("embedded server", "embedded server")
    assert "PREFECT_API_KEY" not in there


def test_an_empty_environment_gives_the_defaults(load: Load, home: Path) -> None:
    settings = load()

    assert settings == Settings(
        home=home / ".prefect",
        state_home=home / ".local/state/procworker",
        exported={"PREFECT_SERVER_EPHEMERAL_ENABLED": "true"},
        origins={"PREFECT_SERVER_EPHEMERAL_ENABLED": f"profile 'ephemeral' in {home}/.prefect/profiles.toml"},
    )
    assert (settings.api_url, settings.api_request_timeout, settings.client_max_retries) == (None, 60, 5)
    assert (settings.worker_heartbeat_seconds, settings.worker_prefetch_seconds) == (30, 10)
    assert (settings.worker_webserver_host, settings.worker_webserver_port) == ("127.0.0.1", 8080)


def test_without_arguments_the_process_itself_is_read(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("PREFECT_WORKER_QUERY_SECONDS", "7")
    (cwd / "prefect.toml").write_text('[api]\nurl = "http://here/api"\n')
    before = dict(os.environ)

    settings = Settings.load()

    assert (settings.worker_query_seconds, settings.api_url) == (7, "http://here/api")
    assert dict(os.environ) == before


# --- toml


def test_toml_tables_become_prefixes_and_values_become_text(load: Load, cwd: Path) -> None:
    (cwd / "prefect.toml").write_text(
        "debug_mode = false\n[client]\nretry_extra_codes = [504, 418]\n"
        '[client.custom_headers]\nX-Team = "a b"\n'
        '[logging]\nlog_prints = true\n[logging.to_api]\nbatch_interval = 0.5\n[made.up]\nname = "x"\n'
        "[tasks]\ndefault_retry_delay_seconds = [10, 1]\n"
    )

    settings = load()

    assert settings.client_retry_extra_codes == {418, 504}
    assert settings.client_custom_headers == {"X-Team": "a b"}
    assert settings.logging_to_api_batch_interval == 0.5
    assert settings.exported == {
        "PREFECT_DEBUG_MODE": "False",
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "504,418",
        "PREFECT_CLIENT_CUSTOM_HEADERS": '{"X-Team": "a b"}',
        "PREFECT_LOGGING_LOG_PRINTS": "True",
        "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.5",
        "PREFECT_MADE_UP_NAME": "x",
        "PREFECT_TASKS_DEFAULT_RETRY_DELAY_SECONDS": "10,1",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
    }


def test_only_tool_prefect_counts_in_pyproject(load: Load, cwd: Path) -> None:
    (cwd / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[prefect]\nui_url = "http://no"\n'
        '[tool.other]\nx = 1\n[tool.prefect.client.custom_headers]\nX-Team = "a"\n'
    )

    settings = load()

    assert settings.client_custom_headers == {"X-Team": "a"}
    assert settings.exported.keys() == {"PREFECT_CLIENT_CUSTOM_HEADERS", "PREFECT_SERVER_EPHEMERAL_ENABLED"}


@pytest.mark.parametrize("name", ["prefect.toml", "pyproject.toml", "../home/.prefect/profiles.toml"])
def test_invalid_toml_names_file_and_line(load: Load, cwd: Path, name: str) -> None:
    (cwd / name).write_text('[worker]\nquery_seconds = 5\nbroken = "\n')

    text = message(load)

    assert str((cwd / name).resolve()) in text
    assert "line 3" in text
    assert "correct that file" in text


@pytest.mark.parametrize(
    "text", ["tool = 3", "[tool]\nprefect = 3", "profiles = 3", "active = 3", "[profiles]\nephemeral = 3"]
)
def test_toml_of_another_shape_is_harmless(load: Load, cwd: Path, home: Path, text: str) -> None:
    (cwd / "pyproject.toml").write_text(text)
    write_profiles(home, text)

    assert load().profile == "ephemeral"


# --- .env


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("X=plain", "plain"),
        ("X = spaced  ", "spaced"),
        ("export X=exported", "exported"),
        ("X=", ""),
        ("X= # only a comment", ""),
        ("X=#not-a-comment", "#not-a-comment"),
        ("X=a#b # comment", "a#b"),
        ("X='single # quoted' # comment", "single # quoted"),
        ('X="double \\"quoted\\" \\n"', 'double "quoted" \n'),
        ("X='it\\'s \\n'", "it's \\n"),
        ('X="two\nlines"', "two\nlines"),
        ("X=${HOME}/$USER", "${HOME}/$USER"),
        ("X=a\nX=b", "b"),
        ("\ufeffX=marked", "marked"),
        ("X=crlf\r\nY=1", "crlf"),
        ("x=lower", "lower"),
    ],
)
def test_dotenv_values_arrive_as_written(load: Load, cwd: Path, line: str, value: str) -> None:
    text = line.replace("X", "PREFECT_X").replace("x=", "prefect_x=")
    (cwd / ".env").write_bytes(text.encode())

    assert load().exported["PREFECT_X"] == value


def test_dotenv_lines_that_are_no_assignments_are_named_and_skipped(
    load: Load, cwd: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (cwd / ".env").write_text("# PREFECT_UI_URL=no\n\nhunter2 rubbish\nBARE\nX='open\nPREFECT_UI_URL=http://ui\n")

    with caplog.at_level(logging.WARNING):
        assert load().ui_url == "http://ui"

    assert [record.getMessage() for record in caplog.records] == [
        f"{cwd / '.env'}, line {number}: ignored, not NAME=VALUE" for number in (3, 4, 5)
    ]


def test_a_dotenv_that_is_not_utf8_is_an_error(load: Load, cwd: Path) -> None:
    (cwd / ".env").write_bytes(b"PREFECT_API_KEY=\xff\n")

    text = message(load)

    assert str(cwd / ".env") in text
    assert "utf-8" in text


def test_a_directory_called_dotenv_is_not_read(load: Load, cwd: Path) -> None:
    (cwd / ".env").mkdir()

    assert load().api_url is None


# --- profiles


def test_packaged_profiles_need_no_file_and_a_users_profile_replaces_its_namesake(load: Load, home: Path) -> None:
    assert load(PREFECT_PROFILE="local").api_url == "http://127.0.0.1:4200/api"
    assert load("cloud").exported == {}
    assert load("default").profile == "default"
    assert "PREFECT_SERVER_DATABASE_CONNECTION_URL" in load("test").exported

    write_profiles(home, '[profiles.local]\nPREFECT_LOGGING_LEVEL = "ERROR"\n')
    settings = load(PREFECT_PROFILE="local")
    assert (settings.api_url, settings.logging_level) == (None, "ERROR")
    assert load("cloud").profile == "cloud"


def test_an_unknown_explicit_profile_is_an_error_that_lists_the_known_ones(load: Load, home: Path) -> None:
    path = write_profiles(home, "[profiles.mine]\n")

    text = message(load, profile="nope")

    assert "'nope'" in text
    assert str(path) in text
    assert "cloud, default, ephemeral, local, mine, test" in text


@pytest.mark.parametrize("environ", [{"PREFECT_PROFILE": "nope"}, {}])
def test_any_other_unknown_profile_is_a_warning(
    load: Load, home: Path, caplog: pytest.LogCaptureFixture, environ: dict[str, str]
) -> None:
    write_profiles(home, 'active = "nope"\n[profiles.mine]\n')

    assert load(**environ).profile == "ephemeral"
    assert "profile 'nope'" in caplog.text
    assert "mine" in caplog.text


def test_profiles_path_is_found_where_prefect_finds_it(load: Load, cwd: Path, home: Path, tmp_path: Path) -> None:
    text = 'active = "x"\n[profiles.x]\nPREFECT_UI_URL = "http://{}"\n'
    write_profiles(home, text.format("home"))
    assert load().ui_url == "http://home"

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "profiles.toml").write_text(text.format("elsewhere"))
    assert load(PREFECT_HOME=str(elsewhere)).ui_url == "http://elsewhere"

    (elsewhere / "other.toml").write_text(text.format("other"))
    (cwd / "near.toml").write_text(text.format("near"))
    path = {"PREFECT_HOME": str(elsewhere), "PREFECT_PROFILES_PATH": "$PREFECT_HOME/other.toml"}
    assert load(**path).ui_url == "http://other"
    assert load(PREFECT_PROFILES_PATH="~/.prefect/profiles.toml").ui_url == "http://home"

    (cwd / "prefect.toml").write_text('profiles_path = "near.toml"\n')
    assert load().ui_url == "http://near"
    (cwd / ".env").write_text("PREFECT_PROFILES_PATH=missing.toml\n")
    assert load().profile == "ephemeral"


def test_profiles_that_cannot_be_read_are_an_error(load: Load, home: Path) -> None:
    path = write_profiles(home, "")
    path.write_bytes(b"\xff")
    assert str(path) in message(load)

    if os.geteuid() != 0:
        path.chmod(0)
        assert "Permission denied" in message(load)


# --- values


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://host:4200/api", "http://host:4200/api"),
        ("https://host/api/", "https://host/api"),
        ("  HTTP://[::1]:4200/api//\n", "HTTP://[::1]:4200/api"),
        ("http://user:pass@host", "http://user:pass@host"),
        ("", None),
        ("  ", None),
    ],
)
def test_api_url_is_tidied(load: Load, written: str, meant: str | None) -> None:
    assert load(PREFECT_API_URL=written).api_url == meant


@pytest.mark.parametrize(
    ("written", "suggestion"),
    [
        ("localhost:4200", "http://localhost:4200/api"),
        ("localhost:4200/api/", "http://localhost:4200/api"),
        ("htp://host:4200/api", "http://host:4200/api"),
        ("http://", "http://127.0.0.1:4200/api"),
        ("http://host:port/api", "http://127.0.0.1:4200/api"),
        ("http://ho st/api", "http://127.0.0.1:4200/api"),
    ],
)
def test_an_api_url_that_is_none_comes_with_a_suggestion(load: Load, written: str, suggestion: str) -> None:
    text = message(load, PREFECT_API_URL=written)

    assert text.startswith(f"PREFECT_API_URL '{written}' (environment): ")
    assert f"did you mean '{suggestion}'?" in text


@pytest.mark.parametrize(
    ("text", "value"),
    [(text, True) for text in ("true", "True", "1", "yes", "on", "t", "Y")]
    + [(text, False) for text in ("false", "FALSE", "0", "no", "off", "f", "n")],
)
def test_booleans_are_pydantics(load: Load, text: str, value: bool) -> None:
    assert load(PREFECT_API_TLS_INSECURE_SKIP_VERIFY=text).api_tls_insecure_skip_verify is value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PREFECT_DEBUG_MODE", "maybe"),
        ("PREFECT_DEBUG_MODE", ""),
        ("PREFECT_WORKER_QUERY_SECONDS", "soon"),
        ("PREFECT_WORKER_QUERY_SECONDS", "-1"),
        ("PREFECT_WORKER_QUERY_SECONDS", ""),
        ("PREFECT_WORKER_HEARTBEAT_SECONDS", "0"),
        ("PREFECT_API_REQUEST_TIMEOUT", "nan"),
        ("PREFECT_API_REQUEST_TIMEOUT", "inf"),
        ("PREFECT_CLIENT_MAX_RETRIES", "1.5"),
        ("PREFECT_CLIENT_RETRY_EXTRA_CODES", "500,99"),
        ("PREFECT_CLIENT_RETRY_EXTRA_CODES", "500,x"),
        ("PREFECT_WORKER_WEBSERVER_PORT", "65536"),
        ("PREFECT_LOGGING_LEVEL", "LOUD"),
    ],
)
def test_a_wrong_value_is_named_with_its_source(load: Load, name: str, value: str) -> None:
    assert message(load, **{name: value}).startswith(f"{name} {value!r} (environment): ")


def test_every_kind_of_source_is_named(load: Load, cwd: Path, home: Path) -> None:
    path = write_profiles(home, 'active = "x"\n[profiles.x]\nPREFECT_WORKER_QUERY_SECONDS = "soon"\n')
    assert f"(profile 'x' in {path})" in message(load)

    for name, text in [
        ("pyproject.toml", '[tool.prefect.worker]\nquery_seconds = "soon"\n'),
        ("prefect.toml", '[worker]\nquery_seconds = "soon"\n'),
        (".env", "PREFECT_WORKER_QUERY_SECONDS=soon\n"),
    ]:
        (cwd / name).write_text(text)
        assert f"PREFECT_WORKER_QUERY_SECONDS 'soon' ({cwd / name}): " in message(load)


def test_all_mistakes_are_reported_in_one_line(load: Load) -> None:
    text = message(load, PREFECT_WORKER_QUERY_SECONDS="so\non", PREFECT_DEBUG_MODE="maybe")

    assert "PREFECT_WORKER_QUERY_SECONDS" in text
    assert "PREFECT_DEBUG_MODE" in text


def test_debug_mode_forces_the_level(load: Load) -> None:
    assert load(PREFECT_LOGGING_LEVEL="warning").logging_level == "WARNING"
    assert load(PREFECT_LOGGING_LEVEL="warning", PREFECT_DEBUG_MODE="1").logging_level == "DEBUG"
    assert load(PREFECT_DEBUG_MODE="1").logging_level == "DEBUG"


def test_a_log_record_must_fit_into_a_batch(load: Load) -> None:
    text = message(load, PREFECT_LOGGING_TO_API_BATCH_SIZE="50000", PREFECT_API_URL=CLOUD)
    assert text.startswith("PREFECT_LOGGING_TO_API_MAX_LOG_SIZE '1000000' (default): ")
    assert "PREFECT_LOGGING_TO_API_BATCH_SIZE, 50000" in text

    sizes = {"PREFECT_LOGGING_TO_API_BATCH_SIZE": "500", "PREFECT_LOGGING_TO_API_MAX_LOG_SIZE": "500"}
    assert load(**sizes).logging_to_api_max_log_size == 500


def test_cloud_is_known_by_its_url_and_limits_log_records(load: Load) -> None:
    cloud, own = load(PREFECT_API_URL=CLOUD), load(PREFECT_API_URL="http://host/api")
    assert (cloud.is_cloud, own.is_cloud, load().is_cloud) == (True, False, False)
    assert (cloud.logging_to_api_max_log_size, own.logging_to_api_max_log_size) == (25_000, 1_000_000)
    assert load(PREFECT_CLOUD_API_URL="", PREFECT_API_URL="http://host/api").is_cloud is False
    elsewhere = load(
        PREFECT_API_URL="https://api.me.dev/api/accounts/1", PREFECT_CLOUD_API_URL="https://api.me.dev/api"
    )
    assert elsewhere.is_cloud


@pytest.mark.parametrize(
    ("environ", "ui_url"),
    [
        ({}, None),
        ({"PREFECT_API_URL": "http://host:4200/api"}, "http://host:4200"),
        ({"PREFECT_API_URL": "http://user:pass@host/api"}, "http://host"),
        ({"PREFECT_API_URL": CLOUD}, "https://app.prefect.cloud/account/1/workspace/2"),
        ({"PREFECT_API_URL": CLOUD, "PREFECT_UI_URL": "http://ui"}, "http://ui"),
    ],
)
def test_the_ui_is_found_from_the_api(load: Load, environ: dict[str, str], ui_url: str | None) -> None:
    assert load(**environ).ui_url == ui_url


def test_the_certificate_file_defaults_to_openssls(load: Load) -> None:
    assert load(SSL_CERT_FILE="/ca.pem").api_ssl_cert_file == "/ca.pem"
    assert load(SSL_CERT_FILE="/ca.pem", PREFECT_API_SSL_CERT_FILE="/my.pem").api_ssl_cert_file == "/my.pem"
    assert "PREFECT_API_SSL_CERT_FILE" not in load(SSL_CERT_FILE="/ca.pem").exported


def test_settings_can_be_made_by_hand_and_do_not_change() -> None:
    settings = Settings(
        api_url="http://host/api/",
        client_custom_headers={"X": "y"},
        client_retry_extra_codes=frozenset({500}),
    )

    assert settings.api_url == "http://host/api"
    with pytest.raises(ValidationError, match="frozen"):
        settings.api_url = None  # type: ignore[misc]


# --- what the child gets


def test_everything_that_was_set_is_exported_as_it_was_written(load: Load, cwd: Path) -> None:
    (cwd / ".env").write_text("PREFECT_FROM_FILE='{\"a\": 1}'\nOTHER=1\n")

    exported = load(
        "cloud",
        PREFECT_API_URL=" http://host/api/ ",
        PREFECT_API_KEY="pnu_1234",
        PREFECT_UNKNOWN="ä\n%{{x}}",
        PREFECT_EMPTY="",
        PREFECT_PROFILE="local",
        PREFECT_PROFILES_PATH="/none",
        PREFECT__FLOW_RUN_ID="1",
        PATH="/bin",
    ).exported

    assert exported == {
        "PREFECT_API_URL": "http://host/api/",
        "PREFECT_API_KEY": "pnu_1234",
        "PREFECT_UNKNOWN": "ä\n%{{x}}",
        "PREFECT_EMPTY": "",
        "PREFECT_FROM_FILE": '{"a": 1}',
    }


# --- where state lives


@pytest.mark.parametrize(
    ("environ", "platform", "place"),
    [
        ({}, "linux", "~/.local/state/procworker"),
        ({"XDG_STATE_HOME": "/xdg"}, "linux", "/xdg/procworker"),
        ({"XDG_STATE_HOME": "/xdg"}, "darwin", "~/Library/Application Support/procworker"),
        ({"LOCALAPPDATA": "C:/Local"}, "win32", "C:/Local/procworker"),
        ({}, "win32", "~/AppData/Local/procworker"),
        ({"TOX_ENV_DIR": "/tox/py", "CI": "true", "RUNNER_TEMP": "/job"}, "linux", "/tox/py/.procworker"),
        ({"CI": "true", "RUNNER_TEMP": "/job"}, "darwin", "/job/procworker"),
        ({"CI": "true"}, "linux", "~/.local/state/procworker"),
        ({"RUNNER_TEMP": "/job"}, "linux", "~/.local/state/procworker"),
    ],
)
def test_state_lives_where_the_platform_or_the_job_keeps_it(environ: dict[str, str], platform: str, place: str) -> None:
    assert default_state_home(environ, platform) == place


@pytest.mark.skipif(sys.platform != "linux", reason="the default is the platform's")
def test_homes_are_absolute_and_may_start_with_a_tilde(load: Load, cwd: Path, home: Path) -> None:
    settings = load(PREFECT_HOME="~/p", PROCWORKER_HOME="state")
    assert (settings.home, settings.state_home) == (home / "p", cwd / "state")

    (cwd / ".env").write_text("PROCWORKER_HOME=~/s\nPREFECT_HOME=here\n")
    settings = load()
    assert (settings.home, settings.state_home) == (cwd / "here", home / "s")


def test_a_user_without_a_home_gets_a_temporary_one(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)

    settings = Settings.load({}, cwd)

    own = Path(os.environ["TMPDIR"], f"procworker-{os.getuid()}")
    assert (settings.home, settings.state_home) == (own / ".prefect", own / ".local/state/procworker")


# --- secrets


def test_secrets_lists_everything_that_must_be_masked(load: Load) -> None:
    settings = load(
        PREFECT_API_URL="http://user:url-pass@host/api",
        PREFECT_API_KEY=" key-canary\n",
        PREFECT_API_AUTH_STRING="admin:auth-canary",
        PREFECT_MY_TOKEN="token-canary",
        PREFECT_SERVER_DATABASE_CONNECTION_URL="postgresql://u:p%40ss@db/prefect",
        PREFECT_CLIENT_CUSTOM_HEADERS='{"Authorization": "Bearer header-canary", "X-Team": "blue-team"}',
        PREFECT_SECRETS_SHOWN="true",
        PREFECT_SERVER_CSRF_TOKEN_EXPIRATION="3600",
        PREFECT_SHORT_KEY="a",
    )

    assert settings.secrets() == {
        *("url-pass", "key-canary", "admin:auth-canary", "auth-canary", "YWRtaW46YXV0aC1jYW5hcnk=", "token-canary"),
        *("p%40ss", "p@ss", "Bearer header-canary", "header-canary"),
    }
    assert load().secrets() == frozenset()


def test_secrets_in_an_environment_include_those_of_proxies() -> None:
    environ = {
        "HTTPS_PROXY": "http://me:proxy-pass@proxy:3128",
        "MY_PASSWORD": "word-canary",
        "A_KEY": None,
        "B_KEY": " ",
    }

    assert secrets_in(environ) == {"proxy-pass", "word-canary"}


def test_no_secret_is_shown(load: Load, cwd: Path) -> None:
    settings = load(
        PREFECT_API_URL="http://user:canary@host/api",
        PREFECT_API_KEY="canary",
        PREFECT_API_AUTH_STRING="admin:canary",
        PREFECT_CLIENT_CUSTOM_HEADERS='{"X": "canary"}',
    )
    assert "canary" not in repr(settings)
    assert "canary" not in str(settings)

    text = message(load, PREFECT_API_URL="admin:canary@host:4200", PREFECT_CLIENT_CUSTOM_HEADERS="canary")
    assert "PREFECT_CLIENT_CUSTOM_HEADERS (environment)" in text
    assert "http://host:4200/api" in text
    assert "canary" not in text
    assert "canary" not in message(load, PREFECT_CLIENT_CUSTOM_HEADERS='{"X": {"canary": 1}}')


def test_settings_for_another_server_forget_the_credentials_of_this_one(load: Load) -> None:
    mine = {"PREFECT_API_KEY": "pnu_1", "PREFECT_API_AUTH_STRING": "me:mine", "PREFECT_UNKNOWN": "1"}
    settings = load("cloud", PREFECT_API_URL=CLOUD, **mine)

    local = settings.at_server("http://127.0.0.1:1/api", "admin:word")
    assert (local.api_url, local.api_key, local.is_cloud) == ("http://127.0.0.1:1/api", None, False)
    assert local.ui_url == "http://127.0.0.1:1"
    assert local.exported == {
        "PREFECT_API_URL": "http://127.0.0.1:1/api",
        "PREFECT_API_AUTH_STRING": "admin:word",
        "PREFECT_UNKNOWN": "1",
    }
    open_server = settings.at_server("http://127.0.0.1:1/api", None)
    assert open_server.secrets() == frozenset()
    assert "PREFECT_API_AUTH_STRING" not in open_server.exported
