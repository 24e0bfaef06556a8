"""Take a flow run by an accepted PENDING of our own, and make sure that nobody else has it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from uuid import UUID, uuid4

import anyio

from procworker.errors import ApiError, ObjectNotFound
from procworker.logs import RunLogger
from procworker.loops import patiently
from procworker.outcome import carries_id, latest_attempt
from procworker.report import details_of
from procworker.server.client import Client
from procworker.server.models import FlowRun, OrchestrationResult, State, new_state

CLAIM_SECONDS = 2.0
"""Age up to which a poll answer is good for a claim: servers accept a stale one (contract 0)."""


class Claim:
    """One worker's claim of one flow run."""

    def __init__(self, flow_run: FlowRun, log: RunLogger, transition_id: UUID | None = None) -> None:
        """With the transition id of a claim that was made before, by whomever, nothing is left but to hold it."""
        self.transition_id = transition_id or uuid4()
        self.held = transition_id is not None
        """Is the run ours to report?"""
        self.cancelled = False
        """Does somebody want the run cancelled already?"""
        self.refusal: str | None = None
        self._in_doubt = False
        self._flow_run = flow_run
        self._log = log

    async def take(
        self, client: Client, answered_at: float, read_deployment: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        """Claim what a poll showed at `answered_at`; never from an old answer, never over a newer outcome."""
        deadline = answered_at + CLAIM_SECONDS
        if anyio.current_time() > deadline:
            return
        self.held = True  # whoever breaks us off from here on has to report the run
        try:
            answer = await patiently(partial(self._propose, client, deadline))
        except ApiError as error:
            self._log.warning("Flow run %r could not be claimed: %s", self._flow_run.name, error)
            self.held, self.refusal = False, str(error)
            return
        # A REJECT that shows our own transition id answers a repeated request.
        state = answer and answer.state
        if answer and not (state and state.type == "PENDING" and carries_id(state, self.transition_id)):
            self.held, self.refusal = False, str(answer.details.get("reason") or answer.status)
            self._log.info("Flow run %r is not ours to run: %s", self._flow_run.name, self.refusal)
            if read_deployment is not None:
                await self._cancel_without_deployment(client, read_deployment)
            return
        await self.look_back(client)

    async def renew(self, client: Client, flow_run: FlowRun) -> None:
        """Hold what a dead worker claimed with our transition id, also if the server has not carried that out yet."""
        self._flow_run, self._in_doubt = flow_run, True
        if flow_run.state_type == "SCHEDULED":
            await self.take(client, anyio.current_time())
        else:
            await self.look_back(client)

    async def _propose(self, client: Client, deadline: float) -> OrchestrationResult | None:
        """Propose our PENDING; None when the history has to tell what became of it.

        A proposal without an answer may be carried out later, when nobody polls the run any more. So it is proposed
        again (which cannot count twice) until there is an answer, or until something else has become of the run.
        """
        id = self._flow_run.id
        if self._in_doubt:
            history = await client.read_flow_run_states(id)
            if not history or history[-1].id != self._flow_run.state_id:
                return None
            deadline = anyio.current_time() + CLAIM_SECONDS
        self._in_doubt = True
        pending = new_state("PENDING", transition_id=self.transition_id)
        return await client.set_flow_run_state(id, pending, deadline=deadline)

    async def look_back(self, client: Client) -> None:
        """See whether our PENDING took what was scheduled, and nobody else's did.

        Servers accept a claim over the end of another attempt (contract 0), and SQLite ones two claims at once. They
        stamp a state before they wait for their database: only what stands now tells who came last.
        """
        self.held = True
        self.held = await self._stands(client)

    async def _stands(self, client: Client) -> bool:
        id = self._flow_run.id
        attempt = latest_attempt(await patiently(partial(client.read_flow_run_states, id)))
        others = [state for state in attempt if not carries_id(state, self.transition_id)]
        if len(others) == len(attempt):
            return False
        if not others:
            return True
        moved = [state for state in others if state.type != "PENDING"]
        current = (await patiently(partial(client.read_flow_run, id))).state
        if current is None or carries_id(current, self.transition_id):
            # We came last, over a rival or what became of it. What runs will be followed by its own engine's word.
            if moved and moved[-1].type != "RUNNING":
                await self._put_back(client, moved[-1])
            return False
        # Whose PENDING stands now gives way; so the first of the others has the run.
        first = carries_id(next(state for state in attempt if state.id != current.id), self.transition_id)
        self.cancelled = first and current.is_cancelling()
        return self.cancelled or (first and current.type == "PENDING")

    async def _put_back(self, client: Client, state: State) -> None:
        """Our claim overwrote the end of another attempt: make it stand again."""
        self._log.info("Flow run %r was %s already and is left so", self._flow_run.name, state.name or state.type)
        body = new_state(state.type, state.name, state.message, uuid4(), details_of(state), state.data)
        await patiently(partial(client.set_flow_run_state, self._flow_run.id, body, force=True))

    async def _cancel_without_deployment(
        self, client: Client, read_deployment: Callable[[], Awaitable[object]]
    ) -> None:
        """A run whose deployment is gone can never be claimed: say so once instead of polling it for ever."""
        try:
            await read_deployment()
        except ObjectNotFound:
            history = await patiently(partial(client.read_flow_run_states, self._flow_run.id))
            if history and history[-1].type == "SCHEDULED":
                state = new_state("CANCELLED", message=without_deployment(self._flow_run))
                await patiently(partial(client.set_flow_run_state, self._flow_run.id, state, force=True))


def without_deployment(flow_run: FlowRun) -> str:
    return f"The deployment {flow_run.deployment_id} of this flow run no longer exists."
