"""Give a command a Prefect server of its own: private, shared by all who need it now, gone when nobody does.

A server and its database live in HOME/servers/<Prefect version>. Whoever comes first starts a keeper (see
`procworker.local.keeper`), the server's parent; everybody holds a shared lock on a lease file while using it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from subprocess import DEVNULL, SubprocessError, run
from typing import Any

import httpx
from anyio import CancelScope, current_time, fail_after, move_on_after, sleep, to_thread

from procworker.errors import ConfigurationError
from procworker.local import keeper
from procworker.system.processes import COOKIE

LEAVE_SECONDS = 15.0
PAUSE_SECONDS = 0.05
FREE_MIB = 64
# The caller's directory, first on the path of `python -c`, may hold anything.
PROBE = """import sys; sys.path = [entry for entry in sys.path if entry]; import importlib.metadata
print(sys.executable, importlib.metadata.version("prefect"), sep="\\n")"""


@dataclass(frozen=True)
class LocalServer:
    """A healthy embedded server, for as long as its context is open."""

    api_url: str
    auth_string: str | None = field(repr=False)
    pid: int
    version: str


@asynccontextmanager
async def local_server(
    python: str,
    home: Path,
    *,
    keep_seconds: float = 600.0,
    say: Callable[[str], None],
    version: str | None = None,
    start_seconds: float = 120.0,
) -> AsyncIterator[LocalServer]:
    """Use the Prefect server of an interpreter, started if need be and kept for a while after its last use.

    A known `version` spares asking the interpreter. With `keep_seconds=0` the last user waits for the end.
    """
    if os.name == "nt":
        raise ConfigurationError("The embedded server needs Linux or macOS: set PREFECT_API_URL")
    python, found = (python, version) if version else await to_thread.run_sync(find_prefect, python)
    site = Site(home.absolute() / "servers" / found, os.path.abspath(shutil.which(python) or python), say)
    with usable(site.directory):
        site.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lease = keeper.private_file(site.directory / "lease")
    try:
        with usable(site.directory):
            state = await site.join(lease, start_seconds)
            if keep_seconds > keeper.kept_for(lease):
                os.write(lease, f"{keep_seconds}\n".encode())
        yield LocalServer(state["api_url"], state["auth_string"], state["server"][0], state["version"])
    finally:
        with CancelScope(shield=True):
            await site.leave(lease, keep_seconds)


@dataclass(frozen=True)
class Site:
    """The place of one Prefect version's server, and whom to tell about it."""

    directory: Path
    python: str
    say: Callable[[str], None]

    async def join(self, lease: int, start_seconds: float) -> dict[str, Any]:
        """Take the lease of a healthy server; start one if there is none."""
        begin = current_time()
        try:
            with fail_after(start_seconds):
                while not keeper.lock(lease, exclusive=False):  # noqa: ASYNC110 - a lock of an ending keeper
                    await sleep(PAUSE_SECONDS)
                state = await self.find_or_start()
        except TimeoutError:
            await to_thread.run_sync(stop, self.directory)
            reason = f"did not answer within {start_seconds:g} s, see {self.directory / 'server.log'}"
            raise ConfigurationError(f"The Prefect {self.directory.name} server {reason}") from None
        os.close(keeper.private_file(self.directory / "migrated"))
        self.say(f"Prefect server ready after {current_time() - begin:.1f} s at {state['api_url'][:-4]}")
        return state

    async def find_or_start(self) -> dict[str, Any]:
        """Wait until a server answers, whoever starts it."""
        started = waited = False
        while True:
            place = keeper.private_file(self.directory / "keeper")
            try:
                if keeper.lock(place, exclusive=True):
                    if started:
                        raise ConfigurationError(self.epitaph())
                    first = "" if (self.directory / "migrated").exists() else " (first start takes 10-30 s)"
                    self.say(f"Starting the Prefect {self.directory.name} server{first} ...")
                    await to_thread.run_sync(self.start_keeper, place)
                    started = True
            finally:
                os.close(place)
            state = keeper.read_state(self.directory)
            if state and keeper.is_alive(state["keeper"]) and await to_thread.run_sync(is_healthy, state):
                return state
            if not (started or waited):
                self.say(f"Waiting for the Prefect {self.directory.name} server of another process ...")
                waited = True
            await sleep(PAUSE_SECONDS)

    def start_keeper(self, place: int) -> None:
        """Clear away what the last keeper left, and start one that takes over our lock."""
        stop(self.directory)
        os.truncate(self.directory / "lease", 0)
        if not (self.directory / "migrated").exists():  # a first start that was killed left half a database
            for half_made in self.directory.glob("prefect.db*"):
                half_made.unlink()
        if shutil.disk_usage(self.directory).free < FREE_MIB << 20:
            raise OSError(f"less than {FREE_MIB} MiB free on its disk")
        command = [sys.executable, "-m", "procworker.local.keeper", str(self.directory), self.python]
        env = server_env(os.environ, self.directory)
        root = Path(__file__).parents[2]  # where `-m` finds procworker, however we were imported
        with open(keeper.private_file(self.directory / "server.log", os.O_TRUNC), "ab") as log:
            run(command, cwd=root, env=env, stdin=DEVNULL, stdout=log, stderr=log, pass_fds=[place])

    def epitaph(self) -> str:
        """Say why the server died at start, and what helps where that is known."""
        log = self.directory / "server.log"
        text = log.read_text(errors="replace")[-65536:]
        if "unexpected keyword argument 'min_items'" in text:
            advice = f"{self.python} -m pip install 'fastapi<0.140'"
            return f"Prefect {self.directory.name} cannot work with its newer fastapi: {advice}"
        return f"The Prefect {self.directory.name} server died at start: {last_words(text)} (see {log})"

    async def leave(self, lease: int, keep_seconds: float) -> None:
        """Give the lease back; the last user, if nobody wants the server kept, waits until it is gone."""
        is_wanted = not keeper.lock(lease, exclusive=True) or max(keep_seconds, keeper.kept_for(lease))
        state = keeper.read_state(self.directory)
        os.close(lease)
        place = keeper.private_file(self.directory / "keeper")
        if not is_wanted:
            with move_on_after(LEAVE_SECONDS) as scope:
                while not keeper.lock(place, exclusive=True):
                    if state and not keeper.is_alive(state["keeper"]):
                        break  # somebody started the next one
                    await sleep(PAUSE_SECONDS)
            if scope.cancelled_caught:
                self.say("The Prefect server is still ending")
        os.close(place)


def find_prefect(python: str) -> tuple[str, str]:
    """Ask an interpreter for its real path and its Prefect's version, without importing Prefect."""
    try:
        answer = run([python, "-c", PROBE], stdin=DEVNULL, capture_output=True, text=True, timeout=60)
    except (OSError, SubprocessError) as error:
        raise ConfigurationError(f"Cannot run the interpreter {python}: {error}") from error
    if "PackageNotFoundError" in answer.stderr:
        advice = "pip install 'procworker[prefect]', or choose another interpreter with --python"
        raise ConfigurationError(f"{python} has no Prefect: {advice}")
    if answer.returncode:
        raise ConfigurationError(f"The interpreter {python} does not work: {last_words(answer.stderr)}")
    executable, version = answer.stdout.splitlines()[-2:]
    return executable, version


def server_env(environ: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Build the environment of a keeper and its server: no setting of the user's, no mark of a flow run."""
    foreign = ("PREFECT", "PROCWORKER", "FORCE_COLOR")
    private = {
        "PREFECT_HOME": str(directory),
        "PREFECT_PROFILES_PATH": str(directory / "no-profiles.toml"),
        "PREFECT_MEMO_STORE_PATH": str(directory / "memo_store.toml"),  # 3.4 to 3.6 else write the user's
        "PREFECT_UI_ENABLED": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "http://127.0.0.1",  # no web page has business here
        COOKIE: "",  # no part of the flow run that may have started us
    }
    version = version_of(directory.name)
    if version >= (3, 8):  # saves memory; what an older one throws away for it, fastapi 0.137 and newer still need
        private["PREFECT__SERVER_FINAL"] = "1"
    if knows_passwords(directory.name):
        private["PREFECT_SERVER_API_AUTH_STRING"] = f"procworker:{secrets.token_urlsafe(24)}"
    return {name: value for name, value in environ.items() if not name.startswith(foreign)} | private


def version_of(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, for comparing."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def knows_passwords(version: str) -> bool:
    """Can clients and servers of this Prefect use PREFECT_API_AUTH_STRING?"""
    return version_of(version) >= (3, 1, 10)


def last_words(text: str) -> str:
    """Pick the line that says why a Python program died."""
    lines = [line for line in text.splitlines() if line[:1].strip()]  # indented ones quote source code
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (errors or lines or ["it said nothing"])[-1][:300]


@contextmanager
def usable(directory: Path) -> Iterator[None]:
    """Say in one line that a directory cannot serve, whatever the system's reason."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"The server cannot use {directory}: {error.strerror or error}") from error


def is_healthy(state: dict[str, Any]) -> bool:
    """Ask a server, which has two seconds to answer."""
    with suppress(httpx.HTTPError):
        return httpx.get(f"{state['api_url']}/health", timeout=2, trust_env=False, verify=False).is_success
    return False


def stop(directory: Path) -> None:
    """End the server of a directory and its keeper, if they are ours to end."""
    if state := keeper.read_state(directory):
        keeper.end_tree(state["keeper"], LEAVE_SECONDS)
        keeper.end_tree(state["server"], keeper.GRACE_SECONDS)
        (directory / "state.json").unlink(missing_ok=True)


async def stop_servers(home: Path) -> list[dict[str, Any]]:
    """End all embedded servers, in use or not, and describe them as they were."""
    rows = await to_thread.run_sync(server_status, home)
    for row in rows:
        await to_thread.run_sync(stop, home / "servers" / row["version"])
    return rows


def server_status(home: Path) -> list[dict[str, Any]]:
    """Describe the embedded servers that run."""
    return [describe(directory, state) for directory, state in keeper.living(home)]


def describe(directory: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Describe a server for people."""
    lease = keeper.private_file(directory / "lease")
    in_use = not keeper.lock(lease, exclusive=True)
    os.close(lease)
    return {
        "version": state["version"],
        "url": state["api_url"],
        "pid": state["server"][0],
        "keeper_pid": state["keeper"][0] if keeper.is_alive(state["keeper"]) else None,
        "in_use": in_use,
        "since": datetime.fromtimestamp(state["since"], timezone.utc).isoformat(timespec="seconds"),
        "database": str(directory / "prefect.db"),
        "healthy": is_healthy(state),
    }
