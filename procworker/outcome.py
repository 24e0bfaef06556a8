"""Decide the final state of a flow run from facts; pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from uuid import UUID

from pydantic import BaseModel, ValidationError

from procworker.configuration import BaseWorkerResult
from procworker.errors import ObjectNotFound, ProcworkerError
from procworker.exits import explain_exit
from procworker.server.models import State


class Reason(Enum):
    """Why this worker ended a run; written down before anything is sent to its processes."""

    CANCELLED = "cancelled"
    TIMED_OUT = "timed out"
    STOPPED = "worker stopped"


class DeploymentGone(ObjectNotFound):
    """The deployment of a claimed run no longer exists."""


class ExitUnknown(ProcworkerError):
    """A run has ended while nobody watched it; `tail` holds the last lines of its output that may be shown."""

    def __init__(self, message: str, tail: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.tail = list(tail)


class Facts(BaseModel, frozen=True):
    """What is known of a run whose processes are gone; plain data, which keeps on disk until it is reported."""

    reason: Reason | None = None
    reason_text: str = ""
    result: BaseWorkerResult | None = None
    failure: str | None = None
    """Why it could not be started, or why nothing is known of its end."""
    deployment_gone: bool = False
    unseen: bool = False
    """It was started and has ended, but nobody saw how."""
    tail: list[str] = []
    """The last lines of its output."""
    may_live_on: bool = False
    """Its infrastructure may outlive our losing sight of it, and then its own engine reports."""
    must_report: bool = False
    """It was the engine that ran, whose exit code 0 is a promise to have reported."""
    retries_here: bool = False
    """A retry that it waits for was to happen in its own process."""


@dataclass(frozen=True)
class Proposal:
    """A final state to put on the server."""

    type: str
    name: str
    message: str
    force: bool = False


def carries_id(state: State, transition_id: UUID) -> bool:
    """Was this state made by the proposal with this transition id?"""
    return str(state.state_details.get("transition_id")) == str(transition_id)


def latest_attempt(history: Sequence[State]) -> Sequence[State]:
    """Return what followed the last SCHEDULED state (everything, for a run that was never scheduled).

    An engine that waits for its own retry is SCHEDULED too, named AwaitingRetry, in the middle of its attempt.
    """
    start = 0
    for i, state in enumerate(history):
        retries = state.name == "AwaitingRetry" and i > 0 and history[i - 1].type == "RUNNING"
        claimed = i + 1 < len(history) and history[i + 1].type == "PENDING"
        if state.type == "SCHEDULED" and (claimed or not retries):
            start = i + 1
    return history[start:]


def owns(history: Sequence[State], transition_id: UUID) -> bool:
    """Is the newest attempt the one that our claim, the PENDING with this transition id, began?

    A rival's PENDING alone takes nothing away: servers may accept two claims, and one of them is then dropped. A
    RUNNING that follows a rival's later PENDING does: somebody else runs it now.
    """
    attempt = latest_attempt(history)
    if not any(carries_id(state, transition_id) for state in attempt):
        return False
    rival = False
    for before, state in pairwise(attempt):
        if state.type == "PENDING" and before.type != "PENDING":
            rival = not carries_id(state, transition_id)
        elif state.type == "RUNNING" and rival:
            return False
    return True


def decide(facts: Facts, history: Sequence[State]) -> Proposal | None:
    """Return the state to put on the server, or None to leave what stands there.

    A final state is never overwritten, with one exception: when our own SIGTERM for a recorded cancel or timeout made
    the engine report Crashed, the recorded reason is the truth.
    """
    current = history[-1]
    final = current.is_final() and not current.is_cancelling()
    if facts.reason is Reason.CANCELLED or current.is_cancelling():
        if final and not _crashed_by_our_signal(facts, history):
            return None
        return Proposal("CANCELLED", "Cancelled", _message("Flow run was cancelled.", facts), force=True)
    if facts.reason is Reason.TIMED_OUT:
        if final and (current.type != "CRASHED" or current.name == "TimedOut"):
            return None
        return Proposal("CRASHED", "TimedOut", _message(facts.reason_text, facts), force=final)
    if final:
        return None
    if facts.reason is Reason.STOPPED:
        if facts.may_live_on:
            return None
        return Proposal("CRASHED", "Crashed", _message(facts.reason_text, facts))
    if facts.deployment_gone:
        return Proposal("CANCELLED", "Cancelled", str(facts.failure), force=True)
    if facts.result is None and not facts.unseen:
        text = f"Flow run could not be submitted to infrastructure. {facts.failure}"
        return None if facts.may_live_on else Proposal("CRASHED", "Crashed", text)
    return _judge_exit(facts.result, current, facts)


def _crashed_by_our_signal(facts: Facts, history: Sequence[State]) -> bool:
    """Did an engine without a control session take the SIGTERM of a cancel for a crash?"""
    asked = any(state.is_cancelling() for state in history[-3:-1])
    died_of_it = facts.result is not None and facts.result.status_code == -signal.SIGTERM
    return history[-1].type == "CRASHED" and (asked or died_of_it)


def _judge_exit(result: BaseWorkerResult | None, current: State, facts: Facts) -> Proposal | None:
    rescheduled = current.type == "SCHEDULED" and not facts.retries_here
    suspended = current.type == "PAUSED" and current.state_details.get("pause_reschedule")
    if rescheduled or suspended:
        return None
    if result is None:
        text = str(facts.failure)
    elif (code := result.status_code) != 0:
        explanation = result.explanation or str(explain_exit(code))
        text = f"Flow run infrastructure exited with non-zero status code {code}. {explanation}"
    elif current.type in ("PENDING", "RUNNING") and facts.must_report:
        text = "The flow run process ended without reporting a state."
    else:
        return None  # a command of somebody's own may hand the work elsewhere
    return Proposal("CRASHED", "Crashed", _message(text, facts))


def _message(text: str, facts: Facts) -> str:
    return " ".join([text, *(facts.result.remarks if facts.result is not None else [])])


def one_line(error: BaseException | None) -> str:
    """Say what went wrong, with its place in the configuration but without its values (they may be secrets)."""
    if isinstance(error, ValidationError):
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_input=False)]
        return f"The job configuration is invalid: {'; '.join(faults)}."
    text = " ".join(str(error).split())
    if error is None or isinstance(error, ProcworkerError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
