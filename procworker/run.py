"""One flow run on this worker, from poll to report."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar
from uuid import UUID, uuid4

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup, TaskStatus
from pydantic import ValidationError

from procworker.configuration import (
    BaseJobConfiguration,
    BaseWorkerResult,
    merge_job_variables,
    with_extra_variables,
)
from procworker.errors import (
    ApiError,
    InfrastructureNotFound,
    ObjectNotFound,
    ProcworkerError,
    Unreachable,
    single,
)
from procworker.logs import RunLogger
from procworker.loops import patiently
from procworker.outcome import DeploymentGone, Facts, Reason, carries_id, decide, latest_attempt, one_line, owns
from procworker.server.client import Client
from procworker.server.models import Deployment, Flow, FlowRun, State, WorkPool, new_state
from procworker.submission import FlowRunFuture

T = TypeVar("T")

CLAIM_SECONDS = 2.0
"""Age up to which a poll answer is good for a claim: servers accept a stale one (contract 0)."""
CANCEL_GRACE_SECONDS, ASK_SECONDS = 30.0, 2.0


class Sources:
    """What the runs of one poll belong to, read once each."""

    def __init__(self) -> None:
        self._locks: defaultdict[UUID, anyio.Lock] = defaultdict(anyio.Lock)
        self._found: dict[UUID, Any] = {}

    async def read(self, id: UUID | None, read: Callable[[UUID], Awaitable[T]]) -> T | None:
        if id is None:
            return None
        async with self._locks[id]:
            if id not in self._found:
                self._found[id] = await patiently(partial(read, id))
            found: T = self._found[id]
            return found


class Host(Protocol):
    """What a run asks of the worker that walks it."""

    name: str
    type: str
    backend_id: UUID | None
    job_configuration: Any
    extra_variables: ClassVar[frozenset[str]]
    ends_with_run: ClassVar[bool]
    _work_pool: WorkPool | None
    _base_job_template: dict[str, Any] | None

    @property
    def client(self) -> Client: ...
    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]: ...
    def _inherited_environment(self, configuration: Any) -> dict[str, str]: ...
    async def run(self, flow_run: FlowRun, configuration: Any, task_status: TaskStatus[Any] | None = None) -> Any: ...
    async def kill_infrastructure(self, infrastructure_pid: str, configuration: Any, grace_seconds: float) -> None: ...
    def _in_background(self, work: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None: ...
    def _run_moved(self) -> None: ...
    def _emit(self, event: str, run: Any, follows: Mapping[str, Any] | None = None) -> dict[str, Any] | None: ...


class Started(TaskStatus[Any]):
    """The `task_status` that a worker's `run` reports its identifier to; any value is taken, once."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take: Callable[[str], None] | None = take

    def started(self, value: Any = None) -> None:
        take, self._take = self._take, None
        if take is not None and value is not None:
            take(str(value))


class Run:
    """One flow run. The task that walks it owns it; to end it, others write down a reason and end its processes."""

    def __init__(self, host: Host, flow_run: FlowRun, log: RunLogger, sources: Sources, answered_at: float) -> None:
        self.flow_run = flow_run
        self.id = flow_run.id
        self.log = log
        self.answered_at = answered_at
        self.transition_id = uuid4()
        self.claimed = False
        self.deployment: Deployment | None = None
        self.flow: Flow | None = None
        self.configuration: BaseJobConfiguration | None = None
        self.identifier: str | None = None
        self.reason: Reason | None = None
        self.reason_text = ""
        self.result: BaseWorkerResult | None = None
        self.error: BaseException | None = None
        self.final_state: State | None = None
        self.future: FlowRunFuture | None = None
        self.reporting = anyio.CancelScope(shield=True)
        self.refusal: str | None = None
        self.ending = False
        self._preparing = anyio.CancelScope()
        self._running = anyio.CancelScope()
        self._entered = False
        self._named = anyio.Event()
        self._configured_command = False
        self._host = host
        self._sources = sources

    @property
    def starting(self) -> bool:
        """Is it still being prepared, so that its start is to come?"""
        return not self._entered and self.error is None

    @property
    def stopped_text(self) -> str:
        return f"The worker {self._host.name!r} was stopped, and the flow run with it."

    async def walk(self) -> None:
        """Claim, configure, run, report; whatever goes wrong in a run stays in it."""
        try:
            with self._preparing:
                if not self.claimed:
                    await self._claim()
                if self.claimed:
                    await self._configure()
            if self.configuration is not None:
                await self._execute()
        except Exception as caught:
            self.error = error = single(caught)
            known = isinstance(error, ProcworkerError | ValidationError)
            text = one_line(error)
            self.log.error("Flow run %r failed: %s", self.flow_run.name, text, exc_info=None if known else error)
        finally:
            self._named.set()
            if self.claimed:
                await self._report()

    async def _claim(self) -> None:
        """Take the run by an accepted PENDING of our own; never from an old answer, never over a newer outcome."""
        client, name = self._host.client, self.flow_run.name
        deadline = self.answered_at + CLAIM_SECONDS
        if anyio.current_time() > deadline:
            return
        pending = new_state("PENDING", transition_id=self.transition_id)
        try:
            answer = await client.set_flow_run_state(self.id, pending, deadline=deadline)
        except Unreachable as error:
            self.log.warning("The claim of flow run %r got no answer: %s", name, error)
            # It may have been applied all the same: the history tells.
        except ApiError as error:
            self.log.warning("Flow run %r could not be claimed: %s", name, error)
            self.refusal = str(error)
            return
        else:
            # A REJECT that shows our own transition id answers a repeated request.
            own = answer.state is not None and carries_id(answer.state, self.transition_id)
            if not own or answer.state is None or answer.state.type != "PENDING":
                self.log.info("Flow run %r is not ours to run: %s", name, answer.details.get("reason", answer.status))
                self.refusal = str(answer.details.get("reason") or answer.status)
                await self._cancel_without_deployment()
                return
        self.claimed = True
        self.claimed = await self._holds_claim()

    async def _holds_claim(self) -> bool:
        """Look back whether our PENDING took what was scheduled, and nobody else's did.

        Servers accept a claim over the end of another attempt (contract 0), and SQLite ones two claims at once. They
        stamp a state before they wait for their database: only what stands now tells who came last.
        """
        client = self._host.client
        attempt = latest_attempt(await patiently(partial(client.read_flow_run_states, self.id)))
        others = [state for state in attempt if not carries_id(state, self.transition_id)]
        if len(others) == len(attempt):
            return False
        if not others:
            return True
        moved = [state for state in others if state.type != "PENDING"]
        current = (await patiently(partial(client.read_flow_run, self.id))).state
        if current is None or carries_id(current, self.transition_id):
            # We came last, over a rival or what became of it. What runs will be followed by its own engine's word.
            if moved and moved[-1].type != "RUNNING":
                await self._put_back(moved[-1])
            return False
        # Whose PENDING stands now gives way; so the first of the others has the run.
        first = carries_id(next(state for state in attempt if state.id != current.id), self.transition_id)
        if first and current.is_cancelling():
            self.reason = Reason.CANCELLED
        return first and (current.is_cancelling() or current.type == "PENDING")

    async def _cancel_without_deployment(self) -> None:
        """A run whose deployment is gone can never be claimed: say so once instead of polling it for ever."""
        try:
            await self._sources.read(self.flow_run.deployment_id, self._host.client.read_deployment)
        except ObjectNotFound:
            history = await patiently(partial(self._host.client.read_flow_run_states, self.id))
            if history and history[-1].type == "SCHEDULED":
                state = new_state("CANCELLED", message=self._without_deployment)
                await patiently(partial(self._host.client.set_flow_run_state, self.id, state, force=True))

    @property
    def _without_deployment(self) -> str:
        return f"The deployment {self.flow_run.deployment_id} of this flow run no longer exists."

    async def _put_back(self, state: State) -> None:
        """Our claim overwrote the end of another attempt: make it stand again."""
        self.log.info("Flow run %r was %s already and is left so", self.flow_run.name, state.name or state.type)
        body = new_state(state.type, state.name, state.message, uuid4(), _details(state), state.data)
        await patiently(partial(self._host.client.set_flow_run_state, self.id, body, force=True))

    async def _configure(self) -> None:
        """Read what the run belongs to, then compute its configuration."""
        host, flow_run, pool = self._host, self.flow_run, self._host._work_pool
        try:
            self.deployment = await self._sources.read(flow_run.deployment_id, host.client.read_deployment)
        except ObjectNotFound as error:
            raise DeploymentGone(self._without_deployment) from error
        self.flow = await self._sources.read(flow_run.flow_id, host.client.read_flow)
        own = host.get_default_base_job_template()
        template = (pool and pool.base_job_template) or host._base_job_template or own
        template = with_extra_variables(template, own, host.extra_variables)
        variables = merge_job_variables(
            self.deployment.job_variables if self.deployment else {}, flow_run.job_variables
        )
        configuration = await host.job_configuration.from_template_and_values(template, variables, host.client)
        self._configured_command = configuration.command is not None
        # In a thread: it may ask an interpreter which Prefect it has.
        configuration._inherited = await anyio.to_thread.run_sync(host._inherited_environment, configuration)
        configuration.prepare(flow_run, self.deployment, self.flow, pool, host.name, host.backend_id)
        self.configuration = configuration

    async def _execute(self) -> None:
        """Run it to its end, whoever ends it."""
        if self.reason is not None:
            return
        host, self._entered = self._host, True
        self.log.info("Worker %r submitting flow run %r", host.name, str(self.id))
        submitted = host._emit("prefect.worker.submitted-flow-run", self)
        async with anyio.create_task_group() as beside:
            started = Started(partial(self._started, beside))
            with self._running:
                self.result = await host.run(self.flow_run, self.configuration, task_status=started)
                if self.result is None:
                    raise ProcworkerError(f"{type(host).__name__}.run() returned nothing: return how the run ended")
                host._emit("prefect.worker.executed-flow-run", self, submitted)
            beside.cancel_scope.cancel()

    def _started(self, beside: TaskGroup, identifier: str) -> None:
        """The infrastructure exists: what follows from that happens beside the line."""
        self.identifier = identifier
        self._named.set()
        self.log.info("Flow run %r started as %s", self.flow_run.name, identifier)
        self._host._in_background(self._tell)
        seconds = getattr(self.configuration, "timeout_seconds", None)
        if seconds:
            beside.start_soon(self._stop_after, seconds)
        if self.reason is not None:
            self._host._in_background(self._end, 0.0)
        self._host._run_moved()

    async def _tell(self) -> None:
        """Record pid and labels on the server: useful, never worth a run."""
        host, pool = self._host, self._host._work_pool
        labels = {"prefect.worker.name": host.name, "prefect.worker.type": host.type}
        if pool:
            labels |= {"prefect.work-pool.name": pool.name, "prefect.work-pool.id": str(pool.id)}
        try:
            await host.client.update_flow_run(self.id, infrastructure_pid=str(self.identifier))
            await host.client.update_flow_run_labels(self.id, labels)
        except ApiError as error:
            self.log.warning("The process id or the labels could not be recorded: %s", error)

    async def _stop_after(self, seconds: float) -> None:
        await anyio.sleep(seconds)
        text = f"The flow run exceeded its timeout of {seconds:g} s and was ended."
        self._host._in_background(self.stop, Reason.TIMED_OUT, text)

    async def cancel(self, grace: float | None = None) -> None:
        """Cancel it on our own account; where the server can be asked, its history says so first."""
        with anyio.move_on_after(ASK_SECONDS), suppress(ApiError):
            await self._host.client.set_flow_run_state(self.id, new_state("CANCELLING"), retries=0)
        await self.stop(Reason.CANCELLED, "", grace)

    async def stop(self, reason: Reason, text: str = "", grace: float | None = None) -> None:
        """Write down why, then end its processes; asking again can only shorten the grace.

        Without a grace (seconds) the job's own `grace_seconds` counts, or CANCEL_GRACE_SECONDS.
        """
        if self.reason is None and self.result is None:
            self.reason, self.reason_text = reason, text
            self.log.info("Ending flow run %r: %s", self.flow_run.name, text or reason.value)
        if grace is None:
            own = getattr(self.configuration, "grace_seconds", None)
            grace = CANCEL_GRACE_SECONDS if own is None else float(own)
        await self._end(grace)

    async def _end(self, grace: float) -> None:
        self.ending = True
        if self.identifier is None:
            self._preparing.cancel()
            if self._entered:  # give it time to name what there is to end
                with anyio.move_on_after(grace):
                    await self._named.wait()
                if self.identifier is None:
                    self._running.cancel()
            return
        try:
            await self._host.kill_infrastructure(self.identifier, self.configuration, grace)
        except InfrastructureNotFound:
            pass  # it has just ended by itself
        except NotImplementedError:
            self._running.cancel()
        except Exception as error:
            self.ending = False  # whoever wanted the end will ask again
            self.log.warning("Flow run %r could not be ended: %s", self.flow_run.name, one_line(error))

    async def _report(self) -> None:
        """Put the final state on the server; wait for the server as long as the worker lives."""
        if self.result is None and self.error is None and self.reason is None:  # our own task is being cancelled
            self.reason, self.reason_text = Reason.STOPPED, self.stopped_text
            self.reporting.deadline = min(self.reporting.deadline, anyio.current_time() + 10)
        if self.result is not None:
            self.log.info("Flow run %r exited with status code %d", self.flow_run.name, self.result.status_code)
        with self.reporting:
            transition_id = uuid4()
            try:
                self.final_state = await patiently(partial(self._conclude, transition_id))
                if self.reason is Reason.CANCELLED and self.result is not None:
                    self._host._emit("prefect.worker.cancelled-flow-run", self)
                return
            except Exception as error:
                text = "The end of flow run %r could not be reported: %s"
                self.log.error(text, self.flow_run.name, one_line(error))
        if self.reporting.cancelled_caught:
            self.log.error("The end of flow run %r could not be reported in time", self.flow_run.name)

    async def _conclude(self, transition_id: UUID) -> State | None:
        client = self._host.client
        history = await client.read_flow_run_states(self.id)
        if not owns(history, self.transition_id):
            self.log.info("Flow run %r was deleted or started again elsewhere", self.flow_run.name)
            return None
        ends_with_run = self._host.ends_with_run
        retries_here = False
        if history[-1].type == "SCHEDULED":
            policy = ((await client.read_flow_run(self.id)).model_extra or {}).get("empirical_policy") or {}
            retries_here = policy.get("retry_type") == "in_process"
        facts = Facts(
            self.reason,
            self.reason_text,
            self.result,
            self.error,
            may_live_on=self.identifier is not None and self.result is None and not ends_with_run,
            must_report=ends_with_run and not self._configured_command,
            retries_here=retries_here,
        )
        proposal = decide(facts, history)
        if proposal is None or carries_id(history[-1], transition_id):
            if self.result and history[-1].type in ("PENDING", "RUNNING"):
                text = "Flow run %r is left %s: its command exited with 0, but reported no end"
                self.log.warning(text, self.flow_run.name, history[-1].name)
            return history[-1]
        details = _details(history[-1]) if proposal.force else {}
        state = new_state(proposal.type, proposal.name, proposal.message, transition_id, details)
        answer = await client.set_flow_run_state(self.id, state, force=proposal.force)
        if answer.status != "ACCEPT":
            history = await client.read_flow_run_states(self.id)
            return history[-1] if history else None
        level = logging.INFO if proposal.type == "CANCELLED" else logging.ERROR
        self.log.log(level, "Reported flow run %r as %s: %s", self.flow_run.name, proposal.name, proposal.message)
        if self.result is not None and self.result.tail and proposal.type == "CRASHED":
            self.log.error("The last lines of its output:\n%s", "\n".join(self.result.tail))
        return answer.state


def _details(state: State) -> dict[str, Any]:
    """What must survive when a state is replaced by force, a concurrency lease for one."""
    return {key: value for key, value in state.state_details.items() if value is not None and key != "transition_id"}
