"""A worker that is killed with SIGKILL at any point of a run's line, and what its successor makes of that.

The table OUTCOMES says what is expected at each point; nothing runs twice, and nothing is left behind.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import FAST, ROOT, TEMPLATE, Command, fake_prefect
from doomed import POINTS
from misbehave import survivors

from procworker.system.records import read_record
from procworker.testing import Beside, serving

pytestmark = pytest.mark.slow

REPETITIONS = int(os.environ.get("PROCWORKER_TEST_REPETITIONS", "1"))
DOOMED = Path(__file__).with_name("doomed.py")

COMPLETES = {"do": "complete", "seconds": 1.5}
EXITS = {"do": "exit", "code": 3}
SLEEPS = {"do": "sleep", "term": "ignore"}


class Outcome(NamedTuple):
    """How a run ends whose worker died."""

    flow: dict[str, Any]
    adopted: tuple[str, str]
    """State type and part of its message after the next start, when the dead worker's policy was `adopt`."""
    killed: tuple[str, str]
    """The same where a dead-man's switch ended the run; SCHEDULED means that it was not touched."""
    executions: tuple[int, int] = (1, 1)


DIED = ("CRASHED", "The worker 'doomed' died")
TERMINATED = ("CRASHED", "")
"""By the engine's own word, when it runs already and can give it."""
UNKNOWN = ("CRASHED", "exit status unknown")
CODE_3 = ("CRASHED", "status code 3")
OUTCOMES = {
    "before claim": Outcome(COMPLETES, ("COMPLETED", ""), ("SCHEDULED", ""), (1, 0)),
    "after claim": Outcome(COMPLETES, ("COMPLETED", ""), DIED, (1, 0)),
    "between spawn and journal": Outcome(COMPLETES, ("COMPLETED", ""), TERMINATED, (1, 1)),
    "after spawn": Outcome(COMPLETES, ("COMPLETED", ""), TERMINATED),
    "after pid patch": Outcome(COMPLETES, ("COMPLETED", ""), TERMINATED),
    "running": Outcome(COMPLETES, ("COMPLETED", ""), TERMINATED),
    "during cancel": Outcome(SLEEPS, ("CANCELLED", "cancelled"), ("CANCELLED", "cancelled")),
    "after exit": Outcome(EXITS, UNKNOWN, DIED),
    "before report": Outcome(EXITS, CODE_3, CODE_3),
    "during report": Outcome(EXITS, CODE_3, CODE_3),
}


def eventually(fact: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := fact()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


class Scene:
    """A server, a place, and the workers that die and succeed each other."""

    def __init__(self, place: Path, server: Beside) -> None:
        self.place, self.server = place, server
        self.counted = place / "executions"
        self.home = Path(os.environ["PROCWORKER_HOME"])
        self.path = [str(ROOT), str(DOOMED.parent)]
        self.variables: dict[str, Any] = {"grace_seconds": 1}
        server.add_pool(base_job_template=TEMPLATE)

    def fork(self) -> None:
        """From now on the runs are those of an engine that is forked."""
        template = {**TEMPLATE, "variables": {"properties": {"command": {}, "env": {}, "name": {}}}}
        self.server.add_pool(base_job_template=template)
        self.path.append(str(fake_prefect(self.place / "prefect")))
        self.variables["start_method"] = "fork"

    def schedule(self, flow: dict[str, Any]) -> Any:
        parameters = {**flow, "file": str(self.counted)}
        return self.server.schedule(self.server.add_deployment(job_variables=self.variables), parameters=parameters)

    def die(self, point: str, orphans: str, run: Any) -> None:
        """Have a worker take the run and die at the point."""
        path = os.pathsep.join(self.path)
        environ = {**os.environ, **FAST, "PREFECT_API_URL": self.server.url, "PYTHONPATH": path}
        with (self.place / "doomed.log").open("wb") as log:
            command = [sys.executable, str(DOOMED), point, "pool", orphans]
            worker = subprocess.Popen(command, env=environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            if point in ("running", "during cancel"):
                self.server.wait_state(run, "RUNNING")
            if point == "during cancel":
                self.server.request_cancel(run)
            if point == "running":
                worker.kill()
            assert worker.wait(30) == -signal.SIGKILL, (self.place / "doomed.log").read_text()
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()

    def successor(self) -> Command:
        environ = {"PREFECT_API_URL": self.server.url, "PYTHONPATH": os.pathsep.join(self.path), **FAST}
        return Command(self.place / f"next-{time.monotonic_ns()}", "start", "-p", "pool", **environ)

    @property
    def executions(self) -> int:
        return len(self.counted.read_text().splitlines()) if self.counted.exists() else 0

    @property
    def left(self) -> list[Path]:
        return [path for name in ("runs", "workers") for path in (self.home / name).glob("*")]

    @property
    def work_dirs(self) -> list[Path]:
        return list(Path(os.environ["TMPDIR"]).glob("procworker-*"))


@pytest.fixture
def scene(tmp_path: Path) -> Any:
    with serving() as server:
        yield Scene(tmp_path, server)
    found = survivors(f"PROCWORKER_HOME={os.environ['PROCWORKER_HOME']}")
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    assert not found


def sampled() -> list[Any]:
    """Every point once, or as often as asked for, under both ways to start, in a random but repeatable order."""
    repeated = [(point, method, i) for point in POINTS for method in ("spawn", "fork") for i in range(REPETITIONS)]
    random.Random(7).shuffle(repeated)
    if REPETITIONS == 1:  # of the forks a sample
        forks = [case for case in repeated if case[1] == "fork"]
        repeated = [case for case in repeated if case not in forks[4:]]
    return [pytest.param(point, method, id=f"{point}-{method}-{i}") for point, method, i in repeated]


def test_the_table_is_complete() -> None:
    assert tuple(OUTCOMES) == POINTS


@pytest.mark.parametrize(("point", "method"), sampled())
def test_the_next_start_adopts_what_lives_and_repairs_what_died(scene: Scene, point: str, method: str) -> None:
    outcome = OUTCOMES[point]
    if method == "fork":
        scene.fork()
    run = scene.schedule(outcome.flow)
    scene.die(point, "adopt", run)

    with scene.successor() as worker:
        state = scene.server.wait_state(run, outcome.adopted[0])
        assert outcome.adopted[1] in str(state.message)
        eventually(lambda: not list((scene.home / "runs").glob("*")), "no run directory is left")
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0

    check(scene, run, outcome.adopted[0], outcome.executions[0])


@pytest.mark.parametrize(("point", "method"), sampled())
def test_a_dead_mans_switch_ends_and_reports(scene: Scene, point: str, method: str) -> None:
    outcome = OUTCOMES[point]
    if method == "fork":
        scene.fork()
    flow = {**outcome.flow, "seconds": 30} if outcome.flow is COMPLETES else outcome.flow  # it must not end by itself
    run = scene.schedule(flow)
    scene.die(point, "kill", run)

    state = scene.server.wait_state(run, outcome.killed[0])
    assert outcome.killed[1] in str(state.message)
    eventually(lambda: not survivors(f"PROCWORKER_HOME={scene.home}"), "nothing runs any more")

    check(scene, run, outcome.killed[0], None)
    assert scene.executions <= outcome.executions[1]


def check(scene: Scene, run: Any, final: str, executions: int | None) -> None:
    history = [state.type for state in scene.server.run(run).states]
    assert history.count(final) == 1, history
    assert history[-1] == final, history
    assert executions in (None, scene.executions)
    assert scene.left == []
    assert scene.work_dirs == []


def test_without_a_successor_the_run_would_stay_as_it_was(scene: Scene) -> None:
    """The negative control: what the successor puts right is really wrong."""
    run = scene.schedule(EXITS)
    scene.die("after exit", "adopt", run)

    assert scene.server.run(run).state.type == "RUNNING"
    assert len(list((scene.home / "runs").glob("*"))) == 1


def test_a_newer_attempt_is_not_touched_by_an_old_record(scene: Scene) -> None:
    run = scene.schedule(EXITS)
    scene.die("before report", "adopt", run)
    for type in ("CRASHED", "SCHEDULED", "PENDING", "RUNNING"):
        scene.server.set_state(run, type)

    with scene.successor() as worker:
        eventually(lambda: scene.left == [] or len(scene.left) == 1, "the record is gone")
        eventually(lambda: not list((scene.home / "runs").glob("*")), "the record is gone")
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0

    assert scene.server.run(run).state.type == "RUNNING"


def test_a_successor_of_another_pool_touches_nothing(scene: Scene) -> None:
    run = scene.schedule({"do": "sleep"})
    scene.die("running", "adopt", run)
    scene.server.add_pool("other", base_job_template=TEMPLATE)
    environ = {"PREFECT_API_URL": scene.server.url, **FAST}

    with Command(scene.place / "other", "start", "-p", "other", **environ) as other:
        other.until_it_says("started!")
        other.send(signal.SIGTERM)
        assert other.wait() == 0
    assert scene.server.run(run).state.type == "RUNNING"
    assert len(survivors(str(run))) == 1

    with scene.successor() as worker:
        worker.until_it_says("Going on")
        scene.server.request_cancel(run)
        scene.server.wait_state(run, "CANCELLED")
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0


@pytest.mark.parametrize("secret", [False, True])
def test_the_last_words_of_who_died_unseen_are_shown_unless_they_may_hold_a_secret(scene: Scene, secret: bool) -> None:
    words = "hunter2-was-here" if secret else "so-long"
    if secret:
        scene.variables = {**scene.variables, "env": {"DB_PASSWORD": words}}
    run = scene.schedule({"do": "exit", "code": 3, "print": [words]})
    scene.die("after exit", "adopt", run)

    with scene.successor() as worker:
        scene.server.wait_state(run, "CRASHED")
        eventually(lambda: not list((scene.home / "runs").glob("*")), "the record is gone")
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
    assert (words in worker.err) is not secret


def unshared() -> bool:
    try:
        return subprocess.run(["unshare", "-p", "-f", "--mount-proc", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not unshared(), reason="no pid namespace can be made here")
def test_a_run_that_lives_in_another_container_is_left_alone_until_it_has_ended(scene: Scene) -> None:
    """Its pids are other processes here; that it lives is told by the locks on its output."""
    run = scene.schedule({"do": "sleep"})
    path = os.pathsep.join([str(ROOT), str(DOOMED.parent)])
    environ = {**os.environ, **FAST, "PREFECT_API_URL": scene.server.url, "PYTHONPATH": path}
    inside = '"$0" "$1" "after pid patch" pool adopt & wait; echo dead; read line; exit 0'
    container = subprocess.Popen(
        ["unshare", "-p", "-f", "--mount-proc", "--kill-child", "sh", "-c", inside, sys.executable, str(DOOMED)],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert container.stdout
        while container.stdout.readline() != b"dead\n":
            pass
        scene.server.wait_state(run, "RUNNING")
        with scene.successor() as worker:
            worker.until_it_says("runs in another container")
            time.sleep(0.5)  # long enough for a dozen polls
            assert scene.server.run(run).state.type == "RUNNING"
            assert len(survivors(str(run))) == 1
            worker.send(signal.SIGTERM)
            assert worker.wait() == 0
    finally:
        container.communicate(b"\n", timeout=20)  # with its pid 1 the container ends, and the flow in it
    eventually(lambda: not survivors(str(run)), "the container has ended")

    with scene.successor() as worker:
        state = scene.server.wait_state(run, "CRASHED")
        assert "exit status unknown" in str(state.message)
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
    assert scene.left == []


def test_the_timeout_of_an_adopted_run_counts_from_its_start_and_is_told_as_it_was_given(scene: Scene) -> None:
    scene.variables = {"grace_seconds": 0.2, "timeout_seconds": 3}
    run = scene.schedule({"do": "sleep", "term": "die"})
    scene.die("running", "adopt", run)

    with scene.successor() as worker:
        state = scene.server.wait_state(run, "CRASHED", timeout=30)
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
    assert state.name == "TimedOut"
    assert "timeout of 3 s" in str(state.message)


def test_a_claim_that_is_carried_out_after_its_worker_died_is_not_lost(scene: Scene) -> None:
    """The server had not answered; then the proposal is made again under the same id, which cannot count twice."""
    run = scene.schedule(COMPLETES)
    scene.die("before claim", "adopt", run)
    (page,) = (scene.home / "runs").iterdir()
    claim = read_record(page)["transition_id"]
    late = threading.Timer(1.0, scene.server.set_state, (run, "PENDING"), {"force": False, "transition_id": claim})
    late.start()
    with scene.successor() as worker:
        scene.server.wait_state(run, "COMPLETED", timeout=30)
        eventually(lambda: not list((scene.home / "runs").glob("*")), "no run directory is left")
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
    late.join()
    assert scene.executions == 1
