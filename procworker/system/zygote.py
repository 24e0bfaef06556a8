"""Our end of one zygote: an interpreter that waits for orders to fork (`_zygote.py`)."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import anyio
from anyio.abc import Process as Spawned

from procworker.errors import SpawnError
from procworker.system.child import WARM, Child, check, opened
from procworker.system.files import file_limit
from procworker.system.interpreter import Interpreter
from procworker.system.processes import COOKIE, Process, find_root, identify, is_alive, just_before_now
from procworker.system.subreaper import adoption

SCRIPT = str(Path(__file__).with_name("_zygote.py"))
IDLE_SECONDS, REPLY_SECONDS, LEAVE_SECONDS, LOOK_SECONDS = 600.0, 10.0, 2.0, 1.0
LARGEST = 1024 * 1024
TRACE = b"\n"
"""Stands on an order, behind its one line, from just before the fork on; then comes the pid."""

JSON = dict[str, Any]
wait_readable = getattr(anyio, "wait_readable", None) or anyio.wait_socket_readable  # of anyio before 4.7


class NotForked(Exception):
    """There is no such process: it has to be spawned. Says why."""


class Exit:
    """How one fork ended: its code, or None when its zygote ended before it."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.known = anyio.Event()


class Zygote:
    """Our end of one warm interpreter; `serve` is its life."""

    def __init__(self, library: Library) -> None:
        self.ready = anyio.Event()
        """It can fork, or never will."""
        self.over = ""
        """Why it forks nothing any more."""
        self.used_at = anyio.current_time()
        self.exits: dict[int, Exit] = {}
        self._library = library
        self._channel, self._theirs = socket.socketpair()
        self._stamps: dict[str, int] = {}
        self._process: Spawned | None = None
        self._gone = anyio.Event()
        self._asking = 0
        self._turn = anyio.Lock()
        self._answered = anyio.Event()
        self._answer: JSON = {}
        self._forked = Exit()

    async def serve(self, python: str, env: Mapping[str, str], cwd: Path, mark_length: int) -> None:
        """Start it, hear what it says, and see it leave."""
        mark = "zygote".ljust(mark_length, "-")
        terms = {"mark": f"{COOKIE}={mark}", "modules": self._library.modules, "idle": IDLE_SECONDS}
        self._channel.setblocking(False)
        with anyio.CancelScope(shield=True), self._channel:
            try:
                with self._theirs, adoption.spawning() as own:
                    self._process = await anyio.open_process(
                        [python, SCRIPT],
                        stdin=self._theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        env={**env, COOKIE: mark, WARM: "1"},
                        cwd=cwd,
                        start_new_session=True,
                    )
                    own.add(self._process.pid)
                    file_limit.restore(self._process.pid)
                with _memory(terms) as file:
                    socket.send_fds(self._channel, [b"terms\n"], [file.fileno()])
                await self._listen()
            except Exception as error:  # whatever it is, it is no trouble of the worker's
                self.over = self.over or f"it cannot be started or talked to: {type(error).__name__}: {error}"
            if self._process is not None:
                await _see_off(self._process)
            self._gone.set()
            self._give_up("it has ended")

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
            if not self.ready.is_set():
                self._library.forget()
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

    @property
    def is_in_use(self) -> bool:
        return bool(self.exits or self._asking)

    def close(self) -> None:
        """End it now; what it has forked goes on."""
        self._give_up("the worker has ended")
        self.retire(self.over)

    def retire(self, why: str) -> None:
        """Have it fork nothing any more, and end it as soon as nothing runs that it has forked, or may be forking."""
        self.over = self.over or why
        if not self.is_in_use:
            with suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)

    async def fork(self, *, cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path) -> Child:
        """As spawn(); raises NotForked when there is no such process, and will be none."""
        check(cwd, env)
        self.used_at = anyio.current_time()
        self._asking += 1
        try:
            async with self._turn:
                return await self._fork(cwd, env, stdout, stderr)
        finally:
            self._asking -= 1
            if self.over:
                self.retire(self.over)

    async def _fork(self, cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path) -> Child:
        if self.over:
            raise NotForked(self.over)
        order: JSON = {"mark": f"{COOKIE}={env[COOKIE]}", "cwd": _text(str(cwd))}
        order["env"] = {_text(name): _text(value) for name, value in env.items()}
        self._answered, self._answer, self._before = anyio.Event(), {}, just_before_now()
        with _memory(order) as file:
            try:
                with opened(stdout, stderr) as handles:
                    socket.send_fds(self._channel, [b"fork\n"], [*handles, file.fileno()])
            except OSError as error:
                raise NotForked(f"it cannot be asked: {error}") from error
            with anyio.move_on_after(REPLY_SECONDS):
                await self._answered.wait()
            return await self._answered_child(env[COOKIE], file)

    async def _answered_child(self, cookie: str, order: IO[bytes]) -> Child:
        answer, exit = self._answer, self._forked
        if "forked" in answer:
            with adoption.spawning() as own:
                own.add(answer["forked"])
            root = identify(answer["forked"], dead=True) or Process(answer["forked"], self._before)
            return Child(root, partial(self._exit_of, root, exit))
        if "refused" in answer:
            if answer["spoilt"]:
                self._library.forget()
                self.over = answer["refused"]
            raise NotForked(answer["refused"])
        # It has died, or hangs, and may have forked, or be about to. When it is gone, its last word is on the order:
        # the pid, or at least that it was about to.
        self.over = self.over or "it does not answer"
        await self._kill()
        order.seek(0)
        _, sign, trace = order.read().partition(TRACE)
        if not sign:
            raise NotForked(self.over)
        if found := find_root(cookie):
            return Child(found)
        if trace.isdigit():  # it has ended already
            return Child(Process(int(trace), self._before))
        raise SpawnError("The zygote died while it forked: whether the engine was started cannot be known.")

    async def _exit_of(self, root: Process, exit: Exit) -> int | None:
        """What it says of a fork that has ended; one that says nothing is ended itself."""
        while not exit.known.is_set():
            with anyio.move_on_after(LOOK_SECONDS):
                await exit.known.wait()
            if not exit.known.is_set() and not is_alive(root):
                with anyio.move_on_after(REPLY_SECONDS):
                    await exit.known.wait()
                if not exit.known.is_set():
                    self.over = self.over or "it does not tell how its forks end"
                    await self._kill()
        return exit.code

    async def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        await self._gone.wait()


class Library:
    """The modules that are imported before the fork, for one Prefect in one interpreter; kept on disk."""

    def __init__(self, place: Path, interpreter: Interpreter) -> None:
        name = hashlib.sha256(os.fsencode(interpreter.path)).hexdigest()[:12]
        self._path = place / f"prefect-{interpreter.prefect_version}-{name}.json"
        self.modules: list[str] = []
        self._read()

    def _read(self) -> None:
        with suppress(OSError, ValueError, RecursionError):
            known = json.loads(self._path.read_bytes()) if self._path.stat().st_size <= LARGEST else None
            if isinstance(known, list) and all(isinstance(name, str) for name in known):
                self.modules = known

    def add(self, modules: Iterable[str]) -> None:
        self._read()  # others learn, too
        self.modules = list(dict.fromkeys([*self.modules, *modules]))
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            new.write_text(json.dumps(self.modules))
            new.replace(self._path)
        except OSError:
            with suppress(OSError):
                new.unlink()

    def forget(self) -> None:
        """What was learnt was too much."""
        self.modules = []
        with suppress(OSError):
            self._path.unlink()


def _memory(data: JSON) -> IO[bytes]:
    """A file without a name: what is in it may be secret."""
    memory = hasattr(os, "memfd_create")  # some builds for old systems lack it
    file = open(os.memfd_create("order"), "w+b") if memory else tempfile.TemporaryFile()  # noqa: SIM115
    file.write(json.dumps(data).encode())
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


def _text(what: str) -> str:
    """Bytes as JSON can hold them."""
    return os.fsencode(what).decode("latin-1")
