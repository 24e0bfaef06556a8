"""More output than anybody reads or keeps: nothing waits, memory and disk stay bounded, and what is read is all there.

PROCWORKER_TEST_FULL=1 writes 1 GiB per case, as fast as it goes; otherwise it is 64 MiB, and the cap is lower.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.abc
import psutil
import pytest

from procworker.system.output import GATHER_SECONDS, Follower
from procworker.system.spool import CAP
from procworker.system.watch import Watch

pytestmark = [pytest.mark.slow, pytest.mark.long]

MIB = 1024 * 1024
FULL = os.environ.get("PROCWORKER_TEST_FULL") == "1"
SIZE = (1024 if FULL else 64) * MIB
LIMIT = CAP if FULL else 8 * MIB
RATE = 0 if FULL else 40 * MIB
"""Bytes a second of a fast writer; 0 is as fast as it goes."""
MEMORY = 20 * MIB
BLOCKS = {
    "lines": b"a short line 12\n",
    "no line end": b"x" * 64,
    "bars": b"\r 42%|####   |",
    "binary": bytes(range(256)),
}
MARK = re.compile(r"\[procworker: (\d+) bytes of stdout were dropped here, no more than .* are kept\]")
LINE_END = re.compile(rb"[\r\n]")
WRITER = """
import os, sys, time
block, size, rate = eval(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
block *= 65536 // len(block)
began, done, disk = time.monotonic(), 0, 0
while done < size:
    done += os.write(1, block[:size - done])
    disk = max(disk, os.fstat(1).st_blocks * 512)
    if rate:
        time.sleep(max(0, began + done / rate - time.monotonic()))
print(time.monotonic() - began, disk, file=open(sys.argv[4], "w"))
"""


class Files(NamedTuple):
    stdout: Path
    stderr: Path


class Sink:
    """Counts what it is given, or takes nothing."""

    def __init__(self, blocked: bool) -> None:
        self.blocked = blocked
        self.lines = self.bytes = self.dropped = self.readable = 0
        self.kinds: set[str] = set()

    def take(self, stream: str, line: str) -> None:
        if self.blocked:
            raise BlockingIOError
        if mark := MARK.fullmatch(line):
            self.dropped += int(mark[1])
            return
        self.lines += 1
        self.bytes += len(line)
        if len(self.kinds) < 10:
            self.kinds.add(line[:64])
        self.readable += len(line) if line.isascii() else sum(character.isascii() for character in line)


async def write(files: Files, *argv: Any) -> anyio.abc.Process:
    with open(files.stdout, "ab") as out, open(files.stderr, "ab") as err:  # noqa: ASYNC230
        return await anyio.open_process([*map(str, argv)], stdin=subprocess.DEVNULL, stdout=out, stderr=err)


async def follow(folder: Path, kind: str, how: str, rate: float, limit: int) -> dict[str, Any]:
    """Follow a writer in a process of its own, and say what that cost. How: read, blocked or late."""
    files, sink = Files(folder / "stdout", folder / "stderr"), Sink(how in ("blocked", "late"))
    watch = Watch()
    follower = Follower(files, sink.take, cap=limit or None, watch=watch)
    own = psutil.Process()
    memory = 0
    gap = 0.0
    before = own.memory_info().rss
    processor = time.process_time()
    began = time.monotonic()

    async def measure() -> None:
        nonlocal memory, gap
        while True:
            looked = time.monotonic()
            memory = max(memory, own.memory_info().rss - before)
            await anyio.sleep(0.01)
            gap = max(gap, time.monotonic() - looked)

    writer = await write(files, sys.executable, "-SEc", WRITER, repr(BLOCKS[kind]), SIZE, rate, folder / "time")
    async with watch, anyio.create_task_group() as tasks:
        tasks.start_soon(measure)
        async with anyio.create_task_group() as following:
            following.start_soon(follower.follow)
            code = await writer.wait()
            sink.blocked = how == "blocked"
            follower.end()
        tasks.cancel_scope.cancel()
    seconds, disk = (folder / "time").read_text().split()
    return {
        "code": code,
        "seconds": time.monotonic() - began,
        "cpu": time.process_time() - processor,
        "writer": float(seconds),
        "disk": int(disk),
        "gap": gap,
        "memory": memory,
        "tail": len(follower.tail),
        **{name: value for name, value in vars(sink).items() if isinstance(value, int)},
        "kinds": sorted(sink.kinds),
    }


def storm(folder: Path, kind: str, how: str, rate: float = RATE, limit: int = LIMIT) -> dict[str, Any]:
    """What following such a writer came to, in a process that does nothing else."""
    argv = [sys.executable, __file__, str(folder), kind, how, str(rate), str(limit)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    env = {**os.environ, "PYTHONPATH": path, "PROCWORKER_TEST_FULL": "1" if FULL else "0"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=1800, env=env)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    print(kind, how, {name: value for name, value in told.items() if name != "kinds"})
    assert told["code"] == 0
    assert told["tail"] == 20
    assert told["memory"] < MEMORY
    return told


def assert_bounded(told: dict[str, Any]) -> None:
    """As the writer saw it after each write; more only where the machine gave the reader no turn for long."""
    speed, late = SIZE / told["writer"], max(0, told["gap"] - 4 * GATHER_SECONDS)
    assert told["disk"] <= LIMIT + speed * late


def readable(data: bytes) -> int:
    """How many characters can be told from a replacement and are no line ends."""
    return sum(byte < 128 and byte not in b"\r\n" for byte in data)


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_is_read_in_time_is_complete_and_memory_stays_small(tmp_path: Path, kind: str) -> None:
    told = storm(tmp_path, kind, "read", rate=4 * MIB if FULL else 0, limit=CAP if FULL else 2 * SIZE)

    block = BLOCKS[kind] * (65536 // len(BLOCKS[kind]))
    wholes, rest = divmod(SIZE, len(block))
    assert told["dropped"] == 0
    assert told["readable"] == wholes * readable(block) + readable(block[:rest])
    if kind in ("lines", "bars"):
        ends = wholes * len(LINE_END.findall(block)) + len(LINE_END.findall(block[:rest]))
        assert told["lines"] == ends + (kind == "bars")
        assert BLOCKS[kind].decode().strip("\r\n") in told["kinds"]
        assert len(told["kinds"]) <= 3  # nothing, and a last one that is cut


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_writer_as_fast_as_it_can_is_never_held_up_and_nothing_is_missing_unsaid(tmp_path: Path, kind: str) -> None:
    told = storm(tmp_path, kind, "read")

    if kind in ("lines", "no line end"):
        assert told["bytes"] + (told["lines"] if kind == "lines" else 0) + told["dropped"] == SIZE
    assert told["writer"] < SIZE / MIB
    assert_bounded(told)


@pytest.mark.parametrize("kind", BLOCKS)
def test_where_nobody_reads_disk_and_memory_are_bounded_and_the_writer_ends(tmp_path: Path, kind: str) -> None:
    told = storm(tmp_path, kind, "blocked")

    assert (told["lines"], told["dropped"]) == (0, 0)
    assert told["writer"] < SIZE / MIB
    assert_bounded(told)


def test_a_reader_that_comes_late_is_told_how_much_it_missed(tmp_path: Path) -> None:
    told = storm(tmp_path, "lines", "late")

    assert told["dropped"] > 0
    assert told["bytes"] + told["lines"] + told["dropped"] == SIZE
    assert told["bytes"] + told["lines"] >= LIMIT * 3 // 16, "what is kept while it is written as fast as can be"


def test_without_a_cap_the_disk_fills(tmp_path: Path) -> None:
    """The control."""
    told = storm(tmp_path, "no line end", "read", limit=0)

    assert told["bytes"] == SIZE
    assert told["disk"] >= SIZE


def test_a_shell_that_opens_dev_stdout_anew_is_not_held_up(tmp_path: Path) -> None:
    """Each `>` truncates the file, so a line lives until the next one: the last is shown, and those read in time."""
    files, lines = Files(tmp_path / "stdout", tmp_path / "stderr"), []
    script = "for i in 1 2 3 4 5 6 7 8 9; do echo line $i > /dev/stdout; sleep 0.3; done; echo end >> /dev/stdout"

    async def run() -> None:
        follower = Follower(files, lambda stream, line: lines.append(line))
        writer = await write(files, "sh", "-c", script)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follower.follow)
            with anyio.fail_after(60):
                assert await writer.wait() == 0
            follower.end()

    anyio.run(run)
    assert lines[-2:] == ["line 9", "end"]
    assert lines == sorted(set(lines), key=lines.index), "no line is shown twice"


if __name__ == "__main__":
    folder, kind, how, rate, limit = sys.argv[1:]
    print(json.dumps(anyio.run(follow, Path(folder), kind, how, float(rate), int(limit))))
