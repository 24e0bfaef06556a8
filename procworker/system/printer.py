"""Write to our own stdout and stderr without ever waiting for who reads them."""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import anyio

LIMIT = 256 * 1024
"""Bytes of our own messages that wait for a reader; beyond, the oldest lines go."""
PATIENCE_SECONDS = 2.0
"""How long the end of a program waits for a reader that takes nothing."""
PUMP_SECONDS = 0.5
BATCH = 32 * 1024
ERASE = b"\r\x1b[K"


class _Footer:
    """A line below all others on a terminal: it goes and comes back in the same write as what is printed above it."""

    def __init__(self) -> None:
        self.text = b""
        self.is_news = False
        self._drawn = False

    def around(self, lines: bytes) -> bytes:
        """Return what puts these lines where the footer was, and the footer below them."""
        before = ERASE if self._drawn else b""
        self.is_news, self._drawn = False, bool(self.text)
        return before + lines + self.text


class _Queue:
    """What waits for one reader: the rest of what it has begun to take, and whole texts behind it."""

    def __init__(self) -> None:
        self.rest = b""
        self.size = 0
        self._texts: deque[bytes] = deque()
        self._dropped = 0

    def add(self, text: bytes, limit: int) -> None:
        self._texts.append(text)
        self.size += len(text)
        while self.size > limit and len(self._texts) > 1:
            oldest = self._texts.popleft()
            self.size -= len(oldest)
            self._dropped += oldest.count(b"\n")

    def next(self, footer: _Footer | None = None) -> bytes:
        """What is to be written first; empty when nothing waits."""
        if self.rest:
            return self.rest
        if self._dropped:
            self.rest = b"[procworker: %d lines were dropped here, nobody read them]\n" % self._dropped
            self._dropped = 0
        elif self._texts:
            self.rest = b"".join(self._texts)
            self._texts.clear()
            self.size = 0
        if footer is not None and (self.rest or footer.is_news):
            self.rest = footer.around(self.rest)
        return self.rest


class Printer:
    """Prints whole lines in order, as far as the readers take them at once; the rest goes out with a later call."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._queues: dict[tuple[int, int], _Queue] = {}  # by file: stdout and stderr may be one pipe
        self._footers: dict[tuple[int, int], _Footer] = {}
        self._lock = threading.RLock()  # any thread may log
        self.harmless: Callable[[str], str] = str
        """Changes all that is printed, but what `command` prints."""
        self._batched = False
        self._filling: dict[str, tuple[TextIO, _Queue]] = {}  # by stream, while what is printed there is batched

    def print_line(self, stream: str, line: str) -> None:
        """The default sink: the stdout and stderr of runs go where ours go.

        Raises BlockingIOError while the reader takes nothing, and OSError or ValueError when there is none any more.
        """
        with self._lock:
            if (file := _file(stream)) is None:
                return
            line = self.harmless(line)
            known, queue = self._filling.get(stream, (None, None))
            if queue is not None and known is file and queue.size <= BATCH:  # what most lines of a flood come to
                queue.add(_encode(line + "\n", file), self._limit)
                return
            queue = self._queues.get(_place(file)) if _is_plain(file) else None
            waits = queue is not None and (not self._batched or queue.rest or queue.size > BATCH)
            if waits and not self._go_on(file):
                raise BlockingIOError(errno.EAGAIN, "the reader of our output takes nothing now")
            self._write(file, line + "\n")
            if self._batched and _is_plain(file):
                self._filling[stream] = file, self._queues[_place(file)]

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Write what is printed in the block in larger pieces, the last of it at the end."""
        self._batched = True
        try:
            yield
        finally:
            self._batched = False
            self._filling.clear()
            self.flush()

    def say(self, text: str, stream: str = "stdout") -> None:
        """Print whole lines of our own; while the reader takes nothing, the last 256 KiB wait. Raises nothing."""
        with self._lock, suppress(OSError, ValueError):  # nobody reads any more
            if (file := _file(stream)) is not None:
                self._write(file, self.harmless(text))

    def command(self, line: str) -> None:
        """Print what the reader of our stdout, a CI system, is to do."""
        with self._lock, suppress(OSError, ValueError):
            if (file := _file("stdout")) is not None:
                self._write(file, line + "\n")

    def footer(self, line: str, stream: str = "stdout") -> None:
        """Keep this line, which must not be wider than the terminal, below all that is printed; "" takes it away."""
        with self._lock, suppress(OSError, ValueError):
            if (file := _file(stream)) is None or not _is_plain(file):
                return
            place = _place(file)
            footer, text = self._footers.setdefault(place, _Footer()), line.encode(file.encoding, "replace")
            if text == footer.text:
                return
            footer.text, footer.is_news = text, True
            self._queues.setdefault(place, _Queue())
            if not self._batched:
                self._go_on(file)

    def flush(self) -> bool:
        """Write what waits, as far as it is taken at once; return whether nothing is left. Raises nothing."""
        with self._lock:
            done = True
            for file in (sys.stdout, sys.stderr) if self._queues else ():
                with suppress(OSError, ValueError):
                    done = (file is None or self._go_on(file)) and done
            return done

    async def pump(self) -> None:
        """Write what had to wait, a little after it can be taken, until cancelled: a task beside the work."""
        while True:
            await anyio.sleep(PUMP_SECONDS)
            self.flush()

    def drain(self, seconds: float = PATIENCE_SECONDS) -> bool:
        """Wait at most so long until nothing is left, at the end of a program; return whether that is so."""
        deadline = time.monotonic() + seconds
        while not (done := self.flush()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return done

    def _write(self, file: TextIO, text: str) -> None:
        if not _is_plain(file):
            _write_through(file, text)
            return
        place = _place(file)
        if place not in self._queues:
            if _is_writable(file.fileno()):
                file.flush()  # what others printed before us; mostly nothing
            self._queues[place] = _Queue()
        self._queues[place].add(_encode(text, file), self._limit)
        if not self._batched:
            self._go_on(file)

    def _go_on(self, file: TextIO) -> bool:
        """Return whether nothing waits for this file any more."""
        if not _is_plain(file) or (queue := self._queues.get(place := _place(file))) is None:
            return True
        self._filling.clear()
        footer = self._footers.get(place)
        try:
            with _Outlet(file.fileno()) as outlet:
                while data := queue.next(footer):
                    queue.rest = data[outlet.write(data) :]
        except BlockingIOError:
            return False
        except OSError:
            del self._queues[place]
            raise
        del self._queues[place]
        return True


class LogStream:
    """Our stderr for a logging.StreamHandler."""

    def __init__(self, printer: Printer) -> None:
        self._printer = printer

    def write(self, text: str) -> None:
        self._printer.say(text, "stderr")

    def flush(self) -> None:
        self._printer.flush()


PRINTER = Printer()
"""The one of this process."""
print_line = PRINTER.print_line


class _Outlet:
    """A file descriptor that can be written to without waiting, for the length of a block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._status = os.fstat(fd)
        self._own: int | None = None

    def __enter__(self) -> _Outlet:
        # O_NONBLOCK of what we were given is shared with the shell and other programs; a new open file is ours alone.
        terminal = os.isatty(self._fd)
        if terminal or stat.S_ISFIFO(self._status.st_mode):
            with suppress(OSError):  # not ours to open, no such system, or a pipe that nobody reads any more
                path = os.ttyname(self._fd) if terminal else f"/proc/self/fd/{self._fd}"
                self._own = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._own is not None:
            os.close(self._own)

    def write(self, data: bytes) -> int:
        """Write what is taken at once and return its size; raises BlockingIOError when that is nothing."""
        if self._own is not None:
            return os.write(self._own, data)
        if stat.S_ISREG(self._status.st_mode):
            return os.write(self._fd, data)
        if not _is_writable(self._fd):
            raise BlockingIOError
        return os.write(self._fd, data[: select.PIPE_BUF])


def _file(stream: str) -> TextIO | None:
    """None when it was closed before we started."""
    return sys.stdout if stream == "stdout" else sys.stderr


def _place(file: TextIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def _is_writable(fd: int) -> bool:
    return bool(select.select([], [fd], [], 0)[1])


def _is_plain(file: TextIO) -> bool:
    """Whether the stream does nothing but write to a file descriptor (a test's capture does more, so does Windows)."""
    if os.name != "posix" or type(file) is not io.TextIOWrapper:
        return False
    return type(getattr(file.buffer, "raw", file.buffer)) is io.FileIO


def _write_through(file: TextIO, text: str) -> None:
    try:
        file.write(text)
    except UnicodeEncodeError:  # our own output is ASCII only
        file.write(text.encode("ascii", "backslashreplace").decode())
    file.flush()


def _encode(text: str, file: TextIO) -> bytes:
    try:
        return text.encode(file.encoding, file.errors or "strict")
    except UnicodeEncodeError:
        return text.encode("ascii", "backslashreplace")
