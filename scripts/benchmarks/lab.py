"""What every subject stands on: a real Prefect server and workers of both sides, all gone at the end."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from anyio.from_thread import start_blocking_portal

from procworker.errors import ProcworkerError
from procworker.local.server import local_server
from procworker.system.interpreter import find_interpreter

ROOT = Path(__file__).parents[2]
FOREIGN = ("PREFECT", "PROCWORKER", "PYTHON", "VIRTUAL_ENV", "TOX_", "XDG_", "RUNNER_")
GRACE_SECONDS, ATTEMPTS = 20.0, 5


@dataclass
class Lab:
    """A server, the commands that start a worker of either side (the pool comes last), a directory."""

    prefect: str
    ours: list[str]
    theirs: list[str]
    place: Path
    env: dict[str, str]
    client: httpx.Client

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the server, which under load says 503 now and then; None stands for 404."""
        for attempt in range(ATTEMPTS):
            time.sleep(attempt)
            answer = self.client.request(method, path, json=body)
            if answer.status_code != 503:
                break
        if answer.is_error and answer.status_code != 404:
            raise ProcworkerError(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        return answer.json() if answer.is_success else None

    @contextmanager
    def worker(self, command: list[str], pool: str, **variables: str) -> Iterator[psutil.Popen]:
        """Run a worker that has reported to the server; it and all that it started is gone afterwards."""
        home = tempfile.mkdtemp(dir=self.place)
        env = clean() | self.env | {"HOME": home} | variables
        with open(f"{home}/log", "wb") as log:
            # Both start in ROOT, where ours finds this procworker; neither gets Ctrl-C.
            options: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            worker = psutil.Popen([*command, pool], cwd=ROOT, env=env, **options)
        try:
            reported = f"/work_pools/{pool}/workers/filter"
            wait_until(lambda: worker.poll() is not None or self.api("POST", reported, {}), "the worker")
            if worker.poll() is not None:
                raise ProcworkerError(f"{command} has exited: {Path(home, 'log').read_text()[-500:]}")
            yield worker
        finally:
            end(home)


@contextmanager
def opened(prefect: str | None) -> Iterator[Lab]:
    """Start the server of the Python that has Prefect; nothing is left running or lying about afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        os.environ["BENCH_PLACE"] = name  # whatever is started carries it
        try:
            found = find_interpreter(prefect, os.environ)
            ours = [sys.executable, "-m", "procworker", "start", "--python", found.path, "--pool"]
            theirs = [found.path, "-m", "prefect", "worker", "start", "--type", "process", "--pool"]
            starting = local_server(found.path, Path(name), keep_seconds=0, say=note)
            with start_blocking_portal() as portal, portal.wrap_async_context_manager(starting) as server:
                auth = server.auth_string or ":"
                env = {"PREFECT_API_URL": server.api_url, "PREFECT_API_AUTH_STRING": auth}
                user, _, password = auth.partition(":")
                with httpx.Client(base_url=server.api_url, auth=(user, password), timeout=30) as client:
                    yield Lab(found.prefect_version, ours, theirs, Path(name), env, client)
        finally:
            end(name)


def clean() -> dict[str, str]:
    """Return our environment without what would reach into a worker or its Python."""
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def wait_until(fact: Callable[[], Any], what: str, seconds: float = 120.0, pause: float = 0.1) -> None:
    """Wait for a fact outside this process."""
    give_up = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > give_up:
            raise ProcworkerError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(pause)


def end(mark: str) -> None:
    """End, and in the end kill, whatever has the mark in its environment."""
    marked = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and mark in process.environ().values():
                marked.append(process)
                process.terminate()
    for process in psutil.wait_procs(marked, GRACE_SECONDS)[1]:
        note(f"had to kill {process}")
        process.kill()
