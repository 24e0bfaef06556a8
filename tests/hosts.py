"""A host with workers: the fake server, `procworker start` on it as a process, and what it has in hand."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from commands import FAST, TEMPLATE, Command

from procworker.system.census import Census, take_census
from procworker.system.records import read_record
from procworker.testing import Beside, serving

SECRET = "canary-3f9ac1"


def eventually(fact: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := fact()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


class Host:
    """What a test starts here, and how it looks at it."""

    def __init__(self, server: Beside, place: Path) -> None:
        self.server, self.place = server, place
        self.home = Path(os.environ["PROCWORKER_HOME"])
        self.deployment = server.add_deployment(job_variables={"env": {"MY_TOKEN": SECRET}})

    def schedule(self, **flow: Any) -> UUID:
        """A flow run that sleeps, unless the flow says otherwise."""
        id: UUID = self.server.schedule(self.deployment, parameters={"do": "sleep", "seconds": 60, **flow})
        return id

    @contextmanager
    def worker(self, *argv: str) -> Iterator[Command]:
        """A worker named w1; it is stopped at the end, or killed hard when a test has done that."""
        with Command(self.place / "worker", "start", "-p", "pool", "-n", "w1", *argv, **FAST) as worker:
            worker.until_it_says("started!")
            yield worker

    def census(self) -> Census:
        return take_census(self.home)

    def pid_of(self, id: UUID) -> int:
        """Wait until the run is running, by its own word, and return the pid of its engine."""
        self.server.wait_state(id, "RUNNING")

        def found() -> int | None:
            return next((run.pid for run in self.census().runs if run.id == str(id) and run.members), None)

        pid: int = eventually(found, f"{id} runs")
        return pid

    def record_of(self, id: UUID) -> Path:
        return next((self.home / "runs").glob(f"{id}.*"))

    def altered(self, id: UUID, **changes: Any) -> None:
        """Change what stands in a record, as no worker would."""
        page = self.record_of(id)
        (page / "run.json").write_text(json.dumps({**read_record(page), **changes}))


@contextmanager
def hosting(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A server, and an environment that leads there; no CI, where runs would not be kept for the next start."""
    for name in ("CI", "TOX_ENV_DIR"):
        monkeypatch.delenv(name, raising=False)
    with serving() as server:
        server.add_pool(base_job_template=TEMPLATE)
        for name, value in {**FAST, "PREFECT_API_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        yield Host(server, place)
