"""Start engines by forking an interpreter that has imported what they need, where that is as good as a new one.

Each zygote (`_zygote.py`) is of one kind: what decides how Python and Prefect come up was the same when it came up.
So nothing has to be changed in a fork but what any two processes differ in. What a run imports beyond its zygote is
learnt, as far as it is Prefect's own, and kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import anyio
from anyio.abc import Process as Spawned
from anyio.abc import TaskGroup

from procworker.system.child import WARM, Child, check, child_of, opened, spawn
from procworker.system.files import restore_file_limit
from procworker.system.interpreter import Interpreter
from procworker.system.subreaper import adoption
from procworker.system.tree import COOKIE, LINUX, find_root

SCRIPT = str(Path(__file__).with_name("_zygote.py"))
MOST = 4
"""How many zygotes there may be at a time, about 90 MB each."""
IDLE_SECONDS, WARM_UP_SECONDS, REPLY_SECONDS, LEAVE_SECONDS = 600.0, 60.0, 10.0, 2.0
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 60.0, 3600.0
EARLY = re.compile(
    r"(PYTHON|LD_|DYLD_|MALLOC_|GLIBC_|LC_|LANG|PREFECT_(?!_)|PYDANTIC_|OTEL_|SSL_CERT_)\w*"
    r"|HOME|TZ|TERM|COLORTERM|NO_COLOR|FORCE_COLOR|TTY_COMPATIBLE|COLUMNS|LINES"
)
"""What acts before or while Prefect is imported: on the loader, on Python, on Prefect's settings and its logging."""
LENT = ("PATH", "TMPDIR", "USER", "LOGNAME")
SETTINGS_FILES = {".env": b"PREFECT", "prefect.toml": b"", "pyproject.toml": b"tool.prefect"}
"""What Prefect reads in the directory that it is started in, and what stands there if it is of any use to it."""
MOST_TOLD = 100

logger = logging.getLogger(__name__)

JSON = dict[str, Any]
Kind = tuple[Any, ...]
wait_readable = getattr(anyio, "wait_readable", None) or anyio.wait_socket_readable  # of anyio before 4.7


class Start(Protocol):
    """What `spawn` is, and what does the same in another way."""

    async def __call__(
        self, argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path
    ) -> Child: ...


class NotForked(Exception):
    """There is no such process: it has to be spawned. Says why."""


class Exit:
    """How one fork ended: its code, or None when its zygote ended before it."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.known = anyio.Event()

    async def wait(self) -> int | None:
        await self.known.wait()
        return self.code


class Zygote:
    """Our end of one warm interpreter; `serve` is its life."""

    def __init__(self, kind: Kind, library: Library) -> None:
        self.kind = kind
        self.ready = anyio.Event()
        """It can fork, or never will."""
        self.over = ""
        """Why it forks nothing any more."""
        self.used_at = anyio.current_time()
        self.exits: dict[int, Exit] = {}
        self._library = library
        self._channel, self._theirs = socket.socketpair()
        self._stamps: dict[str, int] = {}
        self._turn = anyio.Lock()
        self._answered = anyio.Event()
        self._answer: JSON = {}
        self._forked = Exit()

    async def serve(self, python: str, env: Mapping[str, str], cwd: Path, mark_length: int) -> None:
        """Start it, hear what it says, and see it leave."""
        mark = "zygote".ljust(mark_length, "-")
        terms = {"mark": f"{COOKIE}={mark}", "modules": self._library.modules, "idle": IDLE_SECONDS}
        process = None
        with anyio.CancelScope(shield=True), self._channel:
            try:
                with self._theirs, adoption.spawning() as own:
                    process = await anyio.open_process(
                        [python, SCRIPT],
                        stdin=self._theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        env={**env, COOKIE: mark, WARM: "1"},
                        cwd=cwd,
                        start_new_session=True,
                    )
                    own.add(process.pid)
                    restore_file_limit(process.pid)
                self._channel.sendall(json.dumps(terms).encode() + b"\n")
                self._channel.setblocking(False)
                await self._listen()
            except OSError as error:
                self.over = self.over or f"it cannot be talked to: {error}"
            self._give_up("it has ended")
        if process is not None:
            await _see_off(process)

    async def _listen(self) -> None:
        rest = b""
        while True:
            await wait_readable(self._channel)
            if not (piece := self._channel.recv(65536)):
                return
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self._hear(json.loads(line))

    def _hear(self, said: JSON) -> None:
        if "ended" in said:
            if exit := self.exits.pop(said["ended"], None):
                exit.code = said["code"]
                exit.known.set()
            if self.over and not self.exits:
                self.retire(self.over)
        elif "ready" in said:
            self._stamps = said["ready"]
            self.ready.set()
        elif "failed" in said:
            self._give_up(said["failed"])
        elif "learnt" in said:
            self._library.add(said["learnt"])
        else:
            if "forked" in said:
                self._forked = self.exits[said["forked"]] = Exit()
            self._answer = said
            self._answered.set()

    def _give_up(self, why: str) -> None:
        self.over = self.over or why
        self.ready.set()
        self._answered.set()
        for exit in self.exits.values():
            exit.known.set()
        self.exits = {}

    @property
    def is_current(self) -> bool:
        """Is on disk what it has in memory?"""
        with suppress(OSError):
            return all(os.stat(path).st_mtime_ns == stamp for path, stamp in self._stamps.items())
        return False

    def close(self) -> None:
        """End it now; what it has forked goes on."""
        self._give_up("the worker has ended")
        self.retire(self.over)

    def retire(self, why: str) -> None:
        """Have it fork nothing any more, and end it as soon as nothing runs that it has forked."""
        self.over = self.over or why
        if not self.exits:
            with suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)

    async def fork(self, *, cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path) -> Child:
        """As spawn(); raises NotForked."""
        check(cwd, env)
        self.used_at = anyio.current_time()
        order = {"mark": f"{COOKIE}={env[COOKIE]}", "env": dict(env), "cwd": str(cwd)}
        async with self._turn:
            if self.over:
                raise NotForked(self.over)
            self._answered, self._answer = anyio.Event(), {}
            try:
                with _memory(json.dumps(order).encode()) as file, opened(stdout, stderr) as handles:
                    socket.send_fds(self._channel, [b"fork\n"], [*handles, file.fileno()])
                    with anyio.move_on_after(REPLY_SECONDS):
                        await self._answered.wait()
            except OSError as error:
                raise NotForked(f"it cannot be asked: {error}") from error
            answer, exit = self._answer, self._forked
        if "forked" in answer:
            with adoption.spawning() as own:
                own.add(answer["forked"])
            return child_of(answer["forked"], exit.wait)
        if "refused" in answer:
            if answer["spoilt"]:
                self._library.forget()
                self.retire(answer["refused"])
            raise NotForked(answer["refused"])
        # It has died, or hangs; but it may have forked before.
        self.retire("it does not answer")
        if root := find_root(env[COOKIE]):
            return Child(root)
        raise NotForked(self.over)


class Library:
    """The modules that are imported before the fork, for one Prefect in one interpreter; kept on disk."""

    def __init__(self, place: Path, interpreter: Interpreter) -> None:
        name = hashlib.sha256(os.fsencode(interpreter.path)).hexdigest()[:12]
        self._path = place / f"prefect-{interpreter.prefect_version}-{name}.json"
        self.modules: list[str] = []
        with suppress(OSError, ValueError):
            known = json.loads(self._path.read_bytes())
            if isinstance(known, list) and all(isinstance(name, str) for name in known):
                self.modules = known

    def add(self, modules: Iterable[str]) -> None:
        self.modules = list(dict.fromkeys([*self.modules, *modules]))
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with suppress(OSError):
            new.write_text(json.dumps(self.modules))
            new.replace(self._path)

    def forget(self) -> None:
        """What was learnt was too much."""
        self.modules = []
        with suppress(OSError):
            self._path.unlink()


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
        assert self._tasks
        for zygote in [*self._zygotes.values(), *self._retired]:
            zygote.close()
        await self._tasks.__aexit__(*exc_info)

    async def starter(self, interpreter: Interpreter, cwd: Path, env: Mapping[str, str]) -> Start:
        """Return what starts an engine of this interpreter there: a fork if possible, `spawn` if not."""
        try:
            return partial(self._start, await self._zygote(interpreter, cwd, env))
        except NotForked as why:
            self._say(why)
            return spawn

    async def _start(self, zygote: Zygote, argv: Sequence[str], **how: Any) -> Child:
        try:
            child = await zygote.fork(**how)
        except NotForked as why:
            self._fail(zygote.kind)
            self._say(why)
            return await spawn(argv, **how)
        self._failures.pop(zygote.kind, None)
        return child

    async def _zygote(self, interpreter: Interpreter, cwd: Path, env: Mapping[str, str]) -> Zygote:
        if not LINUX or self._tasks is None:
            raise NotForked("only Linux is known to bear it")
        self._tidy()
        kind, local = _kind(interpreter, cwd, env)
        zygote = self._zygotes.get(kind)
        if zygote is None:
            failures, until = self._failures.get(kind, (0, 0.0))
            if anyio.current_time() < until:
                raise NotForked(f"it has failed {failures} times and is tried again later")
            self._make_room()
            zygote = self._zygotes[kind] = Zygote(kind, Library(self._place, interpreter))
            lent = {name: value for name, value in env.items() if name in LENT or EARLY.fullmatch(name)}
            place = cwd if local else self._empty_place()
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
        self._retired = {zygote for zygote in self._retired if zygote.exits}

    def _make_room(self) -> None:
        """Retire who was not used for longest and has no runs, unless there is room for one more."""
        if len(self._zygotes) + len(self._retired) < MOST:
            return
        idle = [zygote for zygote in self._zygotes.values() if zygote.ready.is_set() and not zygote.exits]
        if not idle:
            raise NotForked(f"{MOST} warm interpreters of other kinds are in use")
        min(idle, key=lambda zygote: zygote.used_at).retire("another kind is wanted")
        self._tidy()

    def _fail(self, kind: Kind) -> None:
        failures = self._failures.pop(kind, (0, 0.0))[0] + 1
        while len(self._failures) >= MOST_TOLD:
            del self._failures[next(iter(self._failures))]
        # Once is bad luck: a zygote may die, or leave, just as it is asked.
        pause = min(RETRY_SECONDS * 2.0 ** min(failures - 2, 10), LONGEST_RETRY_SECONDS) if failures > 1 else 0.0
        self._failures[kind] = failures, anyio.current_time() + pause

    def _say(self, why: NotForked) -> None:
        if str(why) not in self._said and len(self._said) < MOST_TOLD:
            self._said.add(str(why))
            logger.warning("Flow runs are spawned instead of forked from a warm interpreter: %s", why)


def _kind(interpreter: Interpreter, cwd: Path, env: Mapping[str, str]) -> tuple[Kind, bool]:
    """Name all that decides how Python and Prefect come up, and say whether the directory has a part in it."""
    early = frozenset((name, value) for name, value in env.items() if EARLY.fullmatch(name))
    local = _found(cwd / name for name, word in SETTINGS_FILES.items() if _says(cwd / name, word))
    home = env.get("PREFECT_HOME") or os.path.join(env.get("HOME", ""), ".prefect")
    profiles = _found([Path(env.get("PREFECT_PROFILES_PATH") or os.path.join(home, "profiles.toml"))])
    return (interpreter, early, local, profiles), bool(local)


def _says(path: Path, word: bytes) -> bool:
    try:
        return word in path.read_bytes()
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


def _memory(data: bytes) -> Any:
    """A file without a name: what is in it may be secret."""
    file = open(os.memfd_create("order"), "w+b") if LINUX else tempfile.TemporaryFile()  # noqa: SIM115
    file.write(data)
    file.flush()
    file.seek(0)
    return file


async def _see_off(process: Spawned) -> None:
    """It leaves when nobody talks to it; when it does not, it is made to."""
    with anyio.CancelScope(shield=True):
        with anyio.move_on_after(LEAVE_SECONDS):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
    adoption.disown(process.pid)
