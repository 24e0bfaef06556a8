"""The stand-in engine reports like the real one, and each misbehaving child does what its mode says."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any
from uuid import UUID, uuid4

import anyio
import pytest
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from misbehave import MODES, survivors

from procworker.testing.api import PrefectApi

HERE = Path(__file__).parent
Watch = Callable[[str], None]


async def start(script: str, *arguments: str, **environ: str) -> Process:
    command = [sys.executable, "-S", "-E", str(HERE / script), *arguments]
    return await anyio.open_process(command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env={**os.environ, **environ})


async def engine(server: PrefectApi, id: UUID, **environ: str) -> Process:
    return await start("engine.py", PREFECT_API_URL=server.url, PREFECT__FLOW_RUN_ID=str(id), **environ)


async def output(process: Process) -> str:
    assert process.stdout
    return b"".join([chunk async for chunk in process.stdout]).decode()


async def run_engine(server: PrefectApi, **parameters: Any) -> tuple[UUID, int, str]:
    id = server.schedule(parameters=parameters)
    server.set_state(id, "PENDING")
    with anyio.fail_after(20):
        async with await engine(server, id) as process:
            text = await output(process)
            return id, await process.wait(), text


# The engine


@pytest.mark.parametrize(
    ("ask", "states", "code"),
    [
        ({}, ["Running", "Completed"], 0),
        ({"do": "complete", "seconds": 0.05, "code": 7}, ["Running", "Completed"], 7),
        ({"do": "fail"}, ["Running", "Failed"], 0),
        ({"do": "exit"}, ["Running"], 3),
        ({"do": "cancel"}, ["Running", "Cancelled"], 0),
        ({"do": "raise"}, [], 1),
        ({"do": "nothing", "code": 4}, [], 4),
    ],
)
async def test_the_engine_reports_what_the_parameters_ask_for(
    server: PrefectApi, ask: dict[str, Any], states: list[str], code: int
) -> None:
    id, exited, _ = await run_engine(server, **ask)
    assert [state.name for state in server.run(id).states[2:]] == states
    assert exited == code


async def test_the_engine_prints_and_counts_its_executions(server: PrefectApi, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    id, _, text = await run_engine(server, print=["one", "two"], env=["PREFECT__FLOW_RUN_ID"], file=str(mark))
    assert text.splitlines() == ["one", "two", f"PREFECT__FLOW_RUN_ID={id}"]
    assert len(mark.read_text().splitlines()) == 1


async def test_the_engine_runs_nothing_when_the_run_is_cancelling_or_gone(server: PrefectApi) -> None:
    id = server.schedule()
    server.set_state(id, "CANCELLING")
    for gone, code in ((id, 0), (uuid4(), 1)):
        async with await engine(server, gone) as process:
            assert await process.wait() == code
    assert server.run(id).state.type == "CANCELLING"


@pytest.mark.parametrize(
    ("ask", "state", "code"),
    [
        ({"term": "crash"}, "CRASHED", -signal.SIGTERM),
        ({"term": "die"}, "RUNNING", -signal.SIGTERM),
        ({"term": "finish", "seconds": 0.5}, "COMPLETED", 0),
        ({"term": "ignore", "seconds": 0.5}, "COMPLETED", 0),
    ],
)
async def test_the_engine_takes_term_as_told(server: PrefectApi, ask: dict[str, Any], state: str, code: int) -> None:
    id = server.schedule(parameters={"do": "sleep", **ask})
    async with await engine(server, id) as process:
        await server.wait_state(id, "RUNNING")
        process.terminate()
        assert await process.wait() == code
    assert server.run(id).state.type == state


async def test_the_engine_waits_until_it_is_due_and_while_the_server_is_away(server: PrefectApi) -> None:
    id = server.schedule(due_in=1.2)
    server.set_state(id, "PENDING", scheduled_time=server.run(id).state.state_details["scheduled_time"])
    async with await engine(server, id) as process:
        await server.wait_request("POST", "set_state")
        assert server.run(id).state.type == "PENDING"
        await server.down()
        await anyio.sleep(0.1)
        await server.up()
        assert await process.wait() == 0
    assert server.run(id).run_count == 1


async def test_an_intent_over_the_control_session_makes_term_a_cancel(server: PrefectApi) -> None:
    id = server.schedule(parameters={"do": "sleep", "control": True})
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = str(listener.extra(anyio.abc.SocketAttribute.local_port))
    acked = anyio.Event()

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            buffered = BufferedByteReceiveStream(stream)
            assert await buffered.receive_until(b"\n", 99) == b"token"
            assert await buffered.receive_exactly(5) == b"\0PF\x02\x01"
            await server.wait_state(id, "RUNNING")
            await stream.send(b"c")
            assert await buffered.receive_exactly(1) == b"a"
        acked.set()

    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        secrets = {"PREFECT__CONTROL_PORT": port, "PREFECT__CONTROL_TOKEN": "token"}
        async with await engine(server, id, **secrets) as process:
            await acked.wait()
            process.terminate()
            assert await process.wait() == 0
        tasks.cancel_scope.cancel()
    assert [state.name for state in server.run(id).states[-3:]] == ["Running", "Cancelling", "Cancelled"]


# The misbehaving children


class Child:
    """A child in a mode, past its READY line."""

    def __init__(self, process: Process) -> None:
        assert process.stdout
        self.process = process
        self.stdout = BufferedByteReceiveStream(process.stdout)
        self.children: list[int] = []

    async def ready(self) -> Child:
        while not (line := await self.line()).startswith("READY"):
            self.children.append(int(line.removeprefix("CHILD ")))
        pid, group, session = map(int, line.split()[1:])
        assert (pid, group, session) == (self.process.pid, os.getpgid(0), os.getsid(0))
        return self

    async def line(self) -> str:
        return (await self.stdout.receive_until(b"\n", 1 << 23)).decode()

    async def rest(self) -> bytes:
        data = b""
        while True:
            try:
                data += await self.stdout.receive()
            except anyio.EndOfStream:
                return data


@pytest.fixture
def cookie(no_survivors: Watch) -> str:
    """What the environment of everything here holds; a test ends what it starts."""
    cookie = f"MISBEHAVE={uuid4()}"
    no_survivors(cookie)
    return cookie


async def misbehave(stack: AsyncExitStack, cookie: str, *arguments: str) -> Child:
    process = await start("misbehave.py", *arguments, **dict([cookie.split("=")]))
    stack.push_async_callback(process.aclose)
    child = Child(process)
    stack.callback(end_all, cookie, child.children)
    with anyio.fail_after(10):
        return await child.ready()


def end_all(cookie: str, named: list[int]) -> None:
    while found := {*survivors(cookie), *named}:
        named.clear()
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["exit", "3"], 3), (["die", "9"], -9), (["die", "15"], -15), (["daemon-exit", "2"], 2), (["nohup"], 0)],
)
async def test_a_child_ends_as_told(cookie: str, arguments: list[str], code: int) -> None:
    async with AsyncExitStack() as stack:
        child = await misbehave(stack, cookie, *arguments)
        assert await child.process.wait() == code


@pytest.mark.parametrize(
    ("arguments", "descendants", "tell_tales"),
    [
        (["sleep"], 0, 1),
        (["ignore-term"], 0, 1),
        (["sh-wait"], 2, 3),
        (["setsid"], 1, 2),
        (["daemon"], 1, 2),
        (["daemon-clean"], 1, 1),
        (["tree", "2"], 2, 3),
        (["close-stdout"], 0, 1),
    ],
)
async def test_descendants_are_named_and_found_by_their_environment(
    cookie: str, arguments: list[str], descendants: int, tell_tales: int
) -> None:
    async with AsyncExitStack() as stack:
        child = await misbehave(stack, cookie, *arguments)
        assert len(set(child.children)) == descendants
        with anyio.fail_after(20):
            # Who is starting a program has no environment for a moment.
            while len(survivors(cookie)) != tell_tales:  # noqa: ASYNC110
                await anyio.sleep(0.01)


@pytest.mark.parametrize("mode", ["ignore-term", "slow-term", "forker"])
async def test_term_is_not_always_obeyed_at_once(cookie: str, mode: str) -> None:
    async with AsyncExitStack() as stack:
        child = await misbehave(stack, cookie, mode)
        child.process.terminate()
        if mode == "slow-term":
            assert [await child.line(), await child.line()] == ["TERM", "TIDY"]
            assert await child.process.wait() == 0
        elif mode == "forker":
            assert (await child.line()).startswith("CHILD")
        assert (child.process.returncode is None) == (mode != "slow-term")


async def test_output_outlives_the_child_that_kept_it_open(cookie: str) -> None:
    async with AsyncExitStack() as stack:
        child = await misbehave(stack, cookie, "keep-stdout")
        assert await child.process.wait() == 0
        with anyio.move_on_after(0.1) as scope:
            await child.rest()
        assert scope.cancelled_caught
        os.kill(child.children[0], signal.SIGKILL)
        assert await child.rest() == b""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["huge-line", "100000"], b"x" * 100_000 + b"\n"),
        (["binary"], bytes(range(256)) * 16),
        (["split-text"], "snow ☃ man\n".encode()),
        (["lines", "2"], b"out 0\nout 1\n"),
        (["close-stdout"], b""),
    ],
)
async def test_output_is_as_odd_as_told(cookie: str, arguments: list[str], expected: bytes) -> None:
    async with AsyncExitStack() as stack:
        child = await misbehave(stack, cookie, *arguments)
        assert await child.rest() == expected


def test_every_mode_has_a_line_that_says_what_it_does() -> None:
    assert [name for name, mode in MODES.items() if not mode.__doc__] == []


def test_the_environment_of_a_test_is_its_own(tmp_path: Path) -> None:
    assert not [name for name in os.environ if name.startswith("PREFECT_") and name != "PREFECT_HOME"]
    assert all(os.environ[name].startswith(str(tmp_path)) for name in ("HOME", "PREFECT_HOME", "PROCWORKER_HOME"))
