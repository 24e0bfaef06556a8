"""What every subject stands on: a real Prefect server and workers of both sides, all gone at the end."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from anyio.from_thread import start_blocking_portal

from procworker.errors import ProcworkerError
from procworker.local.server import local_server
from procworker.system.interpreter import find_interpreter

ROOT = Path(__file__).parents[2]
FOREIGN = ("PREFECT", "PROCWORKER", "PYTHON", "VIRTUAL_ENV", "TOX_", "XDG_", "RUNNER_", "SSL_CERT_")
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
"""Our environment without what would reach into a worker or its Python."""


class Lab(NamedTuple):
    """A server, the commands that start a worker of either side (the pool comes last), a directory."""

    prefect: str
    ours: list[str]
    theirs: list[str]
    place: Path
    env: dict[str, str]
    client: httpx.Client
    server: psutil.Process

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the server, which under load says 503 now and then."""
        for pause in (1, 2, 4, 8, 16, 0):
            if (answer := self.client.request(method, path, json=body)).status_code != 503:
                break
            time.sleep(pause)
        return answer.raise_for_status().json() if answer.content else answer.raise_for_status()

    @contextmanager
    def worker(self, command: list[str], pool: str, *flags: str, **variables: str) -> Iterator[psutil.Popen]:
        """Run a worker that has reported to the server; it and all that it started is gone afterwards."""
        self.api("POST", "/work_pools/", {"name": pool, "type": "process"})
        home, reports = tempfile.mkdtemp(dir=self.place), f"/work_pools/{pool}/workers/filter"
        env = {**CLEAN, **self.env, "HOME": home, **variables}
        try:
            with open(f"{home}/log", "wb") as log:
                # Both start in ROOT, where ours finds this procworker; neither gets Ctrl-C.
                options: Any = {"cwd": ROOT, "env": env, "start_new_session": True}
                worker = psutil.Popen([*command, pool, *flags], stdout=log, stderr=log, **options)
            wait_until(lambda: worker.poll() is not None or self.api("POST", reports, {}), "the worker")
            if worker.poll() is not None:
                raise ProcworkerError(f"{command} has exited: {Path(home, 'log').read_text()[-500:]}")
            yield worker
        finally:
            end(home)


@contextmanager
def opened(prefect: str | None) -> Iterator[Lab]:
    """Start the server of the Python that has Prefect; nothing is left running or lying about afterwards."""
    found = find_interpreter(prefect, os.environ)
    ours = [sys.executable, "-m", "procworker", "start", "--python", found.path, "--pool"]
    theirs = [found.path, "-m", "prefect", "worker", "start", "--type", "process", "--pool"]
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        starting = local_server(found.path, Path(name), keep_seconds=0, say=print)
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(starting) as server:
            url, auth = server.api_url, server.auth_string or ":"
            env = {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": auth}
            client = httpx.Client(base_url=url, auth=httpx.BasicAuth(*auth.split(":", 1)), timeout=120)
            yield Lab(found.prefect_version, ours, theirs, Path(name), env, client, psutil.Process(server.pid))


def wait_until(fact: Callable[[], Any], what: str, pause: float = 0.1, seconds: float = 120.0) -> Any:
    """Wait for a fact outside this process, and return it."""
    give_up = time.monotonic() + seconds
    while not (found := fact()):
        if time.monotonic() > give_up:
            raise ProcworkerError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(pause)
    return found


def end(mark: str) -> None:
    """End, and in the end kill, whatever has the mark in its environment."""
    found = marked(mark)
    for process in found:
        with suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(found, timeout=20)[1]:
        process.kill()


def marked(mark: str) -> list[psutil.Process]:
    """Find what has the mark in its environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and mark in process.environ().values():
                found.append(process)
    return found
