"""Wait until somebody writes to a file: the kernel tells where it can (Linux), else all files are looked at in turn."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup

POLL_SECONDS, AT_ONCE = 0.1, 150
"""Of more files than so many each is looked at less often."""
IN_MODIFY, IN_ONESHOT = 0x00000002, 0x80000000
_EVENT = struct.Struct("iIII")
_PIECE = 4096

wait_readable: Any = getattr(anyio, "wait_readable", None) or anyio.wait_socket_readable  # of anyio before 4.7


class Watched(Protocol):
    """Somebody who reads files that others append to."""

    @property
    def paths(self) -> Sequence[Path]: ...

    def has_news(self) -> bool:
        """Is there anything in them that was not seen?"""
        ...


class Watch:
    """Wakes each of many readers when there is something for it to do; they need no clocks of their own.

    A reader is told of the first write after it began to wait, not of each, so a quick writer costs no more than a slow
    one. Where the kernel has no room for another file (`fs.inotify.max_user_watches`), that reader's files are polled.
    """

    def __init__(self, *, notify: bool = sys.platform.startswith("linux")) -> None:
        self._notify = notify
        self._kernel: Inotify | None = None
        self._numbers: dict[int, Watched] = {}
        self._waiting: dict[Watched, anyio.Event] = {}
        self._polled: dict[Watched, None] = {}
        self._wanted = anyio.Event()
        self._tasks: TaskGroup | None = None

    @property
    def is_on(self) -> bool:
        return self._tasks is not None

    @property
    def is_told(self) -> bool:
        """Does the kernel tell of a write at once?"""
        return self._kernel is not None

    async def __aenter__(self) -> Watch:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        if self._notify:
            with suppress(OSError, AttributeError):
                self._kernel = Inotify()
                self._tasks.start_soon(self._hear, self._kernel)
        self._tasks.start_soon(self._look)
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        assert self._tasks
        tasks, self._tasks = self._tasks, None
        tasks.cancel_scope.cancel()
        try:
            await tasks.__aexit__(*exc_info)
        finally:
            if self._kernel is not None:
                self._kernel.close()
                self._kernel = None

    async def news(self, reader: Watched) -> None:
        """Wait until there is something for it to do; not for ever: whoever ends it has to `wake` it."""
        event = self._waiting[reader] = anyio.Event()
        numbers = self._ask(reader)
        try:
            if not numbers:
                self._polled[reader] = None
                self._wanted.set()
            elif reader.has_news():  # written before the kernel was asked
                return
            await event.wait()
        finally:
            self._waiting.pop(reader, None)
            self._polled.pop(reader, None)
            for number in numbers:
                self._numbers.pop(number, None)
                if self._kernel is not None:
                    self._kernel.forget(number)

    def wake(self, reader: Watched) -> None:
        if event := self._waiting.get(reader):
            event.set()

    def _ask(self, reader: Watched) -> list[int]:
        """Have the kernel tell of the next write; returns nothing where it will not."""
        numbers: list[int] = []
        if self._kernel is not None:
            try:
                for path in reader.paths:
                    numbers.append(self._kernel.once(path))
            except OSError:
                for number in numbers:
                    self._kernel.forget(number)
                return []
            self._numbers.update(dict.fromkeys(numbers, reader))
        return numbers

    async def _hear(self, kernel: Inotify) -> None:
        while True:
            await wait_readable(kernel.fd)
            for number in kernel.told():
                # Below zero: it had more to tell than it could hold.
                for reader in self._waiting if number < 0 else filter(None, [self._numbers.get(number)]):
                    self.wake(reader)

    async def _look(self) -> None:
        while True:
            if not self._polled:
                self._wanted = anyio.Event()
                await self._wanted.wait()
            await anyio.sleep(POLL_SECONDS)
            for reader in list(islice(self._polled, AT_ONCE)):
                del self._polled[reader]
                if reader.has_news():
                    self.wake(reader)
                else:
                    self._polled[reader] = None


class Inotify:
    """The kernel's news of files, as far as they are needed here: one write to a file. Raises OSError.

    See inotify(7); the standard library does not have it.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self._checked(self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))

    def close(self) -> None:
        os.close(self.fd)

    def once(self, path: Path) -> int:
        """Ask for the next write to a file, and return the number under which it will be told, once."""
        events = ctypes.c_uint32(IN_MODIFY | IN_ONESHOT)
        return self._checked(self._libc.inotify_add_watch(self.fd, os.fsencode(path), events))

    def forget(self, number: int) -> None:
        """Do not tell any more; nothing happens if it has been told."""
        self._libc.inotify_rm_watch(self.fd, number)

    def told(self) -> list[int]:
        """The numbers of what has happened meanwhile; -1 when there was more than the kernel could keep."""
        numbers, place = [], 0
        try:
            data = os.read(self.fd, _PIECE)
        except BlockingIOError:
            return []
        while place < len(data):
            number, _, _, length = _EVENT.unpack_from(data, place)
            numbers.append(number)
            place += _EVENT.size + length
        return numbers

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result
