"""A worker in a program of somebody's own: it changes nothing global, and a cancel at any await leaves nothing."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import locale
import logging
import os
import resource
import selectors
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import pytest
from commands import FAST, TEMPLATE
from misbehave import survivors

from procworker.process import ProcessWorker
from procworker.settings import Settings
from procworker.system.records import read_record
from procworker.testing import Beside, serving

pytestmark = pytest.mark.slow

SAMPLE = int(os.environ.get("PROCWORKER_TEST_SAMPLE", "12"))
"""At how many of its awaits a worker is cancelled; 0 is all of them."""
PR_GET_CHILD_SUBREAPER = 37
SECONDS = 60.0
POOLS = ("AnyIO worker thread", "asyncio_")
"""Threads that a loop keeps for later, and ends itself."""


@pytest.fixture
def server() -> Iterator[Beside]:
    with serving() as server:
        server.add_pool(base_job_template=TEMPLATE)
        yield server


def worker_for(server: Beside) -> ProcessWorker:
    settings = Settings.load({**os.environ, **FAST, "PREFECT_API_URL": server.url})
    return ProcessWorker("pool", settings=settings, name="guest", limit=1, sink=lambda *line: None)


async def one_run(worker: ProcessWorker) -> None:
    """Take what is due and see it out."""
    async with worker:
        await worker.get_and_submit_flow_runs()
        await worker._moved.until(lambda: not worker.runs)


def schedule(server: Beside, seconds: float) -> UUID:
    run: UUID = server.schedule(server.add_deployment(), parameters={"seconds": seconds})
    return run


# What is global


def umask() -> int:
    os.umask(mask := os.umask(0o077))
    return mask


def wakeup_descriptor() -> int:
    signal.set_wakeup_fd(descriptor := signal.set_wakeup_fd(-1))
    return descriptor


def subreaper() -> int:
    value = ctypes.c_int(-1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(value), 0, 0, 0)
    return value.value


def child_watcher() -> object:
    """What tells a loop that a child has ended; since 3.12 that is nobody's choice any more."""
    return None if sys.version_info >= (3, 12) else asyncio.get_child_watcher()


def loggers() -> dict[str, Any]:
    """How each logger is set up; one that nobody has set up is as good as none."""
    known = {"": logging.root, **logging.root.manager.loggerDict}
    found = {
        name: (logger.level, [*logger.handlers], [*logger.filters], logger.propagate, logger.disabled)
        for name, logger in known.items()
        if isinstance(logger, logging.Logger)
    }
    return {name: setup for name, setup in found.items() if setup != (0, [], [], True, False)}


GLOBALS: dict[str, Callable[[], Any]] = {
    "signal handlers": lambda: {number: signal.getsignal(number) for number in signal.valid_signals()},
    "blocked signals": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    "wakeup descriptor": wakeup_descriptor,
    "timers": lambda: [signal.getitimer(which) for which in (signal.ITIMER_REAL, signal.ITIMER_PROF)],
    "environment": lambda: dict(os.environ),
    "working directory": os.getcwd,
    "umask": umask,
    "session and group": lambda: (os.getsid(0), os.getpgrp(), os.nice(0)),
    "limits": lambda: {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT_")},
    "subreaper": subreaper,
    "loggers": loggers,
    "logging": lambda: (
        logging.getLoggerClass(),
        logging.getLogRecordFactory(),
        logging.lastResort,
        logging.root.manager.disable,
    ),
    "child watcher": child_watcher,
    "loop policy": lambda: type(asyncio.get_event_loop_policy()),
    "exception handler": lambda: asyncio.get_running_loop().get_exception_handler(),
    "task factory": lambda: asyncio.get_running_loop().get_task_factory(),
    "hooks": lambda: (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook, sys.breakpointhook),
    "tracing": lambda: (sys.getprofile(), threading.getprofile() if hasattr(threading, "getprofile") else None),
    "warnings": lambda: ([*warnings.filters], warnings.showwarning),
    "streams": lambda: (sys.stdin, sys.stdout, sys.stderr),
    "path and arguments": lambda: ([*sys.path], [*sys.argv], sys.getrecursionlimit()),
    "garbage collector": lambda: (gc.isenabled(), gc.get_threshold()),
    "locale": lambda: locale.setlocale(locale.LC_ALL),
    "tasks": lambda: len(asyncio.all_tasks()),
}


def descriptors() -> Counter[str]:
    """Kinds and numbers of our open files."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the one that listed the directory
            continue
        found[target.partition(":")[0] if target.startswith(("socket:", "pipe:")) else target] += 1
    return found


def threads() -> Counter[str]:
    return Counter(thread.name for thread in threading.enumerate() if not thread.name.startswith(POOLS))


def eventually(fact: Callable[[], Any], expected: Any) -> None:
    """The server, whose thread is one of ours, learns a little later that a connection was closed."""
    deadline = time.monotonic() + SECONDS
    while (found := fact()) != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found == expected


async def test_nothing_global_is_changed_by_a_worker(server: Beside) -> None:
    open_, running = descriptors(), threads()
    schedule(server, 0)
    await one_run(worker_for(server))  # the first makes what Python makes only once
    before = {name: look() for name, look in GLOBALS.items()}

    run = schedule(server, 0.2)
    async with worker_for(server) as worker:
        await worker.get_and_submit_flow_runs()
        while worker.runs:
            during = {name: look() for name, look in GLOBALS.items() if name != "tasks"}
            assert during == {name: before[name] for name in during}
            await anyio.sleep(0.01)

    assert {name: look() for name, look in GLOBALS.items()} == before
    assert server.run(run).state.type == "COMPLETED"
    eventually(descriptors, open_)
    eventually(threads, running)
    nothing_is_left()


async def test_what_is_global_is_really_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The negative control: a guest without manners would be seen."""
    before = {name: look() for name, look in GLOBALS.items()}
    handler, mask = signal.signal(signal.SIGUSR1, lambda *_: None), os.umask(0o123)
    logger = logging.getLogger("procworker")
    logger.addHandler(logging.NullHandler())
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("LEFT", "behind")
        patch.setattr(sys, "excepthook", print)
        after = {name: look() for name, look in GLOBALS.items()}
    logger.handlers.pop()
    os.umask(mask)
    signal.signal(signal.SIGUSR1, handler)

    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"signal handlers", "umask", "loggers", "working directory", "environment", "hooks"}
    assert {name: look() for name, look in GLOBALS.items()} == before


def nothing_is_left() -> None:
    """No process, no record, no directory: the server has heard how the run ended."""
    home = os.environ["PROCWORKER_HOME"]
    assert survivors(f"PROCWORKER_HOME={home}") == {}
    assert [str(path) for path in Path(home).glob("*/*")] == []
    assert [str(path) for path in Path(os.environ["TMPDIR"]).iterdir()] == []


# A cancel at any await


class Turns(selectors.DefaultSelector):
    """Counts the turns of a loop: between two of them every task has got to its next await."""

    def __init__(self, each: Callable[[int], None]) -> None:
        super().__init__()
        self.count, self._each = 0, each

    def select(self, timeout: float | None = None) -> Any:
        self.count += 1
        self._each(self.count)
        return super().select(timeout)


def cancelled_at(turn: int, server: Beside) -> int:
    """Run one flow run, and cancel the worker's scope at this turn of the loop; returns how many turns there were."""
    run = schedule(server, 0.1)
    scopes: list[anyio.CancelScope] = []

    def each(count: int) -> None:
        if count == turn:
            for scope in scopes:
                scope.cancel()

    async def main() -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await one_run(worker_for(server))

    turns = Turns(each)
    loop = asyncio.SelectorEventLoop(turns)
    try:
        loop.run_until_complete(asyncio.wait_for(main(), SECONDS))
        assert not asyncio.all_tasks(loop)
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    history = [state.type for state in server.run(run).states]
    assert history[-1] in ("SCHEDULED", "COMPLETED", "CRASHED"), history
    assert history.count("RUNNING") <= 1
    if history[-1] == "SCHEDULED":  # the next in line shall not find it
        server.delete_run(run)
    return turns.count


def test_a_worker_that_is_cancelled_at_any_await_leaves_no_process_task_thread_or_file(server: Beside) -> None:
    open_, running = descriptors(), threads()
    turns = cancelled_at(0, server)  # untouched
    step = max(1, turns // SAMPLE) if SAMPLE else 1
    for turn in range(1, turns + 1, step):
        cancelled_at(turn, server)
        nothing_is_left()
        eventually(descriptors, open_)
        eventually(threads, running)
    assert turns > 30


def test_only_a_report_that_nobody_takes_stays_on_disk(server: Beside, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel while the server is away: the processes are gone, and the next start has something to report."""
    monkeypatch.setattr("procworker.worker.LAST_REPORT_SECONDS", 0.5)
    run = schedule(server, 600)

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one_run, worker_for(server))
            while server.run(run).state.type != "RUNNING":  # noqa: ASYNC110 - the server is another loop's
                await anyio.sleep(0.02)
            server.down()
            tasks.cancel_scope.cancel()

    anyio.run(main)
    home = Path(os.environ["PROCWORKER_HOME"])
    assert survivors(f"PROCWORKER_HOME={home}") == {}
    assert server.run(run).state.type == "RUNNING"
    (page,) = (home / "runs").iterdir()
    record = read_record(page)
    assert (record["flow_run_id"], record["phase"]) == (str(run), "ended")


def test_a_task_that_does_not_clean_up_would_be_found(server: Beside) -> None:
    """The negative control: a run whose record stays, and a process that stays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("procworker.system.journal.Page.remove", lambda page: None)
        cancelled_at(0, server)
        with pytest.raises(AssertionError):
            nothing_is_left()
