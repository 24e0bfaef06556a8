"""Become the parent of orphans, so that a daemon without any mark of its run is still found (Linux, for programs only).

A process-wide decision: whoever embeds a worker is not asked for it. Orphans that end have to be reaped; only exact
pids are waited for, and never one that the event loop has started and waits for itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import anyio

PR_SET_CHILD_SUBREAPER = 36


class Adoption:
    """Which children of this process are orphans that it was given."""

    def __init__(self) -> None:
        self.on = False
        self.may_kill = False
        """Is every orphan that comes to us the work of a run?"""
        self._own: set[int] = set()
        self._spawning = 0

    @contextmanager
    def spawning(self) -> Iterator[set[int]]:
        """A child of our own is being made; its pid goes into the set, and is taken from it once it was waited for."""
        self._spawning += 1
        try:
            yield self._own
        finally:
            self._spawning -= 1

    def give_up(self) -> None:
        """From now on our children are none of its business."""
        self.on = self.may_kill = False
        _set(False)

    def disown(self, pid: int) -> None:
        """It was waited for: the pid may now be anybody's."""
        self._own.discard(pid)

    def code_of(self, pid: int) -> int | None:
        """The exit code of a fork whose zygote died, so that it became our child; of others nobody tells us."""
        if self.on and pid in self._own:
            with suppress(OSError):
                found, status = os.waitpid(pid, os.WNOHANG)
                return os.waitstatus_to_exitcode(status) if found else None
        return None

    def holds(self, pid: int, parent: int, session: int) -> bool:
        """Was this process given to us? Runs have sessions of their own, our other children share ours."""
        return (
            self.on
            and not self._spawning
            and parent == os.getpid()
            and pid not in self._own
            and session != os.getsid(0)
        )

    def reap(self) -> None:
        """Take leave of the orphans that have ended."""
        for pid in children():
            with suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{pid}/stat", "rb") as file:
                    state, parent, _, session, *_ = file.read().rpartition(b")")[2].split()
                if state == b"Z" and self.holds(pid, int(parent), int(session)):
                    os.waitpid(pid, os.WNOHANG)


adoption = Adoption()
"""That of this process."""


def children() -> list[int]:
    """The pids of our children, zombies too; empty where the kernel does not tell."""
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            with suppress(FileNotFoundError), open(f"/proc/self/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    return found


@asynccontextmanager
async def subreaper() -> AsyncIterator[None]:
    """Be a subreaper within the block, where the system has that; without it nothing changes.

    Orphans are killed only by a process that had no child before and is not pid 1: else they may be anybody's.
    """
    before = children()
    if not _set(True):
        yield
        return
    adoption.on, adoption.may_kill = True, os.getpid() != 1 and not before
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_reap)
            yield
            tasks.cancel_scope.cancel()
    finally:
        adoption.give_up()


async def _reap() -> None:
    with anyio.open_signal_receiver(signal.SIGCHLD) as ended:
        adoption.reap()
        async for _ in ended:
            adoption.reap()


def _set(on: bool) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        import ctypes

        return bool(ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False
