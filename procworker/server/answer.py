"""What an API said, whichever way it was asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

REDIRECTIONS = frozenset({301, 302, 303, 307, 308})


class Answer(NamedTuple):
    """A response, read to its end and decoded; the names of its headers are in lower case."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def leads_elsewhere(self) -> bool:
        return self.status in REDIRECTIONS and "location" in self.headers

    def is_of_the_api(self) -> bool:
        """Prefect explains its refusals in JSON; anything else speaks for a proxy, which knows nothing of runs."""
        return self.body.lstrip().startswith(b"{")

    def is_a_page(self) -> bool:
        """Is it somebody's HTML? What else a good answer holds may not be for others to see."""
        return self.body.lstrip().startswith(b"<")

    def refuses_csrf_token(self) -> bool:
        return self.status == 403 and b"CSRF token" in self.body
