"""Cancelling a flow run, whatever it is doing and whichever engine runs it: one final state, the hooks of the table.

One worker serves all runs of an engine at once. Engines of Prefect 3.4 and 3.6.27 work on the server of 3.8, as flows
do whose Prefect is older than their server.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest
from harness import FINAL, HERE, Api, Place, Prefect, eventually, start_time, working
from misbehave import survivors

from procworker.process import ProcessWorker

pytestmark = [pytest.mark.real, pytest.mark.long]

BOTH = ("3.8", "2.20")
FULL = bool(os.environ.get("PROCWORKER_TEST_FULL"))
"""Every cell of the table; else, of the engines between the oldest and the newest, the first only."""


def cancel(api: Api, place: Place, run: str) -> None:
    """What the user interface does."""
    assert api.set_state(run, "CANCELLING")["state"]["type"] == "CANCELLING"


def terminate(api: Api, place: Place, run: str) -> None:
    """What anybody can do, and a cancel must not be taken for."""
    os.kill(int(place.marked(run)["engine"].split()[0]), signal.SIGTERM)


@dataclass(frozen=True)
class Doing:
    """What a flow is doing when the end comes."""

    flow: str
    """A function in cancel_flows.py."""
    variables: dict[str, Any] = field(default_factory=dict)
    end: Callable[[Api, Place, str], None] = cancel
    state: str = "CANCELLED Cancelled"


DOING = {
    "sync": Doing("python_loop"),
    "async": Doing("async_sleep"),
    "in C sleep": Doing("c_sleep"),
    "ignoring SIGTERM": Doing("deaf", {"grace_seconds": 2}),
    "finishing at that instant": Doing("finishing"),
    "finishing on SIGTERM": Doing("finishing_on_signal"),
    "still importing": Doing("python_loop", {"env": {"IMPORT_SLOWLY": "1"}}),
    "not cancelled": Doing("c_sleep", end=terminate, state="CRASHED Crashed"),
}

NONE, CANCELLATION, CRASHED = {""}, {"on_cancellation"}, {"on_crashed"}
HOOKS = {
    "3.8": {"sync": CANCELLATION, "async": CANCELLATION, "in C sleep": CANCELLATION, "not cancelled": CRASHED},
    "3.6.27": {"sync": CANCELLATION, "async": CANCELLATION, "in C sleep": CANCELLATION, "not cancelled": NONE},
    # These know no cancel, and SIGTERM ends them before they can say anything.
    "3.4": {"sync": NONE, "async": NONE, "in C sleep": NONE, "not cancelled": NONE},
    "3.0": {"sync": NONE, "async": NONE, "in C sleep": NONE, "not cancelled": NONE},
    # It knows none either, but proposes Crashed, and then the server tells it.
    "2.20": {"sync": CANCELLATION, "async": NONE, "in C sleep": CANCELLATION, "not cancelled": CRASHED},
}
"""Which hooks may run, by the engine's Prefect and by what its flow is doing."""
for row in HOOKS.values():
    row |= {"ignoring SIGTERM": NONE, "still importing": NONE, "finishing on SIGTERM": CANCELLATION}
    # Its Completed is refused in favour of Cancelling. Our SIGTERM may come before that, or on top of it.
    row["finishing at that instant"] = NONE | CANCELLATION | {"on_cancellation on_cancellation"}


@dataclass(frozen=True)
class Ended:
    """What became of a run."""

    finals: list[str]
    """All final states in its history."""
    last: str
    hooks: str
    """Those that ran, in order."""
    gone: bool
    """No process of it was left while the worker still ran."""

    def is_as(self, doing: Doing, hooks: set[str]) -> bool:
        return self.finals == [self.last] == [doing.state] and self.hooks in hooks and self.gone


def play(prefect: Prefect, place: Place, titles: list[str], method: str) -> tuple[dict[str, Ended], str]:
    """Let one worker run all these flows at once, and end each as soon as it is ready; return the worker's log, too."""
    api, ids = prefect.api, {}
    pool = api.pool(f"cancel {uuid4().hex[:8]}", ProcessWorker.get_default_base_job_template())
    for title in titles:
        flow, name = f"{HERE / 'cancel_flows.py'}:{DOING[title].flow}", title.replace(" ", "-")
        variables = {"start_method": method, **DOING[title].variables}
        ids[title] = api.flow_run(api.deployment(pool, flow, name, **variables), name)

    def end(title: str) -> None:
        run, early = ids[title], f"Flow run {title.replace(' ', '-')!r} exited"
        eventually(lambda: "ready" in place.marked(run) or early in worker.log or not worker.alive, what=title)
        DOING[title].end(api, place, run)

    with working(place, api, "--pool", pool, "--python", prefect.python) as worker:
        with ThreadPoolExecutor(len(ids)) as people:
            list(people.map(end, ids))
        eventually(lambda: not any((place.path / "state" / "runs").iterdir()), what="no run has a directory")
        ended = {title: look_at(api, place, run) for title, run in ids.items()}
        assert worker.stop() == 0
        assert place.clear() == {}
        return ended, worker.log


def look_at(api: Api, place: Place, run: str) -> Ended:
    marks = place.marked(run)
    pid, start = marks["engine"].split()
    states = [f"{state['type']} {state['name']}" for state in api.states(run)]
    finals = [state for state in states if state.split()[0] in FINAL]
    gone = start_time(int(pid)) != start and not survivors(f"PROCWORKER_RUN={run}")
    return Ended(finals, states[-1], " ".join(marks.get("hooks", "").split()), gone)


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        (engine, method)
        for engine in HOOKS
        for method in ("spawn", "fork")
        if FULL or method == "spawn" or engine in BOTH
    ],
)
def test_a_run_gets_one_final_state_and_the_hooks_of_the_table(
    engine: str, method: str, place: Place, request: pytest.FixtureRequest
) -> None:
    prefect = request.getfixturevalue(f"prefect{engine.replace('.', '')}")
    everything = FULL or engine in BOTH
    ended, log = play(prefect, place, list(DOING) if everything else list(DOING)[:1], method)
    wrong = {title: end for title, end in ended.items() if not end.is_as(DOING[title], HOOKS[engine][title])}
    assert not wrong, log
    assert "spawned instead of forked" not in log
