"""What the real-server tests share: Prefect's REST API, a place of their own, the command line as a subprocess."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import httpx
from misbehave import survivors

import procworker

HERE = Path(__file__).parent
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}

T = TypeVar("T")


def eventually(fact: Callable[[], T], seconds: float = 240.0, what: str = "") -> T:
    """Wait for a fact outside this process and return it."""
    deadline = time.monotonic() + seconds
    while not (found := fact()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what or fact}"
        time.sleep(0.1)
    return found


def start_time(pid: int) -> str | None:
    """When the living process that has this pid now was started; None without one."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


class Api:
    """The part of Prefect's REST API that a user has."""

    def __init__(self, url: str, auth_string: str | None) -> None:
        self.url = url
        self.auth_string = auth_string
        auth = httpx.BasicAuth(*auth_string.split(":", 1)) if auth_string else None
        self._http = httpx.Client(base_url=url, auth=auth, timeout=120, trust_env=False)

    def __call__(self, method: str, path: str, json: Any = None) -> Any:
        # SQLite is busy for a moment when everything starts at once; nothing was written then.
        for _ in range(10):
            answer = self._http.request(method, path, json=json)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(0.5)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text[:1000]}"
        return answer.json() if answer.content else None

    def close(self) -> None:
        self._http.close()

    def pool(self, name: str, template: Mapping[str, Any]) -> str:
        self("POST", "/work_pools/", {"name": name, "type": "process", "base_job_template": template})
        return name

    def deployment(self, pool: str, flow: str, name: str, **job_variables: Any) -> str:
        """A deployment of a function in flows.py, or of another `file.py:function`."""
        flow = flow if ":" in flow else f"{HERE / 'flows.py'}:{flow}"
        flow_id = self("POST", "/flows/", {"name": flow.rpartition(":")[2]})["id"]
        step = {"prefect.deployments.steps.set_working_directory": {"directory": str(HERE)}}
        body = {"name": name, "flow_id": flow_id, "entrypoint": flow, "path": str(HERE), "pull_steps": [step]}
        body |= {"work_pool_name": pool, "job_variables": job_variables, "enforce_parameter_schema": False}
        return str(self("POST", "/deployments/", body)["id"])

    def flow_run(self, deployment: str, name: str = "run", **parameters: Any) -> str:
        body = {"name": name, "parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self("POST", f"/deployments/{deployment}/create_flow_run", body)["id"])

    def set_state(self, run: str, type: str, force: bool = False) -> Any:
        return self("POST", f"/flow_runs/{run}/set_state", {"state": {"type": type}, "force": force})

    def read(self, run: str) -> dict[str, Any]:
        return dict(self("GET", f"/flow_runs/{run}"))

    def read_all(self, runs: list[str]) -> list[dict[str, Any]]:
        chunks = [runs[start : start + 200] for start in range(0, len(runs), 200)]
        found = (self("POST", "/flow_runs/filter", {"flow_runs": {"id": {"any_": chunk}}}) for chunk in chunks)
        return [row for rows in found for row in rows]

    def states(self, run: str) -> list[dict[str, Any]]:
        """Oldest first."""
        return sorted(self("GET", f"/flow_run_states/?flow_run_id={run}"), key=lambda state: state["timestamp"])

    def logs(self, run: str) -> list[dict[str, Any]]:
        body = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return list(self("POST", "/logs/filter", body))

    def until_final(self, *runs: str, seconds: float = 240.0) -> list[dict[str, Any]]:
        """Wait until all runs have a final state (many of them longer); return them."""
        seconds = max(seconds, 4.0 * len(runs))
        deadline = time.monotonic() + seconds
        while waiting := [run for run in self.read_all(list(runs)) if run["state_type"] not in FINAL]:
            if time.monotonic() > deadline:
                late = {run["name"]: [state["name"] for state in self.states(run["id"])] for run in waiting}
                raise AssertionError(f"not final within {seconds:g} s: {late}")
            time.sleep(0.5)
        return [self.read(run) for run in runs]


@dataclass(frozen=True)
class Prefect:
    """One installed Prefect, and its server."""

    python: str
    api: Api


@dataclass(frozen=True)
class Place:
    """A directory of its own for everything that a test writes, also through the processes it starts."""

    path: Path

    def __post_init__(self) -> None:
        for directory in ("home", "tmp", "state", "marks", "cwd"):
            (self.path / directory).mkdir()

    def environment(self, api: Api, **changes: str) -> dict[str, str]:
        """Nothing of ours but what every program needs; `MARKS` tells whom a process belongs to."""
        foreign = ("PREFECT", "PROCWORKER")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        auth = {"PREFECT_API_AUTH_STRING": api.auth_string} if api.auth_string else {}
        return {
            **kept,
            **auth,
            "DO_NOT_TRACK": "1",
            "HOME": str(self.path / "home"),
            "PREFECT_HOME": str(self.path / "home" / "prefect"),
            "TMPDIR": str(self.path / "tmp"),
            "PROCWORKER_HOME": str(self.path / "state"),
            "MARKS": str(self.path / "marks"),
            "PREFECT_API_URL": api.url,
            "PREFECT_WORKER_QUERY_SECONDS": "0.5",
            "PYTHONPATH": str(Path(procworker.__file__).parents[1]),
            **changes,
        }

    def marked(self, run: str) -> dict[str, str]:
        """The marks that a flow run left."""
        files = (self.path / "marks" / run).glob("[!.]*")
        return {file.name: file.read_text(encoding="utf-8") for file in files}

    def processes(self) -> dict[int, str]:
        """Everything that runs and was started for this place."""
        return survivors(f"MARKS={self.path / 'marks'}")

    def clear(self) -> dict[int, str]:
        """Kill what is left and name it."""
        left = self.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return left


class Worker:
    """`procworker start` as a user has it; ends when the context does, and everything with it."""

    program: ClassVar[tuple[str, ...]] = (sys.executable, "-m", "procworker")

    def __init__(self, place: Place, api: Api, *options: str, **environment: str) -> None:
        self._place = place
        self.log_file = place.path / f"worker-{time.monotonic_ns()}.log"
        command = [*self.program, "start", *options]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=place.path / "cwd",
                env=place.environment(api, **environment),
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> int:
        """Stop as a service manager does; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def working(place: Place, api: Api, *options: str, kind: type[Worker] = Worker, **environment: str) -> Iterator[Worker]:
    worker = kind(place, api, *options, **environment)
    try:
        yield worker
    except BaseException:
        print(worker.log)  # pytest shows it with the failure
        raise
    finally:
        if worker.alive:
            worker.process.kill()
            worker.process.wait()
        place.clear()
