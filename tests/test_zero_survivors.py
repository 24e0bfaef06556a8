"""Whatever a flow started is gone when its run is over: every way to hide, and every way to end.

All misbehaviours run at once under one real `procworker start`; then all are ended in one way.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import misbehave
import pytest
from commands import FAST, Command, fake_prefect

from procworker.system.processes import Process, identify, is_alive, send
from procworker.testing import Beside, serving

SCRIPT = misbehave.__file__
MODES = {
    "ignore-term": 0,
    "sh-wait": 2,
    "setsid": 1,
    "daemon": 1,
    "pool": 3,
    "close-stdout": 0,
    "keep-stdout": 1,
    "forker": 20,
    "stop-itself": 0,
    "zombie-maker": 1,
    "change-group": 2,
    "daemon-clean": 1,
}
"""What a flow starts, and how many descendants of it are named before it is ready or soon after."""

UNCOVERED = {"killed": {"daemon-clean"}}
"""With the worker, its subreaper is killed: nobody can find a daemon without any mark then (the README says so)."""

GRACE, TIMEOUT = 0.5, 8.0
PATIENCE = GRACE + 2 if os.environ.get("PROCWORKER_TEST_FULL") else 30.0
"""Seconds until nothing may be left; in `--full` what is promised, else what a busy machine may need."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")]


def eventually(fact: Callable[[], Any], what: str | Callable[[], str], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := fact()):
        said = what if isinstance(what, str) else what()
        assert time.monotonic() < deadline, f"not within {seconds} s: {said}"
        time.sleep(0.02)
    return found


class Scene:
    """A worker with one run of every mode, and all processes that these named."""

    def __init__(self, place: Path, server: Beside, command: str, ending: str) -> None:
        self.place, self.server, self.ending = place, server, ending
        self.custom, self.forked = command == "custom", command == "forked"
        self.ready: set[str] = set()
        self.seen: dict[Process, str] = {}
        # As a command of one's own this mode ends at once: it belongs to the normal ends alone.
        self.modes = {
            mode: n for mode, n in MODES.items() if not (self.custom and ending != "exit" and mode == "keep-stdout")
        }
        self._read = 0
        server.add_pool(
            base_job_template={
                "job_configuration": {"command": "{{ command }}"},
                "variables": {"properties": {"command": {"type": "string"}}},
            }
        )
        self.runs = {mode: self._schedule(mode) for mode in self.modes}
        orphans = "kill" if ending == "killed" else "adopt"
        environ = {"PYTHONPATH": str(fake_prefect(place / "prefect")), "PREFECT_API_URL": server.url, **FAST}
        self.worker = Command(place / "worker", "start", "-p", "pool", "--orphans", orphans, **environ)

    def _schedule(self, mode: str) -> UUID:
        variables: dict[str, Any] = {"grace_seconds": GRACE}
        if self.ending == "timeout":
            variables["timeout_seconds"] = TIMEOUT
        leaving = self.ending == "exit"
        if self.forked:
            variables["start_method"] = "fork"
        if self.custom:
            words = ["leave", mode] if leaving else [mode]
            variables["command"] = " ".join([sys.executable, "-S", "-E", SCRIPT, *words])
        term = "ignore" if mode == "ignore-term" else "crash"
        ask = {"do": "complete" if leaving else "sleep", "seconds": 2 if leaving else 600, "term": term}
        parameters = {**ask, "misbehave": [mode]}
        deployment = self.server.add_deployment(job_variables=variables)
        return UUID(str(self.server.schedule(deployment, parameters=parameters, name=mode)))

    def look(self) -> None:
        """Read what the runs said since the last look, and learn the identity of those they named."""
        text = self.worker.out[self._read :]
        text = text[: text.rfind("\n") + 1]
        self._read += len(text)
        for mode, word, pid in re.findall(r"^(\S+) \| (READY|CHILD) (\d+)", text, re.MULTILINE):
            if word == "READY":
                self.ready.add(mode)
            if found := identify(int(pid)):
                self.seen[found] = mode

    def begin(self) -> None:
        """Wait until everything misbehaves."""

        def all_ready() -> bool:
            self.look()
            named = [list(self.seen.values()).count(mode) >= min(count, 1) for mode, count in self.modes.items()]
            return self.ready == set(self.modes) and all(named)

        eventually(all_ready, lambda: f"ready: {self.ready}\n{self.worker.out}\n{self.worker.err}")

    @property
    def alive(self) -> dict[str, list[Process]]:
        found: dict[str, list[Process]] = {}
        for process, mode in self.seen.items():
            if is_alive(process):
                found.setdefault(mode, []).append(process)
        return found

    @property
    def marked(self) -> dict[int, str]:
        """What carries the mark of one of the runs."""
        return {
            pid: what
            for run in self.runs.values()
            for pid, what in misbehave.survivors(f"PROCWORKER_RUN={run}").items()
        }

    def types(self) -> set[str]:
        return {self.server.run(run).state.type for run in self.runs.values()}

    def clean_up(self) -> None:
        for process in self.seen:
            send(process, signal.SIGKILL)
        for pid in self.marked:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def scene(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    command, ending = request.param
    with serving() as server:
        scene = Scene(tmp_path, server, command, ending)
        try:
            with scene.worker:
                yield scene
        finally:
            scene.clean_up()


ENDINGS = ["cancel", "timeout", "exit", "stopped twice", "killed"]
COMMANDS = ["default", "custom", "forked"]
SCENES = [pytest.param((command, ending), id=f"{ending}-{command}") for ending in ENDINGS for command in COMMANDS]


@pytest.mark.parametrize("scene", SCENES, indirect=True)
def test_nothing_is_left(scene: Scene, record_property: Callable[[str, object], None]) -> None:
    if scene.ending in ("cancel", "stopped twice", "killed"):
        scene.begin()
        assert set(scene.alive) == set(scene.modes), "the negative control: before the end all are there"
        assert len(misbehave.survivors("PROCWORKER_WARM=1")) >= len(scene.modes) * scene.forked
    final = {
        "cancel": {"CANCELLED"},
        "timeout": {"CRASHED"},
        # A command of one's own that exits with 0 may have handed the work elsewhere: its run is left Pending.
        "exit": {"COMPLETED"} if not scene.custom else {"PENDING"},
        "stopped twice": {"CRASHED"},
        "killed": {"CRASHED"},
    }[scene.ending]
    began = time.monotonic()
    if scene.ending == "cancel":
        for run in scene.runs.values():
            scene.server.request_cancel(run)
        eventually(lambda: "Ending flow run" in scene.worker.err, "the worker has seen it")
        began = time.monotonic()
    elif scene.ending == "stopped twice":
        scene.worker.send(signal.SIGTERM)
        time.sleep(1.1)  # signals within a second count once
        began = time.monotonic()
        scene.worker.send(signal.SIGTERM)
    elif scene.ending == "killed":
        scene.worker.process.kill()
    else:
        pages = Path(os.environ["PROCWORKER_HOME"]) / "runs"
        eventually(lambda: scene.look() or len(scene.ready) == len(scene.modes), "all have been ready")
        eventually(lambda: scene.look() or not list(pages.glob("*")), "all runs are over")
        began = time.monotonic()

    spared = UNCOVERED.get(scene.ending, set())
    # Who ends a run that nobody cancelled gives it 10 s, whatever its own grace is.
    patience = PATIENCE + 10 if scene.ending in ("stopped twice", "killed") else PATIENCE
    eventually(
        lambda: scene.look() or (set(scene.alive) <= spared and not scene.marked),
        lambda: f"left: {scene.alive} {scene.marked}",
        patience,
    )
    record_property("seconds", round(time.monotonic() - began, 2))
    assert set(scene.alive) == spared
    eventually(lambda: scene.types() == final, f"final states are {final}, not {scene.types()}")
    assert "spawned instead of forked" not in scene.worker.err
