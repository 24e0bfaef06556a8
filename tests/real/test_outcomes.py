"""Every way a flow run can end, against real Prefect servers: the state is what Prefect's own worker yields, or better.

One worker serves all runs of a server at once; the table CASES says what becomes of each.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from harness import FINAL, Place, Prefect, Worker, eventually, working
from misbehave import survivors

from procworker.process import ProcessWorker

pytestmark = pytest.mark.real

TEXT = "naïve ☃ 日本 \N{PILE OF POO} \"'\\ \n\t{{ x }} << y >> $HOME"
BIG = "0123456789abcdef" * 31_250
"""500,000 characters; a 3.8 server takes at most 512 KiB."""
HUGE = BIG * 2
BOTH = ("3.8", "2.20")
OWN_FLOWS = {
    "broken.py": "import no_such_module",
    "vanishing.py": "import os; os._exit(0)",
    "slow.py": "import flows, time; flows.mark('importing'); time.sleep(600)",
}
"""Flow files that do not survive being imported."""
WRAPPER = """
import os, runpy, sys
sys.path.insert(0, sys.argv.pop(1))
import flows
flows.mark("first cwd", os.getcwd())
runpy.run_module("prefect.engine", run_name="__main__")
"""


@dataclass(frozen=True)
class Acting:
    """A run, and what somebody can do to it."""

    api: Any
    place: Place
    worker: Worker
    id: str
    name: str

    def wait_for(self, mark: str) -> str:
        """Wait until the flow leaves this mark; return its text."""
        eventually(lambda: mark in self.place.marked(self.id), what=f"{self.name}: mark {mark!r}")
        return self.place.marked(self.id)[mark]

    def wait_for_state(self, type: str) -> None:
        eventually(lambda: self.api.read(self.id)["state_type"] == type, what=f"{self.name}: {type}")

    def wait_for_exit(self, code: int) -> None:
        line = f"Flow run {self.name!r} exited with status code {code}"
        eventually(lambda: line in self.worker.log, what=line)

    def cancel(self) -> None:
        self.api.set_state(self.id, "CANCELLING")


def cancel_at(mark: str) -> Callable[[Acting], None]:
    def act(run: Acting) -> None:
        run.wait_for(mark)
        run.cancel()

    return act


def kill_engine(run: Acting) -> None:
    run.wait_for("running")
    pid, _ = run.wait_for("engine").split()
    os.kill(int(pid), signal.SIGKILL)


def resume(run: Acting) -> None:
    run.wait_for_state("PAUSED")
    run.wait_for_exit(0)
    run.api("POST", f"/flow_runs/{run.id}/resume", {})


def wait_for_exit(run: Acting) -> None:
    run.wait_for_exit(0)


@dataclass(frozen=True, eq=False)
class Case:
    """One row: a deployment, its run, and the state that the run must end in."""

    name: str
    flow: str
    """A function in flows.py, or in one of OWN_FLOWS."""
    state: str
    """Type and name."""
    says: str = ""
    """What the state's message says, among other things."""
    parameters: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    """Job variables of the deployment; `PYTHON` in a command is the one that has Prefect."""
    act: Callable[[Acting], None] | None = None
    servers: tuple[str, ...] = ("3.8",)

    @property
    def run_name(self) -> str:
        return self.name.replace(" ", "-")


COMPLETED, FAILED, CANCELLED = "COMPLETED Completed", "FAILED Failed", "CANCELLED Cancelled"
CRASHED, TIMED_OUT = "CRASHED Crashed", "CRASHED TimedOut"
NO_REPORT = "The flow run process ended without reporting a state."
WRAPPED = "PYTHON wrapper.py TESTS"
DEAF = {"grace_seconds": 2}

CASES = [
    # The engine reports, and what it reports stands.
    Case("success", "answer", COMPLETED, servers=BOTH),
    Case("failure", "fail", FAILED, "boom", servers=BOTH),
    Case("sys exit", "leave", CRASHED, "", {"code": 3}),
    Case("error in finally", "fail_in_finally", FAILED, "second"),
    Case("async flow", "answer_async", COMPLETED),
    Case("subflow", "parent_flow", COMPLETED),
    Case("tasks with retries", "tasks", COMPLETED),
    Case("flow with retries", "second_time_lucky", COMPLETED),
    Case("unicode parameter", "echo", COMPLETED, "", {"text": TEXT}),
    Case("big parameter", "measure", COMPLETED, "", {"text": BIG}),
    Case("huge parameter", "measure", COMPLETED, "", {"text": HUGE}, servers=("2.20",)),
    Case("wrong parameter", "typed", FAILED, "", {"number": "many"}),
    Case("import error", "broken.py:flow", FAILED, "no_such_module"),
    Case("missing file", "missing.py:flow", FAILED, "missing.py"),
    Case("SIGTERM to itself", "die", CRASHED, "", {"number": 15}),
    Case("suspended and resumed", "suspend", COMPLETED, act=resume),
    # The engine cannot report any more: exit code, meaning, hint. Prefect knows no hint for most of them.
    Case("os exit", "vanish", CRASHED, "status code 3. It ended with an unexpected status.", {"code": 3}, servers=BOTH),
    Case("SIGKILL to itself", "die", CRASHED, "SIGKILL", {"number": 9}, servers=BOTH),
    Case("SIGSEGV to itself", "die", CRASHED, "SIGSEGV", {"number": 11}),
    # Prefect leaves these Running, or Pending, for ever.
    Case("exit 0 in the flow", "vanish", CRASHED, NO_REPORT, {"code": 0}, servers=BOTH),
    Case("exit 0 on import", "vanishing.py:flow", CRASHED, NO_REPORT),
    Case("killed engine of a living child", "parent_of_deaf", CRASHED, "SIGKILL", act=kill_engine, servers=BOTH),
    # It cannot be started: the message says what to mend.
    Case("missing python", "answer", CRASHED, "'/no/python' does not exist", variables={"python": "/no/python"}),
    Case("missing directory", "answer", CRASHED, "'/no/where' does not exist", variables={"working_dir": "/no/where"}),
    Case("missing command", "answer", CRASHED, "'no-command' was not found", variables={"command": "no-command"}),
    Case("open quote", "answer", CRASHED, "cannot be split", variables={"command": "python 'x"}),
    # The server takes these job variables; its schema knows no bounds, and it does not look up references.
    Case("bad timeout", "answer", CRASHED, "timeout_seconds: ", variables={"timeout_seconds": -1}),
    Case(
        "missing block",
        "answer",
        CRASHED,
        "no-such-block",
        variables={"env": {"X": "{{ prefect.blocks.secret.no-such-block }}"}},
    ),
    # Job variables.
    Case(
        "environment",
        "look_around",
        COMPLETED,
        variables={"env": {"INHERITED": None, "GIVEN": "given"}},
        servers=BOTH,
    ),
    Case("engine by command", "answer", COMPLETED, variables={"command": "PYTHON -m prefect.engine"}),
    Case("engine in a wrapper", "answer", COMPLETED, variables={"command": WRAPPED}, servers=BOTH),
    # A configured command may hand the run to somebody else, so 0 says nothing.
    Case("true", "answer", "PENDING Pending", variables={"command": "true"}, act=wait_for_exit),
    Case("false", "answer", CRASHED, "status code 1.", variables={"command": "false"}),
    Case("timeout", "sleep", TIMED_OUT, "timeout of 15 seconds", variables={"timeout_seconds": 15}, servers=BOTH),
    Case("early timeout", "slow.py:flow", TIMED_OUT, "timeout of 1 second", variables={"timeout_seconds": 1}),
    # Cancelled; nothing but SIGKILL ends some of them.
    Case("cancel", "sleep", CANCELLED, act=cancel_at("running"), servers=BOTH),
    Case("cancel async", "sleep_async", CANCELLED, act=cancel_at("running")),
    Case("cancel on import", "slow.py:flow", CANCELLED, act=cancel_at("importing"), servers=BOTH),
    Case("cancel deaf", "ignore_term", CANCELLED, variables=DEAF, act=cancel_at("running"), servers=BOTH),
    # What a flow leaves behind does not outlive it, and does not harm it.
    Case("background process", "leave_behind", COMPLETED, servers=BOTH),
]


@dataclass(frozen=True)
class Ended:
    """All that can be known of a run at the end."""

    id: str
    flow_run: dict[str, Any]
    states: list[dict[str, Any]]
    logs: list[str]
    marks: dict[str, str]

    def __str__(self) -> str:
        history = [f"{state['type']} {state['name']}: {state['message']}" for state in self.states]
        return "\n".join([*history, *self.logs])


@dataclass
class Outcomes:
    """The ends of all runs on one server, and what they left."""

    place: Place
    pool: dict[str, Any]
    runs: dict[str, Ended] = field(default_factory=dict)
    exit_code: int | None = None
    carrying_cookies: dict[int, str] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)
    log: str = ""


def start_run(prefect: Prefect, place: Place, pool: str, case: Case) -> str:
    api = prefect.api
    flow = f"{place.path / 'flows' / case.flow}" if ".py:" in case.flow else case.flow
    variables = dict(case.variables)
    if "command" in variables:
        here = str(Path(__file__).parent)
        words = {"PYTHON": prefect.python, "wrapper.py": str(place.path / "flows" / "wrapper.py"), "TESTS": here}
        variables["command"] = " ".join(words.get(word, word) for word in variables["command"].split(" "))
    deployment = api.deployment(pool, flow, case.run_name, **variables)
    return api.flow_run(deployment, case.run_name, **case.parameters)


def play(version: str, prefect: Prefect, place: Place) -> Outcomes:
    """Let one worker run all cases of this server's, all at once, and collect what became of them."""
    api, cases = prefect.api, [case for case in CASES if version in case.servers]
    (place.path / "flows").mkdir()
    for name, text in {**OWN_FLOWS, "wrapper.py": WRAPPER}.items():
        (place.path / "flows" / name).write_text(text)
    pool = api.pool(f"outcomes {uuid4().hex[:8]}", ProcessWorker.get_default_base_job_template())
    ids = {case: start_run(prefect, place, pool, case) for case in cases}
    outcomes = Outcomes(place, api("GET", f"/work_pools/{pool}"))
    options = ("--pool", pool, "--name", "real", "--python", prefect.python)
    environment = {"INHERITED": "inherited", "PYTHONPATH": place.environment(api)["PYTHONPATH"]}
    with working(place, api, *options, **environment) as worker, ThreadPoolExecutor(len(cases)) as people:
        runs = {case: Acting(api, place, worker, id, case.run_name) for case, id in ids.items()}
        acts = [people.submit(case.act, runs[case]) for case in cases if case.act]
        for act in acts:
            act.result()
        ending = [ids[case] for case in cases if case.state.split()[0] in FINAL]
        api.until_final(*ending, seconds=240)
        eventually(lambda: not any((place.path / "state" / "runs").iterdir()), what="no run directories")
        outcomes.carrying_cookies = {k: v for id in ids.values() for k, v in survivors(f"PROCWORKER_RUN={id}").items()}
        outcomes.exit_code = worker.stop()
        outcomes.log = worker.log
        outcomes.left = place.clear()
    for case, id in ids.items():
        logs = [line["message"] for line in api.logs(id)]
        outcomes.runs[case.name] = Ended(id, api.read(id), api.states(id), logs, place.marked(id))
    return outcomes
