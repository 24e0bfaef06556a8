"""The control channel against the child's half in a real Prefect, without a server."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.abc import Process
from anyio.streams.text import TextReceiveStream

from procworker.system.control import Control, Session
from procworker.system.interpreter import locate

pytestmark = pytest.mark.real

# Read now: the fixture `clean_environment` takes it away later.
GIVEN = os.environ.get("PROCWORKER_TEST_PREFECT38")

SECONDS = 60

ENGINE = """
import os, signal
from prefect._internal import control_listener as listener
from prefect.exceptions import TerminationSignal
from prefect.utilities.engine import capture_sigterm

listener.configure_from_env()
print("left in the environment:", [name for name in os.environ if "CONTROL" in name])
try:
    with capture_sigterm():
        negotiated = listener._negotiation_complete.wait(30)
        print(f"negotiated: {negotiated}, with receipts: {listener._receipt_capable}", flush=True)
        while True:
            signal.pause()
except TerminationSignal:
    print("intent:", listener.get_intent(), flush=True)
"""


class Engine:
    """A Python with Prefect that does what the engine does around a flow."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        self.process = process
        self.said = ""
        self._stdout = TextReceiveStream(process.stdout)

    @classmethod
    @asynccontextmanager
    async def running(cls, session: Session) -> AsyncIterator[Engine]:
        if not GIVEN:
            pytest.skip("PROCWORKER_TEST_PREFECT38 names no Python that has this Prefect")
        command = [locate(GIVEN), "-c", ENGINE]
        env = {**os.environ, "DO_NOT_TRACK": "1", **session.environment}
        with anyio.fail_after(SECONDS):
            async with await anyio.open_process(command, env=env, stderr=None) as process:
                try:
                    yield cls(process)
                finally:
                    if process.returncode is None:
                        process.kill()

    async def hear(self, text: str) -> None:
        """Wait until it has said a line that ends so: in its middle a signal would break it off."""
        while f"{text}\n" not in self.said:
            self.said += await self._stdout.receive()

    async def end(self) -> tuple[str, int]:
        """Send SIGTERM; return its last words and its exit code."""
        self.process.send_signal(signal.SIGTERM)
        async for text in self._stdout:
            self.said += text
        return self.said.splitlines()[-1], await self.process.wait()


async def until(fact: Callable[[], bool]) -> None:
    with anyio.fail_after(SECONDS):
        while not fact():  # noqa: ASYNC110 - about sockets nobody tells
            await anyio.sleep(0.01)


async def test_the_engine_takes_the_sigterm_after_a_cancel_for_a_cancel() -> None:
    async with Control() as control:
        session = control.session()
        async with Engine.running(session) as engine:
            # Were its hello not replied to, it would wait at the end of its flow, for up to a second.
            await engine.hear("negotiated: True, with receipts: False")
            assert session.connected
            assert await session.cancel(SECONDS)
            assert await engine.end() == ("intent: cancel", 0)
        assert "left in the environment: []" in engine.said


async def test_a_sigterm_alone_is_none() -> None:
    async with Control() as control:
        session = control.session()
        async with Engine.running(session) as engine:
            await engine.hear("negotiated: True, with receipts: False")
            assert session.connected
            last, code = await engine.end()
            assert "intent" not in last
            assert code == -signal.SIGTERM
        await until(lambda: not session.connected)
        assert not await session.cancel()
