"""How a Prefect server judges proposed states and picks what is due, and verbs to arrange its memory.

What it accepts and refuses was compared with Prefect 3.8.8 and 2.20.26.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from procworker.testing.rows import BUSY, FINAL, Deployment, Flow, Pool, Queue, Row, Run, State, new_state, now


@dataclass
class Verdict:
    """What becomes of a proposal; `state` is the one to enter, if any."""

    status: str
    state: State | None = None
    reason: str | None = None
    delay: int = 0


def orchestrate(run: Run, new: State, old_server: bool) -> Verdict:
    """Judge a proposal by Prefect's rules, in Prefect's order."""
    current, change = run.state, (run.state.type, new.type)
    transition = new.state_details.get("transition_id")
    if transition and transition == current.state_details.get("transition_id"):
        return Verdict("REJECT", reason="This run has already made this state transition.")
    if current.type in FINAL and new.type in ("CANCELLING", "PAUSED", "CRASHED"):
        return Verdict("ABORT", reason=f"Run is already in terminal state {current.type}.")
    if current.type in FINAL and new.type == "SCHEDULED" and run.deployment_id is None:
        return Verdict("ABORT", reason="Cannot reschedule a run without an associated deployment.")
    stuck = ("CANCELLING", "CANCELLED") if old_server else ("CANCELLING",)
    if current.type in stuck and new.type != "CANCELLED":
        return Verdict("REJECT", reason="A run that is cancelling can only become Cancelled.")
    if change == ("SCHEDULED", "CANCELLING") and (not run.infrastructure_pid or current.name == "Resuming"):
        return Verdict("REJECT", new_state("CANCELLED"), "The run has no infrastructure to end.")
    if new.type == "PENDING" and current.type in ("PENDING", "RUNNING", "CANCELLED"):
        renamed = current.type == "PENDING" and new.name not in ("Pending", current.name)
        if old_server or not renamed:
            return Verdict("ABORT", reason=f"A run that is {current.type} cannot become PENDING.")
    stays_paused = change == ("PAUSED", "PENDING") or (old_server and change == ("PAUSED", "CANCELLING"))
    if stays_paused or (new.type == "PAUSED" and current.type != "RUNNING"):
        return Verdict("REJECT", reason=f"A run that is {current.type} cannot become {new.type}.")
    if new.type == "PENDING" and current.scheduled_time and not new.scheduled_time:
        new.state_details["scheduled_time"] = current.state_details["scheduled_time"]
    if new.type == "RUNNING" and current.type in ("SCHEDULED", "PENDING") and current.scheduled_time:
        early = round((current.scheduled_time - now()).total_seconds())
        if early > 0:
            return Verdict("WAIT", reason="Scheduled time is in the future", delay=early)
    if change == ("RUNNING", "FAILED") and run.run_count <= (run.empirical_policy.get("retries") or 0):
        run.empirical_policy = {**run.empirical_policy, "retry_type": "in_process"}
        retry = new_state("SCHEDULED", "AwaitingRetry", new.message)
        return Verdict("REJECT", retry, "Retrying")
    return Verdict("ACCEPT", new)


class Model:
    """All a server knows; verbs to arrange it, and the transitions that clients propose."""

    def __init__(self, version: str, cloud: bool = False) -> None:
        self.version = version
        self.cloud = cloud
        self.pools: dict[str, Pool] = {}
        self.queues: dict[UUID, Queue] = {}
        self.workers: dict[tuple[str, str], Row] = {}
        self.flows: dict[UUID, Flow] = {}
        self.deployments: dict[UUID, Deployment] = {}
        self.runs: dict[UUID, Run] = {}
        self.blocks: dict[UUID, Row] = {}
        self.variables: dict[str, Row] = {}
        self.logs: list[Row] = []
        self.artifacts: list[Row] = []
        self.events: list[Row] = []

    def changed(self) -> None:
        """Called after every change; a server wakes its waiters here."""

    @property
    def old(self) -> bool:
        """Whether this is a server of the 2.x generation."""
        return self.version.startswith("2.")

    def add_pool(self, name: str = "pool", queues: Iterable[str] = ("default",), **fields: Any) -> Pool:
        """A pool; the first queue is its default and has the highest priority. `fields` as in Pool."""
        pool = self.pools[name] = Pool(name=name, **fields)
        pool.default_queue_id = [self.add_queue(name, queue) for queue in queues][0].id  # noqa: RUF015
        self.changed()
        return pool

    def add_queue(self, pool: str, name: str, **fields: Any) -> Queue:
        """A queue, by default of lower priority than those before it. `fields` as in Queue."""
        owner = self.pools[pool]
        fields.setdefault("priority", 1 + len(self.queues_of(owner)))
        queue = Queue(name=name, work_pool_id=owner.id, work_pool_name=pool, **fields)
        self.queues[queue.id] = queue
        return queue

    def add_flow(self, name: str = "flow", tags: Iterable[str] = ()) -> Flow:
        """The flow of this name, made when there is none."""
        known = next((flow for flow in self.flows.values() if flow.name == name), None)
        flow = known or Flow(name=name, tags=[*tags])
        self.flows[flow.id] = flow
        return flow

    def add_deployment(
        self,
        name: str = "deployment",
        *,
        flow: str = "flow",
        pool: str = "pool",
        queue: str = "",
        **fields: Any,
    ) -> UUID:
        """A deployment, with its flow and pool when they are missing. `fields` as in Deployment."""
        place = self.queue_in(pool, queue)
        where: Row = {"work_pool_name": pool, "work_queue_name": place.name, "work_queue_id": place.id}
        deployment = Deployment(name=name, flow_id=self.add_flow(flow).id, **where, **fields)
        self.deployments[deployment.id] = deployment
        self.changed()
        return deployment.id

    def add_block(self, name: str, block_type: str, data: Any) -> UUID:
        """A block document of the type with this slug."""
        id = uuid4()
        self.blocks[id] = {"id": id, "name": name, "data": data, "block_type": {"slug": block_type}}
        return id

    def add_variable(self, name: str, value: Any) -> None:
        """A variable; 2.x knows only strings."""
        self.variables[name] = {"id": uuid4(), "name": name, "value": value, "tags": []}

    def schedule(
        self,
        deployment: UUID | None = None,
        *,
        due_in: float = 0,
        pool: str = "pool",
        queue: str = "",
        flow: str = "flow",
        **fields: Any,
    ) -> UUID:
        """A flow run due in so many seconds, of a deployment or directly in a pool. `fields` as in Run."""
        due = (now() + timedelta(seconds=due_in)).isoformat()
        state = new_state("SCHEDULED", scheduled_time=due)
        if deployment is not None:
            return self.create_run(self.deployments[deployment], state, fields).id
        given = {"flow_id": self.add_flow(flow).id, **fields}
        return self.create_run(None, state, given, self.queue_in(pool, queue)).id

    def set_state(
        self,
        id: UUID,
        type: str,
        name: str | None = None,
        message: str | None = None,
        *,
        force: bool = True,
        **details: Any,
    ) -> Verdict:
        """Propose a state as somebody else would; forced, it is entered whatever the rules say."""
        return self.propose(self.runs[id], new_state(type, name, message, **details), force)

    def request_cancel(self, id: UUID) -> Verdict:
        """Press the cancel button of the UI."""
        return self.set_state(id, "CANCELLING", force=False)

    def delete_run(self, id: UUID) -> None:
        """Make the run unknown."""
        del self.runs[id]
        self.changed()

    def delete_deployment(self, id: UUID) -> None:
        """Make the deployment unknown; its runs stay, as those do that were polled in time."""
        del self.deployments[id]
        self.changed()

    def delete_pool(self, name: str) -> None:
        """Make the pool unknown, with its queues."""
        pool = self.pools.pop(name)
        self.queues = {id: queue for id, queue in self.queues.items() if queue.work_pool_id != pool.id}
        self.changed()

    def run(self, id: UUID) -> Run:
        """The run: its `.state`, `.states`, `.infrastructure_pid`, `.labels`, `.run_count` and the rest."""
        return self.runs[id]

    def due(self, pool: Pool, queues: Iterable[Queue], before: datetime | None) -> list[Run]:
        """What a poll returns: by queue priority, then by time, as far as the concurrency limits allow."""
        found: list[Run] = []
        for queue in sorted(queues, key=lambda queue: queue.priority):
            mine = [run for run in self.runs.values() if run.work_queue_id == queue.id and run.is_due(before)]
            mine.sort(key=lambda run: str(run.next_scheduled_start_time))
            if not queue.is_paused:
                found += mine[: self._room(queue.concurrency_limit, "work_queue_id", queue.id)]
        return [] if pool.is_paused else found[: self._room(pool.concurrency_limit, "work_pool_id", pool.id)]

    def queues_of(self, pool: Pool) -> list[Queue]:
        """The queues of a pool."""
        return [queue for queue in self.queues.values() if queue.work_pool_id == pool.id]

    def queue_in(self, pool: str, name: str = "") -> Queue:
        """The named or default queue of a pool; what is missing is made."""
        owner = self.pools.get(pool) or self.add_pool(pool)
        if not name and owner.default_queue_id:
            return self.queues[owner.default_queue_id]
        named = {queue.name: queue for queue in self.queues_of(owner)}
        return named.get(name) or self.add_queue(pool, name)

    def create_run(self, deployment: Deployment | None, state: State, given: Row, place: Queue | None = None) -> Run:
        """A new flow run in this state, or the one that already has its idempotency key."""
        key = given.get("idempotency_key")
        known = next((run for run in self.runs.values() if key and run.idempotency_key == key), None)
        if known:
            return known
        if deployment:
            place = place or (self.queues.get(deployment.work_queue_id) if deployment.work_queue_id else None)
            given = {
                **given,
                "flow_id": deployment.flow_id,
                "deployment_id": deployment.id,
                "parameters": {**deployment.parameters, **(given.get("parameters") or {})},
                "tags": [*deployment.tags, *(given.get("tags") or ())],
            }
        if place:
            where = {"work_pool_id": place.work_pool_id, "work_pool_name": place.work_pool_name}
            given = {**where, "work_queue_id": place.id, "work_queue_name": place.name, **given}
        stored = {name: value for name, value in given.items() if value is not None}
        run = Run(**{"name": f"run-{len(self.runs) + 1}", **stored})
        run.enter(state)
        self.runs[run.id] = run
        self.changed()
        return run

    def propose(self, run: Run, state: State, force: bool) -> Verdict:
        """Judge a proposed state and enter what the verdict says."""
        verdict = Verdict("ACCEPT", state) if force else self._judge(run, state)
        if verdict.state:
            run.enter(verdict.state)
        self.changed()
        return verdict

    def _judge(self, run: Run, state: State) -> Verdict:
        verdict = orchestrate(run, state, self.old)
        claims = verdict.status == "ACCEPT" and (run.state.type, state.type) == ("SCHEDULED", "PENDING")
        if self.old or run.deployment_id is None or not claims:
            return verdict
        deployment = self.deployments.get(run.deployment_id)
        if deployment is None or deployment.concurrency_limit == 0:
            return Verdict("ABORT", reason="The deployment is gone or its concurrency limit is 0.")
        if self._room(deployment.concurrency_limit, "deployment_id", deployment.id) != 0:
            return verdict
        if (deployment.concurrency_options or {}).get("collision_strategy") == "CANCEL_NEW":
            return Verdict("REJECT", new_state("CANCELLED"), "Deployment concurrency limit reached.")
        due = (now() + timedelta(seconds=30)).isoformat()
        waiting = new_state("SCHEDULED", "AwaitingConcurrencySlot", scheduled_time=due)
        return Verdict("REJECT", waiting, "Deployment concurrency limit reached.")

    def _room(self, limit: int | None, key: str, id: UUID) -> int | None:
        """How many more runs a concurrency limit allows; None is as many as there are."""
        if limit is None:
            return None
        busy = [run for run in self.runs.values() if getattr(run, key) == id and run.state.type in BUSY]
        return max(0, limit - len(busy))
