"""Keep a run's output in its own directory, follow it line by line, and remember its last words."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.lowlevel

CHUNK = 256 * 1024
LINE_LIMIT = 64 * 1024
"""Bytes after which a line without an end is cut and goes on as the next one."""
TAIL_LINES = 20
POLL_SECONDS = 0.1

Sink = Callable[[str, str], None]
"""Takes (stream name, line)."""

_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")


class RunDirectory:
    """The private directory of one run: what it printed, until its outcome is reported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stdout = path / "stdout"
        self.stderr = path / "stderr"

    @classmethod
    def create(cls, home: Path, name: str) -> RunDirectory:
        """Make it below home; where home cannot be written, in the temporary directory."""
        path = home / "runs" / name
        try:
            path.mkdir(mode=0o700, parents=True)
        except OSError:
            path = Path(tempfile.mkdtemp(prefix="procworker-run-"))
        return cls(path)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class Mask:
    """Replace known secrets in a line by asterisks, those of several lines line by line.

    Values under six characters are left alone.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        lines = {line.strip() for secret in secrets for line in secret.splitlines()}
        known = sorted((line for line in lines if len(line) >= 6), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, known))) if known else None

    def __call__(self, text: str) -> str:
        return self._pattern.sub("***", text) if self._pattern else text


class _Stream:
    """One file that grows, read in bounded pieces and cut into lines."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._path = path
        self._offset = 0
        self._end = sys.maxsize
        self._rest = b""

    def stop(self) -> None:
        """Read no further than the file reaches now."""
        with suppress(OSError):
            self._end = os.stat(self._path).st_size

    def read(self) -> tuple[list[str], bool]:
        """Return the new complete lines, and whether more is waiting."""
        try:
            size = min(os.stat(self._path).st_size, self._end)
            if size < self._offset:  # the child truncated its own output
                self._offset = 0
            if size == self._offset:
                return [], False
            with open(self._path, "rb", buffering=0) as file:
                file.seek(self._offset)
                data = file.read(min(CHUNK, size - self._offset))
        except OSError:
            return [], False
        self._offset += len(data)
        *lines, self._rest = _LINE_END.split(self._rest + data)
        while len(self._rest) > LINE_LIMIT:
            lines.append(self._rest[:LINE_LIMIT])
            self._rest = self._rest[LINE_LIMIT:]
        return [_text(line) for line in lines], self._offset < size

    def flush(self) -> list[str]:
        rest, self._rest = self._rest, b""
        return [_text(rest)] if rest else []


def _text(line: bytes) -> str:
    return line.rstrip(b"\r").decode("utf-8", "replace")


class Follower:
    """Hand every line of a run's two files to a sink, in order per stream, and keep the last ones."""

    def __init__(self, directory: RunDirectory, sink: Sink | None) -> None:
        self._streams = [_Stream("stdout", directory.stdout), _Stream("stderr", directory.stderr)]
        self._sink = sink
        self._ended = anyio.Event()
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)

    def end(self) -> None:
        """The run has ended: read what is there, but nothing that a process allowed to stay writes later."""
        for stream in self._streams:
            stream.stop()
        self._ended.set()

    async def follow(self) -> None:
        """Read until `end` was called and nothing is left."""
        while True:
            ended = self._ended.is_set()
            more = False
            for stream in self._streams:
                lines, waiting = stream.read()
                more |= waiting
                self._emit(stream, lines)
            if more:
                await anyio.lowlevel.checkpoint()
            elif ended:
                break
            else:
                with anyio.move_on_after(POLL_SECONDS):
                    await self._ended.wait()
        for stream in self._streams:
            self._emit(stream, stream.flush())

    def _emit(self, stream: _Stream, lines: list[str]) -> None:
        self.tail.extend(lines)
        if self._sink is None:
            return
        for line in lines:
            # Nobody reads any more (a closed pipe): the run goes on, and its last lines are kept all the same.
            with suppress(OSError, ValueError):
                self._sink(stream.name, line)


def print_line(stream: str, line: str) -> None:
    """The default sink: the child's stdout and stderr go where ours go."""
    file = sys.stdout if stream == "stdout" else sys.stderr
    try:
        print(line, file=file, flush=True)
    except UnicodeEncodeError:  # our own output is ASCII only
        print(line.encode("ascii", "backslashreplace").decode(), file=file, flush=True)
