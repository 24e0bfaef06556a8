"""Start one child process, in its own session, with its output in files."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import psutil

from procworker.errors import ConfigurationError, SpawnError
from procworker.system.files import file_limit
from procworker.system.journal import try_lock
from procworker.system.processes import Process, identify, is_alive, just_before_now
from procworker.system.subreaper import adoption

ADOPTED_POLL_SECONDS = 0.25
WARM = "PROCWORKER_WARM"
"""Stands in the environment that others see of a fork: it is not the fork's own."""


@dataclass(frozen=True)
class Child:
    """The first process of a run: one that this worker started, in whatever way, or one that it adopted."""

    identity: Process
    _exit: Callable[[], Awaitable[int | None]] | None = None
    """Waits for its exit code, or for the end of whoever could have told it: None."""

    @property
    def pid(self) -> int:
        return self.identity.pid

    async def wait(self) -> int | None:
        """Wait for the exit and return its code; minus the signal's number when a signal ended it.

        Of a process that is not our child nobody may be left to tell the code: None.
        """
        code = await self._exit() if self._exit else None
        while code is None and is_alive(self.identity):  # noqa: ASYNC110 - the kernel tells only parents
            await anyio.sleep(ADOPTED_POLL_SECONDS)
        if code is None:
            code = adoption.code_of(self.pid)
        adoption.disown(self.pid)
        return code

    def environment(self) -> dict[str, str]:
        """Return the environment it was started with, as far as it can be read."""
        with suppress(psutil.Error, OSError):
            if is_alive(self.identity) and WARM not in (environ := psutil.Process(self.pid).environ()):
                return environ
        return {}


def parse_command(command: str) -> list[str]:
    """Split a command into arguments by the platform's rules; no shell is ever involved.

    Raises ConfigurationError when quotes are left open or nothing is left to run.
    """
    try:
        if os.name == "nt":
            argv = [part.strip('"') for part in shlex.split(command, posix=False)]
        else:
            argv = shlex.split(command)
    except ValueError as error:
        raise ConfigurationError(f"the command cannot be split into arguments: {error}") from error
    if not argv:
        raise ConfigurationError("command is blank: leave it out to run the Prefect engine")
    return argv


def join_command(argv: Sequence[str]) -> str:
    """The inverse of parse_command."""
    return subprocess.list2cmdline(argv) if os.name == "nt" else shlex.join(argv)


async def spawn(argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path) -> Child:
    """Start argv with empty stdin and its output appended to two private files.

    Raises SpawnError with a sentence that says what is wrong.
    """
    check(cwd, env)
    group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", None)  # on Windows
    flags: dict[str, Any] = {"creationflags": group} if group else {}
    file_limit.make_room()
    before = just_before_now()
    try:
        # A cancelled open_process cleans up after itself, but the lines after it must not be cut off.
        with opened(stdout, stderr) as (out, err), anyio.CancelScope(shield=True), adoption.spawning() as own:
            spawned = await anyio.open_process(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env=dict(env),
                start_new_session=os.name == "posix",
                **flags,
            )
            own.add(spawned.pid)
            file_limit.restore(spawned.pid)
    except (OSError, ValueError) as error:
        raise SpawnError(_explain(error, argv, env)) from error
    # One that has ended and was reaped already has no start time any more; what it left behind is younger than this.
    return Child(identify(spawned.pid, dead=True) or Process(spawned.pid, before), spawned.wait)


def check(cwd: Path, env: Mapping[str, str]) -> None:
    """Raise SpawnError where no process can be started in this directory or with this environment."""
    if not os.path.isdir(cwd):  # unlike Path's, this one never raises
        what = "is not a directory" if os.path.exists(cwd) else "does not exist"
        raise SpawnError(f"The working directory {str(cwd)!r} {what}.")
    if not os.access(cwd, os.X_OK):
        raise SpawnError(f"The working directory {str(cwd)!r} cannot be entered: {os.strerror(errno.EACCES)}.")
    for name, value in env.items():
        if not name or "=" in name or "\0" in name + value:
            raise SpawnError(f"The environment variable {name!r} has a character that no environment can hold.")


@contextmanager
def opened(*paths: Path) -> Iterator[list[int]]:
    """Open private files to append to, for a child to inherit."""
    handles: list[int] = []
    try:
        for path in paths:
            handles.append(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
            # The lock belongs to what the child inherits: as long as it lives, other containers see that it does.
            try_lock(handles[-1])
        yield handles
    finally:
        for handle in handles:
            os.close(handle)


def _explain(error: Exception, argv: Sequence[str], env: Mapping[str, str]) -> str:
    code = getattr(error, "errno", None)
    if code == errno.E2BIG:
        largest = sorted(env, key=lambda name: -len(env[name]))[:5]
        return f"The environment or the command is too large for this system; the largest variables: {largest}."
    if getattr(error, "filename", None) in (None, argv[0]):  # else it is about cwd or an output file
        if code == errno.ENOENT:
            return f"The command {argv[0]!r} was not found; check `command`, `python` and PATH."
        if code in (errno.EACCES, errno.ENOEXEC):
            return f"The command {argv[0]!r} is not executable."
    return f"The command {argv[0]!r} could not be started: {error}."
