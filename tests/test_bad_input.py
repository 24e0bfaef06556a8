"""What a person gets wrong: one line that says what to change, the documented exit code, and never a traceback."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import sys
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import FAST, TEMPLATE, Command, code_of, flow_file

from procworker.testing import Beside, serving

UNREACHABLE = 3
UNKNOWN_ID = "6d7b2a34-4d1f-4b1c-9f4f-3a3a7b0e8f00"
QUICK = "--startup-timeout 0.3"
FAR = {"PREFECT_API_URL": "http://prefect.test/api"}  # no proxy leads to this computer
HTML = {"status": 200, "body": "<html>Sign in</html>", "headers": {"content-type": "text/html"}}
Arrange = Callable[["Setting"], object]


@dataclass
class Setting:
    """Where a row happens: the current directory, the server, and the environment of the command."""

    place: Path
    server: Beside
    environ: dict[str, str]


class Bad(NamedTuple):
    """One mistake, made by argv or by `how` (environment, or what arranges it); `says` stands in the error."""

    name: str
    argv: str
    says: str
    how: Arrange | dict[str, str]
    code: int
    server: dict[str, Any]


def bad(
    name: str, argv: str, says: str, how: Arrange | dict[str, str] | None = None, code: int = 2, **server: Any
) -> Bad:
    """A row; `server` as in PrefectApi."""
    return Bad(name, argv, says, how or {}, code, server)


def write(name: str, content: str | bytes) -> Arrange:
    data = content.encode() if isinstance(content, str) else content
    return lambda setting: (setting.place / name).write_bytes(data)


def directory(name: str) -> Arrange:
    return lambda setting: (setting.place / name).mkdir(parents=True)


def pool(type: str) -> Arrange:
    return lambda setting: setting.server.add_pool("pool", type=type)


def template(**parts: Any) -> Arrange:
    return write("t.json", json.dumps(parts))


def undeclared(setting: Setting) -> None:
    template(job_configuration={"command": "{{ nope }}"}, variables={"properties": {}})(setting)


def fault(method: str, path: str, **how: Any) -> Arrange:
    return lambda setting: setting.server.fault(method, path, **{"times": math.inf, **how})


def flow_run(state: str) -> Arrange:
    def make(setting: Setting) -> None:
        id = setting.server.schedule(setting.server.add_deployment(), id=UNKNOWN_ID, name="sponge")
        if state != "SCHEDULED":
            setting.server.set_state(id, state)

    return make


def url(text: str) -> dict[str, str]:
    return {"PREFECT_API_URL": text}


def auth(text: str) -> dict[str, str]:
    return {"PREFECT_API_AUTH_STRING": text}


def closed_url(setting: Setting) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        setting.environ.update(url(f"http://127.0.0.1:{free.getsockname()[1]}/api"))


def no_url(setting: Setting) -> None:
    del setting.environ["PREFECT_API_URL"]


def wrong_path(setting: Setting) -> None:
    setting.environ["PREFECT_API_URL"] += "/v2"


def missing_ca_file(setting: Setting) -> None:
    setting.environ.update({**url("https://127.0.0.1:4200/api"), "PREFECT_API_SSL_CERT_FILE": "/no"})


def taken_port(setting: Setting) -> None:
    setting.environ["PREFECT_WORKER_WEBSERVER_PORT"] = str(setting.server.port)


def profiles(text: str) -> Arrange:
    return lambda setting: Path(os.environ["PREFECT_HOME"], "profiles.toml").write_text(text)


def profiles_directory(setting: Setting) -> None:
    Path(os.environ["PREFECT_HOME"], "profiles.toml").mkdir()


START, ONCE = "start --pool pool", "start --pool pool --run-once"
TEMPLATED = "start --pool pool --base-job-template"
RUN, FILE = "run hello/nightly", "run flows.py:hello"
TABLE = [
    # Where is the server?
    bad("no URL", START, "PREFECT_API_URL is not set", no_url),
    bad("URL without scheme", START, "did you mean 'http://127.0.0.1:4200/api'", url("127.0.0.1:4200/api")),
    bad("URL of another protocol", RUN, "did you mean 'http://host/api'", url("ftp://host/api")),
    bad("no URL at all", RUN, "did you mean 'http://127.0.0.1:4200/api'", url("my server")),
    bad("half an IPv6 address", RUN, "did you mean 'http://127.0.0.1:4200/api'", url("http://[::1")),
    bad("URL with a blank", START, "PREFECT_API_URL", url("http://my host/api")),
    bad("URL with a wrong path", START, "most end in /api", wrong_path),
    bad("URL with a wrong path for run", RUN, "most end in /api", wrong_path),
    bad("closed port", f"{ONCE} {QUICK}", "check PREFECT_API_URL", closed_url, code=UNREACHABLE),
    bad("closed port for run", f"{RUN} {QUICK}", "check PREFECT_API_URL", closed_url, code=UNREACHABLE),
    bad("proxy without scheme", ONCE, "a proxy variable", {**FAR, "HTTP_PROXY": "nonsense://x", "ALL_PROXY": "::"}),
    bad("CA file that is missing", START, "PREFECT_API_SSL_CERT_FILE", missing_ca_file),
    # Answers that are none
    bad("truncated JSON", ONCE, "/work_pools/pool", fault("GET", "/work_pools", truncate=20), code=UNREACHABLE),
    bad("half a JSON", ONCE, "body is no use", fault("GET", "/work_pools", body='{"id": "1'), code=UNREACHABLE),
    bad("HTML", f"{ONCE} {QUICK}", "body is no use", fault("*", "", **HTML), code=UNREACHABLE),
    bad("HTML behind /health", ONCE, "<html>", fault("*", "/work_pools", **HTML), code=UNREACHABLE),
    bad("HTML for run", f"{RUN} {QUICK}", "body is no use", fault("*", "", **HTML), code=UNREACHABLE),
    bad("another shape", ONCE, "body is no use", fault("GET", "/work_pools", body="[1]"), code=UNREACHABLE),
    bad("500 for ever", ONCE, "500", fault("*", "/work_pools", status=500), code=UNREACHABLE),
    # Credentials
    bad("no key", START, "check PREFECT_API_KEY", api_key="the right key"),
    bad("wrong key", START, "check PREFECT_API_KEY", {"PREFECT_API_KEY": "wrong-key"}, api_key="right-key"),
    bad("wrong key for run", RUN, "401", {"PREFECT_API_KEY": "wrong-key"}, api_key="right-key"),
    bad("wrong basic auth", ONCE, "check PREFECT_API_KEY or PREFECT_API_AUTH_STRING", auth("a:no"), auth_string="a:b"),
    bad("key with a line break", START, "illegal character", {"PREFECT_API_KEY": "a\nb"}),
    bad("headers that are no JSON", START, "not a JSON object", {"PREFECT_CLIENT_CUSTOM_HEADERS": "X-A: b"}),
    # The pool
    bad("pool of another type", START, "unknown worker type 'kubernetes'", pool("kubernetes")),
    bad("worker of another type", f"{START} -t process", "choose another pool", pool("kubernetes")),
    bad("push pool", START, "choose another --pool", pool("cloud-run:push")),
    bad("managed pool", START, "choose another --pool", pool("prefect:managed")),
    bad("agent pool", f"{START} -t process", "choose another --pool", pool("prefect-agent")),
    bad("unknown type", f"{START} -t teapot", "process; install the package"),
    bad("unknown type for template", "template -t teapot", "process; install the package"),
    bad("reserved pool name", "start -p prefect-pool", "check the name"),
    bad("missing pool", f"{START} --no-create-pool-if-not-found", "does not exist: create it"),
    bad("template that is missing", f"{TEMPLATED} no.json", "cannot be read: No such file"),
    bad("template that is a directory", f"{TEMPLATED} .", "cannot be read: Is a directory"),
    bad("template that is no JSON", f"{TEMPLATED} flows.py", "is not JSON"),
    bad("template that is no text", f"{TEMPLATED} t", "is not JSON", write("t", b"\xff\xfe{")),
    bad(
        "template without variables",
        f"{TEMPLATED} t.json",
        "must hold 'job_configuration' and",
        template(job_configuration={}),
    ),
    bad("template with an undeclared variable", f"{TEMPLATED} t.json", "['nope']", undeclared),
    # Flags
    bad("no command", "", "required: COMMAND"),
    bad("unknown command", "stat", "invalid choice: 'stat'"),
    bad("no pool", "start", "required: -p/--pool"),
    bad("limit 0", f"{START} --limit 0", "at least 1, not 0"),
    bad("limit -1", f"{START} --limit -1", "at least 1, not -1"),
    bad("limit in words", f"{START} --limit two", "invalid int value: 'two'"),
    bad("worker name with a slash", f"{START} --name a/b", "must not contain '/'"),
    bad("health port in use", f"{START} --with-healthcheck", "choose another address", taken_port),
    bad("Python for a worker without one", f"{START} -t idle --python python", "leave out --python"),
    bad("action of server", "server restart", "invalid choice: 'restart'"),
    # Settings
    bad("unknown profile", f"--profile staging {START}", "profile 'staging' is not in"),
    bad(
        "profiles that are a directory", f"--profile staging {START}", "profile 'staging' is not in", profiles_directory
    ),
    bad("profiles that are no toml", START, "correct that file", profiles("[profiles.")),
    bad(".env that is not UTF-8", START, ".env cannot be used", write(".env", b"PREFECT_A=\xff")),
    bad("prefect.toml that is no toml", START, "prefect.toml cannot be used", write("prefect.toml", "api = ")),
    bad("pyproject.toml that is no toml", RUN, "pyproject.toml cannot be used", write("pyproject.toml", "[tool")),
    bad("interval in words", START, "PREFECT_WORKER_QUERY_SECONDS 'abc'", {"PREFECT_WORKER_QUERY_SECONDS": "abc"}),
    bad("interval below zero", RUN, "greater than or equal to 0", {"PREFECT_WORKER_QUERY_SECONDS": "-1"}),
    bad("port out of range", START, "less than or equal to 65535", {"PREFECT_WORKER_WEBSERVER_PORT": "70000"}),
    bad("log level", "server status", "'loud'", {"PREFECT_LOGGING_LEVEL": "loud"}),
    # What to run
    bad("no target", "run", "required: TARGET"),
    bad("file without a flow", "run flows.py", "write flows.py:FLOW"),
    bad("target that is nothing", "run hello", "no flow/deployment and no flow run id"),
    bad("file that is missing", "run nowhere.py:hello", "does not exist (looked in"),
    bad("flow that is missing", "run flows.py:bye", "has no flow 'bye'; it has: flow, hello"),
    bad("flow that is no name", "run flows.py:", "has no flow: write it as"),
    bad("file with a syntax error", "run broken.py:hello", "broken.py, line 1", write("broken.py", "def hello(:\n")),
    bad("file that is no Python", "run t.py:hello", "t.py", write("t.py", b"\x00\xff")),
    bad("unknown deployment", "run hello/nightly", "no deployment 'hello/nightly'"),
    bad("unknown flow run", f"run {UNKNOWN_ID}", f"no flow run '{UNKNOWN_ID}'"),
    bad(
        "flow run that has ended", f"run {UNKNOWN_ID}", "'sponge' is Completed: only a scheduled", flow_run("COMPLETED")
    ),
    bad("flow run that runs", f"run {UNKNOWN_ID}", "'sponge' is Running: only a scheduled", flow_run("RUNNING")),
    bad("parameter without a value", f"{FILE} -p name", "must be written KEY=VALUE"),
    bad("parameter without a name", f"{FILE} -p =1", "must be written KEY=VALUE"),
    bad("parameter of an existing run", f"run {UNKNOWN_ID} -p a=1", "leave out --param", flow_run("SCHEDULED")),
    # With which Python
    bad("Python that is missing", f"{FILE} --python /no/python", "'/no/python' does not exist"),
    bad("Python that is no venv", f"{FILE} --python .", "not a virtual environment"),
    bad("Python that is no Python", f"{FILE} --python /bin/false", "'/bin/false' cannot be used"),
    bad("Python without Prefect", f"{FILE} --python bare", "no Prefect in"),
    bad("Python without Prefect for start", f"{START} --python bare", "no Prefect in"),
    bad("Python that is missing for start", f"{START} --python nope", "'nope' does not exist"),
    bad("no Prefect for the embedded server", f"{FILE} --python bare", "pip install 'procworker[prefect]'", no_url),
    bad("no Prefect for start --local", f"{START} --local --python bare", "no Prefect in", no_url),
]
AS_A_USER = {
    "no URL",
    "closed port",
    "truncated JSON",
    "wrong key",
    "limit in words",
    ".env that is not UTF-8",
    "unknown flow run",
    "Python that is no venv",
}


@pytest.fixture(autouse=True)
def idle_type() -> Iterator[None]:
    """A worker type of somebody else, for the rows that need one."""
    from procworker import BaseWorker

    class IdleWorker(BaseWorker):
        type = "idle"

        async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> Any: ...

    yield
    del BaseWorker._known["idle"]


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with nothing in it, wherever the tests run."""
    path = tmp_path_factory.mktemp("bare")
    venv.create(path, symlinks=True)
    return path


@pytest.fixture
def place(tmp_path: Path, bare: Path) -> Path:
    path = tmp_path / "place"
    path.mkdir()
    (path / "bare").symlink_to(bare)
    flow_file(path / "flows.py")
    return path


def arranged(row: Bad, place: Path, server: Beside) -> dict[str, str]:
    setting = Setting(place, server, {**FAST, "PREFECT_API_URL": server.url})
    if callable(row.how):
        row.how(setting)
    else:
        setting.environ.update(row.how)
    return setting.environ


def check(row: Bad, code: int, out: str, err: str) -> None:
    errors = [line for line in err.splitlines() if re.match(r"procworker( \w+)?: error: ", line)]

    assert code == row.code, err
    assert errors == err.splitlines()[-1:]
    assert row.says in errors[0]
    assert "Traceback" not in out + err


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in TABLE])
def test_a_mistake_is_answered_with_what_to_change(
    row: Bad, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    with serving(**row.server) as server:
        for name, value in arranged(row, place, server).items():
            monkeypatch.setenv(name, value)
        code = code_of(*row.argv.split())

    check(row, code, *capsys.readouterr())


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in TABLE if row.name in AS_A_USER])
def test_the_same_holds_for_the_command_as_a_process(row: Bad, place: Path) -> None:
    with serving(**row.server) as server, Command(place, *row.argv.split(), **arranged(row, place, server)) as command:
        code = command.wait()

    check(row, code, command.out, command.err)


def test_the_rows_that_are_run_as_processes_exist() -> None:
    assert {row.name for row in TABLE} >= AS_A_USER
    assert len({row.name for row in TABLE}) == len(TABLE)


def test_no_mistake_leaves_a_flow_run_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is made for a command that cannot run it would stay in the list as Crashed."""
    monkeypatch.chdir(place)
    with serving() as server:
        monkeypatch.setenv("PREFECT_API_URL", server.url)
        for mistake in (["--python", "bare"], ["--python", "."], ["-p", "x"]):
            assert code_of("run", "flows.py:hello", *mistake) == 2
        assert not server.runs


# Jobs that cannot start: the command is right, so the run fails (exit 1), and its Crashed state says what to change


@dataclass
class Job:
    says: str
    variables: dict[str, Any] = field(default_factory=dict)
    configuration: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)


JOBS = {
    "env as a list": Job("env: Input should be a valid dictionary", {"env": ["A=1"]}),
    "env as a text": Job("env: Input should be a valid dictionary", {"env": "A=1"}),
    "command with an open quote": Job("cannot be split into arguments", {"command": "python 'flow.py"}),
    "command that is missing": Job("was not found", {"command": "/no/such/command"}),
    "command that is a directory": Job("is not executable", {"command": "/"}),
    "missing Python": Job("python '/no/python' does not exist", {"command": "", "python": "/no/python"}),
    "Python that is no venv": Job("not a virtual environment", {"command": "", "python": "/"}),
    "Python without Prefect": Job("no Prefect in", {"command": "", "python": "bare"}),
    "missing working directory": Job("working directory '/no/place' does not exist", {"working_dir": "/no/place"}),
    "working directory that is a file": Job("is not a directory", {"working_dir": sys.executable}),
    "timeout in words": Job("timeout_seconds: Input should be a valid number", {"timeout_seconds": "soon"}),
    "leftovers": Job("leftovers: Input should be 'kill' or 'allow'", {"leftovers": "maybe"}),
    "variable with an equals sign": Job("has a character that no environment can hold", {"env": {"A=B": "1"}}),
    "dotted key through a text": Job("goes through a value that is no mapping", {"env.A": "1", "env.A.B": "2"}),
    "unknown block of the server": Job("nope", configuration={"command": "{{ prefect.blocks.secret.nope }}"}),
    "template without job configuration": Job("has no 'job_configuration'", template={"job_configuration": None}),
}


@pytest.mark.parametrize("job", [pytest.param(job, id=name) for name, job in JOBS.items()])
def test_a_job_that_cannot_start_says_why_where_its_user_looks(
    job: Job, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    configuration = {**TEMPLATE["job_configuration"], "working_dir": "{{ working_dir }}", **job.configuration}
    base = {**TEMPLATE, "job_configuration": configuration, **job.template}
    with serving() as server:
        for name, value in {**FAST, "PREFECT_API_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        server.add_pool(base_job_template=base)
        id = server.schedule(server.add_deployment(job_variables=job.variables))
        code = code_of("start", "--pool", "pool", "--run-once")
        state = server.run(id).state

    out, err = capsys.readouterr()
    assert code == 1
    assert (state.type, state.name) == ("CRASHED", "Crashed")
    assert job.says in state.message
    assert "\n" not in state.message
    assert job.says in err
    assert "Traceback" not in out + err
