"""Find and end every process that a run started.

A process belongs to a run when it sits in the run's session, descends from one of its processes, carries the run's
cookie in its environment, or is an orphan that no run which goes on can have left to us. One that was started with
another cookie, or an emptied one, has opted out. Each is named by (pid, start time), so that a reused pid is never
taken for it.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from typing import NamedTuple
from weakref import WeakSet

import anyio
import anyio.lowlevel
import psutil

from procworker.system.subreaper import adoption

COOKIE = "PROCWORKER_RUN"
"""Name of the environment variable that marks everything a run started."""

KILL_SECONDS = 5.0
LOOKS, LOOK_PAUSE_SECONDS = 100, 0.1
_DEAD = {b"Z", b"X"}
_MARK = f"\0{COOKIE}=".encode()
_PIECE = 16 * 1024
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


def is_touchable(process: Process) -> bool:
    """Is it neither init, nor ourselves, nor one of our ancestors?"""
    return process.pid not in _untouchable()


def is_alive(process: Process) -> bool:
    """Is exactly this process still there? A zombie is dead."""
    try:
        return identify(process.pid) == process
    except OSError:  # who cannot be looked at is not gone
        return True


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
        if identify(process.pid) != process:  # raises where it cannot be looked at: then it is not signalled
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


def _read(path: str) -> bytes | None:
    """Read a file below /proc: thousands of them at a time, hence by hand."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # it is we who cannot look
            raise
        return None
    try:
        data = piece = os.read(descriptor, _PIECE)
        while len(piece) == _PIECE:
            data += (piece := os.read(descriptor, _PIECE))
        return data
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _linux_entry(pid: int) -> Entry | None:
    if (stat := _read(f"/proc/{pid}/stat")) is None:
        return None
    # The command may hold blanks and brackets: the fields start after the last bracket.
    state, parent, _, session, *rest = stat[stat.rfind(b")") + 2 :].split()
    # A process whose first thread has ended looks like a zombie while its other threads run on.
    dead = state in _DEAD and int(rest[13]) <= 1
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


def mark(pid: int) -> str | None:
    """Return the cookie that this process was started with: "" when it was emptied, None when there is none to see."""
    if not LINUX:
        try:
            return psutil.Process(pid).environ().get(COOKIE)
        except (psutil.Error, OSError):
            return None
    environ = b"\0" + (_read(f"/proc/{pid}/environ") or b"")
    start = environ.find(_MARK)
    if start < 0:
        return None
    return environ[start + len(_MARK) :].partition(b"\0")[0].decode("utf-8", "replace")


def find_root(cookie: str) -> Process | None:
    """Return the eldest living process that was started with this cookie."""
    return min(
        (entry.process for entry in scan() if not entry.dead and mark(entry.process.pid) == cookie),
        key=lambda process: process.start,
        default=None,
    )


def age(process: Process) -> float:
    """How many seconds ago the process was started, those that the system slept included."""
    if LINUX:
        return time.clock_gettime(time.CLOCK_BOOTTIME) - process.start / os.sysconf("SC_CLK_TCK")
    return time.time() - process.start


def just_before_now() -> float:
    """A start time just below those of all processes that are started from now on; no process has it."""
    if LINUX:
        return time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK") // 1 - 0.5
    return -1.0


class Snapshot:
    """All processes at one moment; what more must be known of one is read once."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = {entry.process.pid: entry for entry in entries}
        self.children: dict[int, list[int]] = {}
        for pid, entry in self.entries.items():
            self.children.setdefault(entry.parent, []).append(pid)
        self._marks: dict[int, str | None] = {}

    def mark(self, pid: int) -> str | None:
        if pid not in self._marks:
            self._marks[pid] = None if self.entries[pid].dead else mark(pid)
        return self._marks[pid]


class Lookout:
    """One scan for all who ask at the same time; it never starts before they asked."""

    def __init__(self, scan: Scan) -> None:
        self._scan = scan
        self._turn: list[Snapshot] = []

    def look_now(self) -> Snapshot:
        return Snapshot(self._scan())

    async def _look_patiently(self) -> Snapshot:
        """Too many open files, ours or the system's, are waited for a while."""
        for _ in range(LOOKS):
            with suppress(OSError):
                return self.look_now()
            await anyio.sleep(LOOK_PAUSE_SECONDS)
        return self.look_now()

    async def look(self) -> Snapshot:
        turn = self._turn
        await anyio.lowlevel.checkpoint()
        if not turn:
            self._turn = []
            turn.append(await self._look_patiently())
        return turn[0]


_lookout = Lookout(scan)
_families: WeakSet[Family] = WeakSet()
"""Those that run."""
_spared: set[Process] = set()
"""Orphans that a run was allowed to leave."""


class Family:
    """Everything one run started, and the one way to end it."""

    def __init__(self, root: Process, cookie: str, *, scan: Scan | None = None) -> None:
        self.root = root
        self.cookie = cookie
        self.ended: set[Process] = set()
        self.survivors: set[Process] = set()
        self.given_up = False
        """Could the root itself not be killed?"""
        self.on_giving_up: Callable[[], None] | None = None
        self._lookout = Lookout(scan) if scan else _lookout
        self._known = {root}
        self._session_open = True
        self.is_ending = False
        self._deadline = float("inf")
        _families.add(self)

    @cached_property
    def _lock(self) -> anyio.Lock:
        return anyio.Lock()

    def close(self) -> None:
        """The run is over: what comes up now is not its work, and what may stay of it is spared for good."""
        if adoption.may_kill and not self.is_ending:
            self.is_ending = True
            _spared.update(self.members())
        _families.discard(self)

    def members(self) -> set[Process]:
        """Scan once and return the living members."""
        return self._pick(self._lookout.look_now())

    def _pick(self, seen: Snapshot) -> set[Process]:
        entries = seen.entries
        leader = entries.get(self.root.pid)
        # The kernel keeps a session's number while it has members. A stranger can hold it only after the last of
        # ours has gone: so once it was seen empty, or led by somebody else, it says nothing about us any more.
        self._session_open &= leader is None or leader.process == self.root
        untouchable = _untouchable()  # whoever descends from them need not descend from us
        ours = {pid for pid, entry in entries.items() if self._is_ours(pid, entry, seen)} - untouchable
        if leader is None or leader.session == self.root.pid:  # else it has just been forked, and leads none yet
            self._session_open &= any(entries[pid].session == self.root.pid for pid in ours)
        queue = list(ours)
        while queue:
            children = set(seen.children.get(queue.pop(), ())) - ours - untouchable
            born = {pid for pid in children if seen.mark(pid) is None}
            ours |= born
            queue.extend(born)
        living = {entries[pid].process for pid in ours if not entries[pid].dead}
        self._known |= living
        return living

    def _is_ours(self, pid: int, entry: Entry, seen: Snapshot) -> bool:
        if entry.process == self.root:
            return True
        if LINUX and entry.process.start < self.root.start:  # older than the run; most of a host is
            return False
        if (cookie := seen.mark(pid)) is not None:
            return cookie == self.cookie  # another one, or an emptied one, is the wish to be left alone
        in_session = self._session_open and entry.session == self.root.pid
        return entry.process in self._known or in_session or self._is_orphan(pid, entry)

    def _is_orphan(self, pid: int, entry: Entry) -> bool:
        """Was it given to us, and can no run that goes on have started it?"""
        return (
            adoption.may_kill
            and entry.process not in _spared
            and adoption.holds(pid, entry.parent, entry.session)
            and all(other.is_ending or other.root.start > entry.process.start for other in _families)
        )

    async def end(self, grace: float, settle: float = 0.0, *, hurry: bool = True) -> None:
        """End every member: politely for at most `grace` seconds, then by force; fills `ended` and `survivors`.

        `settle` is how long members may take to leave by themselves before anything is sent. While another call is
        under way, this one shortens its grace (or, without `hurry`, waits for it) and then ends what is left.
        """
        self.is_ending = True
        if hurry:
            self._deadline = min(self._deadline, anyio.current_time() + settle + grace)
        async with self._lock:
            start = anyio.current_time()
            self._deadline = min(self._deadline, start + settle + grace)
            gone = await self._gone(start + settle)
            if not gone:
                living = await self._look()
                self.ended |= living
                for process in living:
                    send(process, signal.SIGTERM)
                    if _CONT:
                        send(process, _CONT)
                gone = await self._gone(self._deadline)
            self.survivors = await self._kill(gone)
            self._deadline = float("inf")
            if self.root in self.survivors:
                self.given_up = True
                if self.on_giving_up:
                    self.on_giving_up()

    async def _look(self) -> set[Process]:
        return self._pick(await self._lookout.look())

    async def _gone(self, deadline: float) -> bool:
        """Wait for the set to become empty; a full scan only when all known members have gone."""
        pause = 0.01
        while True:
            if not any(is_alive(process) for process in self._known) and not await self._look():
                return True
            if anyio.current_time() >= min(deadline, self._deadline):
                return False
            await anyio.sleep(min(pause, max(0.001, deadline - anyio.current_time())))
            pause = min(pause * 1.5, 0.1)

    async def _kill(self, gone: bool) -> set[Process]:
        """Freeze, kill and look again until two scans in a row are empty; return what survived KILL_SECONDS.

        With `gone`, one scan was empty already. A single one may miss who is born while it goes on.
        """
        give_up, empty = anyio.current_time() + KILL_SECONDS, int(gone)
        while empty < 2:
            living = await self._look()
            if not living:
                empty += 1
                continue
            if anyio.current_time() > give_up:
                return living
            empty = 0
            if _STOP:  # what is stopped cannot fork while the others are killed
                for process in living:
                    send(process, _STOP)
                living |= await self._look()
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
