"""The embedded server: one for all who need it, private, and gone when nobody does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import httpx
import psutil
import pytest
from misbehave import survivors

from procworker.errors import ConfigurationError
from procworker.local import keeper
from procworker.local.server import (
    LocalServer,
    find_prefect,
    last_words,
    local_server,
    server_env,
    server_status,
    stop_servers,
)
from procworker.system.interpreter import locate

ROOT = Path(__file__).parents[1]
GIVEN = {name: os.environ.get(f"PROCWORKER_TEST_{name}") for name in ("PREFECT38", "PREFECT220")}
REAL = {name: locate(given) if given else None for name, given in GIVEN.items()}

# Stands for uvicorn with Prefect's application: all that the bootstrap needs, and what can go wrong with it.
FAKE_UVICORN = """
import http.server, json, os, signal, sys, threading, time

class Config:
    def __init__(self, app, **options):
        self.app = app

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()
        self.wfile.write(b"true")

class Server:
    def __init__(self, config):
        self.app = config.app

    def run(self, sockets):
        seen = {"env": dict(os.environ), "argv": sys.orig_argv, "cwd": os.getcwd(), "app": self.app}
        with open(os.environ["PREFECT_HOME"] + "/seen.json", "w") as file:
            json.dump(seen, file)
        mode = os.environ.get("FAKE_SERVER")
        if mode == "fastapi":
            raise TypeError("Body() got an unexpected keyword argument 'min_items'")
        if mode == "full":
            print("OSError: database or disk is full\\nERROR: startup failed", file=sys.stderr)
            threading.Thread(target=time.sleep, args=(60,)).start()
            sys.exit(3)
        if mode == "hang":
            signal.pause()
        if mode == "slow to end":
            signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), os._exit(0)))
        if mode == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if mode == "loud":
            print("x" * (5 << 20), flush=True)
        server = http.server.ThreadingHTTPServer(("", 0), Answer, bind_and_activate=False)
        server.socket.close()
        server.socket = sockets[0]
        server.serve_forever()
"""

USER = """
import sys, anyio
from pathlib import Path
from procworker.local.server import local_server

async def main():
    home, keep_seconds = Path(sys.argv[1]), float(sys.argv[2])
    async with local_server(sys.executable, home, keep_seconds=keep_seconds, say=str) as server:
        print(server.pid, flush=True)
        await anyio.to_thread.run_sync(sys.stdin.read)

anyio.run(main)
"""

FLOW = """
from prefect import flow

@flow
def double(x: int):
    return 2 * x
"""


@pytest.fixture
async def home(tmp_path: Path) -> Any:
    """A home whose servers are ended, and whose processes are all gone, after the test."""
    home = tmp_path / "home"
    yield home
    await stop_servers(home)
    await wait_until(lambda: not survivors(str(home)))


@pytest.fixture(autouse=True)
def fake_prefect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[..., None]:
    """Give this interpreter a Prefect of some version; `FAKE_SERVER` says what is wrong with its server."""
    site = tmp_path / "site"

    def install(version: str) -> None:
        shutil.rmtree(site, ignore_errors=True)
        metadata = site / f"prefect-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Name: prefect\nVersion: {version}\n")
        (site / "uvicorn.py").write_text(FAKE_UVICORN)

    if "real" not in request.keywords:
        monkeypatch.setenv("PYTHONPATH", f"{site}:{ROOT}")
        install("3.9.9")
    return install


def use(home: Path, keep_seconds: float = 0, **options: Any) -> AbstractAsyncContextManager[LocalServer]:
    return local_server(sys.executable, home, **{"keep_seconds": keep_seconds, "say": str, **options})


def seen(home: Path, version: str = "3.9.9") -> Any:
    return json.loads((home / "servers" / version / "seen.json").read_text())


async def start_user(home: Path, keep_seconds: float) -> anyio.abc.Process:
    process = await anyio.open_process([sys.executable, "-c", USER, str(home), str(keep_seconds)], stderr=None)
    assert process.stdout
    await process.stdout.receive()
    return process


async def answer(server: LocalServer) -> str:
    async with httpx.AsyncClient() as api:
        return (await api.get(f"{server.api_url}/health")).text


async def wait_until(fact: Callable[[], bool]) -> None:
    with anyio.fail_after(15):
        while not fact():  # noqa: ASYNC110
            await anyio.sleep(0.02)


def is_gone(*pids: int) -> bool:
    return not any(keeper.identity(pid) for pid in pids)


async def test_a_server_is_healthy_while_it_is_used_and_gone_afterwards(home: Path) -> None:
    said: list[str] = []

    async with use(home, say=said.append) as server:
        [row] = server_status(home)
        assert await answer(server) == "true"

    assert said[0] == "Starting the Prefect 3.9.9 server (first start takes 10-30 s) ..."
    assert said[1].startswith("Prefect server ready after ")
    assert said[1].endswith(f" at {server.api_url.removesuffix('/api')}")
    assert row["pid"] == server.pid
    assert row["healthy"]
    assert row["in_use"]
    assert row["database"] == str(home / "servers/3.9.9/prefect.db")
    assert is_gone(server.pid, row["keeper_pid"])
    assert server_status(home) == []


async def test_a_server_sees_nothing_of_its_users_settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("PROCWORKER_HOME", "elsewhere")

    async with use(home):
        env = seen(home)["env"]

    assert not {"PREFECT_API_URL", "PREFECT_API_KEY", "PROCWORKER_HOME"} & set(env)
    assert env["PREFECT_HOME"] == seen(home)["cwd"] == str(home / "servers/3.9.9")
    assert not Path(env["PREFECT_PROFILES_PATH"]).exists()
    assert env["PREFECT_SERVER_ANALYTICS_ENABLED"] == env["PREFECT_UI_ENABLED"] == "false"


async def test_the_password_is_known_to_users_and_to_nobody_else(home: Path) -> None:
    async with use(home) as server, use(home) as again:
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (home / "servers/3.9.9").iterdir()}
        commands = [
            " ".join(psutil.Process(row[key]).cmdline()) for row in server_status(home) for key in row if "pid" in key
        ]

    assert server.auth_string
    assert server.auth_string == again.auth_string == seen(home)["env"]["PREFECT_SERVER_API_AUTH_STRING"]
    password = server.auth_string.removeprefix("procworker:")
    assert len(password) >= 32
    assert password not in " ".join(commands) + repr(server) + repr(server_status(home))
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE((home / "servers/3.9.9").stat().st_mode) == 0o700


@pytest.mark.parametrize(("version", "has_password"), [("2.20.26", False), ("3.1.9", False), ("3.1.10", True)])
async def test_a_version_gets_its_own_database_and_the_password_it_can_ask_for(
    home: Path, fake_prefect: Callable[[str], None], version: str, has_password: bool
) -> None:
    fake_prefect(version)

    async with use(home) as server:
        assert seen(home, version)["env"]["PREFECT_HOME"].endswith(f"/servers/{version}")

    assert server.version == version
    assert bool(server.auth_string) is has_password


@pytest.mark.parametrize(("version", "is_final"), [("2.20.26", False), ("3.4.25", False), ("3.8.8", True)])
def test_a_server_throws_nothing_away_that_a_newer_fastapi_needs(tmp_path: Path, version: str, is_final: bool) -> None:
    assert ("PREFECT__SERVER_FINAL" in server_env({}, tmp_path / version)) == is_final


def test_a_server_remembers_its_blocks_in_its_own_directory(tmp_path: Path) -> None:
    """Prefect 3.4 to 3.6 else write to that of the user's own server, whatever PREFECT_HOME says."""
    env = server_env({"PREFECT_MEMO_STORE_PATH": "/users/memo_store.toml"}, tmp_path / "3.4.25")
    assert env["PREFECT_MEMO_STORE_PATH"] == str(tmp_path / "3.4.25" / "memo_store.toml")


async def test_users_who_come_at_once_share_one_server(home: Path) -> None:
    pids, everybody = set(), anyio.Event()

    async def user() -> None:
        async with use(home) as server:
            pids.add(server.pid)
            arrived.append(server)
            if len(arrived) == 5:
                everybody.set()
            await everybody.wait()

    arrived: list[LocalServer] = []
    with anyio.fail_after(30):
        async with anyio.create_task_group() as users:
            for _ in range(5):
                users.start_soon(user)

    assert len(pids) == 1
    assert is_gone(*pids)


async def test_a_kept_server_serves_the_next_user(home: Path) -> None:
    async with use(home, keep_seconds=60) as first:
        pass
    async with use(home) as second:
        pass

    assert second == first
    [row] = server_status(home)
    assert row["healthy"]
    assert not row["in_use"]
    assert [gone["pid"] for gone in await stop_servers(home)] == [first.pid]
    assert is_gone(row["pid"], row["keeper_pid"])


async def test_the_longest_wish_to_keep_wins(home: Path) -> None:
    async with use(home) as server, use(home, keep_seconds=60):
        pass

    assert [row["pid"] for row in server_status(home)] == [server.pid]


async def test_a_kept_server_ends_when_its_time_is_over(home: Path) -> None:
    async with use(home, keep_seconds=0.5) as server:
        [row] = server_status(home)

    await wait_until(lambda: is_gone(server.pid, row["keeper_pid"]))


async def test_who_comes_while_a_server_ends_gets_a_new_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SERVER", "slow to end")
    first = await start_user(home, 0.01)
    [row] = server_status(home)
    assert first.stdin
    await first.stdin.aclose()
    await wait_until(lambda: not (home / "servers/3.9.9/state.json").exists())

    async with use(home) as server:
        assert is_gone(row["pid"], row["keeper_pid"])
        assert server.pid != row["pid"]
    await first.wait()


@pytest.mark.slow
async def test_a_server_that_does_not_listen_is_killed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SERVER", "deaf")

    with anyio.fail_after(keeper.GRACE_SECONDS + 4):
        async with use(home) as server:
            pass

    assert is_gone(server.pid)


async def test_a_server_outlives_the_user_who_started_it_and_was_killed(home: Path) -> None:
    starter = await start_user(home, 0)
    async with use(home) as server:
        starter.kill()
        await starter.wait()
        assert await answer(server) == "true"

    assert is_gone(server.pid)


async def test_a_killed_user_holds_no_lease(home: Path) -> None:
    user = await start_user(home, 0)
    [row] = server_status(home)
    user.kill()
    await user.wait()

    await wait_until(lambda: is_gone(row["pid"], row["keeper_pid"]))


async def test_a_server_does_not_outlive_its_keeper(home: Path) -> None:
    async with use(home, keep_seconds=60) as server:
        [row] = server_status(home)
        os.kill(row["keeper_pid"], signal.SIGKILL)
        await wait_until(lambda: is_gone(server.pid))
        async with use(home) as next_server:
            assert next_server.pid != server.pid

    await wait_until(lambda: is_gone(next_server.pid))


async def test_a_server_that_its_keeper_left_behind_is_ended_by_the_next_user(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a stopped server survives its keeper: it cannot see that its standard input ended."""
    monkeypatch.setattr(keeper, "GRACE_SECONDS", 0.2)
    async with use(home, keep_seconds=60) as server:
        [row] = server_status(home)
        os.kill(server.pid, signal.SIGSTOP)
        tasks = list(Path(f"/proc/{server.pid}/task").iterdir())
        await wait_until(lambda: all("T (stopped)" in (task / "status").read_text() for task in tasks))
        os.kill(row["keeper_pid"], signal.SIGKILL)
        await wait_until(lambda: is_gone(row["keeper_pid"]))
        [left] = server_status(home)

    assert left["keeper_pid"] is None
    assert not left["healthy"]
    async with use(home):
        assert is_gone(server.pid)


@pytest.mark.parametrize("change", [{"host": "another boot"}, {}])
async def test_a_process_that_took_over_a_pid_is_never_signalled(home: Path, change: dict[str, str]) -> None:
    directory = home / "servers/3.9.9"
    directory.mkdir(parents=True)
    async with await anyio.open_process([sys.executable, "-c", "input()"]) as bystander:
        ticks = 0 if not change else (keeper.identity(bystander.pid) or [0, 0])[1]
        stale = {"version": "3.9.9", "api_url": "http://127.0.0.1:9/api", "auth_string": None, "since": 0.0}
        process = [bystander.pid, ticks]
        state = {**stale, "host": keeper.here(), "server": process, "keeper": process, **change}
        (directory / "state.json").write_text(json.dumps(state))

        assert server_status(home) == []
        assert await stop_servers(home) == []
        async with use(home) as server:
            assert server.pid != bystander.pid
        assert bystander.returncode is None
        bystander.kill()


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"host"'])
async def test_a_state_that_cannot_be_read_is_no_state(home: Path, text: str) -> None:
    directory = home / "servers/3.9.9"
    directory.mkdir(parents=True)
    (directory / "state.json").write_text(text)

    assert server_status(home) == []
    async with use(home):
        assert len(server_status(home)) == 1


async def test_a_keeper_ends_with_its_server(home: Path) -> None:
    async with use(home, keep_seconds=60) as server:
        [row] = server_status(home)
        os.kill(server.pid, signal.SIGKILL)
        await wait_until(lambda: is_gone(row["keeper_pid"]))

    assert server_status(home) == []


async def test_a_keeper_ends_its_server_when_it_is_told_to(home: Path) -> None:
    async with use(home, keep_seconds=60) as server:
        [row] = server_status(home)
        os.kill(row["keeper_pid"], signal.SIGTERM)
        await wait_until(lambda: is_gone(server.pid, row["keeper_pid"]))

    assert not (home / "servers/3.9.9/state.json").exists()


async def test_a_log_stays_bounded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SERVER", "loud")
    log = home / "servers/3.9.9/server.log"

    async with use(home):
        await wait_until(lambda: log.with_suffix(".log.1").exists() and log.stat().st_size < keeper.LOG_BYTES)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("fastapi", "Prefect 3.9.9 cannot work with its newer fastapi: .* -m pip install 'fastapi<0.140'"),
        ("full", "The Prefect 3.9.9 server died at start: OSError: database or disk is full .*server.log"),
        ("hang", "The Prefect 3.9.9 server did not answer within 3 s, see .*server.log"),
    ],
)
async def test_a_server_that_cannot_start_says_why_and_is_gone(
    home: Path, monkeypatch: pytest.MonkeyPatch, mode: str, message: str
) -> None:
    monkeypatch.setenv("FAKE_SERVER", mode)

    with pytest.raises(ConfigurationError, match=message) as caught:
        async with use(home, keep_seconds=60, start_seconds=3 if mode == "hang" else 60):
            pass

    assert "\n" not in str(caught.value)
    assert server_status(home) == []


async def test_a_cancelled_start_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SERVER", "hang")
    state = home / "servers/3.9.9/state.json"

    async with anyio.create_task_group() as tasks:

        async def start() -> None:
            async with use(home):
                pass

        tasks.start_soon(start)
        await wait_until(state.exists)
        tasks.cancel_scope.cancel()

    assert not state.exists()


async def test_half_a_database_of_a_killed_first_start_is_thrown_away(home: Path) -> None:
    database = home / "servers/3.9.9/prefect.db"
    database.parent.mkdir(parents=True)
    database.write_text("half")
    async with use(home):
        assert not database.exists()
        database.write_text("whole")
    async with use(home):
        assert database.read_text() == "whole"


async def test_an_unusable_home_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigurationError, match=r"The server cannot use .*/file/servers/3.9.9: Not a directory"):
        async with use(tmp_path / "file"):
            pass


async def test_a_full_disk_is_named_before_anything_starts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("procworker.local.server.FREE_MIB", 1 << 40)

    with pytest.raises(ConfigurationError, match=r"less than .* MiB free on its disk"):
        async with use(home):
            pass


def test_an_interpreter_without_prefect_is_answered_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH")

    # The base interpreter, without the packages of a user or of Debian, is one without Prefect.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E -s "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ConfigurationError, match=r"has no Prefect: pip install 'procworker\[prefect\]', or .*--python"):
        find_prefect(str(bare))
    with pytest.raises(ConfigurationError, match=r"Cannot run the interpreter /nowhere/python: .*No such file"):
        find_prefect("/nowhere/python")
    with pytest.raises(ConfigurationError, match="The interpreter /bin/false does not work: it said nothing"):
        find_prefect("/bin/false")


def test_prefect_is_found_whatever_the_callers_directory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "email.py").write_text("1/0")
    monkeypatch.chdir(tmp_path)

    assert find_prefect(sys.executable) == (sys.executable, "3.9.9")


def test_the_last_words_are_the_last_error() -> None:
    died = "Traceback (most recent call last):\n  File x\nsqlalchemy.exc.OperationalError: no table\n(See)\n"

    assert last_words(died) == "sqlalchemy.exc.OperationalError: no table"
    assert last_words("exit code -9\n\n") == "exit code -9"


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
async def test_a_real_server_runs_a_flow(home: Path, tmp_path: Path, name: str) -> None:
    if not (python := REAL[name]):
        pytest.skip(f"PROCWORKER_TEST_{name} does not name an interpreter")
    (tmp_path / "flow.py").write_text(FLOW)

    async with local_server(python, home, keep_seconds=0, say=print) as server:
        assert bool(server.auth_string) is (name == "PREFECT38")
        user, _, password = (server.auth_string or ":").partition(":")
        async with httpx.AsyncClient(base_url=server.api_url) as stranger:
            status_code = (await stranger.post("/flows/filter", json={})).status_code
        async with httpx.AsyncClient(base_url=server.api_url, auth=(user, password)) as api:
            flow = (await api.post("/flows/", json={"name": "double"})).json()
            body = {"flow_id": flow["id"], "parameters": {"x": 2}, "state": {"type": "PENDING"}}
            # SQLite is busy for a moment when everything starts at once; nothing was written then.
            while (answer := await api.post("/flow_runs/", json=body)).status_code == 503:  # noqa: ASYNC110
                await anyio.sleep(0.5)
            flow_run = answer.json()["id"]
            env = {"PREFECT_API_URL": server.api_url, "PREFECT_API_AUTH_STRING": server.auth_string or ""}
            env |= {
                "PREFECT__FLOW_RUN_ID": flow_run,
                "PREFECT__FLOW_ENTRYPOINT": f"{tmp_path}/flow.py:double",
            }
            environ = {**os.environ, **{key: value for key, value in env.items() if value}}
            await anyio.run_process([python, "-m", "prefect.engine"], env=environ, check=False)
            state = (await api.get(f"/flow_runs/{flow_run}")).json()["state"]

    assert status_code == (401 if name == "PREFECT38" else 200)
    assert state["type"] == "COMPLETED"
    assert is_gone(server.pid)
