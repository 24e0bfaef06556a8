"""Run each flow run as one process tree on this host."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import TaskStatus

from procworker.configuration import BaseWorkerResult
from procworker.errors import InfrastructureNotAvailable, InfrastructureNotFound
from procworker.exits import explain_exit
from procworker.outcome import ExitUnknown
from procworker.process_job import ProcessJobConfiguration, ProcessVariables
from procworker.redaction import mask_of, names_of, secrets_by
from procworker.run import CANCEL_GRACE_SECONDS
from procworker.server.models import FlowRun
from procworker.settings import Settings
from procworker.system.child import Child, parse_command, spawn
from procworker.system.control import Control, Session
from procworker.system.deadman import dead_mans_switch
from procworker.system.journal import Journal, Page
from procworker.system.output import Follower, Sink
from procworker.system.printer import print_line
from procworker.system.processes import COOKIE, Process, age, describe, find_root, identify, is_touchable
from procworker.system.tree import Family
from procworker.system.warm import Start, Warm
from procworker.system.watch import Watch
from procworker.worker import BaseWorker

SETTLE_SECONDS, LEFTOVER_GRACE_SECONDS = 0.5, 5.0
"""How long what a flow leaves behind may take to end by itself, and then after SIGTERM."""
TAIL_WIDTH = 2000


class ProcessWorkerResult(BaseWorkerResult):
    """How a flow run process ended; the status code is minus the signal's number when a signal ended it."""


UNSEEN = "The flow run process ended while no worker watched it: exit status unknown."
HEIR_SECONDS = 120.0
"""How long the reports of a worker that died may take; then they wait on disk for the next start."""
LATE_CLAIM_SECONDS = 3.0
ACK_SECONDS = 3.0
"""How long an engine may take to acknowledge an announced cancel; a busy one needs more than Prefect's 1 s."""
WORK_DIR = "procworker-"


@dataclass(frozen=True)
class Live:
    """What is at hand of one running flow run."""

    child: Child
    family: Family
    session: Session


class ProcessWorker(BaseWorker[ProcessJobConfiguration, ProcessVariables, ProcessWorkerResult]):
    """A worker that starts flow runs as processes of its own host."""

    type = "process"
    job_configuration = ProcessJobConfiguration
    job_configuration_variables = ProcessVariables
    extra_variables = frozenset({"python", "start_method", "timeout_seconds", "grace_seconds", "leftovers"})
    kept_fields = frozenset({"stream_output", "timeout_seconds", "grace_seconds", "leftovers"})
    ends_with_run = True

    _description = "Runs each flow run as one process on this host, and leaves nothing behind."
    _display_name = "Process"
    _documentation_url = "https://docs.prefect.io/latest/"

    _journal: Journal

    def __init__(
        self,
        *args: Any,
        python: str | None = None,
        sink: Sink = print_line,
        on_start: Callable[[FlowRun, Family], None] | None = None,
        **options: Any,
    ) -> None:
        """As BaseWorker; `python` runs flows whose job names no other, `sink` takes their output line by line.

        `on_start` is told of the processes of each run that is started.
        """
        settings = options.pop("settings", None) or Settings.load()
        super().__init__(*args, settings=settings, journal=Journal(settings.state_home), **options)
        self._python = python
        self._sink = sink
        self._on_start = on_start
        self._live: dict[str, Live] = {}
        self._control = Control()
        self._warm = Warm(settings.state_home)
        self._output_watch = Watch()

    async def setup(self) -> None:
        async with AsyncExitStack() as stack:
            stack.callback(self._journal.close)
            signature = {key: value for key, value in self._signature().items() if key in ("api", "pool")}
            known = {"name": self.name, "type": self.type, "limit": self.limit, "queues": sorted(self._work_queues)}
            self._journal.introduce(process=identify(os.getpid()), since=time.time(), **signature, **known)
            self._control = await stack.enter_async_context(Control())
            if self._orphans == "kill":
                heir = (self._settings, self._journal.owner, self.name)
                stack.enter_context(dead_mans_switch(__name__, end_runs_of.__name__, heir))
            await stack.enter_async_context(self._warm)
            await stack.enter_async_context(self._output_watch)
            await super().setup()
            stack.push_async_exit(self._stack)
            self._stack = stack.pop_all()

    def _inherited_environment(self, configuration: ProcessJobConfiguration) -> dict[str, str]:
        return configuration._inherit(self._python, self._settings)

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: TaskStatus[Any] | None = None,
    ) -> ProcessWorkerResult:
        """Start the process, follow its output, wait for it and for everything it started.

        Raises SpawnError when it cannot be started.
        """
        ours = not self._journal.has(flow_run.id)
        page = self._journal.page(flow_run.id)
        session = self._control.session()
        env = {k: v for k, v in configuration.env.items() if v is not None}
        secrets = configuration.secrets
        try:
            argv = parse_command(configuration.command or configuration._base_flow_run_command())
            with _working_directory(configuration.working_dir, page) as cwd:
                env |= {**session.environment, COOKIE: page.name}
                start: Start = spawn
                if configuration._is_forkable and configuration._interpreter:
                    start = await self._warm.starter(configuration._interpreter, cwd, env)
                # From the start of the process on somebody must know of it, whatever happens to us.
                with anyio.CancelScope(shield=True):
                    try:
                        child = await start(argv, cwd=cwd, env=env, stdout=page.stdout, stderr=page.stderr)
                        hints = {"secrets": bool(secrets - self._known_secrets), "secret_names": names_of(secrets, env)}
                        del env  # it would be kept as long as the run lives
                    except Exception:
                        # It may have been started all the same: no thread could be had to wait for it.
                        if root := find_root(page.name):
                            await Family(root, page.name).end(0.0)
                        raise
                    known = {**_infrastructure(page), "process": child.identity, **hints}
                    page.write(phase="running", infrastructure=known)
                    live = self._live[str(child.pid)] = Live(child, Family(child.identity, page.name), session)
                if self._on_start is not None:
                    self._on_start(flow_run, live.family)
                return await self._watch(flow_run, configuration, live, page, secrets, task_status)
        finally:
            session.close()
            if ours:
                page.remove()

    async def _reattach(
        self, flow_run: FlowRun, configuration: ProcessJobConfiguration, task_status: TaskStatus[Any]
    ) -> ProcessWorkerResult:
        """Watch and end what a dead worker started; how it exited nobody can know.

        Raises ExitUnknown.
        """
        page = self._journal.page(flow_run.id)
        try:
            known = _infrastructure(page)
            root = Process(*known["process"]) if "process" in known else find_root(page.name)
            if root is None or not page.is_of_this_boot or not is_touchable(root):
                raise ExitUnknown(UNSEEN)
            # Its engine knows no control session but that of the worker that is dead.
            child = Child(root)
            live = self._live[str(root.pid)] = Live(child, Family(root, page.name), Control().session())
            configuration._age = age(root)
            environ, names = child.environment(), known.get("secret_names", [])
            # Who has ended tells nobody what is secret in its output.
            lost = names is None or (not environ and known.get("secrets", True))
            secrets = None if lost else secrets_by(names, environ)
            return await self._watch(flow_run, configuration, live, page, secrets, task_status, resume=True)
        finally:
            _remove_work_dir(page)

    async def _watch(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        live: Live,
        page: Page,
        secrets: frozenset[str] | None,
        task_status: TaskStatus[Any] | None,
        resume: bool = False,
    ) -> ProcessWorkerResult:
        """Follow the output (unless nobody knows its secrets) until the last process has gone; say how it ended."""
        child, family = live.child, live.family
        shown = configuration.stream_output and secrets is not None
        sink = partial(self._print, flow_run.name) if shown else None
        mask = mask_of(self._known_secrets | (secrets or frozenset()))
        follower = Follower(page, sink, resume=resume, watch=self._output_watch, mask=mask)
        try:
            if task_status is not None:
                task_status.started(child.pid)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(follower.follow)
                code = await _exit_of(child, family)
                before = set(family.ended)
                if configuration.leftovers == "kill" or family.is_ending:
                    await family.end(LEFTOVER_GRACE_SECONDS, SETTLE_SECONDS, hurry=False)
                follower.end()
        except BaseException:
            # The worker is being torn down: what it started goes with it. KILL_SECONDS bounds this.
            with anyio.CancelScope(shield=True):
                await family.end(0.0)
                await _exit_of(child, family)  # no zombie is left to a loop that closes next
            raise
        finally:
            del self._live[str(child.pid)]
            family.close()
            self.unkilled += len(family.survivors)
        if left := family.ended - before:
            self.get_flow_run_logger(flow_run).warning(
                "Processes left behind by the flow run were ended: %d", len(left)
            )
        remarks = []
        if family.survivors:
            remarks.append(f"Could not be killed: {', '.join(map(describe, family.survivors))}.")
        tail = [line[:TAIL_WIDTH] for line in follower.tail if secrets is not None]
        if code is None:
            raise ExitUnknown(" ".join([UNSEEN, *remarks]), tail)
        explanation = str(explain_exit(code)) if code else ""
        return ProcessWorkerResult(
            identifier=str(child.pid), status_code=code, explanation=explanation, remarks=remarks, tail=tail
        )

    def _print(self, name: str, stream: str, line: str) -> None:
        # A line end in a name would begin a line that is nobody's: in CI that could be a command.
        self._sink(stream, f"{name if name.isprintable() else ascii(name)[1:-1]} | {line}")

    async def _announce_cancel(self, identifier: str) -> None:
        if live := self._live.get(identifier):
            await live.session.cancel(ACK_SECONDS)

    async def kill_infrastructure(
        self,
        infrastructure_pid: str,
        configuration: ProcessJobConfiguration,
        grace_seconds: float = CANCEL_GRACE_SECONDS,
    ) -> None:
        """End the whole tree of a run that this worker started: SIGTERM, the grace (seconds), SIGKILL.

        Raises InfrastructureNotFound when no such run lives here, InfrastructureNotAvailable for another host's.
        """
        host, _, pid = infrastructure_pid.rpartition(":")
        if host and host != socket.gethostname():
            raise InfrastructureNotAvailable(f"Process {pid} runs on host {host!r}, not on {socket.gethostname()!r}.")
        live = self._live.get(pid)
        if live is None:
            raise InfrastructureNotFound(f"Process {pid} was not started by this worker, or has ended.")
        await live.family.end(grace_seconds)


async def _exit_of(child: Child, family: Family) -> int | None:
    """Wait for the exit of a run's first process; None when it cannot be known, or when the process cannot be ended."""
    with anyio.CancelScope() as waiting:
        family.on_giving_up = waiting.cancel
        return None if family.given_up else await child.wait()
    return None


@contextmanager
def _working_directory(given: Path | None, page: Page) -> Iterator[Path]:
    if given is not None:
        yield Path(os.path.expanduser(given))
        return
    path = Path(tempfile.gettempdir(), f"{WORK_DIR}{page.name}")
    page.data["infrastructure"] = {"work_dir": str(path)}
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        _remove_work_dir(page)


def _remove_work_dir(page: Page) -> None:
    """Remove the temporary directory that a run was given, also what the run made inaccessible in it."""
    path = Path(_infrastructure(page).get("work_dir") or Path(tempfile.gettempdir(), f"{WORK_DIR}{page.name}"))
    if path.name != f"{WORK_DIR}{page.name}":
        return
    with suppress(OSError):  # mostly it is empty
        path.rmdir()
        return
    for place, names, _ in os.walk(path):
        for name in names:
            if not os.path.islink(inner := os.path.join(place, name)):
                with suppress(OSError):
                    os.chmod(inner, 0o700)
    shutil.rmtree(path, ignore_errors=True)


def _infrastructure(page: Page) -> dict[str, Any]:
    found: dict[str, Any] = page.data.get("infrastructure") or {}
    return found


def end_runs_of(heir: tuple[Settings, str, str]) -> None:
    """End and report what a dead worker left: (its settings, its journal's owner, its name)."""
    settings, owner, name = heir
    anyio.run(_end_runs_of, ProcessWorker(None, name=name, settings=settings), owner)


async def _end_runs_of(worker: ProcessWorker, owner: str) -> None:
    with anyio.move_on_after(HEIR_SECONDS):
        while not worker._journal.is_dead(owner):  # noqa: ASYNC110 - the kernel tells nobody
            await anyio.sleep(0.02)
    if not (pages := worker._journal.take_over_from(owner)):
        return
    async with worker:
        deadline = anyio.current_time() + HEIR_SECONDS
        claiming = [page for page in pages if page.data.get("phase") == "claiming"]
        worker._resume([page for page in pages if page not in claiming])
        if claiming:  # the server may be about to carry the claim out
            await anyio.sleep(LATE_CLAIM_SECONDS)
            worker._resume(claiming)
        for run in worker.runs.values():
            run.reporting.deadline = deadline
