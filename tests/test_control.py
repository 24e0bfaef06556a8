"""The control channel, against engines that are sockets in the test: what is said, what is refused, what is left."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import struct
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
import psutil
import pytest
from anyio.abc import SocketStream

from procworker.system import control as module
from procworker.system.control import MOST_STRANGERS, Control, Session

HELLO, VERSION_1 = b"\x00PF\x02\x01", b"\x00PF\x01\x00"
LONG = 60.0
"""Seconds that no test may need."""


async def until(fact: Callable[[], Any]) -> None:
    with anyio.fail_after(20):
        while not fact():  # noqa: ASYNC110 - about sockets nobody tells
            await anyio.sleep(0.005)


def token_of(session: Session) -> bytes:
    return session.environment["PREFECT__CONTROL_TOKEN"].encode()


class Engine:
    """The other end, byte by byte."""

    def __init__(self, stream: SocketStream) -> None:
        self.stream = stream

    @classmethod
    async def dial(cls, session: Session, said: bytes = b"") -> Engine:
        """Connect and say something."""
        engine = cls(await anyio.connect_tcp("127.0.0.1", int(session.environment["PREFECT__CONTROL_PORT"])))
        await engine.say(said)
        return engine

    @classmethod
    async def of(cls, session: Session, hello: bytes = b"") -> Engine:
        """Connect as a real one does: of version 1, or of version 2 when it says hello."""
        engine = await cls.dial(session, token_of(session) + b"\n")
        await until(lambda: session.connected)
        if hello:
            await engine.say(hello)
            assert await engine.hear(5) == VERSION_1
        return engine

    async def say(self, data: bytes) -> None:
        await self.stream.send(data)

    async def hear(self, size: int = 1) -> bytes:
        with anyio.fail_after(20):
            return await self.stream.receive(size)

    async def hear_all(self, size: int) -> bytes:
        heard = b""
        while len(heard) < size:
            heard += await self.hear(size - len(heard))
        return heard

    async def acknowledge(self) -> None:
        assert await self.hear() == b"c"
        await self.say(b"a")

    async def reset(self) -> None:
        """Hang up without manners, as the system does for a process with unread data."""
        raw = self.stream.extra(anyio.abc.SocketAttribute.raw_socket)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self.stream.aclose()

    async def is_hung_up_on(self) -> bool:
        """Wait until the worker hangs up; False when it says something instead."""
        try:
            await self.hear()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return True
        finally:
            await self.stream.aclose()
        return False


async def cancelled(session: Session, engine: Engine) -> bool:
    """Whether a cancel reaches this engine and its answer comes back."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(engine.acknowledge)
        return await session.cancel(LONG)


async def connected(session: Session, turns: int) -> None:
    """Wait until a session is connected, and not a turn of the loop longer than that many."""
    with anyio.fail_after(20):
        while not session.connected:
            await anyio.lowlevel.checkpoint()
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()


class Asking:
    """A cancel that is under way in a task of its own."""

    def __init__(self, session: Session, timeout: float = LONG) -> None:
        self.answer: bool | None = None
        self._session, self._timeout = session, timeout

    async def run(self) -> None:
        self.answer = await self._session.cancel(self._timeout)


# What is said


@pytest.mark.parametrize("hello", [b"", HELLO, b"\x00PF\x09\xff"], ids=["version 1", "version 2", "a later version"])
async def test_an_engine_acknowledges_a_cancel(hello: bytes) -> None:
    async with Control() as control:
        session = control.session()
        async with (await Engine.of(session, hello)).stream as stream:
            assert await cancelled(session, Engine(stream))
        assert await session.cancel(), "said once, true for ever"


async def test_what_an_engine_says_may_come_in_any_pieces() -> None:
    async with Control() as control:
        session = control.session()
        engine = await Engine.dial(session)
        for byte in token_of(session) + b"\n" + HELLO:
            await engine.say(bytes([byte]))
            await anyio.sleep(0.001)
        assert await engine.hear(5) == VERSION_1
        assert await cancelled(session, engine)
        await engine.stream.aclose()


async def test_token_and_hello_may_come_in_one_piece() -> None:
    async with Control() as control:
        session = control.session()
        engine = await Engine.dial(session, token_of(session) + b"\n" + HELLO)
        assert await engine.hear(5) == VERSION_1
        assert await cancelled(session, engine)
        await engine.stream.aclose()


async def test_a_cancel_may_overtake_the_hello() -> None:
    async with Control() as control:
        session = control.session()
        engine = await Engine.of(session)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon((asking := Asking(session)).run)
            assert await engine.hear() == b"c"
            await engine.say(HELLO + b"a")
        assert asking.answer is True
        await engine.stream.aclose()


@pytest.mark.parametrize("turns", range(4))
async def test_a_cancel_may_meet_the_reply_to_the_hello(turns: int) -> None:
    async def answer() -> None:
        assert await engine.hear_all(6) == VERSION_1 + b"c"
        await engine.say(b"a")

    async with Control() as control:
        session = control.session()
        engine = await Engine.dial(session, token_of(session) + b"\n" + HELLO)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(answer)
            await connected(session, turns)
            assert await session.cancel(LONG)
        await engine.stream.aclose()


async def test_each_session_reaches_its_own_engine() -> None:
    async with Control() as control:
        sessions = [control.session() for _ in range(3)]
        assert len({token_of(session) for session in sessions}) == 3
        engines = [await Engine.of(session) for session in reversed(sessions)][::-1]
        assert await cancelled(sessions[1], engines[1])
        assert [session.connected for session in sessions] == [True, False, True]
        assert not await sessions[0].cancel(0.05)
        assert await engines[0].hear() == b"c"
        await engines[2].say(b"a")  # not asked
        assert await engines[2].is_hung_up_on()
        await until(lambda: not sessions[2].connected)
        assert sessions[0].connected
        for engine in engines:
            await engine.stream.aclose()


async def test_an_engine_is_told_where_and_with_what_to_connect() -> None:
    async with Control() as control:
        session = control.session()
        assert sorted(session.environment) == ["PREFECT__CONTROL_PORT", "PREFECT__CONTROL_TOKEN"]
        assert len(token_of(session)) == 32
        assert int(token_of(session), 16) >= 0
        (listening,) = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert listening.laddr == ("127.0.0.1", int(session.environment["PREFECT__CONTROL_PORT"]))


# What is not answered


async def test_a_cancel_before_the_engine_connects_waits_for_nothing() -> None:
    async with Control() as control:
        session = control.session()
        with anyio.fail_after(20):
            assert await session.cancel(LONG) is False
        engine = await Engine.of(session)
        assert await cancelled(session, engine)
        await engine.stream.aclose()


@pytest.mark.parametrize("hello", [b"", HELLO])
async def test_a_cancel_waits_no_longer_than_asked_for_and_a_late_answer_counts(hello: bytes) -> None:
    async with Control() as control:
        session = control.session()
        engine = await Engine.of(session, hello)
        start = time.monotonic()
        assert await session.cancel(0.2) is False
        assert 0.19 < time.monotonic() - start < 20
        assert session.connected
        async with anyio.create_task_group() as tasks:
            tasks.start_soon((again := Asking(session)).run)
            await engine.acknowledge()
        assert again.answer is True
        assert await engine.is_hung_up_on(), "the byte was sent once"


async def test_whoever_asks_meanwhile_gets_the_same_answer() -> None:
    async with Control() as control:
        session = control.session()
        engine = await Engine.of(session)
        many = [Asking(session) for _ in range(5)]
        async with anyio.create_task_group() as tasks:
            for asking in many:
                tasks.start_soon(asking.run)
            await engine.acknowledge()
        assert [asking.answer for asking in many] == [True] * 5
        assert await engine.is_hung_up_on()


@pytest.mark.parametrize("answer", [b"", b"x", b"c", HELLO[:3], b"\x00PX\x02\x01"])
async def test_an_engine_that_leaves_or_talks_nonsense_has_not_acknowledged(answer: bytes) -> None:
    async with Control() as control:
        session = control.session()
        engine = await Engine.of(session)
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon((asking := Asking(session)).run)
                assert await engine.hear() == b"c"
                await engine.say(answer)
                await engine.stream.aclose()
        assert asking.answer is False
        assert not session.connected
        assert not await session.cancel(LONG)


@pytest.mark.parametrize("turns", range(8))
async def test_an_engine_may_vanish_at_any_moment(turns: int) -> None:
    async with Control() as control:
        unknown, silent, talking, asked = (control.session() for _ in range(4))
        await (await Engine.dial(unknown, b"0")).reset()
        await (await Engine.dial(silent, token_of(silent) + b"\n" + HELLO)).reset()
        await (await Engine.of(talking)).reset()
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        assert await talking.cancel(LONG) is False
        assert await silent.cancel(LONG) is False
        engine = await Engine.of(asked)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon((asking := Asking(asked)).run)
            await until(lambda: asked._asked)
            await engine.reset()
        assert asking.answer is False
        last = control.session()
        engine = await Engine.of(last)
        assert await cancelled(last, engine)
        await engine.stream.aclose()


async def test_a_cancel_that_is_given_up_can_be_repeated() -> None:
    async with Control() as control:
        session = control.session()
        engine = await Engine.of(session)
        for turns in range(10):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(Asking(session).run)
                for _ in range(turns):
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
        assert not await session.cancel(0.0)
        assert await cancelled(session, engine)
        assert await engine.is_hung_up_on()


# Who is refused


async def test_a_wrong_token_is_refused() -> None:
    async with Control() as control:
        session = control.session()
        right = token_of(session)
        for wrong in (b"", b"0" * 32, right[:-1], right + b"0", right.upper() + b"A", b" " + right, b"\xff" * 32):
            assert await (await Engine.dial(session, wrong + b"\n")).is_hung_up_on()
            assert not session.connected
        engine = await Engine.of(session)
        assert await cancelled(session, engine)
        await engine.stream.aclose()


async def test_a_token_is_good_for_once() -> None:
    async with Control() as control:
        session = control.session()
        engine = await Engine.of(session)
        assert await (await Engine.dial(session, token_of(session) + b"\n")).is_hung_up_on()
        assert await cancelled(session, engine)
        await engine.stream.aclose()
        await until(lambda: not session.connected)
        assert await (await Engine.dial(session, token_of(session) + b"\n")).is_hung_up_on()


async def test_a_token_has_to_be_shown_in_time() -> None:
    async with Control(auth_seconds=1.0) as control:
        slow, quick = control.session(), control.session()
        engine = await Engine.dial(slow, token_of(slow))  # never ends its line
        other = await Engine.dial(quick, token_of(quick) + b"\n")
        await until(lambda: quick.connected)
        assert await engine.is_hung_up_on()
        assert not slow.connected
        await anyio.sleep(0.5)
        assert quick.connected
        assert await cancelled(quick, other)
        await other.stream.aclose()


async def test_a_line_without_end_is_refused() -> None:
    async with Control(auth_seconds=LONG) as control:
        engine = await Engine.dial(control.session(), b"0" * 1_000)
        assert await engine.is_hung_up_on()


@pytest.mark.parametrize(
    "said", [b"x", b"a", b"\n", b"\x02", b"\x01\x00\x00\x00\x02{}", b"\x00PX\x02\x01", b"\x00" * 5]
)
async def test_an_engine_that_says_what_it_should_not_is_hung_up_on(said: bytes) -> None:
    async with Control() as control:
        session = control.session()
        assert await (await Engine.dial(session, token_of(session) + b"\n" + said)).is_hung_up_on()
        await until(lambda: not session.connected)
        assert await session.cancel(LONG) is False


@pytest.mark.parametrize("said", [HELLO, b"a", b"x"])
async def test_hello_is_said_once(said: bytes) -> None:
    async with Control() as control:
        session = control.session()
        engine = await Engine.of(session, HELLO)
        await engine.say(said)
        assert await engine.is_hung_up_on()


async def test_many_strangers_do_not_keep_an_engine_out() -> None:
    async with Control(auth_seconds=LONG) as control:
        session = control.session()
        strangers = [await Engine.dial(session) for _ in range(3 * MOST_STRANGERS)]
        engine = await Engine.of(session)
        assert len(control._strangers) <= MOST_STRANGERS
        assert await strangers[0].is_hung_up_on()
        assert await cancelled(session, engine)
        for stranger in [*strangers, engine]:
            await stranger.stream.aclose()
        await until(lambda: not control._strangers)


async def test_too_many_open_files_only_delay_an_engine() -> None:
    async with Control() as control:
        session = control.session()
        with socket.socket() as engine:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                engine.connect(("127.0.0.1", int(session.environment["PREFECT__CONTROL_PORT"])))
                engine.sendall(token_of(session) + b"\n")
                await anyio.sleep(0.3)
                assert not session.connected
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await until(lambda: session.connected)


# The end of a session


async def test_closing_hangs_up_and_forgets_the_token() -> None:
    async with Control() as control:
        talking, waiting = control.session(), control.session()
        engine = await Engine.of(talking)
        for session in (talking, waiting):
            session.close()
            session.close()
            assert not session.connected
            assert not await session.cancel(LONG)
            assert session not in control._expected
            assert await (await Engine.dial(session, token_of(session) + b"\n")).is_hung_up_on()
        assert await engine.is_hung_up_on()


async def test_closing_ends_the_wait_for_an_answer() -> None:
    async with Control() as control:
        session = control.session()
        engine = await Engine.of(session)
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon((asking := Asking(session)).run)
                assert await engine.hear() == b"c"
                session.close()
        assert asking.answer is False
        await engine.stream.aclose()


@pytest.mark.parametrize("turns", range(4))
async def test_a_cancel_may_meet_the_end(turns: int) -> None:
    """Both while the hello is replied to, some turns of the loop apart."""

    async def close() -> None:
        while not session._asked:
            await anyio.lowlevel.checkpoint()
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        session.close()

    async with Control() as control:
        session = control.session()
        engine = await Engine.dial(session, token_of(session) + b"\n" + HELLO)
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(close)
                await connected(session, 0)
                assert await session.cancel(LONG) is False
        await engine.stream.aclose()


async def test_the_end_of_the_control_ends_the_wait_for_an_answer() -> None:
    asking: Asking
    async with anyio.create_task_group() as tasks:
        async with Control() as control:
            session = control.session()
            engine = await Engine.of(session)
            tasks.start_soon((asking := Asking(session)).run)
            assert await engine.hear() == b"c"
        assert await engine.is_hung_up_on()
    assert asking.answer is False
    assert not await session.cancel(LONG)
    session.close()


# Without a listener


async def test_a_control_that_is_not_entered_reaches_nobody() -> None:
    control = Control()
    before = control.session()
    async with control:
        assert control.session().environment
    for session in (before, control.session()):
        assert session.environment == {}
        assert not session.connected
        assert await session.cancel(LONG) is False
        session.close()
        session.close()


async def test_without_a_loopback_interface_one_warning_is_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    async with Control() as control:
        for session in (control.session(), control.session()):
            assert session.environment == {}
            assert not await session.cancel(LONG)
            session.close()
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "127.0.0.1" in warning.getMessage()
    assert "Cannot assign requested address" in warning.getMessage()


# What is left, what is shown


async def test_no_secret_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with Control() as control:
        session, shown = control.session(), []
        shown += [repr(session), str(session), repr(control)]
        engine = await Engine.of(session)
        await (await Engine.dial(session, token_of(session) + b"\n")).is_hung_up_on()
        assert await cancelled(session, engine)
        await engine.stream.aclose()
        shown += [repr(session), repr(control), caplog.text]
    assert token_of(session).decode() not in " ".join(shown)


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(known: bytes, shown: bytes) -> bool:
        compared.append(shown)
        return False

    async def show() -> None:
        async with Control() as control:
            session = control.session()
            assert await (await Engine.dial(session, token_of(session) + b"\n")).is_hung_up_on()
            assert compared == [token_of(session)]

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    anyio.run(show)


async def test_children_inherit_no_socket() -> None:
    async with Control() as control:
        session = control.session()
        engine = await Engine.of(session)
        port = int(session.environment["PREFECT__CONTROL_PORT"])
        ours = [c.fd for c in psutil.Process().net_connections("tcp") if c.laddr and c.laddr.port == port]
        assert len(ours) == 2, "the listener and the connection"
        assert not any(map(os.get_inheritable, ours))
        await engine.stream.aclose()


class Before:
    """What the test's loop had before."""

    def __init__(self) -> None:
        self._tasks = asyncio.all_tasks()

    def no_task_is_left(self) -> bool:
        return asyncio.all_tasks() <= self._tasks

    def nothing_is_left(self, *ports: str) -> bool:
        used = {str(c.laddr.port) for c in psutil.Process().net_connections("tcp") if c.laddr}
        return used.isdisjoint(ports) and self.no_task_is_left()


async def test_leaving_leaves_no_task_and_no_socket() -> None:
    before = Before()
    async with Control() as control:
        sessions = [control.session() for _ in range(3)]
        port = sessions[0].environment["PREFECT__CONTROL_PORT"]
        engines = [await Engine.of(sessions[0]), await Engine.of(sessions[1], HELLO), await Engine.dial(sessions[2])]
        assert not before.nothing_is_left(port)
        assert not before.no_task_is_left()
    await until(lambda: before.nothing_is_left(port))
    for engine in engines:
        assert await engine.is_hung_up_on()


async def test_being_cancelled_anywhere_leaves_no_task_and_no_socket() -> None:
    before, ports = Before(), list[str]()

    async def live() -> None:
        async with Control() as control:
            session = control.session()
            ports.append(session.environment["PREFECT__CONTROL_PORT"])
            with socket.create_connection(("127.0.0.1", int(ports[-1]))) as engine:
                engine.setblocking(False)
                engine.sendall(token_of(session) + b"\n" + HELLO)
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
                await session.cancel(0.001)
                session.close()

    turns, whole = 0, 0
    while whole < 5:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(live)
            for _ in range(turns):
                # Not checkpoints only: the address is looked up in a thread, for which time has to pass.
                await anyio.sleep(0.0005)
            whole += before.no_task_is_left()
            tasks.cancel_scope.cancel()
        await until(before.no_task_is_left)
        turns += 1 + turns // 20
    assert ports
    await until(lambda: before.nothing_is_left(*ports))


async def test_what_goes_wrong_in_the_block_comes_out_as_it_is() -> None:
    async def go_wrong() -> None:
        async with Control() as control, (await Engine.of(control.session())).stream:
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        await go_wrong()


async def test_a_control_may_outlive_a_task_group_and_be_cancelled_with_it() -> None:
    before = Before()
    for inside in (True, False):
        with anyio.CancelScope() as scope:
            async with AsyncExitStack() as stack:
                if not inside:
                    await stack.enter_async_context(anyio.create_task_group())
                control = await stack.enter_async_context(Control())
                tasks = await stack.enter_async_context(anyio.create_task_group())
                session = control.session()
                engine = await Engine.of(session)
                tasks.start_soon((asking := Asking(session)).run)
                assert await engine.hear() == b"c"
                scope.cancel()
                await anyio.sleep(LONG)
        assert scope.cancelled_caught
        assert asking.answer is None
        assert await engine.is_hung_up_on()
        await until(before.no_task_is_left)


async def test_a_control_may_be_entered_again() -> None:
    control = Control()
    for _ in range(2):
        async with control:
            session = control.session()
            engine = await Engine.of(session)
            assert await cancelled(session, engine)
            session.close()
            await engine.stream.aclose()
