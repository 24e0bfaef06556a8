"""How facts become a final state."""

from __future__ import annotations

from datetime import datetime, timezone
from uuid import uuid4

import pytest
from pydantic import BaseModel, ValidationError

from procworker.configuration import BaseWorkerResult
from procworker.errors import ConfigurationError
from procworker.exits import explain_exit
from procworker.outcome import Facts, Reason, decide, latest_attempt, one_line, owns
from procworker.server.models import State

OURS = uuid4()


def history(*types: str, **details: object) -> list[State]:
    """States by type or "TYPE:Name"; our claim is every PENDING."""
    states = []
    for text in types:
        type, _, name = text.partition(":")
        known = {"transition_id": str(OURS)} if type == "PENDING" else {}
        states.append(
            State(
                id=uuid4(),
                type=type,
                name=name or type.title(),
                state_details=known,
                timestamp=datetime.now(timezone.utc),
            )
        )
    states[-1].state_details |= details
    return states


def exited(code: int, *remarks: str) -> BaseWorkerResult:
    return BaseWorkerResult(identifier="1", status_code=code, remarks=list(remarks))


RUNNING = ("SCHEDULED", "PENDING", "RUNNING")
CANCELLING = (*RUNNING, "CANCELLING")


@pytest.mark.parametrize("final", ["COMPLETED", "FAILED", "CANCELLED", "CRASHED"])
@pytest.mark.parametrize("facts", [Facts(result=exited(0)), Facts(result=exited(1)), Facts(reason=Reason.STOPPED)])
def test_a_final_state_is_never_overwritten(final: str, facts: Facts) -> None:
    assert decide(facts, history(*RUNNING, final)) is None


@pytest.mark.parametrize("final", ["COMPLETED", "FAILED", "CANCELLED", "CRASHED"])
def test_a_cancel_that_came_too_late_changes_nothing(final: str) -> None:
    assert decide(Facts(reason=Reason.CANCELLED, result=exited(0)), history(*RUNNING, final)) is None


def test_crashed_by_our_own_signal_for_a_cancel_becomes_cancelled() -> None:
    proposal = decide(Facts(reason=Reason.CANCELLED, result=exited(-15)), history(*CANCELLING, "CRASHED"))

    assert proposal is not None
    assert (proposal.type, proposal.force) == ("CANCELLED", True)


@pytest.mark.parametrize("last", ["CANCELLING", "CANCELLED:Cancelling"])
def test_a_run_that_is_being_cancelled_ends_cancelled_whoever_ended_it(last: str) -> None:
    for facts in (Facts(result=exited(-15)), Facts(result=exited(0)), Facts(reason=Reason.STOPPED)):
        proposal = decide(facts, history(*RUNNING, last))
        assert proposal is not None
        assert (proposal.type, proposal.force) == ("CANCELLED", True)


def test_a_non_zero_exit_is_a_crash_that_tells_code_and_remarks() -> None:
    proposal = decide(Facts(result=exited(3, "Remark.", "Another.")), history(*RUNNING))

    assert proposal is not None
    assert (proposal.type, proposal.name, proposal.force) == ("CRASHED", "Crashed", False)
    told = f"Flow run infrastructure exited with non-zero status code 3. {explain_exit(3)} Remark. Another."
    assert proposal.message == told


def test_what_an_exit_code_means_is_told_only_where_the_exit_was_not_our_doing() -> None:
    killed = BaseWorkerResult(identifier="1", status_code=-9, explanation="Memory?", remarks=["7 survived."])

    alone = decide(Facts(result=killed), history(*RUNNING))
    cancelled = decide(Facts(reason=Reason.CANCELLED, result=killed), history(*CANCELLING))

    assert alone is not None
    assert alone.message.endswith("status code -9. Memory? 7 survived.")
    assert cancelled is not None
    assert cancelled.message == "Flow run was cancelled. 7 survived."


@pytest.mark.parametrize("last", ["PENDING", "RUNNING"])
def test_exit_0_without_a_report_is_a_crash_of_the_engine_but_not_of_a_command_of_ones_own(last: str) -> None:
    states = history("SCHEDULED", "PENDING", *(["RUNNING"] if last == "RUNNING" else []))

    proposal = decide(Facts(result=exited(0), must_report=True), states)

    assert proposal is not None
    assert "without reporting" in proposal.message
    assert decide(Facts(result=exited(0)), states) is None


def test_a_run_that_scheduled_or_suspended_itself_is_left_alone() -> None:
    for code in (0, 1):
        facts = Facts(result=exited(code))
        assert decide(facts, history(*RUNNING, "SCHEDULED:AwaitingRetry")) is None
        assert decide(facts, history(*RUNNING, "PAUSED:Suspended", pause_reschedule=True)) is None


def test_a_process_that_died_while_it_waited_for_its_own_retry_or_pause_has_crashed() -> None:
    facts = Facts(result=exited(-9), retries_here=True)
    for states in (history(*RUNNING, "SCHEDULED:AwaitingRetry"), history(*RUNNING, "PAUSED")):
        proposal = decide(facts, states)
        assert proposal is not None
        assert proposal.type == "CRASHED"


def test_a_timeout_is_a_crash_named_timed_out_also_over_the_engines_own_crash() -> None:
    facts = Facts(reason=Reason.TIMED_OUT, reason_text="Exceeded 5 seconds.", result=exited(-15, "Meaning."))
    for states, force in ((history(*RUNNING), False), (history(*RUNNING, "CRASHED"), True)):
        proposal = decide(facts, states)
        assert proposal is not None
        assert (proposal.type, proposal.name, proposal.force) == ("CRASHED", "TimedOut", force)
        assert proposal.message == "Exceeded 5 seconds. Meaning."
    assert decide(facts, history(*RUNNING, "COMPLETED")) is None


def test_what_could_not_be_started_tells_why() -> None:
    proposal = decide(Facts(failure="The working directory '/x' does not exist."), history("SCHEDULED", "PENDING"))

    assert proposal is not None
    assert proposal.type == "CRASHED"
    assert "'/x' does not exist" in proposal.message


def test_infrastructure_that_was_lost_sight_of_is_left_to_its_engine() -> None:
    lost = "gone"
    assert decide(Facts(failure=lost, may_live_on=True), history(*RUNNING)) is None
    assert decide(Facts(failure=lost), history(*RUNNING)) is not None


def test_a_run_without_its_deployment_is_cancelled() -> None:
    proposal = decide(Facts(failure="No deployment.", deployment_gone=True), history("SCHEDULED", "PENDING"))

    assert proposal is not None
    assert (proposal.type, proposal.message, proposal.force) == ("CANCELLED", "No deployment.", True)


def foreign(type: str) -> State:
    return State(type=type, state_details={"transition_id": str(uuid4())})


def test_an_attempt_is_ours_until_it_is_scheduled_again_or_somebody_else_runs_it() -> None:
    ours = history(*RUNNING)

    assert owns(ours, OURS)
    assert owns([*ours, foreign("PENDING")], OURS)
    assert owns([*ours[:2], foreign("PENDING"), ours[2]], OURS)
    assert not owns([*ours, State(type="CRASHED"), foreign("PENDING"), foreign("RUNNING")], OURS)
    assert not owns([*ours, State(type="SCHEDULED"), foreign("PENDING")], OURS)
    assert not owns([], OURS)


def test_a_retry_in_the_engines_own_process_stays_in_the_attempt_and_one_that_is_claimed_begins_another() -> None:
    retrying = history(*RUNNING, "SCHEDULED:AwaitingRetry", "RUNNING:Retrying")

    assert owns(retrying, OURS)
    assert owns(retrying[:-1], OURS)
    assert not owns([*retrying[:-1], foreign("PENDING"), foreign("RUNNING")], OURS)


def test_what_may_live_on_is_not_declared_dead_when_its_worker_stops() -> None:
    assert decide(Facts(reason=Reason.STOPPED, may_live_on=True), history(*RUNNING)) is None


def test_a_run_that_was_never_scheduled_is_one_attempt() -> None:
    assert owns(history("PENDING", "RUNNING"), OURS)
    assert [state.type for state in latest_attempt(history("SCHEDULED", "PENDING", "SCHEDULED:Late"))] == []


def test_errors_become_one_line_that_never_shows_values() -> None:
    class Model(BaseModel):
        env: dict[str, str]

    with pytest.raises(ValidationError) as caught:
        Model.model_validate({"env": ["secret-value"]})

    assert "env: Input should be a valid dictionary" in one_line(caught.value)
    assert "secret-value" not in one_line(caught.value)
    assert one_line(ConfigurationError("two\nlines")) == "two lines"
    assert one_line(KeyError()) == "KeyError"
