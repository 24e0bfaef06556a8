"""Following a run's output: lines whatever the pieces, bounded memory, secrets masked, nothing lost but on purpose."""

from __future__ import annotations

import itertools
import os
import re
import sys
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import misbehave
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from procworker.system import output as module
from procworker.system.output import PATIENCE_SECONDS, TAIL_LINES, Follower, Sink
from procworker.system.spool import CHUNK, LINE_LIMIT, Spool


class Files(NamedTuple):
    """What a run writes to."""

    stdout: Path
    stderr: Path


@pytest.fixture
def directory(tmp_path: Path) -> Files:
    return Files(tmp_path / "stdout", tmp_path / "stderr")


class Output:
    """A follower at work: what it said, and what it was told."""

    def __init__(self, directory: Files, sink: Sink | None = None) -> None:
        self.directory = directory
        self.lines: list[tuple[str, str]] = []
        self.moved = anyio.Event()
        self.follower = Follower(directory, sink or self.take)

    def take(self, stream: str, line: str) -> None:
        self.lines.append((stream, line))
        self.moved.set()

    @property
    def stdout(self) -> list[str]:
        return [line for stream, line in self.lines if stream == "stdout"]

    def write(self, data: bytes, stream: str = "stdout") -> None:
        with open(getattr(self.directory, stream), "ab") as file:
            file.write(data)

    async def until(self, fact: Callable[[], Any]) -> None:
        with anyio.fail_after(10):
            while not fact():
                self.moved = anyio.Event()
                await self.moved.wait()

    async def run(self, *argv: str) -> None:
        """Run a command that writes to the two files."""
        paths = (self.directory.stdout, self.directory.stderr)
        out, err = (os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) for path in paths)
        try:
            await anyio.run_process(argv, stdout=out, stderr=err)
        finally:
            os.close(out)
            os.close(err)

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Follow for the length of the block, then until the end."""
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.follower.follow)
                yield
                self.follower.end()


async def lines_of(directory: Files, data: bytes, stream: str = "stdout") -> list[str]:
    """The lines of a finished output."""
    output = Output(directory)
    output.write(data, stream)
    async with output.followed():
        pass
    return [line for _, line in output.lines]


def in_pieces(tmp_path: Path, pieces: list[bytes]) -> list[str]:
    """The lines of a file that grew in these pieces and was read after each."""
    path = tmp_path / "grows"
    path.write_bytes(b"")
    spool, lines = Spool("stdout", path), []
    for piece in pieces:
        with open(path, "ab") as file:
            file.write(piece)
        more = True
        while more:
            new, more = spool.read()
            lines += new
    spool.stop()
    return lines + spool.read()[0]


# Lines


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([b"a", b"\n", b"\r", b"\r\n", b"\xe2", b"\x98\x83", b"\xff", b"\0", b"\x1b[1m", b" "])),
    st.data(),
)
def test_lines_are_the_same_however_the_output_is_split(words: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    expected = [line.decode("utf-8", "replace") for line in re.split(rb"\r\n|\n|\r", whole)]
    if not expected[-1]:
        del expected[-1]

    with tempfile.TemporaryDirectory() as folder:
        assert in_pieces(Path(folder), pieces) == expected


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"a", ["a"]),
        (b"a\nb\n", ["a", "b"]),
        (b"\n\n", ["", ""]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"10%\r20%\r100%\n", ["10%", "20%", "100%"]),
        (b"10%\r20%\r", ["10%", "20%"]),
        (b"\xff\xfe\n", ["\ufffd\ufffd"]),
        (b"\x1b[31mred\x1b[0m\n", ["\x1b[31mred\x1b[0m"]),
        (b"a\0b\x0b\x0c\x1cc\n", ["a\0b\x0b\x0c\x1cc"]),
        ("a\u2028b\u0085c\n".encode(), ["a\u2028b\u0085c"]),
    ],
)
async def test_what_is_a_line(directory: Files, data: bytes, lines: list[str]) -> None:
    assert await lines_of(directory, data) == lines


async def test_lines_across_chunk_borders_stay_whole(directory: Files) -> None:
    lines = [f"{number} {'☃' * 1000}" for number in range(3 * CHUNK // 3000 + 100)]
    text = "".join(line + "\r\n" for line in lines).encode()
    assert len(text) > 3 * CHUNK
    assert await lines_of(directory, text) == lines


async def test_both_streams_are_followed_each_in_order(directory: Files) -> None:
    output = Output(directory)
    async with output.followed():
        for number in range(100):
            output.write(b"out %d\n" % number)
            output.write(b"err %d\n" % number, "stderr")
            if number % 40 == 0:
                await output.until(lambda n=number: len(output.lines) == 2 * n + 2)
    assert output.stdout == [f"out {number}" for number in range(100)]
    assert [line for stream, line in output.lines if stream == "stderr"] == [f"err {n}" for n in range(100)]


async def test_a_line_is_shown_when_it_is_written_not_at_the_end(directory: Files) -> None:
    output = Output(directory)
    async with output.followed():
        output.write(b"first\nsecond")
        await output.until(lambda: output.lines)
        assert output.stdout == ["first"]
    assert output.stdout == ["first", "second"]


async def test_what_is_written_just_before_the_end_is_not_lost(tmp_path: Path) -> None:
    for turn in range(20):
        output = Output(Files(tmp_path / f"out{turn}", tmp_path / f"err{turn}"))
        async with output.followed():
            await anyio.lowlevel.checkpoint()
            output.write(b"last\n")
        assert output.stdout == ["last"]


async def test_no_output_at_all_is_fine(directory: Files) -> None:
    output = Output(directory)
    async with output.followed():
        pass
    assert output.lines == []


# Real writers


async def written_by(directory: Files, *mode: str) -> list[str]:
    """The lines of a mode of misbehave.py after READY."""
    output = Output(directory)
    async with output.followed():
        await output.run(sys.executable, "-S", "-E", misbehave.__file__, *mode)
    assert output.stdout[0].startswith("READY ")
    return output.stdout[1:]


async def test_a_character_in_single_bytes_is_read_whole(directory: Files) -> None:
    assert await written_by(directory, "split-text") == ["snow ☃ man"]


async def test_binary_output_is_readable_and_harmless(directory: Files) -> None:
    text = "".join(await written_by(directory, "binary"))
    assert "ABC" in text
    assert "\ufffd" in text


async def test_a_huge_line_is_cut(directory: Files) -> None:
    lines = await written_by(directory, "huge-line", "1000000")
    assert "".join(lines) == "x" * 1_000_000
    assert max(map(len, lines)) <= CHUNK + LINE_LIMIT


async def test_a_writer_that_truncates_its_output_is_followed_on(directory: Files) -> None:
    output = Output(directory)
    async with output.followed():
        output.write(b"a long first line\n")
        await output.until(lambda: output.lines)
        await output.run("sh", "-c", "echo x > /dev/stdout")
        await output.until(lambda: len(output.lines) == 2)
        output.write(b"y\n")
    assert output.stdout == ["a long first line", "x", "y"]


async def test_ten_megabytes_without_a_line_end_need_little_memory(directory: Files) -> None:
    size = 10 * 1024 * 1024
    seen = {"bytes": 0, "longest": 0}

    def count(stream: str, line: str) -> None:
        seen["bytes"] += len(line)
        seen["longest"] = max(seen["longest"], len(line))

    output = Output(directory, count)
    for _ in range(10):
        output.write(b"x" * (size // 10))
    tracemalloc.start()
    try:
        async with output.followed():
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == {"bytes": size, "longest": LINE_LIMIT}
    assert peak < 4 * 1024 * 1024 + TAIL_LINES * LINE_LIMIT


async def test_a_flood_does_not_starve_the_event_loop(directory: Files) -> None:
    output = Output(directory, lambda stream, line: None)
    output.write((b"x" * 1023 + b"\n") * (20 * CHUNK // 1024))
    turns = 0
    async with output.followed():
        while output.follower._streams[0].spool._offset < 20 * CHUNK:
            await anyio.lowlevel.checkpoint()
            turns += 1
    assert turns >= 19


async def test_a_writer_that_was_allowed_to_stay_does_not_keep_us(directory: Files) -> None:
    """One that writes faster than we read would otherwise never let go."""
    block, later = b"x" * 1023 + b"\n", itertools.repeat(b"y" * 1023 + b"\n", 10 * CHUNK // 1024)
    seen: list[str] = []

    def write_on(stream: str, line: str) -> None:
        seen.append(line[0])
        output.write(next(later, b"") * 2)

    output = Output(directory, write_on)
    output.write(block * (2 * CHUNK // 1024))
    output.follower.end()
    await output.follower.follow()
    assert set(seen) == {"x"}
    assert len(seen) == 2 * CHUNK // 1024


# Who reads it


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError("disk full"), ValueError("I/O operation on closed file")])
async def test_a_sink_that_fails_does_not_stop_the_run(directory: Files, error: Exception) -> None:
    calls: list[str] = []

    def fail(stream: str, line: str) -> None:
        calls.append(line)
        raise error

    output = Output(directory, fail)
    output.write(b"a\nb\n")
    async with output.followed():
        pass
    assert calls == list(output.follower.tail) == ["a", "b"]


async def test_without_a_sink_the_last_lines_are_kept_all_the_same(directory: Files) -> None:
    follower = Follower(directory, None)
    directory.stdout.write_bytes(b"a\nb")
    follower.end()
    await follower.follow()
    assert list(follower.tail) == ["a", "b"]


async def test_the_tail_is_the_last_twenty_lines_of_both_streams(directory: Files) -> None:
    output = Output(directory)
    async with output.followed():
        output.write(b"".join(b"%d\n" % number for number in range(100)))
        await output.until(lambda: len(output.lines) == 100)
        output.write(b"error\n", "stderr")
    assert list(output.follower.tail) == [*map(str, range(81, 100)), "error"]


class Reader:
    """A sink that takes as many lines as it is told to, then refuses."""

    def __init__(self, room: float = 0) -> None:
        self.room = room
        self.lines: list[str] = []
        self.refused = 0

    def take(self, stream: str, line: str) -> None:
        if len(self.lines) >= self.room:
            self.refused += 1
            raise BlockingIOError
        self.lines.append(line)


async def test_a_sink_that_refuses_is_offered_the_same_line_again(directory: Files) -> None:
    reader = Reader(3)
    output = Output(directory, reader.take)
    async with output.followed():
        output.write(b"".join(b"%d\n" % number for number in range(10)))
        while reader.refused < 3:  # noqa: ASYNC110
            await anyio.sleep(0.001)
        assert reader.lines == ["0", "1", "2"]
        reader.room = float("inf")
    assert reader.lines == [str(number) for number in range(10)]


@pytest.mark.slow
async def test_waiting_for_a_sink_costs_little(directory: Files) -> None:
    reader = Reader()
    output = Output(directory, reader.take)
    async with output.followed():
        output.write(b"x\n")
        began = time.monotonic()
        await anyio.sleep(1)
        assert 2 < reader.refused < 10 + 20 * (time.monotonic() - began)
        reader.room = 1


@pytest.mark.slow
async def test_after_the_end_a_sink_that_takes_nothing_is_given_up_soon(
    directory: Files, caplog: pytest.LogCaptureFixture
) -> None:
    reader = Reader(5)
    output = Output(directory, reader.take)
    output.write(b"".join(b"%d\n" % number for number in range(100)))
    began = time.monotonic()
    async with output.followed():
        pass
    assert PATIENCE_SECONDS <= time.monotonic() - began < PATIENCE_SECONDS + 5
    assert reader.lines == [str(number) for number in range(5)]
    assert list(output.follower.tail) == [str(number) for number in range(80, 100)]
    assert "its reader takes nothing" in caplog.text


@pytest.mark.slow
async def test_a_slow_sink_is_waited_for(directory: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 3)
    reader = Reader(1)
    output = Output(directory, reader.take)
    output.write(b"".join(b"%d\n" % number for number in range(10)))
    async with output.followed():
        output.follower.end()
        while reader.room < 10:
            await anyio.sleep(0.5)
            reader.room += 1
    assert len(reader.lines) == 10


async def test_but_not_for_ever(directory: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.5)
    reader = Reader(1)
    output = Output(directory, reader.take)
    output.write(b"".join(b"%d\n" % number for number in range(1000)))
    done = anyio.Event()

    async def read_slowly() -> None:
        while not done.is_set():
            await anyio.sleep(0.01)
            reader.room += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read_slowly)
        async with output.followed():
            pass
        done.set()
    assert len(reader.lines) < 1000
    assert output.follower.tail[-1] == "999"
