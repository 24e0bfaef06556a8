"""Find and end every process that a run started.

A process belongs to a run when it sits in the run's session, descends from one of its processes, or carries the
run's cookie in its environment. It is named by (pid, start time), so a reused pid is never taken for it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import anyio
import psutil

COOKIE = "PROCWORKER_RUN"
"""Name of the environment variable that marks everything a run started."""

KILL_SECONDS = 5.0
_DEAD = {"Z", "X"}
_STOP = getattr(signal, "SIGSTOP", None)
_CONT = getattr(signal, "SIGCONT", None)
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


class Process(NamedTuple):
    """One process, for good: `start` is the kernel's start time, so a reused pid compares unequal."""

    pid: int
    start: float


class Entry(NamedTuple):
    """What a scan saw of one process."""

    process: Process
    parent: int
    session: int
    dead: bool


Scan = Callable[[], Iterable[Entry]]


def identify(pid: int, *, dead: bool = False) -> Process | None:
    """Name the living process that has this pid now, or None; with `dead`, a zombie too."""
    entry = _entry(pid)
    return None if entry is None or (entry.dead and not dead) else entry.process


def is_alive(process: Process) -> bool:
    """Is exactly this process still there? A zombie is dead."""
    return identify(process.pid) == process


def send(process: Process, signum: int) -> bool:
    """Signal exactly this process; False when it is gone or not ours to signal."""
    if process.pid <= 1 or process.pid == os.getpid():
        return False
    handle = -1
    try:
        # The descriptor pins the process, so nothing can take its pid between the check and the signal. Old kernels
        # and some containers have none; without it the check alone must do.
        with suppress(AttributeError, OSError):
            handle = os.pidfd_open(process.pid)
        if not is_alive(process):
            return False
        if handle >= 0:
            signal.pidfd_send_signal(handle, signum)
        else:
            psutil.Process(process.pid).send_signal(signum)
    except (OSError, psutil.Error):
        return False
    finally:
        if handle >= 0:
            os.close(handle)
    return True


def _linux_entry(pid: int) -> Entry | None:
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            stat = file.read(1024)
    except OSError:
        return None
    # The command may hold blanks and brackets: the fields start after the last bracket.
    state, parent, _, session, *rest = stat[stat.rfind(b")") + 2 :].split()
    # A process whose first thread has ended looks like a zombie while its other threads run on.
    dead = state.decode() in _DEAD and int(rest[13]) <= 1
    return Entry(Process(pid, float(rest[15])), int(parent), int(session), dead)


def _portable_entry(pid: int) -> Entry | None:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            session = os.getsid(pid) if hasattr(os, "getsid") else 0
            dead = process.status() == psutil.STATUS_ZOMBIE
            return Entry(Process(pid, process.create_time()), process.ppid(), session, dead)
    except (psutil.Error, OSError):
        return None


LINUX = sys.platform.startswith("linux")
_entry = _linux_entry if LINUX else _portable_entry


def scan() -> Iterator[Entry]:
    """List every process of this host."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit()) if LINUX else psutil.pids()
    return (entry for pid in pids if (entry := _entry(pid)) is not None)


def carries(pid: int, cookie: str) -> bool:
    """Was this process started with the run's cookie in its environment?"""
    wanted = f"{COOKIE}={cookie}"
    if LINUX:
        try:
            with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
                return wanted.encode() in file.read().split(b"\0")
        except OSError:
            return False
    try:
        return psutil.Process(pid).environ().get(COOKIE) == cookie
    except (psutil.Error, OSError):
        return False


class Family:
    """Everything one run started, and the one way to end it."""

    def __init__(self, root: Process, cookie: str, *, scan: Scan = scan) -> None:
        self.root = root
        self.cookie = cookie
        self._scan = scan
        self._known = {root}
        self._session_open = True
        self._lock = anyio.Lock()
        self.ended: set[Process] = set()
        self.survivors: set[Process] = set()
        self._deadline = float("inf")

    def members(self) -> set[Process]:
        """Scan once and return the living members."""
        entries = {entry.process.pid: entry for entry in self._scan()}
        leader = entries.get(self.root.pid)
        # The kernel keeps a session's number while it has members. A stranger can hold it only after the last of
        # ours has gone: so once it was seen empty, or led by somebody else, it says nothing about us any more.
        self._session_open &= leader is None or leader.process == self.root
        ours = {pid for pid, entry in entries.items() if self._is_ours(pid, entry)}
        self._session_open &= any(entries[pid].session == self.root.pid for pid in ours)
        children: dict[int, list[int]] = {}
        for pid, entry in entries.items():
            children.setdefault(entry.parent, []).append(pid)
        queue = list(ours)
        while queue:
            born = [pid for pid in children.get(queue.pop(), ()) if pid not in ours]
            ours.update(born)
            queue.extend(born)
        living = {entries[pid].process for pid in ours - _untouchable() if not entries[pid].dead}
        self._known |= living
        return living

    def _is_ours(self, pid: int, entry: Entry) -> bool:
        return (
            entry.process in self._known
            or (self._session_open and entry.session == self.root.pid)
            or (not entry.dead and carries(pid, self.cookie))
        )

    async def end(self, grace: float, settle: float = 0.0, *, hurry: bool = True) -> None:
        """End every member: politely for at most `grace` seconds, then by force; fills `ended` and `survivors`.

        `settle` is how long members may take to leave by themselves before anything is sent. While another call is
        under way, this one shortens its grace (or, without `hurry`, waits for it) and then ends what is left.
        """
        if hurry:
            self._deadline = min(self._deadline, anyio.current_time() + settle + grace)
        async with self._lock:
            start = anyio.current_time()
            self._deadline = min(self._deadline, start + settle + grace)
            if not await self._gone(start + settle):
                living = self.members()
                self.ended |= living
                for process in living:
                    send(process, signal.SIGTERM)
                    if _CONT:
                        send(process, _CONT)
                await self._gone(self._deadline)
            self.survivors = await self._kill()
            self._deadline = float("inf")

    async def _gone(self, deadline: float) -> bool:
        """Wait for the set to become empty; a full scan only when all known members have gone."""
        pause = 0.01
        while True:
            if not any(is_alive(process) for process in self._known) and not self.members():
                return True
            if anyio.current_time() >= min(deadline, self._deadline):
                return False
            await anyio.sleep(min(pause, max(0.001, deadline - anyio.current_time())))
            pause = min(pause * 1.5, 0.1)

    async def _kill(self) -> set[Process]:
        """Freeze, kill and look again until two scans in a row are empty; return what survived KILL_SECONDS."""
        give_up, empty = anyio.current_time() + KILL_SECONDS, 0
        while empty < 2:
            living = self.members()
            if not living:
                empty += 1
                continue
            if anyio.current_time() > give_up:
                return living
            empty = 0
            if _STOP:  # what is stopped cannot fork while the others are killed
                for process in living:
                    send(process, _STOP)
                living |= self.members()
            for process in living:
                send(process, _KILL)
            self.ended |= living
            await anyio.sleep(0.02)
        return set()


def describe(process: Process) -> str:
    """Name a process for a person: pid and command name, never its arguments (they may hold secrets)."""
    with suppress(psutil.Error):
        return f"{process.pid} ({psutil.Process(process.pid).name()})"
    return str(process.pid)


def _untouchable() -> set[int]:
    """Pids that are never signalled: init, ourselves and our ancestors."""
    pids, pid = {0, 1}, os.getpid()
    while pid > 1 and (entry := _entry(pid)) is not None and pid not in pids:
        pids.add(pid)
        pid = entry.parent
    return pids
