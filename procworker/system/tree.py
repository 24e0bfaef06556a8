"""Find and end every process that a run started.

A process belongs to a run when it sits in the run's session, descends from one of its processes, carries the run's
cookie in its environment, or is an orphan that no run which goes on can have left to us. One that was started with
another cookie, or an emptied one, has opted out. Each is named by (pid, start time), so that a reused pid is never
taken for it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from weakref import WeakSet

import anyio
import anyio.lowlevel

from procworker.system.processes import LINUX, Entry, Process, is_alive, mark, scan, send, untouchable
from procworker.system.subreaper import adoption

KILL_SECONDS = 5.0
LOOKS, LOOK_PAUSE_SECONDS = 100, 0.1
_STOP = getattr(signal, "SIGSTOP", None)
_CONT = getattr(signal, "SIGCONT", None)
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


Scan = Callable[[], Iterable[Entry]]


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


_families: WeakSet[Family] = WeakSet()
"""Those that run."""


def _scan() -> Iterable[Entry]:
    """List what may belong to a run: nothing that is older than the oldest of them."""
    return scan(min((family.root.start for family in _families), default=0.0))


_lookout = Lookout(_scan)
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
        spared = untouchable()  # whoever descends from them need not descend from us
        ours = {pid for pid, entry in entries.items() if self._is_ours(pid, entry, seen)} - spared
        if leader is None or leader.session == self.root.pid:  # else it has just been forked, and leads none yet
            self._session_open &= any(entries[pid].session == self.root.pid for pid in ours)
        queue = list(ours)
        while queue:
            children = set(seen.children.get(queue.pop(), ())) - ours - spared
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
