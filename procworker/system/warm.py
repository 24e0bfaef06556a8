"""Start engines by forking an interpreter that has imported what they need, where that is as good as a new one.

Each zygote (`_zygote.py`) is of one kind: what decides how Python and Prefect come up was the same when it came up.
So nothing has to be changed in a fork but what any two processes differ in. What a run imports beyond its zygote is
learnt, as far as it is Prefect's own, and kept on disk.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup

from procworker.system.child import Child, check, spawn
from procworker.system.interpreter import Interpreter
from procworker.system.processes import COOKIE, LINUX
from procworker.system.zygote import Library, NotForked, Zygote

MOST = 4
"""How many zygotes there may be at a time, about 80 MB each."""
WARM_UP_SECONDS = 60.0
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 60.0, 3600.0
PER_RUN = re.compile(f"PREFECT__.*|{COOKIE}")
"""Variables that differ from run to run, and that nothing reads before the run begins."""
PLACES = re.compile(r"PYTHONPATH|PYTHONHOME|PYTHONPYCACHEPREFIX|PREFECT_\w*(PATH|HOME)")
"""Variables that may name places relative to the directory."""
SETTINGS_FILES = (".env", "prefect.toml", "pyproject.toml")
"""What Prefect reads in the directory that it is started in."""
LONGEST_LOOK = 1024 * 1024
MOST_REMEMBERED = 100

logger = logging.getLogger(__name__)

Kind = tuple[Any, ...]


class Start(Protocol):
    """What `spawn` is, and what does the same in another way."""

    async def __call__(
        self, argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path
    ) -> Child: ...


class Warm:
    """The zygotes of one worker."""

    def __init__(self, home: Path) -> None:
        self._place = home / "warm"
        self._zygotes: dict[Kind, Zygote] = {}
        self._retired: set[Zygote] = set()
        self._failures: dict[Kind, tuple[int, float]] = {}
        self._said: set[str] = set()
        self._tasks: TaskGroup | None = None

    async def __aenter__(self) -> Warm:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        tasks, self._tasks = self._tasks, None
        assert tasks
        for zygote in [*self._zygotes.values(), *self._retired]:
            zygote.close()
        await tasks.__aexit__(*exc_info)

    async def starter(self, interpreter: Interpreter, cwd: Path, env: Mapping[str, str]) -> Start:
        """Return what starts an engine of this interpreter there: a fork if possible, `spawn` if not."""
        check(cwd, env)
        try:
            kind, local = _kind(interpreter, cwd, env)
            zygote = await self._zygote(kind, interpreter, cwd if local else self._empty_place(), env)
            return partial(self._start, kind, zygote)
        except NotForked as why:
            self._say(why)
            return spawn

    async def _start(self, kind: Kind, zygote: Zygote, argv: Sequence[str], **how: Any) -> Child:
        try:
            child = await zygote.fork(**how)
        except NotForked as why:
            self._fail(kind)
            self._say(why)
            return await spawn(argv, **how)
        self._failures.pop(kind, None)
        return child

    async def _zygote(self, kind: Kind, interpreter: Interpreter, place: Path, env: Mapping[str, str]) -> Zygote:
        if not LINUX or self._tasks is None:
            raise NotForked("only Linux is known to bear it")
        self._tidy()
        zygote = self._zygotes.get(kind)
        if zygote is None:
            failures, until = self._failures.get(kind, (0, 0.0))
            if anyio.current_time() < until:
                raise NotForked(f"it has failed {failures} times and is tried again later")
            self._make_room()
            zygote = self._zygotes[kind] = Zygote(Library(self._place, interpreter))
            lent = {name: value for name, value in env.items() if not PER_RUN.fullmatch(name)}
            self._tasks.start_soon(zygote.serve, interpreter.path, lent, place, len(env[COOKIE]))
        with anyio.move_on_after(WARM_UP_SECONDS):
            await zygote.ready.wait()
        if not zygote.ready.is_set():
            zygote.retire(f"it is not ready after {WARM_UP_SECONDS:g} s")
        if zygote.over:
            self._fail(kind)
            raise NotForked(zygote.over)
        return zygote

    def _empty_place(self) -> Path:
        """A directory without anything that Prefect reads."""
        with suppress(OSError):
            self._place.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self._place
        return Path(os.sep)

    def _tidy(self) -> None:
        """Part with those that have ended, and with those that are not what is on disk."""
        for kind, zygote in list(self._zygotes.items()):
            if zygote.ready.is_set() and not zygote.over and not zygote.is_current:
                zygote.retire("the interpreter or Prefect has changed")
            if zygote.over:
                del self._zygotes[kind]
                self._retired.add(zygote)
        self._retired = {zygote for zygote in self._retired if zygote.is_in_use}

    def _make_room(self) -> None:
        """Retire who was not used for longest and has no runs, unless there is room for one more."""
        if len(self._zygotes) + len(self._retired) < MOST:
            return
        idle = [zygote for zygote in self._zygotes.values() if zygote.ready.is_set() and not zygote.is_in_use]
        if not idle:
            raise NotForked(f"{MOST} of other kinds are in use")
        min(idle, key=lambda zygote: zygote.used_at).retire("another kind is wanted")
        self._tidy()

    def _fail(self, kind: Kind) -> None:
        failures = self._failures.pop(kind, (0, 0.0))[0] + 1
        while len(self._failures) >= MOST_REMEMBERED:
            del self._failures[next(iter(self._failures))]
        # Once is bad luck: a zygote may die, or leave, just as it is asked.
        pause = min(RETRY_SECONDS * 2.0 ** min(failures - 2, 10), LONGEST_RETRY_SECONDS) if failures > 1 else 0.0
        self._failures[kind] = failures, anyio.current_time() + pause

    def _say(self, why: NotForked) -> None:
        if str(why) not in self._said and len(self._said) < MOST_REMEMBERED:
            self._said.add(str(why))
            logger.warning("Flow runs are spawned instead of forked from a warm interpreter: %s", why)


def _kind(interpreter: Interpreter, cwd: Path, env: Mapping[str, str]) -> tuple[Kind, bool]:
    """Name all that decides how Python and Prefect come up, and say whether the directory has a part in it."""
    variables = frozenset((name, value) for name, value in env.items() if not PER_RUN.fullmatch(name))
    local = _found(cwd / name for name in SETTINGS_FILES if _is_about_prefect(cwd / name))
    if any(PLACES.fullmatch(name) and _is_relative(value) for name, value in env.items()):
        local = (*local, str(cwd))
    user = env.get("HOME") or os.path.expanduser("~")
    home = env.get("PREFECT_HOME", "~/.prefect")
    files = (
        env.get("PREFECT_PROFILES_PATH", f"{home}/profiles.toml"),
        env.get("PREFECT_LOGGING_SETTINGS_PATH", f"{home}/logging.yml"),
    )
    found = _found(cwd / (user + file[1:] if file.startswith("~/") else file) for file in files)
    return (interpreter, variables, local, found), bool(local)


def _is_relative(places: str) -> bool:
    return not all(place.startswith(("/", "~")) for place in places.split(os.pathsep) if place)


def _is_about_prefect(path: Path) -> bool:
    """May a file of settings be of any use to Prefect? One that is too long to look into may."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return False
        return status.st_size > LONGEST_LOOK or path.name == "prefect.toml" or b"prefect" in path.read_bytes().lower()
    except OSError:
        return False


def _found(paths: Iterable[Path]) -> tuple[Any, ...]:
    """Which of these files there are, and as of when."""
    found = []
    for path in paths:
        with suppress(OSError):
            status = path.stat()
            found.append((str(path), status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)
