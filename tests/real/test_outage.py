"""Nothing that happens to the answers of a server ends the worker, touches a flow or costs a report.

A fault proxy stands between the worker and a real server; the flows themselves talk to the server directly. The
timers of the worker's patience are scaled down, except with PROCWORKER_TEST_FULL=1, where outages are long, too.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import engine
import httpx
import pytest
from harness import FINAL, Api, Place, Prefect, Worker, eventually
from proxy import FAULTS, FLOOD, Proxy, proxied
from workers import engine_command

from procworker.process import ProcessWorker

pytestmark = [pytest.mark.real, pytest.mark.long]

FULL = os.environ.get("PROCWORKER_TEST_FULL") == "1"
SEED = int(os.environ.get("PROCWORKER_TEST_SEED", "1"))
OUTAGE_SECONDS = 600.0 if FULL else 10.0
POLL_SECONDS = 0.5
SLACK_SECONDS = 3.0
"""What a loaded machine may take longer for a poll than an idle one."""

POLL = "POST /work_pools/{name}/get_scheduled_flow_runs"
SET_STATE = "POST /flow_runs/{id}/set_state"
OF_THE_POOL = ("GET /work_pools/{name}", "POST /work_pools/{name}/workers/heartbeat", POLL)
OF_A_NEW_POOL = ("POST /work_pools/", "PATCH /work_pools/{name}")
OF_A_RUN = (
    "GET /csrf-token",
    SET_STATE,
    "GET /flow_run_states/",
    "GET /deployments/{id}",
    "GET /flows/{id}",
    "GET /variables/name/{name}",
    "GET /block_types/slug/secret/block_documents/name/{name}",
    "PATCH /flow_runs/{id}",
    "POST /flow_runs/filter",
    "POST /logs/",
)
OF_NEWER_SERVERS = ("PATCH /flow_runs/{id}/labels", "POST /events")
RARE = {"GET /flow_runs/{id}", *OF_NEWER_SERVERS}
"""When two workers claim one run or one was rescheduled; and what older servers refuse, which is found out once."""

PROGRAM = """
import os, sys
from procworker import cancels, loops, shift
from procworker.cli import main
from procworker.server import http, outbox
{changes}
sys.exit(main())
"""
SCALED = """
http.Http.first_pause = 0.2
loops.patiently.__defaults__ = (0.2, 2.0)
cancels.CANCEL_POLL_SECONDS = 0.5
shift.DRAIN_SECONDS = shift.STOP_GRACE_SECONDS = shift.LAST_REPORT_SECONDS = 2.0
outbox.LONGEST_WAIT = 1.0
"""
MANY_STARTS = """
os.cpu_count = lambda: 8
"""
"""Others are waited for while one start has to wait."""
IMPATIENT = """
async def turn(self):
    try:
        await self._work()
    except Exception as error:
        # A busy SQLite server answers 503 by itself.
        if self._what == "Polling" and getattr(error, "status_code", None) != 503:
            raise

loops.Loop.turn = turn
"""


class ChangedWorker(Worker):
    """`procworker start` with changes, as Python code, to what cannot be set."""

    def __init__(self, place: Place, api: Api, *options: str, changes: str, **environment: str) -> None:
        self._place = place
        self.log_file = place.path / f"worker-{time.monotonic_ns()}.log"
        program = ["-c", PROGRAM.format(changes=changes)] if changes else ["-m", "procworker"]
        fast = {
            "PREFECT_API_REQUEST_TIMEOUT": "1.5",
            "PREFECT_CLIENT_MAX_RETRIES": "5" if FULL else "1",
            "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.1",
            "PREFECT_WORKER_HEARTBEAT_SECONDS": "0.5",
            "PREFECT_WORKER_QUERY_SECONDS": str(POLL_SECONDS),
        }
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, "start", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=place.path / "cwd",
                env=place.environment(api, **{**fast, **environment}),
            )

    def resident(self) -> float:
        """How much memory it holds, in MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) / 1024


class Scene:
    """A pool whose runs are walked by workers behind a proxy, while the flows see the server itself."""

    def __init__(self, place: Place, prefect: Prefect, csrf: bool = False) -> None:
        self.place, self.prefect, self.api = place, prefect, prefect.api
        self.counted = place.path / "marks" / "executions"
        self.pool = self.api.pool(f"outage {uuid4().hex[:8]}", ProcessWorker.get_default_base_job_template())
        self.direct = {"PREFECT_API_URL": self.api.url}
        self.runs: dict[str, str] = {}
        self._workers: list[ChangedWorker] = []

    def deployment(self, name: str, **variables: Any) -> str:
        env = {**self.direct, **variables.pop("env", {})}
        variables = {"command": engine_command(), **variables}
        return self.api.deployment(self.pool, "answer", name, env=env, **variables)

    def run(self, deployment: str, name: str, **flow: Any) -> str:
        """Schedule a run of the mini engine."""
        self.runs[name] = id = self.api.flow_run(deployment, name, file=str(self.counted), **flow)
        return id

    def start(
        self, api: Api, *options: str, pool: str | None = None, changes: str = "" if FULL else SCALED, **environ: str
    ) -> ChangedWorker:
        options = ("--pool", pool or self.pool, *options)
        self._workers.append(worker := ChangedWorker(self.place, api, *options, changes=changes, **environ))
        return worker

    def executions(self) -> Counter[str]:
        """How often each flow was executed."""
        lines = self.counted.read_text().splitlines() if self.counted.exists() else []
        return Counter(line.split()[1] for line in lines)

    def end(self) -> None:
        for worker in self._workers:
            if worker.alive:
                worker.process.kill()
                worker.process.wait()
        self.place.clear()


@contextmanager
def scene(place: Place, prefect: Prefect) -> Iterator[tuple[Scene, Proxy, Api]]:
    """A scene, the proxy, and the API as the workers are to see it."""
    played = Scene(place, prefect)
    with proxied(prefect.api.url, csrf=True) as proxy:
        behind = Api(proxy.url, prefect.api.auth_string)
        try:
            yield played, proxy, behind
        except BaseException:
            for worker in played._workers:
                print(worker.log)  # pytest shows it with the failure
            raise
        finally:
            played.end()
            behind.close()


# The faults themselves: what a client without any patience makes of them

EXPECTED: dict[str, type[Exception] | int] = {
    "refused": httpx.ReadError,
    "reset": httpx.ReadError,
    "answer lost": httpx.ReadError,
    "done late": 500,
    "timeout": httpx.ReadTimeout,
    "half-open": httpx.ReadTimeout,
    "401": 401,
    "408": 408,
    "429 seconds": 429,
    "429 date": 429,
    "429 junk": 429,
    "500": 500,
    "502": 502,
    "503": 503,
    "maintenance": 503,
    "HTML": 200,
    "truncated JSON": 200,
    "cut off": httpx.RemoteProtocolError,
    "100 MB": 200,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_what_it_is_called(fault: str, prefect38: Prefect) -> None:
    """The negative control of all that follows: a request that meets the fault once does not succeed."""
    expected = EXPECTED[fault]
    with proxied(prefect38.api.url) as proxy, httpx.Client(base_url=proxy.url, timeout=1, trust_env=False) as client:
        assert client.get("/health").json() is True
        proxy.choose = lambda endpoint: fault
        if not isinstance(expected, int):
            with pytest.raises(expected):
                client.get("/health")
        elif fault == "100 MB":
            assert len(client.get("/health").content) > FLOOD
        else:
            answer = client.get("/health")
            assert answer.status_code == expected
            assert (fault in ("HTML", "truncated JSON")) == answer.is_success
            if answer.is_success:
                with pytest.raises(ValueError):
                    answer.json()
        if fault == "refused":
            with pytest.raises(httpx.ConnectError):
                client.get("/health")
            eventually(lambda: proxy._server, 10, "it listens again")
        proxy.choose = lambda endpoint: None
        assert client.get("/health").json() is True
        assert proxy.injected == {("GET /health", fault): 1}


# Every fault at every endpoint


def test_a_claim_that_is_carried_out_late_is_not_lost(place: Place, prefect38: Prefect) -> None:
    with scene(place, prefect38) as (played, proxy, behind):
        once = ["done late"]
        proxy.choose = lambda endpoint: once.pop() if endpoint == SET_STATE and once else None
        run = played.run(played.deployment("late"), "late", do="complete", seconds=1)
        worker = played.start(behind)
        (ended,) = played.api.until_final(run, seconds=60)
        assert ended["state_type"] == "COMPLETED"
        assert played.executions() == {run: 1}
        assert proxy.injected == {(SET_STATE, "done late"): 1}
        assert worker.stop() == 0


class Storm:
    """Strikes each endpoint with so many of the faults, in any order, and lets good answers through between."""

    def __init__(self, endpoints: Mapping[str, int], seed: int) -> None:
        self._random = random.Random(seed)
        self._left = {endpoint: self._random.sample([*FAULTS], count) for endpoint, count in endpoints.items()}
        self.seen: set[str] = set()

    def __call__(self, endpoint: str) -> str | None:
        self.seen.add(endpoint)
        left = self._left.get(endpoint)
        return left.pop() if left and self._random.random() < 0.7 else None

    def left(self, *endpoints: str) -> dict[str, list[str]]:
        """The faults that have not struck yet, there or anywhere."""
        return {
            endpoint: left for endpoint, left in self._left.items() if left and endpoint in (endpoints or self._left)
        }


def references(api: Api) -> dict[str, str]:
    """Values of a job's `env` that have to be read from the server."""
    name = f"outage-{uuid4().hex[:8]}"
    api("POST", "/variables/", {"name": name.replace("-", "_"), "value": "a variable"})
    type_id = api("GET", "/block_types/slug/secret")["id"]
    schemas = api("POST", "/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [type_id]}}})
    ids = {"block_type_id": type_id, "block_schema_id": schemas[0]["id"]}
    api("POST", "/block_documents/", {"name": name, "data": {"value": "a block"}, **ids})
    variable = f"{{{{ prefect.variables.{name.replace('-', '_')} }}}}"
    return {"VARIABLE": variable, "BLOCK": f"{{{{ prefect.blocks.secret.{name} }}}}"}


def recreate(api: Api, pool: str) -> None:
    """Take a complete pool away, so that its worker has to make it anew."""
    found = api("POST", "/work_pools/filter", {"work_pools": {"name": {"any_": [pool]}}})
    if found and found[0]["base_job_template"]:
        api("DELETE", f"/work_pools/{pool}")


@pytest.mark.parametrize("version", ["3.8", *(["2.20"] if FULL else [])])
def test_no_fault_at_any_endpoint_ends_the_worker_or_spoils_a_run(
    version: str, place: Place, request: pytest.FixtureRequest
) -> None:
    prefect: Prefect = request.getfixturevalue(f"prefect{version.replace('.', '')}")
    each = (*OF_THE_POOL, *OF_A_RUN, *(OF_NEWER_SERVERS if version == "3.8" else ()))
    endpoints = dict.fromkeys(each, len(FAULTS) if FULL else 13)
    endpoints |= dict.fromkeys(OF_A_NEW_POOL, len(FAULTS) if FULL else 6)  # to make a pool anew takes its time
    storm = Storm(endpoints, SEED)
    with scene(place, prefect) as (played, proxy, behind):
        api = played.api
        deployment = played.deployment("storm", env=references(api))
        real = api.deployment(played.pool, "answer", "real", python=prefect.python, env=played.direct)
        scaled = SCALED + MANY_STARTS
        worker = played.start(behind, "--name", "in the storm", "--python", prefect.python, changes=scaled)
        # Another one, whose pool is taken away again and again.
        other_pool = f"gone {uuid4().hex[:8]}"
        other = played.start(behind, "--name", "homeless", pool=other_pool, changes=scaled)
        eventually(
            lambda: proxy.good(POLL) and "started!" in worker.log and "started!" in other.log, what="two workers"
        )
        memory = worker.resident()
        played.runs |= {f"real {number}": api.flow_run(real, f"real {number}") for number in range(2)}
        proxy.choose = storm
        deadline = time.monotonic() + (900 if FULL else 240)
        while storm.left():
            assert time.monotonic() < deadline, f"{storm.left()}\n{sorted(proxy.injected.items())}"
            assert worker.alive
            assert other.alive
            if storm.left(*OF_A_RUN, *OF_NEWER_SERVERS):
                running = [run for run in api.read_all([*played.runs.values()]) if run["state_type"] not in FINAL]
                for _ in range(10 - len(running)):
                    number = len(played.runs)
                    do = "exit" if number % 2 else "complete"
                    # No shorter than a real engine's: the server takes a claim that comes late over the end of a run.
                    played.run(deployment, f"{do} {number}", do=do, seconds=1)
            if storm.left(*OF_A_NEW_POOL):
                recreate(api, other_pool)
            time.sleep(0.3)
        proxy.choose = lambda endpoint: None
        over = time.monotonic()
        last = played.run(deployment, "complete afterwards", do="complete")
        polled = eventually(lambda: proxy.good(POLL, over), what="a poll")[0].begun - over
        # Whoever polls may just have been told to wait, or be waiting for an answer.
        assert polled < 2 + 1.3 * POLL_SECONDS + SLACK_SECONDS
        api.until_final(last, seconds=60)
        ended = {run["name"]: run for run in api.until_final(*played.runs.values(), seconds=120)}
        for name, run in ended.items():
            history = [(state["type"], state["message"]) for state in api.states(run["id"])]
            expected = "CRASHED" if name.startswith("exit") else "COMPLETED"
            assert run["state_type"] == expected, f"{name}: {history}"
            assert not name.startswith("exit") or "status code 3" in run["state"]["message"], history
        by_engine = {id for name, id in played.runs.items() if not name.startswith("real")}
        assert played.executions() == dict.fromkeys(by_engine, 1)

        assert Counter(endpoint for endpoint, _ in proxy.injected) == endpoints
        assert {*proxy.injected.values()} == {1}
        assert sum(endpoints.values()) >= 200
        assert storm.seen - {*endpoints} <= RARE
        floods = [each.sent for each in proxy.exchanges if each.fault == "100 MB"]
        assert max(floods) < 0.9 * FLOOD  # it hung up
        assert worker.resident() < memory + 150  # MiB
        eventually(lambda: not any((place.path / "state" / "runs").iterdir()), what="no run has a directory")
        assert (worker.stop(), other.stop()) == (0, 0)
        assert "Traceback" not in worker.log + other.log


# Nobody there at all

ON_CUE = f"""
import os, sys, time
sys.path.insert(0, {str(Path(engine.__file__).parent)!r})
import engine

def flow(ask, flow=engine.flow):
    flow(ask)
    while not os.path.exists(os.environ["MARKS"] + "/cue"):
        time.sleep(0.1)

engine.flow = flow
sys.exit(engine.main())
"""
"""The mini engine, whose flows end when the test says so."""
TIMEOUT_SECONDS = 300 if FULL else 12
CALM = {"PREFECT_API_REQUEST_TIMEOUT": "20", "PREFECT_WORKER_HEARTBEAT_SECONDS": "2"}
VERDICTS = {
    "completes": ("COMPLETED", ""),
    "exits": ("CRASHED", "status code 3"),
    "cancelled": ("CANCELLED", ""),
    "timed out": ("CRASHED", "exceeded its timeout"),
    "stopped": ("CRASHED", "The worker 'cut off' was stopped"),
}


@pytest.fixture
def on_cue(place: Place) -> str:
    """The command of flows that end on cue."""
    script = place.path / "on_cue.py"
    script.write_text(ON_CUE)
    return f"{sys.executable} -S -E {script}"


def engines(place: Place) -> list[int]:
    """The flows that go on."""
    return [pid for pid, command in place.processes().items() if "on_cue.py" in command]


def judge(run: dict[str, Any]) -> str:
    """What is wrong with how a run ended."""
    type, text = next(verdict for start, verdict in VERDICTS.items() if run["name"].startswith(start))
    state = run["state"]
    right = state["type"] == type and text in (state["message"] or "")
    return "" if right else f"{run['name']}: {state['type']} {state['message']}"


def test_an_outage_during_ten_runs_costs_no_flow_and_no_report(place: Place, prefect38: Prefect, on_cue: str) -> None:
    with scene(place, prefect38) as (played, proxy, behind):
        api = played.api
        plain = played.deployment("plain", command=on_cue, grace_seconds=OUTAGE_SECONDS + 60)
        timed = played.deployment("timed", command=on_cue, timeout_seconds=TIMEOUT_SECONDS)
        for number in range(3):
            played.run(plain, f"completes {number}", do="complete")
            played.run(plain, f"exits {number}", do="exit")
        before = [played.run(plain, f"cancelled before {number}", do="exit", term="ignore") for number in range(2)]
        during = played.run(plain, "cancelled during it", do="sleep", seconds=36000, term="die")
        worker = played.start(behind, "--name", "cut off", **CALM)
        eventually(lambda: len(played.executions()) == 9, what="nine flows run")
        for run in before:
            api.set_state(run, "CANCELLING")
        eventually(lambda: worker.log.count("Ending flow run") == 2, what="the worker knows of two cancels")
        played.run(timed, "timed out", do="sleep", term="die")
        eventually(lambda: len(played.executions()) == 10, what="all ten flows run")

        proxy.down()
        began = time.monotonic()
        assert len(engines(place)) == 10
        (place.path / "marks" / "cue").touch()
        api.set_state(during, "CANCELLING")
        eventually(lambda: len(engines(place)) == 1, TIMEOUT_SECONDS + 60, "all flows are over but one")
        time.sleep(max(0.0, began + OUTAGE_SECONDS - time.monotonic()))
        final = {run["name"] for run in api.read_all([*played.runs.values()]) if run["state_type"] in FINAL}
        # Completed by their own engines; and after minutes a 3.8 server itself gives up a cancel that nobody confirms.
        assert {name for name in final if "cancelled" not in name} == {f"completes {number}" for number in range(3)}
        assert worker.alive
        assert len(engines(place)) == 1
        proxy.up()

        back = time.monotonic()
        polled = eventually(lambda: proxy.good(POLL, back), what="a poll")[0].begun - back
        assert polled < 1.3 * POLL_SECONDS + SLACK_SECONDS
        ended = api.until_final(*played.runs.values(), seconds=180)
        assert [judge(run) for run in ended] == [""] * 10
        assert played.executions() == dict.fromkeys(played.runs.values(), 1)
        assert worker.stop() == 0
        assert not any((place.path / "state" / "runs").iterdir())
        assert "Traceback" not in worker.log


def test_what_a_worker_cannot_report_before_it_has_to_stop_is_reported_by_the_next(
    place: Place, prefect38: Prefect, on_cue: str
) -> None:
    with scene(place, prefect38) as (played, proxy, behind):
        api = played.api
        plain = played.deployment("plain", command=on_cue)
        for number in range(2):
            played.run(plain, f"exits {number}", do="exit")
        played.run(plain, "completes", do="complete")
        played.run(plain, "stopped", do="sleep", term="die")
        worker = played.start(behind, "--name", "cut off", **CALM)
        eventually(lambda: len(played.executions()) == 4, what="four flows run")

        proxy.down()
        (place.path / "marks" / "cue").touch()
        eventually(lambda: len(engines(place)) == 1, what="all flows are over but one")
        assert worker.stop() == 0
        assert worker.log.count("is kept for the next start") == 4  # it cannot know what the server knows
        assert engines(place) == []
        # The next one begins during the outage, too.
        successor = played.start(behind, "--name", "successor", **CALM)
        eventually(lambda: "Going on with flow run" in successor.log, what="the records are found")
        states = {run["name"]: run["state_type"] for run in api.read_all([*played.runs.values()])}
        unreported = ("exits 0", "exits 1", "stopped")
        assert states == {"completes": "COMPLETED", **dict.fromkeys(unreported, "RUNNING")}
        proxy.up()

        ended = api.until_final(*played.runs.values(), seconds=120)
        assert [judge(run) for run in ended] == [""] * 4
        assert played.executions() == dict.fromkeys(played.runs.values(), 1)
        assert successor.stop() == 0
        assert not any((place.path / "state" / "runs").iterdir())


def test_without_patience_one_page_of_html_ends_a_worker(place: Place, prefect38: Prefect) -> None:
    """The negative control of the others: the faults reach the worker's loops, and would end them."""
    with scene(place, prefect38) as (played, proxy, behind):
        worker = played.start(behind, changes=IMPATIENT, **CALM)
        eventually(lambda: proxy.good(POLL), what="a poll")
        proxy.choose = lambda endpoint: "HTML" if endpoint == POLL else None
        assert worker.process.wait(60) != 0
        assert proxy.injected == {(POLL, "HTML"): 1}
