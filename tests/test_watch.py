"""Waiting for what others write: told by the kernel or seen by looking, each reader in its turn, nothing left over."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from procworker.system import watch as module
from procworker.system.output import Follower
from procworker.system.watch import Inotify, Watch

BOTH = pytest.mark.parametrize("notify", [True, False], ids=["told", "polled"])
HOURS = 3600.0
QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")


class Reader:
    """Counts how much of a file it knows."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, 0
        path.touch()

    @property
    def paths(self) -> list[Path]:
        return [self.path]

    def has_news(self) -> bool:
        return self.path.stat().st_size > self.seen

    def write(self) -> None:
        with open(self.path, "ab") as file:
            file.write(b"x")

    def read(self) -> None:
        self.seen = self.path.stat().st_size


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path / "file")


@pytest.fixture
def never_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", HOURS)


@asynccontextmanager
async def waiting(watch: Watch, *readers: Reader) -> AsyncIterator[anyio.Event]:
    """They all wait, and go on doing so, until something is written to each; then the event is set."""
    done, left = anyio.Event(), set(readers)

    async def wait(reader: Reader) -> None:
        await watch.news(reader)
        reader.read()
        left.discard(reader)
        if not left:
            done.set()

    async with anyio.create_task_group() as tasks:
        for reader in readers:
            tasks.start_soon(wait, reader)
        await anyio.wait_all_tasks_blocked()
        yield done
        tasks.cancel_scope.cancel()


@BOTH
async def test_one_watch_serves_many_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notify: bool) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 3)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    readers = [Reader(tmp_path / str(number)) for number in range(10)]
    async with Watch(notify=notify) as watch:
        for _ in range(3):
            async with waiting(watch, *readers) as done:
                for reader in readers:
                    reader.write()
                with anyio.fail_after(10):
                    await done.wait()


async def test_a_write_is_told_without_looking(reader: Reader, never_polls: None) -> None:
    async with Watch() as watch, waiting(watch, reader) as done:
        assert watch.is_told
        reader.write()
        with anyio.fail_after(10):
            await done.wait()


async def test_who_is_not_told_and_does_not_look_hears_nothing(reader: Reader, never_polls: None) -> None:
    """The control."""
    async with Watch(notify=False) as watch, waiting(watch, reader) as done:
        reader.write()
        with anyio.move_on_after(0.3):
            await done.wait()

    assert not done.is_set()


async def test_what_was_written_before_the_wait_is_news_at_once(reader: Reader, never_polls: None) -> None:
    reader.write()
    async with Watch() as watch:
        with anyio.fail_after(10):
            await watch.news(reader)


@BOTH
async def test_waking_needs_no_news(reader: Reader, never_polls: None, notify: bool) -> None:
    async with Watch(notify=notify) as watch, waiting(watch, reader) as done:
        watch.wake(reader)
        with anyio.fail_after(10):
            await done.wait()


async def test_files_that_the_kernel_cannot_watch_are_looked_at(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    async with Watch() as watch:
        watch._ask = lambda reader: []  # type: ignore[method-assign]  # what it answers without room
        async with waiting(watch, reader) as done:
            reader.write()
            with anyio.fail_after(10):
                await done.wait()


async def test_of_two_files_one_missing_the_other_is_not_kept(reader: Reader) -> None:
    async with Watch() as watch:
        reader.__class__ = type("Two", (Reader,), {"paths": [reader.path, reader.path.with_name("missing")]})

        assert watch._ask(reader) == []
        assert not watch._numbers


@pytest.mark.skipif(not QUEUE.exists(), reason="this system has no inotify")
async def test_more_than_the_kernel_can_keep_wakes_everybody(tmp_path: Path, never_polls: None) -> None:
    kernel, reader = Inotify(), Reader(tmp_path / "busy")
    try:
        for _ in range(int(QUEUE.read_text()) // 2 + 1):  # each write is told by two events
            kernel.once(reader.path)
            reader.write()
        told: list[int] = []
        while piece := kernel.told():
            told += piece
    finally:
        kernel.close()
    assert told[-1] == -1

    sleeper = Reader(tmp_path / "sleeper")
    async with Watch() as watch, waiting(watch, sleeper) as done:
        assert watch._kernel is not None
        watch._kernel.told = lambda: [-1]  # type: ignore[method-assign]  # so much for that
        watch._kernel.once(reader.path)
        reader.write()
        with anyio.fail_after(10):
            await done.wait()


@BOTH
async def test_nothing_is_left_over(reader: Reader, notify: bool) -> None:
    before = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    async with Watch(notify=notify) as watch:
        for _ in range(20):
            with anyio.move_on_after(0):
                await watch.news(reader)
        assert (watch._numbers, watch._waiting, watch._polled) == ({}, {}, {})

    assert (watch.is_on, watch.is_told) == (False, False)
    assert (os.listdir("/proc/self/fd") if before else []) == before


# With a follower


class Files:
    def __init__(self, place: Path) -> None:
        self.stdout, self.stderr = place / "stdout", place / "stderr"
        self.stdout.touch()
        self.stderr.touch()


@asynccontextmanager
async def followed(watch: Watch, files: Files) -> AsyncIterator[list[str]]:
    lines: list[str] = []
    follower = Follower(files, lambda stream, line: lines.append(line), watch=watch)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follower.follow)
            await anyio.wait_all_tasks_blocked()
            yield lines
            follower.end()


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


async def has(lines: list[str], number: int) -> None:
    while len(lines) < number:  # noqa: ASYNC110 - the sink of a follower is no coroutine
        await anyio.sleep(0.001)


async def test_a_line_is_shown_when_it_is_written(tmp_path: Path, never_polls: None) -> None:
    files = Files(tmp_path)
    async with Watch() as watch, followed(watch, files) as lines:
        for number in range(3):
            append(files.stderr, f"{number}\n")
            await has(lines, number + 1)

    assert lines == ["0", "1", "2"]


@BOTH
async def test_the_end_is_not_waited_for_until_the_next_look(tmp_path: Path, never_polls: None, notify: bool) -> None:
    files = Files(tmp_path)
    async with Watch(notify=notify) as watch, followed(watch, files) as lines:
        files.stdout.write_text("last words")

    assert lines == ["last words"]


async def test_a_watch_that_is_over_leaves_followers_to_themselves(tmp_path: Path) -> None:
    files = Files(tmp_path)
    async with Watch() as watch:
        pass
    async with followed(watch, files) as lines:
        files.stdout.write_text("line\n")
        await has(lines, 1)
