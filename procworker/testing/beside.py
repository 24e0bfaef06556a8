"""The scripted API in a thread with an event loop of its own, for tests that have none or must not wait in theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal

from procworker.testing.api import PrefectApi


class Beside:
    """A PrefectApi in a thread with a loop of its own: the code under test may run another one."""

    def __init__(self, server: PrefectApi, portal: BlockingPortal) -> None:
        self._server, self._portal = server, portal

    def __getattr__(self, name: str) -> Any:
        """Attributes are the server's; its methods, async ones too, run in its loop and return when they are done."""
        found = getattr(self._server, name)
        return partial(self.call, found) if callable(found) else found

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function, async or not, in the loop of the server."""
        return self._portal.call(partial(function, *args, **options))

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Have the server down for the length of the block."""
        self.call(self._server.down)
        try:
            yield
        finally:
            self.call(self._server.up)


@contextmanager
def serving(*args: Any, **options: Any) -> Iterator[Beside]:
    """A server for the length of the block; arguments as in PrefectApi."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(PrefectApi.running(*args, **options)) as server,
    ):
        yield Beside(server, portal)
