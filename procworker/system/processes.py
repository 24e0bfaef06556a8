"""Processes of this host: name one for good, list them, look at one and at its run's mark, signal one.

Each is named by (pid, start time), so that a reused pid is never taken for it. Start times are in clock ticks since the
boot on Linux, elsewhere in seconds since 1970.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

import psutil

COOKIE = "PROCWORKER_RUN"
"""Name of the environment variable that marks everything a run started."""

_DEAD = {b"Z", b"X"}
_MARK = f"\0{COOKIE}=".encode()
_PIECE = 16 * 1024
EXEC_LOOKS, EXEC_SECONDS = 20, 0.0005
"""How often to look again at a process amid an exec, whose environment is not there for a moment, and how soon."""
_elders: dict[int, tuple[int, float]] = {}
"""By pid, inode and start time of those that the last scan passed over: most of a host is older than any run. Linux
gives every process an inode of its own in /proc, also one with a pid that was used before."""


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


def identify(pid: int, *, dead: bool = False) -> Process | None:
    """Name the living process that has this pid now, or None; with `dead`, a zombie too."""
    entry = _entry(pid)
    return None if entry is None or (entry.dead and not dead) else entry.process


def is_touchable(process: Process) -> bool:
    """Is it neither init, nor ourselves, nor one of our ancestors?"""
    return process.pid not in untouchable()


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


def scan(since: float = 0.0) -> Iterable[Entry]:
    """List the processes of this host; on Linux without those that were started before `since`."""
    if not LINUX:
        return (entry for pid in psutil.pids() if (entry := _entry(pid)) is not None)
    elders, entries = {}, []
    with os.scandir("/proc") as listing:
        files = [(int(file.name), file.inode()) for file in listing if file.name.isdigit()]
    for pid, inode in files:
        known, start = _elders.get(pid, (0, since))
        if known != inode or start >= since:
            if (entry := _entry(pid)) is None:
                continue
            if (start := entry.process.start) >= since:
                entries.append(entry)
                continue
        elders[pid] = inode, start
    _elders.clear()
    _elders.update(elders)
    return entries


def mark(pid: int) -> str | None:
    """Return the cookie that this process was started with: "" when it was emptied, None when there is none to see."""
    if not LINUX:
        try:
            return psutil.Process(pid).environ().get(COOKIE)
        except (psutil.Error, OSError):
            return None
    looks, place = EXEC_LOOKS, f"/proc/{pid}/environ"
    while (environ := _read(place)) == b"" and looks > 0:  # of another user there is none to be read at all
        if _is_amid_exec(pid):
            time.sleep(EXEC_SECONDS)
            looks -= 1
        else:
            looks = 0  # it may have come since it was read
    environ = b"\0" + (environ or b"")
    start = environ.find(_MARK)
    if start < 0:
        return None
    return environ[start + len(_MARK) :].partition(b"\0")[0].decode("utf-8", "replace")


def _is_amid_exec(pid: int) -> bool:
    """Has it memory (a kernel thread has none), but no place there for an environment yet, not even an empty one?"""
    if (stat := _read(f"/proc/{pid}/stat")) is None:
        return False
    fields = stat[stat.rfind(b")") + 2 :].split()  # the third and those after it, see proc(5)
    memory, environ_start = fields[23 - 3], fields[50 - 3 : 51 - 3]
    return memory != b"0" and environ_start == [b"0"]


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
    """A start time that no process has, below those of all that start from now on: on Linux just below them."""
    if LINUX:
        return time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK") // 1 - 0.5
    return -1.0


def describe(process: Process) -> str:
    """Name a process for a person: pid and command name, never its arguments (they may hold secrets)."""
    with suppress(psutil.Error):
        return f"{process.pid} ({psutil.Process(process.pid).name()})"
    return str(process.pid)


def untouchable() -> set[int]:
    """Pids that are never signalled: init, ourselves and our ancestors."""
    pids, pid = {0, 1}, os.getpid()
    while pid > 1 and (entry := _entry(pid)) is not None and pid not in pids:
        pids.add(pid)
        pid = entry.parent
    return pids
