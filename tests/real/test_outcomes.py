"""Every way a flow run can end, against real Prefect servers: the state is what Prefect's own worker yields, or better.

One worker serves all runs of a server at once; the table CASES says what becomes of each.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from harness import FINAL, HERE, Api, Place, Prefect, Worker, eventually, start_time, working
from misbehave import survivors

from procworker.process import ProcessWorker

pytestmark = pytest.mark.real

TEXT = "naïve ☃ 日本 \N{PILE OF POO} \"'\\ \n\t{{ x }} << y >> $HOME"
BIG = "0123456789abcdef" * 31_250
"""500,000 characters; a 3.8 server takes at most 512 KiB."""
HUGE = BIG * 2
FLOW_FILES = {
    "broken.py": "import no_such_module",
    "vanishing.py": "import os; os._exit(0)",
    "slow.py": "import flows, time; flows.mark('importing'); time.sleep(600)",
    "wrapper.py": """
import os, runpy, sys
sys.path.insert(0, sys.argv.pop(1))
import flows
flows.mark("first directory", os.getcwd())
runpy.run_module("prefect.engine", run_name="__main__")
""",
}
"""Files that cannot be imported to the end, and a program that runs the engine."""


@dataclass(frozen=True)
class Acting:
    """A run, and what somebody can do to it."""

    api: Api
    place: Place
    worker: Worker
    id: str
    name: str

    def wait_for(self, mark: str) -> str:
        """Wait until the flow leaves this mark; return its text."""
        self.until(lambda: mark in self.place.marked(self.id), f"mark {mark!r}")
        return self.place.marked(self.id)[mark]

    def wait_for_exit(self, code: int) -> None:
        self.until(lambda: f"Flow run {self.name!r} exited with status code {code}" in self.worker.log, "exit")

    def until(self, fact: Callable[[], bool], what: str) -> None:
        eventually(lambda: fact() or not self.worker.alive, what=f"{self.name}: {what}")
        assert self.worker.alive, f"the worker has died before {self.name}: {what}"

    def cancel(self) -> None:
        self.api.set_state(self.id, "CANCELLING")


def cancel_at(mark: str) -> Callable[[Acting], None]:
    def act(run: Acting) -> None:
        run.wait_for(mark)
        run.cancel()

    return act


def kill_engine(run: Acting) -> None:
    run.wait_for("running")
    os.kill(int(run.wait_for("engine").split()[0]), signal.SIGKILL)


def resume(run: Acting) -> None:
    run.wait_for_exit(0)
    assert run.api.read(run.id)["state_name"] == "Suspended"
    run.api("POST", f"/flow_runs/{run.id}/resume", {})


def wait_for_exit(run: Acting) -> None:
    run.wait_for_exit(0)


def cancel_first(api: Api, run: str, deployment: str) -> None:
    assert api.set_state(run, "CANCELLING")["state"]["type"] == "CANCELLED"


def delete_deployment(api: Api, run: str, deployment: str) -> None:
    """Delete it behind the back of a run; its scheduled runs would go with it."""
    api.set_state(run, "PENDING")
    api("DELETE", f"/deployments/{deployment}")
    api.set_state(run, "SCHEDULED")


@dataclass(frozen=True, eq=False)
class Case:
    """One row: a deployment, its run, and the state that the run must end in."""

    title: str
    flow: str
    """A function in flows.py, or in one of FLOW_FILES."""
    state: str
    """Type and name."""
    says: str = ""
    """Part of the state's message."""
    parameters: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    """Job variables of the deployment; in a command, words in capitals are paths."""
    before: Callable[[Api, str, str], None] | None = None
    act: Callable[[Acting], None] | None = None
    servers: tuple[str, ...] = ("3.8",)

    @property
    def name(self) -> str:
        """The name of the deployment and of its run."""
        return self.title.replace(" ", "-")


BOTH = ("3.8", "2.20")
COMPLETED, FAILED, CANCELLED = "COMPLETED Completed", "FAILED Failed", "CANCELLED Cancelled"
CRASHED, TIMED_OUT, PENDING = "CRASHED Crashed", "CRASHED TimedOut", "PENDING Pending"
SILENT = "The flow run process ended without reporting a state."
STATUS_3 = "status code 3. It ended with an unexpected status. Read the last lines of its output."
KILLED = "status code -9. It was ended by SIGKILL"
EMPTY_BLOCK = {"X": "{{ prefect.blocks.secret.no-such-block }}"}
UNSET = {"INHERITED": None, "GIVEN": "given"}

CASES = [
    # The engine reports, and what it reports stands.
    Case("success", "answer", COMPLETED, servers=BOTH),
    Case("failure", "fail", FAILED, "boom", servers=BOTH),
    Case("sys.exit", "leave", CRASHED, "system exit", {"code": 3}),
    Case("error in finally", "fail_in_finally", FAILED, "second"),
    Case("async flow", "answer_async", COMPLETED),
    Case("subflow", "parent_flow", COMPLETED),
    Case("tasks with retries", "tasks", COMPLETED),
    Case("flow with retries", "second_time_lucky", COMPLETED),
    Case("unicode parameter", "echo", COMPLETED, "", {"text": TEXT}),
    Case("big parameter", "measure", COMPLETED, "", {"text": BIG}),
    Case("1 MB parameter", "measure", COMPLETED, "", {"text": HUGE}, servers=("2.20",)),
    Case("wrong parameter", "typed", FAILED, "number", {"number": "many"}),
    Case("SIGTERM to itself", "die", CRASHED, "termination signal", {"number": 15}),
    Case("suspended and resumed", "suspend", COMPLETED, act=resume),
    # The engine cannot report: the message has exit code, meaning and hint. Prefect's has a hint for few codes.
    Case("import error", "broken.py:flow", CRASHED, "status code 1. It ended with a general error. Look for"),
    Case("missing file", "missing.py:flow", CRASHED, "status code 1. It ended with a general error. Look for"),
    Case("os._exit", "vanish", CRASHED, STATUS_3, {"code": 3}, servers=BOTH),
    Case("SIGKILL to itself", "die", CRASHED, KILLED, {"number": 9}),
    Case("SIGSEGV to itself", "die", CRASHED, "status code -11. It was ended by SIGSEGV", {"number": 11}),
    # Prefect leaves these as they are for ever: Pending, or Running.
    Case("exit 0 in the flow", "vanish", CRASHED, SILENT, {"code": 0}, servers=BOTH),
    Case("exit 0 on import", "vanishing.py:flow", CRASHED, SILENT),
    Case("engine killed beside its child", "parent_of_deaf", CRASHED, KILLED, act=kill_engine, servers=BOTH),
    # It cannot be started: the message says what to mend, where Prefect's says "unhandled errors in a TaskGroup".
    Case("missing python", "answer", CRASHED, "'/no/python' does not exist", variables={"python": "/no/python"}),
    Case("missing directory", "answer", CRASHED, "'/no/where' does not exist", variables={"working_dir": "/no/where"}),
    Case("missing command", "answer", CRASHED, "'no-command' was not found", variables={"command": "no-command"}),
    Case("open quote", "answer", CRASHED, "cannot be split", variables={"command": "python 'x"}),
    # The server takes these job variables: the schema knows no bounds, and references are not looked up there.
    Case("bad timeout", "answer", CRASHED, "timeout_seconds: ", variables={"timeout_seconds": -1}),
    Case("missing block", "answer", CRASHED, "no-such-block", variables={"env": EMPTY_BLOCK}),
    # Job variables work; null unsets an inherited variable, which Prefect lets through.
    Case("environment", "look_around", COMPLETED, variables={"env": UNSET}, servers=BOTH),
    Case("engine in a wrapper", "answer", COMPLETED, variables={"command": "PYTHON WRAPPER TESTS"}),
    Case("timeout", "sleep", TIMED_OUT, "timeout of 15 s ", variables={"timeout_seconds": 15}, servers=BOTH),
    Case("early timeout", "slow.py:flow", TIMED_OUT, "timeout of 1 s ", variables={"timeout_seconds": 1}),
    # A configured command may hand the run to somebody else, so its 0 says nothing.
    Case("command true", "answer", PENDING, variables={"command": "true"}, act=wait_for_exit),
    Case("command false", "answer", CRASHED, "status code 1.", variables={"command": "false"}),
    # Cancelled. Prefect's worker leaves the one on import in Cancelling.
    Case("cancel before start", "answer", CANCELLED, before=cancel_first, servers=BOTH),
    Case("deployment deleted", "answer", CANCELLED, "no longer exists", before=delete_deployment, servers=BOTH),
    Case("cancel", "sleep", CANCELLED, "was cancelled", act=cancel_at("running"), servers=BOTH),
    Case("cancel async", "sleep_async", CANCELLED, "was cancelled", act=cancel_at("running")),
    Case("cancel on import", "slow.py:flow", CANCELLED, "was cancelled", act=cancel_at("importing"), servers=BOTH),
    Case(
        "cancel one that ignores SIGTERM, with a child",
        "ignore_term",
        CANCELLED,
        "was cancelled",
        variables={"grace_seconds": 2},
        act=cancel_at("running"),
        servers=BOTH,
    ),
    # What a flow leaves behind does not outlive it, and does not change how it ended. Prefect leaves it running.
    Case("background process", "leave_behind", COMPLETED, servers=BOTH),
]
ROWS = [(version, case) for version in BOTH for case in CASES if version in case.servers]


@dataclass(frozen=True)
class Ended:
    """All that can be known of a run at the end."""

    flow_run: dict[str, Any]
    states: list[dict[str, Any]]
    logs: list[dict[str, Any]]
    marks: dict[str, str]

    @property
    def state(self) -> str:
        return f"{self.states[-1]['type']} {self.states[-1]['name']}"

    @property
    def message(self) -> str:
        return self.states[-1]["message"] or ""

    def __str__(self) -> str:
        """For who reads the report of a failed test."""
        history = [f"{state['type']} {state['name']}: {state['message']}" for state in self.states]
        return "\n".join(["", *history, *(line["message"] for line in self.logs)])


@dataclass
class Outcomes:
    """The ends of all runs on one server, and what they left."""

    place: Place
    api: Api
    pool: dict[str, Any]
    runs: dict[str, Ended] = field(default_factory=dict)
    left_by_runs: dict[int, str] = field(default_factory=dict)
    left_by_worker: dict[int, str] = field(default_factory=dict)
    exit_code: int | None = None
    log: str = ""

    def __getitem__(self, title: str) -> Ended:
        return self.runs[title]

    @property
    def with_engine(self) -> list[Ended]:
        """The runs whose flow file came to life."""
        return [run for run in self.runs.values() if "engine" in run.marks]


def deploy(prefect: Prefect, place: Place, pool: str, case: Case) -> tuple[str, str]:
    """Create the deployment of a case and its run; return the ids."""
    files = place.path / "flows"
    flow = str(files / case.flow) if ".py:" in case.flow else case.flow
    variables = dict(case.variables)
    if "command" in variables:
        paths = {"PYTHON": prefect.python, "WRAPPER": str(files / "wrapper.py"), "TESTS": str(HERE)}
        variables["command"] = " ".join(paths.get(word, word) for word in variables["command"].split(" "))
    deployment = prefect.api.deployment(pool, flow, case.name, **variables)
    return deployment, prefect.api.flow_run(deployment, case.name, **case.parameters)


def play(version: str, prefect: Prefect, place: Place) -> Outcomes:
    """Let one worker run all cases of this server at once, and collect what became of them."""
    api, cases = prefect.api, [case for case in CASES if version in case.servers]
    (place.path / "flows").mkdir()
    for name, text in FLOW_FILES.items():
        (place.path / "flows" / name).write_text(text)
    pool = api.pool(f"outcomes {uuid4().hex[:8]}", ProcessWorker.get_default_base_job_template())
    outcomes, ids = Outcomes(place, api, api("GET", f"/work_pools/{pool}")), {}
    for case in cases:
        deployment, ids[case] = deploy(prefect, place, pool, case)
        if case.before:
            case.before(api, ids[case], deployment)
    options = ("--pool", pool, "--name", "real", "--python", prefect.python)
    with working(place, api, *options, INHERITED="inherited") as worker, ThreadPoolExecutor(len(cases)) as people:
        runs = {case: Acting(api, place, worker, id, case.name) for case, id in ids.items()}
        for act in [people.submit(case.act, runs[case]) for case in cases if case.act]:
            act.result()
        api.until_final(*(ids[case] for case in cases if case.state.split()[0] in FINAL))
        eventually(lambda: not any((place.path / "state" / "runs").iterdir()), what="no run has a directory")
        for id in ids.values():
            outcomes.left_by_runs |= survivors(f"PROCWORKER_RUN={id}")
        outcomes.exit_code = worker.stop()
        outcomes.log = worker.log
        outcomes.left_by_worker = place.clear()
    for case, id in ids.items():
        outcomes.runs[case.title] = Ended(api.read(id), api.states(id), api.logs(id), place.marked(id))
    return outcomes


@pytest.fixture(scope="module")
def outcomes38(prefect38: Prefect, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return play("3.8", prefect38, Place(tmp_path_factory.mktemp("outcomes38")))


@pytest.fixture(scope="module")
def outcomes220(prefect220: Prefect, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return play("2.20", prefect220, Place(tmp_path_factory.mktemp("outcomes220")))


@pytest.fixture
def outcomes(version: str, request: pytest.FixtureRequest) -> Outcomes:
    """What became of all cases on the server of this version."""
    found: Outcomes = request.getfixturevalue(f"outcomes{version.replace('.', '')}")
    return found


each_row = pytest.mark.parametrize(("version", "case"), ROWS, ids=[f"{v}-{case.name}" for v, case in ROWS])
each_server = pytest.mark.parametrize("version", BOTH)


@each_row
def test_a_run_ends_as_the_table_says(outcomes: Outcomes, case: Case) -> None:
    run = outcomes[case.title]
    assert run.state == case.state, str(run)
    assert case.says in run.message, str(run)


@each_server
def test_no_run_is_claimed_twice(outcomes: Outcomes) -> None:
    def claims(run: Ended) -> int:
        return sum(state["type"] == "PENDING" and bool(state["state_details"]["transition_id"]) for state in run.states)

    twice = {title for title, run in outcomes.runs.items() if claims(run) > 1}
    assert twice <= {"suspended and resumed"}


@each_server
def test_no_process_of_any_run_survives(outcomes: Outcomes) -> None:
    marks = [run.marks[name] for run in outcomes.runs.values() for name in ("engine", "child") if name in run.marks]
    assert len(marks) >= 10
    for pid, start in (mark.split() for mark in marks):
        assert start_time(int(pid)) != start
    assert outcomes.left_by_runs == {}
    assert outcomes.left_by_worker == {}


@each_server
def test_nothing_stays_on_disk(outcomes: Outcomes) -> None:
    place = outcomes.place.path
    assert list((place / "state" / "runs").iterdir()) == []
    assert list((place / "tmp").glob("procworker*")) == []
    assert list((place / "cwd").iterdir()) == []


@each_server
def test_the_worker_ends_well_and_never_stumbled(outcomes: Outcomes) -> None:
    assert outcomes.exit_code == 0
    assert "Traceback" not in [line[:9] for line in outcomes.log.splitlines()]


@each_server
def test_the_server_has_the_last_lines_of_what_a_crashed_run_printed(outcomes: Outcomes) -> None:
    titles = {"os._exit", "SIGKILL to itself", "SIGSEGV to itself", "exit 0 in the flow"} & set(outcomes.runs)
    assert titles
    for title in titles:
        assert "last words" in "".join(line["message"] for line in outcomes[title].logs), title


@each_server
def test_the_pid_of_each_engine_is_recorded(outcomes: Outcomes) -> None:
    assert len(outcomes.with_engine) >= 10
    for run in outcomes.with_engine:
        assert run.flow_run["infrastructure_pid"] == run.marks["engine"].split()[0], str(run)


@each_server
def test_null_unsets_an_inherited_variable(outcomes: Outcomes) -> None:
    assert outcomes["success"].marks["inherited"] == "inherited"
    assert outcomes["environment"].marks["inherited"] == "None"
    assert outcomes["environment"].marks["given"] == "given"


@pytest.mark.parametrize("version", ["3.8"])
def test_a_run_starts_in_a_temporary_directory_that_goes_with_it(outcomes: Outcomes) -> None:
    directory = Path(outcomes["engine in a wrapper"].marks["first directory"])
    assert directory.parent == outcomes.place.path / "tmp"
    assert not directory.exists()


@each_server
def test_what_was_left_behind_is_named_in_the_log(outcomes: Outcomes) -> None:
    run = outcomes["background process"]
    assert "Processes left behind by the flow run were ended: 1" in str(run)


@each_server
def test_no_message_blames_the_host_for_a_signal_of_ours(outcomes: Outcomes) -> None:
    for run in outcomes.runs.values():
        if run.state in (CANCELLED, TIMED_OUT):
            assert "If nobody cancelled it" not in run.message
            assert "when memory ran out" not in run.message


@pytest.mark.parametrize("version", ["3.8"])
def test_worker_and_pool_are_recorded_as_labels(outcomes: Outcomes) -> None:
    labels = {
        "prefect.worker.name": "real",
        "prefect.worker.type": "process",
        "prefect.work-pool.name": outcomes.pool["name"],
        "prefect.work-pool.id": outcomes.pool["id"],
    }
    # Best effort beside the line: a busy SQLite server refuses some, and the end of the worker cuts off their retries.
    recorded = [labels.items() <= run.flow_run["labels"].items() for run in outcomes.with_engine]
    assert sum(recorded) > len(recorded) / 2, f"{sum(recorded)} of {len(recorded)}"


@pytest.mark.parametrize("version", ["3.8"])
def test_parameters_arrive_whole(outcomes: Outcomes) -> None:
    assert outcomes["unicode parameter"].marks["text"] == TEXT
    assert_measured(outcomes["big parameter"], BIG)


@pytest.mark.parametrize("version", ["2.20"])
def test_a_parameter_of_1_mb_arrives_whole(outcomes: Outcomes) -> None:
    assert_measured(outcomes["1 MB parameter"], HUGE)


def assert_measured(run: Ended, text: str) -> None:
    assert run.marks["size"] == str(len(text))
    assert run.marks["hash"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("version", ["3.8"])
def test_retries_happen_in_one_process(outcomes: Outcomes) -> None:
    assert outcomes["tasks with retries"].marks["attempts"] == "3"
    assert outcomes["flow with retries"].marks["attempts"] == "2"


@pytest.mark.parametrize("version", ["3.8"])
def test_a_command_that_reports_nothing_is_warned_about(outcomes: Outcomes) -> None:
    assert max(line["level"] for line in outcomes["command true"].logs) >= logging.WARNING


@pytest.mark.parametrize("version", ["2.20"])
def test_2_20_tells_job_variables_as_infra_overrides(outcomes: Outcomes) -> None:
    deployment = outcomes.api("GET", f"/deployments/{outcomes['environment'].flow_run['deployment_id']}")
    assert deployment["infra_overrides"] == {"env": UNSET}
    assert "job_variables" not in deployment
