"""What is written down of a flow run, so that somebody else can watch, end and report it; and the book that forgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol
from uuid import UUID

from pydantic import BaseModel

from procworker.outcome import Facts

JSON = dict[str, Any]


class Record(BaseModel):
    """One flow run as its worker last knew it."""

    flow_run_id: UUID
    flow_run_name: str = ""
    flow_name: str = ""
    transition_id: UUID
    """Of the claim: who finds another one on the server has nothing to report."""
    api: str
    pool: str | None = None
    worker: str
    orphans: Literal["adopt", "kill"] = "adopt"
    """What shall become of the run when its worker is gone."""
    phase: Literal["claiming", "starting", "running", "ended"] = "claiming"
    job: JSON = {}
    """The part of the job configuration that is needed to the end; no environment, which may hold secrets."""
    facts: Facts = Facts()
    infrastructure: JSON = {}
    """For the worker type alone to understand."""


class Page(Protocol):
    """The place of one run's record."""

    data: JSON
    kept: bool
    """Will it be found when its worker is dead?"""

    def write(self, **changes: Any) -> None:
        """Change fields of the record; never raises, and who reads it finds all of this change or none."""

    def remove(self) -> None: ...


class Journal(Protocol):
    """Where a worker writes down what it has in hand."""

    def page(self, flow_run_id: UUID, **facts: Any) -> Page:
        """Return the run's page; a new one, if need be, with these facts. Raises OSError."""

    def take_over(self, api: str, pool: str | None) -> Sequence[Page]:
        """Return the pages that dead workers left for this API and pool; they are ours from now on."""

    def tell(self, state: JSON) -> None:
        """Show how the worker is to whoever asks on this host; never raises."""

    def wishes(self) -> Sequence[tuple[UUID, JSON]]:
        """Return what people on this host have asked of our runs since the last look: to be ended, with a `grace`."""


class ForgottenPage:
    """A record for as long as it is used."""

    kept = False

    def __init__(self, data: JSON) -> None:
        self.data = data

    def write(self, **changes: Any) -> None:
        self.data |= changes

    def remove(self) -> None:
        pass


class NoJournal:
    """Keeps nothing: what its worker had in hand is lost with it."""

    def page(self, flow_run_id: UUID, **facts: Any) -> ForgottenPage:
        return ForgottenPage(facts)

    def take_over(self, api: str, pool: str | None) -> list[Page]:
        return []

    def tell(self, state: JSON) -> None:
        pass

    def wishes(self) -> list[tuple[UUID, JSON]]:
        return []
