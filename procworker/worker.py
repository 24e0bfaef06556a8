"""Poll a work pool and walk its flow runs. Subclasses say what running one means."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, nullcontext
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from uuid import UUID, uuid4

import anyio
from anyio.abc import TaskGroup

from procworker.cancels import CancelWatch
from procworker.configuration import C, R, V
from procworker.errors import ConfigurationError, ObjectNotFound, Unreachable, single
from procworker.health import health_server
from procworker.idleness import Idleness
from procworker.infrastructure import Infrastructure
from procworker.intake import IDLE_POLL_SECONDS, Intake
from procworker.logs import RunLogger, run_context
from procworker.loops import Loop, Moved
from procworker.outcome import Reason
from procworker.pool import check_type, fill_empty_template, read_or_create
from procworker.record import Journal, NoJournal, Page
from procworker.redaction import mask_of
from procworker.run import CANCEL_GRACE_SECONDS, Run, resumed
from procworker.server import events
from procworker.server.client import Client
from procworker.server.models import FlowRun, WorkPool
from procworker.server.outbox import Outbox
from procworker.settings import Settings
from procworker.shift import LAST_REPORT_SECONDS, Drain, Shift
from procworker.sources import Sources
from procworker.submission import FlowRunFuture, create_adhoc_run, entrypoint_of
from procworker.vitals import Vitals

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

LAST_WORDS_SECONDS = 5.0


class BaseWorker(Infrastructure[C, V, R], Generic[C, V, R]):
    """Base of all workers: everything between a work pool and `run`.

    A flow run goes poll -> admit -> claim -> configure -> run -> report -> forget; what follows admit is in run.py.
    """

    def __init__(
        self,
        work_pool_name: str | None,
        work_queues: list[str] | None = None,
        name: str | None = None,
        prefetch_seconds: float | None = None,
        create_pool_if_not_found: bool = True,
        limit: int | None = None,
        heartbeat_interval_seconds: float | None = None,
        *,
        base_job_template: dict[str, Any] | None = None,
        settings: Settings | None = None,
        journal: Journal | None = None,
        orphans: Literal["adopt", "kill"] = "adopt",
        drain: Drain | None = None,
        on_end: Callable[[Run], object] | None = None,
    ) -> None:
        """Describe a worker; nothing happens before `start` or `async with`.

        Without a work pool (None) it polls nothing and only runs what `submit` gives it. `orphans` says what shall
        become of its runs when it dies hard, as far as its `journal` tells of them. With `drain` it ends by itself.
        `on_end` is called with every run that is over and reported.
        """
        if name and ("/" in name or "%" in name):
            raise ConfigurationError(f"the worker name {name!r} must not contain '/' or '%'")
        if limit is not None and limit < 1:
            raise ConfigurationError(f"the limit must be at least 1, not {limit}: leave it out for no limit")
        self._settings = settings or Settings.load()
        self._known_secrets = self._settings.secrets()
        self.name = name or f"{type(self).__name__} {uuid4()}"
        self.limit = limit
        self.heartbeat_interval_seconds = heartbeat_interval_seconds or self._settings.worker_heartbeat_seconds
        self.backend_id: UUID | None = None
        self.is_setup = False
        self.runs: dict[UUID, Run] = {}
        self.unkilled = 0
        """How many processes could not be ended."""
        self.outcomes: Counter[str] = Counter()
        """How many runs ended in which final state type; UNKNOWN where that could not be found out."""
        self._work_pool_name = work_pool_name
        self._work_queues = set(work_queues or ())
        self._prefetch_seconds = (
            self._settings.worker_prefetch_seconds if prefetch_seconds is None else prefetch_seconds
        )
        self._create_pool_if_not_found = create_pool_if_not_found
        self._base_job_template = base_job_template
        self._work_pool: WorkPool | None = None
        self._logger = logging.getLogger(f"prefect.workers.{self.type}.{self.name.lower()}")
        self._client: Client | None = None
        self._outbox: Outbox | None = None
        self._tasks: TaskGroup | None = None
        self._stack = AsyncExitStack()
        self._taken, self._sources, self._moved = set[UUID](), Sources(), Moved()
        self._started_event: dict[str, Any] | None = None
        self._journal: Journal = journal or NoJournal()
        self._orphans = orphans
        self._drain, self._on_end = drain, on_end
        self._idleness = Idleness(self._logger, self._journal.tell)
        self._intake = Intake(self.runs, limit, self._settings.worker_query_seconds)
        self._intake.most = drain.most if drain else None
        self._poll_loop = Loop("Polling", self.get_and_submit_flow_runs, self._intake.poll_seconds)
        self._vitals = Vitals(self._poll_loop, lambda: self._work_pool, self._maintenance_ends_at)
        heartbeat = Loop("The heartbeat", self.sync_with_backend, lambda: self.heartbeat_interval_seconds)
        self._cancels = CancelWatch(self.check_for_cancelled_flow_runs, self.runs, self._moved, self._journal)
        self._shift = Shift(self._poll_loop, [heartbeat], self.runs, self._moved)

    def __repr__(self) -> str:
        return f"Worker(pool={self._work_pool_name!r}, name={self.name!r})"

    def get_name_slug(self) -> str:
        """Return the name as events spell it: lower-case ASCII words joined by hyphens."""
        return events.slug(self.name)

    # What there is while it is set up

    @property
    def client(self) -> Client:
        return _present(self._client)

    @property
    def work_pool(self) -> WorkPool:
        return _present(self._work_pool)

    @property
    def limiter(self) -> anyio.CapacityLimiter:
        return _present(self._intake.limiter)

    def get_status(self) -> dict[str, Any]:
        """Return name, work pool and settings as plain data."""
        pool = self._work_pool.model_dump(mode="json") if self._work_pool else None
        return {
            "name": self.name,
            "work_pool": pool,
            "settings": {"prefetch_seconds": self._prefetch_seconds},
        }

    def get_flow_run_logger(self, flow_run: FlowRun) -> RunLogger:
        """Return a logger whose lines also stand in the run's log on the server."""
        pool_id = self._work_pool.id if self._work_pool else None
        worker = {"worker_name": self.name, "work_pool_name": self._work_pool_name, "work_pool_id": pool_id}
        extra = run_context(flow_run.id, flow_run.name, worker_id=self.backend_id, **worker)
        ship = self._outbox.log if self._outbox and self._settings.logging_to_api_enabled else None
        level = logging.getLevelName(self._settings.logging_level)
        return RunLogger(extra, ship, level, mask_of(self._known_secrets))

    def _signature(self) -> dict[str, Any]:
        """What this worker's records have in common."""
        return {
            "api": self._settings.api_identity,
            "pool": self._work_pool_name,
            "worker": self.name,
            "orphans": self._orphans,
        }

    # Life

    async def __aenter__(self) -> Self:
        await self.setup()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        try:
            await self.teardown(*exc_info)
        except BaseException as error:
            # Task groups wrap even a single exception; who uses the worker expects the one that was raised.
            if (inner := single(error)) is error:
                raise
            raise inner from inner.__cause__

    async def setup(self) -> None:
        """Open the client and make the first sync. A server that is away is no error; what a person must mend is."""
        if not self._settings.api_url:
            raise ConfigurationError(
                "PREFECT_API_URL is not set: name your server's API, for example http://127.0.0.1:4200/api"
            )
        async with AsyncExitStack() as stack:
            stack.callback(self._let_go)
            headers = {"X-Prefect-Worker-Name": self.name.strip(" \t")} if self.name.isascii() else {}
            self._client = await stack.enter_async_context(Client(self._settings, headers=headers))
            try:
                await self.sync_with_backend()
            except Unreachable as error:
                self._logger.warning("The Prefect API does not answer yet, trying on: %s", error)
            self._outbox = await stack.enter_async_context(Outbox(self._client, self._settings))
            self._intake.limiter = None if self.limit is None else anyio.CapacityLimiter(self.limit)
            self._tasks = await stack.enter_async_context(anyio.create_task_group())
            self._stack = stack.pop_all()
        self.is_setup = True

    def _let_go(self) -> None:
        self._client = self._outbox = self._tasks = self._intake.limiter = None

    async def teardown(self, *exc_info: Any) -> None:
        """Wait for what still runs (end it, when an exception is passed) and close everything."""
        self.is_setup = False
        exc_info = exc_info or (None, None, None)
        try:
            if exc_info[0] is None:
                await self._moved.until(lambda: not self.runs)
                # What tells the server of pids and labels may still be trying.
                _present(self._tasks).cancel_scope.deadline = anyio.current_time() + LAST_WORDS_SECONDS
        except BaseException:
            exc_info = sys.exc_info()
            raise
        finally:
            for run in self.runs.values():
                run.reporting.deadline = min(run.reporting.deadline, anyio.current_time() + LAST_REPORT_SECONDS)
            if self._started_event:
                self._emit("prefect.worker.stopped", follows=self._started_event)
            await self._stack.__aexit__(*exc_info)

    async def start(
        self, run_once: bool = False, with_healthcheck: bool = False, printer: Callable[..., None] = print
    ) -> None:
        """Work until `stop` is called, or with run_once take what is due now and finish it; if open, it stays open."""
        async with AsyncExitStack() as stack:
            if with_healthcheck:
                interval = self._settings.worker_query_seconds or IDLE_POLL_SECONDS
                checks = self._vitals.checks(lambda: self.is_worker_still_polling(interval))
                host, port = self._settings.worker_webserver_host, self._settings.worker_webserver_port
                port = await stack.enter_async_context(health_server(host, port, checks))
                printer(f"Health server: http://{host}:{port}/health")
            await stack.enter_async_context(nullcontext() if self.is_setup else self)
            self._started_event = self._emit("prefect.worker.started")
            self._journal.tell({})
            printer(f"Worker {self.name!r} started!")
            self._resume(self._journal.take_over(str(self._settings.api_identity), self._work_pool_name))
            if (run_once or self._drain) and self._work_pool is None:
                await self.sync_with_backend()
            if self._drain:
                await self._shift.drain(self.get_and_submit_flow_runs, self._intake, self._drain)
            elif run_once:
                await self._shift.once(self._take_some, self._took_enough)
            else:
                await self._shift.work()
        printer(f"Worker {self.name!r} stopped!")

    def stop(self) -> None:
        """Take no more runs, let running ones finish for 10 s; called again, end them; again, kill them."""
        self._shift.stop()

    async def _take_some(self) -> None:
        self._taken |= {flow_run.id for flow_run in await self.get_and_submit_flow_runs()}

    def _took_enough(self) -> bool:
        return not self._intake.more_due or (self.limit is not None and len(self._taken) >= self.limit)

    # Sync and health

    async def sync_with_backend(self) -> None:
        """Read the work pool (create it where that is allowed) and send a heartbeat."""
        if self._client is None or self._work_pool_name is None:
            return
        client, name, create = self._client, self._work_pool_name, self._create_pool_if_not_found
        pool = await read_or_create(client, name, self.type, self._base_job_template, create, self._logger)
        if pool is None:
            return
        check_type(pool, self._work_pool, self.type, self._logger)
        pool = await fill_empty_template(client, pool, self.get_default_base_job_template)
        self._work_pool = pool
        interval, wants_id = self.heartbeat_interval_seconds, self.backend_id is None
        worker_id = await client.send_worker_heartbeat(pool.name, self.name, interval, wants_id, retries=0)
        self.backend_id = worker_id or self.backend_id
        await self._idleness.look(client, pool, self._work_queues, bool(self.runs))

    def is_worker_still_polling(self, query_interval_seconds: float) -> bool:
        """Was the last poll at most 30 intervals (seconds) ago? The server's announced maintenance does not count."""
        if not (polls := self._vitals.is_polling(query_interval_seconds)):
            self._logger.error("The worker has not polled for more than 30 times %g s", query_interval_seconds)
        return polls

    def _maintenance_ends_at(self) -> float | None:
        return self._client.http.maintenance_ends_at if self._client else None

    # Poll and admit

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Poll, unless the last answer shows more; start due flow runs while there is room; return what is starting."""
        client, intake = self.client, self._intake
        self._vitals.polls()
        if self._work_pool_name is None or self._work_pool is None:
            return []  # not synced yet
        if intake.room():
            if not intake.knows_more:
                began, refusal = anyio.current_time(), None
                try:
                    await intake.poll(client, self._work_pool_name, self._work_queues, self._prefetch_seconds)
                except ObjectNotFound as error:
                    refusal = f"the pool or a queue does not exist: {error}"
                self._idleness.polled(anyio.current_time() - began, client.http.clock_offset, refusal)
            self._sources = self._sources.renewed()
            for flow_run in intake.choose():
                logger = self.get_flow_run_logger(flow_run)
                self._admit(Run(self, flow_run, logger, self._sources, intake.answered_at))
        self._idleness.filled(self.limit, len(self.runs), intake.more_due)
        return [run.flow_run for run in self.runs.values() if run.starting]

    def _resume(self, pages: Sequence[Page]) -> None:
        """Go on with what dead workers left, each run as its own worker wanted it."""
        for run in resumed(self, pages, self.get_flow_run_logger, self._logger):
            self._admit(run)

    async def submit(
        self, flow: Any, parameters: dict[str, Any] | None = None, job_variables: dict[str, Any] | None = None
    ) -> FlowRunFuture:
        """Run a Prefect flow object or an entrypoint ("file.py:flow") now; return its future.

        Raises ConfigurationError for a flow without a file and for parameters that are not JSON.
        """
        entrypoint, transition_id = entrypoint_of(flow), uuid4()
        flow_run = await create_adhoc_run(
            self.client, flow, entrypoint, parameters, job_variables, transition_id, self._work_pool_name
        )
        return await self.execute(flow_run, transition_id)

    async def execute(self, flow_run: FlowRun, transition_id: UUID | None = None) -> FlowRunFuture:
        """Run an existing flow run now: one created in PENDING under transition_id, or a scheduled one to claim."""
        if flow_run.id in self.runs:
            raise ConfigurationError(f"flow run {flow_run.name!r} runs on this worker already")
        run = Run(self, flow_run, self.get_flow_run_logger(flow_run), Sources(), anyio.current_time(), transition_id)
        run.future = FlowRunFuture(flow_run)
        self._admit(run)
        return run.future

    def _admit(self, run: Run) -> None:
        self.runs[run.id] = run
        self._intake.active_at = anyio.current_time()
        self._in_background(self._walk, run)
        if not self._cancels.watching:
            self._cancels.watching = True
            self._in_background(self._cancels.watch)

    async def _walk(self, run: Run) -> None:
        """See one run through, holding its place under the limit."""
        try:
            async with self._intake.place(run):
                await run.walk()
        finally:
            del self.runs[run.id]
            if run.claim.held:
                self.outcomes[run.final_state.type if run.final_state else "UNKNOWN"] += 1
                self._intake.ended += 1
                if self._on_end:
                    self._on_end(run)
            else:
                self._intake.lose(run)
            if run.future is not None:
                run.future.finish(run.final_state)
            self._intake.active_at = anyio.current_time()
            self._run_moved()

    def _run_moved(self) -> None:
        """A run has started or ended: there may be room for the next."""
        if self._intake.more_due:
            self._poll_loop.wake()
        self._moved.notify()

    def _in_background(self, work: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        _present(self._tasks).start_soon(work, *args)

    # Cancel

    async def check_for_cancelled_flow_runs(self) -> None:
        """Ask once about all runs at hand, and end those that somebody wants cancelled."""
        ids = [run.id for run in self.runs.values() if run.claim.held and not run.ending]
        if ids:
            for flow_run in await self.client.read_flow_runs_by_state(ids, ["CANCELLING", "CANCELLED"], retries=0):
                self._in_background(self.cancel_run, flow_run)

    async def cancel_run(self, flow_run: FlowRun) -> None:
        """End the processes of a run at hand; its own line then reports it as Cancelled."""
        run = self.runs.get(flow_run.id)
        if run is None:
            self._logger.info("Flow run %r does not run on this worker", flow_run.name)
        else:
            await run.stop(Reason.CANCELLED)

    def cancel_all(self, grace: float | None = None) -> None:
        """Cancel every run at hand on our own account; asked again, the grace (seconds) can only get shorter.

        Their reports are given up LAST_REPORT_SECONDS after the grace: a server that is away cannot hold us.
        """
        for run in self.runs.values():
            latest = anyio.current_time() + (CANCEL_GRACE_SECONDS if grace is None else grace) + LAST_REPORT_SECONDS
            run.reporting.deadline = min(run.reporting.deadline, latest)
            self._in_background(run.cancel, grace)

    # Events

    def _emit(
        self, event: str, run: Run | None = None, follows: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """Send an event beside the line; returned so that another can follow it."""
        if self._outbox is None:
            return None
        related = events.related_to(run, self._work_pool)
        made = events.event(event, events.worker_resource(self.type, self.name), related, follows)
        self._outbox.event(made)
        return made


def _present(thing: T | None) -> T:
    if thing is None:
        raise RuntimeError(
            "The worker is not correctly initialized: use it within `async with`, and give it what you ask for"
        )
    return thing
