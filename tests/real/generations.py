"""Watch one worker serve flow runs of one Prefect on the server of another, and tell what a user would see."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx
from harness import FINAL, HERE, Api, Place, Prefect, Worker, eventually, start_time, working
from misbehave import survivors

from procworker.process import ProcessWorker
from procworker.system.interpreter import probe

FLOWS = HERE / "generation_flows.py"
LINE = "a line of the flow's logger"
LABELS = {"prefect.worker.name", "prefect.worker.type", "prefect.work-pool.name", "prefect.work-pool.id"}
EVENTS = ("prefect.worker.submitted-flow-run", "prefect.worker.executed-flow-run")
OTHER_MAJOR, NO_PASSWORD = "Major versions must match.", "401 Unauthorized"
"""Why an engine may refuse, or be refused."""
LATE_SECONDS = 15.0
"""Servers of Prefect 3 take task runs and events in the background."""
SUBMIT = """
import sys, anyio
from procworker import ProcessWorker

async def main(flow, python, has_result):
    async with ProcessWorker(None, python=python) as worker:
        future = await worker.submit(flow)
        await future.wait_async(200)
        is_readable = has_result and future.state.type == "COMPLETED"
        print(future.state.type, future.state.name, *([await future.aresult()] if is_readable else []))

anyio.run(main, sys.argv[1], sys.argv[2], len(sys.argv) > 3)
"""

T = TypeVar("T")


def within(seconds: float, fact: Callable[[], T]) -> T:
    """Return a fact when it has become true, or what it is when the time is over."""
    deadline = time.monotonic() + seconds
    while not (found := fact()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


@contextmanager
def open_server(python: str, home: Path) -> Iterator[Prefect]:
    """`prefect server start` as a user has it, without the password that an embedded server of 3.1.10 or newer has."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "PROCWORKER"))}
    environ |= {"HOME": str(home), "PREFECT_HOME": str(home), "DO_NOT_TRACK": "1", "PREFECT_UI_ENABLED": "false"}
    command = [python, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("wb") as log:
        where = {"env": environ, "cwd": home, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        server = subprocess.Popen(command, start_new_session=True, **where)
    api = Api(f"http://127.0.0.1:{port}/api", None)

    def answers() -> bool:
        assert server.poll() is None, (home / "server.log").read_text()
        with suppress(httpx.TransportError):
            return bool(api("GET", "/health"))
        return False

    try:
        eventually(answers, 120, "the server answers")
        yield Prefect(python, api)
    finally:
        api.close()
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@dataclass(frozen=True)
class Pair:
    """The server of one Prefect, the interpreter of another, and a place for all they write."""

    server: Prefect
    home: Path
    """Where the embedded server lives."""
    python: str
    place: Place

    @property
    def api(self) -> Api:
        return self.server.api

    def watch(self) -> dict[str, str]:
        """Let one worker run all flows at once, then `run` and `submit()` beside it; name each thing that is seen."""
        api = self.api
        pool = api.pool(f"generations {uuid4().hex[:8]}", ProcessWorker.get_default_base_job_template())
        names = ("complete", "fail", "sleep")
        runs = {name: api.flow_run(api.deployment(pool, f"{FLOWS}:{name}", name), name) for name in names}
        is_own = self.python == self.server.python
        with (
            ThreadPoolExecutor() as people,
            working(self.place, api, "--pool", pool, "--name", "watched", "--python", self.python) as worker,
        ):
            # One after the other, for a server whose database is SQLite stands still when too many come at once.
            self.cancel(runs["sleep"], worker)
            ended = dict(zip(runs, api.until_final(*runs.values()), strict=True))
            commands = [people.submit(self.run, name) for name in ("complete", "fail")]
            submitted = people.submit(self.submit)
            embedded = people.submit(self.run_embedded) if is_own else None
            seen = {
                "run": " ".join(str(command.result()) for command in commands),
                "submit": submitted.result(),
                **({"embedded": embedded.result()} if embedded else {}),
            }
            eventually(lambda: not any((self.place.path / "state" / "runs").iterdir()), what="no run has a directory")
            seen |= {"gone": self.is_gone(runs["sleep"])}
            assert worker.stop() == 0
            assert self.place.clear() == {}
        states = {name: f"{run['state_type']} {run['state_name']}" for name, run in ended.items()}
        return {
            **states,
            **seen,
            "hooks": " ".join(self.place.marked(runs["sleep"]).get("hooks", "").split()),
            "finals": " ".join(str(self.finals(run)) for run in runs.values()),
            "pid": self.pid(ended["complete"]),
            # Read when the worker is gone: they wait while a server with SQLite has other things to write.
            "labels": "all" if set(api.read(runs["complete"]).get("labels") or ()) >= LABELS else "none",
            "logs": self.logs(runs["complete"]),
            # None will come of a flow that did not run.
            "task runs": self.task_runs(runs["complete"]) if "COMPLETED" in states["complete"] else "none",
            "events": self.events(runs["complete"]),
        }

    def cancel(self, run: str, worker: Worker) -> None:
        """Cancel a flow that is at work, if it ever gets there."""

        def is_reached() -> bool:
            is_over = self.api.read(run)["state_type"] in FINAL
            return is_over or "ready" in self.place.marked(run) or not worker.alive

        eventually(is_reached, what="the flow is ready, or over")
        if "ready" in self.place.marked(run):
            assert self.api.set_state(run, "CANCELLING")["state"]["type"] == "CANCELLING"

    def command(self, *argv: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
        environ = self.place.environment(self.api) | environment
        environ = {name: value for name, value in environ.items() if value is not None}
        cwd = self.place.path / "cwd"
        where = {"env": environ, "cwd": cwd, "stdin": subprocess.DEVNULL}
        return subprocess.run(
            [sys.executable, *argv], capture_output=True, text=True, timeout=240, check=False, **where
        )

    def run(self, flow: str, *options: str, **environment: str | None) -> int:
        """The exit code of `procworker run`."""
        argv = ("-m", "procworker", "run", f"{FLOWS}:{flow}", "--python", self.python, *options)
        done = self.command(*argv, **environment)
        print(done.stdout, done.stderr)
        return done.returncode

    def run_embedded(self) -> str:
        """The exit code of `procworker run` that finds the embedded server by itself, and what `server status` says."""
        environment = {"PREFECT_API_URL": None, "PREFECT_API_AUTH_STRING": None, "PROCWORKER_HOME": str(self.home)}
        code = self.run("complete", "--no-keep", **environment)
        status = self.command("-m", "procworker", "server", "status", "--json", **environment)
        (row,) = json.loads(status.stdout)
        is_it = row["healthy"] and row["in_use"] and f"{row['url']}" == self.api.url
        return f"{code} {'healthy' if is_it else row}"

    def submit(self) -> str:
        """The final state of a submitted flow; and its result, which only the Prefect that wrote it may read."""
        has_result = own_prefect() == probe(self.python)
        done = self.command("-c", SUBMIT, f"{FLOWS}:complete", self.python, *(["result"] if has_result else []))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def is_gone(self, run: str) -> str:
        """Whether engine and child of a flow are gone, while the worker still lives."""
        marks = self.place.marked(run)
        living = [name for name in ("engine", "child") if name in marks and is_alive(*marks[name].split())]
        return "left: " + " ".join(living) if living or survivors(f"PROCWORKER_RUN={run}") else "gone"

    def finals(self, run: str) -> int:
        return sum(state["type"] in FINAL for state in self.api.states(run))

    def pid(self, run: dict[str, Any]) -> str:
        """Whether the server knows the process of a run; it is the engine's, where that gets as far as the flow."""
        known = (run["infrastructure_pid"] or "").rpartition(":")[2]
        engine, *_ = self.place.marked(run["id"]).get("engine", "").split() or [""]
        if known and not engine:
            return "known"
        return "engine's" if known and known == engine else f"{known or 'unknown'}, not {engine}"

    def logs(self, run: str) -> str:
        """Whether the server has the line that the flow logged, or why not."""
        messages = [line["message"] for line in self.api.logs(run)]
        reasons = [reason for reason in (OTHER_MAJOR, NO_PASSWORD) if any(reason in message for message in messages)]
        return "flow's" if LINE in messages else "\n".join(reasons or messages)

    def task_runs(self, run: str) -> str:
        """The final states of the runs of tasks."""
        body = {"flow_runs": {"id": {"any_": [run]}}}
        found = within(
            LATE_SECONDS,
            lambda: [task for task in self.api("POST", "/task_runs/filter", body) if task["state_type"] in FINAL],
        )
        return " ".join(str(task["state_type"]) for task in found) or "none"

    def events(self, run: str) -> str:
        """The worker's events about a run."""
        auth = httpx.BasicAuth(*self.api.auth_string.split(":", 1)) if self.api.auth_string else None
        body = {"filter": {"any_resource": {"id": [f"prefect.flow-run.{run}"]}, "event": {"name": list(EVENTS)}}}

        def stored() -> list[str] | None:
            answer = httpx.post(f"{self.api.url}/events/filter", json=body, auth=auth, timeout=60, trust_env=False)
            if answer.status_code == httpx.codes.NOT_FOUND:
                return ["no such route"]
            assert answer.is_success, answer.text
            names = sorted(event["event"] for event in answer.json()["events"])
            return names if len(names) == len(EVENTS) else None

        return " ".join(within(LATE_SECONDS, stored) or ["none"])


def is_alive(pid: str, start: str) -> bool:
    return start_time(int(pid)) == start


def own_prefect() -> str | None:
    """The Prefect beside procworker itself."""
    try:
        return importlib.metadata.version("prefect")
    except importlib.metadata.PackageNotFoundError:
        return None
