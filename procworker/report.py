"""Turn the facts of a run that is over into a state on the server, whoever gathered them and whenever that was."""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

from procworker.errors import Rejected, Unreachable
from procworker.logs import RunLogger
from procworker.outcome import Facts, carries_id, decide, owns
from procworker.server.client import Client
from procworker.server.models import State, new_state

REFUSALS = 3
"""How often the history of a run may be refused before its report is given up."""


class Report:
    """One run's report. The decision is made at delivery, from what then stands on the server (contract 0).

    `deliver` may be repeated until it returns: its proposal keeps one transition id, so it cannot count twice.
    """

    def __init__(self, flow_run_id: UUID, name: str, claim: UUID, facts: Facts, proposal_id: UUID) -> None:
        self.flow_run_id = flow_run_id
        self.name = name
        self.claim = claim
        self.facts = facts
        self.proposal_id = proposal_id
        self._refusals = 0

    async def deliver(self, client: Client, log: RunLogger) -> State | None:
        """Return the run's final state (or what it is left in); None when it is not ours to report any more.

        Raises ApiError.
        """
        try:
            history = await client.read_flow_run_states(self.flow_run_id)
        except Rejected as error:  # no server refuses that for good: it is no word about the run
            self._refusals += 1
            if self._refusals > REFUSALS:
                raise
            raise Unreachable(str(error), error.status_code) from error
        if not owns(history, self.claim):
            log.info("Flow run %r was deleted or started again elsewhere", self.name)
            return None
        if carries_id(history[-1], self.proposal_id):  # the answer to the last attempt was lost
            return self._tell(history[-1], log)
        facts = self.facts.model_copy(update={"retries_here": await self._retries_here(client, history[-1])})
        proposal = decide(facts, history)
        if proposal is None:
            if facts.result and history[-1].type in ("PENDING", "RUNNING"):
                text = "Flow run %r is left %s: its command exited with 0, but reported no end"
                log.warning(text, self.name, history[-1].name)
            return history[-1]
        details = details_of(history[-1]) if proposal.force else {}
        state = new_state(proposal.type, proposal.name, proposal.message, self.proposal_id, details)
        answer = await client.set_flow_run_state(self.flow_run_id, state, force=proposal.force)
        if answer.state is not None and (answer.status == "ACCEPT" or carries_id(answer.state, self.proposal_id)):
            return self._tell(answer.state.model_copy(update={"message": proposal.message}), log)
        history = await client.read_flow_run_states(self.flow_run_id)
        return history[-1] if history else None

    def _tell(self, state: State, log: RunLogger) -> State:
        """Write what was reported into the run's log, and with a crash what its user would look for first."""
        level = logging.INFO if state.type == "CANCELLED" else logging.ERROR
        log.log(level, "Reported flow run %r as %s: %s", self.name, state.name, state.message)
        if self.facts.tail and state.type == "CRASHED":
            log.error("The last lines of its output:\n%s", "\n".join(self.facts.tail))
        return state

    async def _retries_here(self, client: Client, current: State) -> bool:
        """Was a retry that the run waits for to happen in its own process?"""
        if current.type != "SCHEDULED":
            return False
        policy = ((await client.read_flow_run(self.flow_run_id)).model_extra or {}).get("empirical_policy") or {}
        return bool(policy.get("retry_type") == "in_process")


def details_of(state: State) -> dict[str, Any]:
    """What must survive when a state is replaced by force, a concurrency lease for one."""
    return {key: value for key, value in state.state_details.items() if value is not None and key != "transition_id"}
