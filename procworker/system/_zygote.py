"""An interpreter that has imported what Prefect's engine needs, and forks one process per flow run on request.

It is run by the Python of the flows, by path, and needs nothing but that Python's standard library and `_fork.py`. Its
standard input is a Unix socket to the worker:

    worker:  "terms" with the descriptor of a file of JSON; then "fork" with those of stdout, stderr and a file of JSON
    zygote:  {"ready": {path: mtime}} or {"failed": why}; {"forked": pid} or {"refused": why} to each "fork";
             {"ended": pid, "code": code} when one has ended; {"learnt": [module]} when there is more to import

The end of the socket is the end of the zygote; what it has forked goes on.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from procworker.system._fork import Tls, become, changes, find_mark, spare, write_mark
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from _fork import Tls, become, changes, find_mark, spare, write_mark

    # No flow shall see it.
    del sys.path[0], sys.modules["_fork"]

ENGINE = "prefect.engine"
FIRST = ("prefect", ENGINE, "prefect.flow_engine")
"""What is imported before anything was learnt; the last of them is none of Prefect 2."""
TRACE = b"\n"
"""What stands on an order once it may have been carried out."""
SCHOLARS = 16
"""How many at a time are asked what they have imported: each takes one of the zygote's files."""
TRIAL_SECONDS = 3
"""How long all that is learnt at a time may take to import: meanwhile the zygote answers nobody."""


class Refused(Exception):
    """A fork would not be the same as a new interpreter."""


class Zygote:
    """`serve` returns in a child alone: with the order that it is to carry out, and the descriptors that came along."""

    def __init__(self, channel: socket.socket, terms: dict[str, Any]) -> None:
        self.channel = channel
        self.mark, self.known, self.idle = terms["mark"], terms["modules"], terms["idle"]
        self.slot = find_mark(self.mark)
        self.children: dict[int, int | None] = {}  # pid -> the file that it names its modules in
        self.closure: set[str] | None = None
        self.base: set[str] = set()
        self.failed: set[str] = set()

    def serve(self) -> tuple[dict[str, Any], list[int]]:
        """Answer until the worker hangs up, or has wanted nothing for a while."""
        self.woken, self.wake = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(self.wake, False)
        self.handler = signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        self.warm_up()
        self.say(ready=stamps())
        self.asked = time.monotonic()
        while True:
            left = None if self.children else max(0.0, self.asked + self.idle - time.monotonic())
            if left == 0.0:
                os._exit(0)
            ready, _, _ = select.select([self.channel.fileno(), self.woken], [], [], left)
            if self.woken in ready:
                while select.select([self.woken], [], [], 0)[0]:
                    os.read(self.woken, 4096)
                self.reap()
            if self.channel.fileno() in ready:
                said, handles, _, _ = socket.recv_fds(self.channel, 4096, 3)
                if not said:
                    os._exit(0)
                self.asked = time.monotonic()
                pid, order = self.fork(handles)
                if pid == 0:
                    return order, handles
                for handle in handles:
                    os.close(handle)

    def say(self, **what: object) -> None:
        self.channel.sendall(json.dumps(what).encode() + b"\n")

    def warm_up(self) -> None:
        """Import what an engine needs, but for its first module: that one will be `__main__`."""
        importlib.import_module(FIRST[0])
        beforehand = ENGINE in sys.modules
        for name in FIRST[1:]:
            if importlib.util.find_spec(name):
                importlib.import_module(name)
        spec: Any = importlib.util.find_spec(ENGINE)
        self.main = spec, spec.loader.get_code(ENGINE)
        if not beforehand:
            del sys.modules[ENGINE]
            vars(sys.modules[FIRST[0]]).pop("engine", None)
        self.changes = changes()
        self.base = roots()
        self.tls = Tls()
        self.load([name for name in self.known if root(name) in self.base])
        self.settle()

    def load(self, names: list[str]) -> None:
        for name in names:
            try:
                importlib.import_module(name)
            except BaseException:  # a flow had it; without it there is just no more to be gained
                self.failed.add(name)

    def settle(self) -> None:
        """What is here stays: forks share it as long as the collector leaves it alone."""
        spare(self.tls)
        gc.collect()
        gc.freeze()
        self.modules = set(sys.modules)

    def fork(self, handles: list[int]) -> tuple[int, dict[str, Any]]:
        """Fork, if that is as good as a new interpreter; return a pid (of nothing, where it is not) and the order."""
        order: dict[str, Any] = {}
        try:
            if len(handles) != 3:
                raise OSError("it has too many open files")
            with open(os.dup(handles[-1]), encoding="ascii") as text:
                order = json.load(text)
            if others := threads():
                raise Refused(f"it has other threads: {others}")
            if len(order["mark"]) != len(self.mark):
                raise Refused("its mark does not fit")
            order["learning"] = memory() if len(self.children) < SCHOLARS else None
            os.write(handles[-1], TRACE)  # from here on nobody can be sure that there is no fork
            pid = os.fork()
        except (Refused, OSError) as error:
            if (file := order.get("learning")) is not None:
                os.close(file)
            self.say(refused=str(error), spoilt=isinstance(error, Refused))
            return -1, order
        if pid:
            self.children[pid] = order["learning"]
            self.say(forked=pid)
        return pid, order

    def leave(self, order: dict[str, Any], out: int, err: int, *others: int) -> None:
        """In the child: leave a trace, and let go of all that is the zygote's."""
        os.write(others[0], str(os.getpid()).encode())
        os.setsid()
        write_mark(self.slot, order["mark"])
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, self.handler)
        os.dup2(out, 1)
        os.dup2(err, 2)
        for handle in (out, err, *others, self.woken, self.wake, *self.children.values()):
            if handle is not None:
                os.close(handle)
        self.channel.close()

    def reap(self) -> None:
        learnt: list[str] = []
        for pid, file in list(self.children.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self.children[pid]
                self.asked = time.monotonic()
                self.say(ended=pid, code=os.waitstatus_to_exitcode(status))
                learnt += self.read(file) if file is not None else []
        if learnt and not self.children:  # nobody waits for us now
            self.learn(learnt)

    def read(self, file: int) -> list[str]:
        """Return what an engine has imported beyond what is here."""
        with open(file, "rb") as names:
            names.seek(0)
            return names.read().decode(errors="replace").split()

    def learn(self, names: list[str]) -> None:
        """Import what belongs to Prefect, or to what it requires, and brings along nothing that a flow may have of its
        own, and no thread."""
        known = self.modules | self.failed | {ENGINE}
        names = [name for name in dict.fromkeys(names) if name not in known]
        if not names:
            return
        if self.closure is None:
            self.closure = closure() & self.base
        candidates, good = [name for name in names if root(name) in self.closure], []
        deadline = time.monotonic() + TRIAL_SECONDS
        while candidates and time.monotonic() < deadline:
            harmless = self.try_out(candidates, deadline)
            good += candidates[:harmless]
            self.failed.update(candidates[harmless : harmless + 1])
            candidates = candidates[harmless + 1 :]
        if good:
            self.load(good)
            self.settle()
            self.say(learnt=[name for name in good if name not in self.failed])

    def try_out(self, names: list[str], deadline: float) -> int:
        """Import them in a fork, and return how many are harmless up to the first that is not."""
        listening, telling = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(TRIAL_SECONDS + 1)  # whatever becomes of us
                self.channel.close()
                os.close(listening)
                for name in names:
                    importlib.import_module(name)
                    if threads() or roots() - self.base - sys.stdlib_module_names:
                        break
                    os.write(telling, b".")
            finally:
                os._exit(0)
        os.close(telling)
        count = 0
        while select.select([listening], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not (told := os.read(listening, 4096)):
                break
            count += len(told)
        else:
            os.kill(pid, signal.SIGKILL)  # it is too slow
        os.close(listening)
        os.waitpid(pid, 0)
        return count


def root(name: str) -> str:
    return name.partition(".")[0]


def roots() -> set[str]:
    """The top-level names of all that was imported."""
    return {root(name) for name in list(sys.modules)}


def threads() -> str:
    """The other threads of this process; forking would lose them, and whatever they hold."""
    try:
        count = len(os.listdir("/proc/self/task")) - 1
    except OSError:
        count = threading.active_count() - 1
    names = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
    return ", ".join(names) or str(count) if count else ""


def memory() -> int:
    """A file without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("modules")
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def stamps() -> dict[str, int]:
    """What on disk must not change: the interpreter, Prefect, and what is installed beside it."""
    from importlib.metadata import distribution

    init = str(sys.modules["prefect"].__file__)
    paths = [sys.executable, os.path.realpath(sys.executable), init, os.path.dirname(init)]
    paths += [str(distribution("prefect").locate_file(""))]
    paths += [path for path in sys.path if path.endswith("-packages") and os.path.isdir(path)]
    return {path: os.stat(path).st_mtime_ns for path in paths}


def closure() -> set[str]:
    """The top-level names of Prefect and of all that it requires."""
    import re
    from importlib.metadata import PackageNotFoundError, distribution

    names: set[str] = set()
    todo, seen = ["prefect"], set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # not for this system
            continue
        required = [line for line in found.requires or () if "extra ==" not in line]
        todo += [match.group() for line in required if (match := re.match(r"[\w.-]+", line))]
        names.add(name.replace("-", "_"))
        listed = found.read_text("top_level.txt")
        if listed is not None:
            names.update(listed.split())
        else:
            names.update(str(path).split("/")[0].removesuffix(".py") for path in found.files or ())
    return names


def main() -> tuple[Any, ModuleType]:
    """Be a zygote; return, in each child, what to execute and where."""
    channel = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd()  # as `python -m` has it
    try:
        if sys.version_info < (3, 10):  # noqa: UP036 - the flows' Python may be older than ours
            raise Refused("Python 3.10 is the oldest that is forked")
        _, (file,), _, _ = socket.recv_fds(channel, 4096, 1)
        with open(file, encoding="ascii") as terms:
            zygote = Zygote(channel, json.load(terms))
        order, handles = zygote.serve()
    except Exception as error:
        try:
            # What follows in further lines may show values, and some are secret.
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            channel.sendall(json.dumps({"failed": why}).encode() + b"\n")
        finally:
            os._exit(1)
    zygote.leave(order, *handles)
    spec, code = zygote.main
    return code, become(order, spec, zygote.changes, zygote.modules)


if __name__ == "__main__":
    code, module = main()
    exec(code, vars(module))
