"""Be the parent of one embedded Prefect server, and end it when nobody uses it any more.

`procworker.local.server` starts it in the environment and with the log of the server. It inherits a lock on
the file `keeper`: who can take that knows that there is none. Users hold a shared lock on the file `lease`,
and note in it how long to keep. Only the standard library and psutil: it mostly waits.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import psutil

from procworker.system.journal import here

try:
    import fcntl
except ImportError:  # Windows: local_server refuses before anything here is called
    fcntl = None  # type: ignore[assignment]

TICK_SECONDS = 0.2
GRACE_SECONDS = 10.0
LOG_BYTES = 4 * 1024 * 1024

# Runs in the server's interpreter, with a socket bound before: nobody can take the port meanwhile. (`uvicorn --fd`
# takes it for a Unix socket and, without TCP_NODELAY, answers each request 40 ms later.) Standard input is a pipe
# that only the keeper holds: it ends when the keeper does. A failed start may leave threads: do not wait for them.
BOOTSTRAP = """
import os, socket, sys, threading, uvicorn
threading.Thread(target=lambda: os._exit(os.read(0, 1) == b""), daemon=True).start()
app = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="warning")
try: uvicorn.Server(app).run(sockets=[socket.socket(fileno=int(sys.argv[1]))])
except Exception: sys.excepthook(*sys.exc_info())
finally: os._exit(3)
"""


def lock(descriptor: int, exclusive: bool) -> bool:
    """Take or change a lock on an open file if that is possible at once."""
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        return True
    return False


def private_file(path: Path, flags: int = 0) -> int:
    """Open a file to read and append to that is the owner's alone."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | flags, 0o600)


def identity(pid: int) -> list[Any] | None:
    """Tell a process from any other that has its pid before or after; None if it is gone or a zombie."""
    if sys.platform == "linux":  # ticks since boot: psutil's create_time moves when the clock is set
        with suppress(OSError):
            status, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            return None if status in b"ZX" else [pid, int(fields[18])]
        return None
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else [pid, process.create_time()]
    return None


def is_alive(process: list[Any]) -> bool:
    """Tell whether this very process, not one that inherited its pid, still runs."""
    return identity(process[0]) == process


def end_tree(process: list[Any], grace: float) -> None:
    """End this very process and its descendants: TERM, and KILL for what is left after `grace` seconds."""
    with suppress(psutil.Error):
        root = psutil.Process(process[0])  # before the comparison: psutil signals no later owner of a pid
        tree = [root] if root.pid > 1 and is_alive(process) else []
        for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
            with suppress(psutil.Error):
                tree += root.children(recursive=True) if root in tree else []
            for member in tree:
                with suppress(psutil.Error):
                    member.send_signal(number)
            _, tree = psutil.wait_procs(tree, timeout=patience)


def read_state(directory: Path) -> dict[str, Any] | None:
    """Read what the last keeper wrote about its server, unless it wrote in another boot or container."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((directory / "state.json").read_bytes())
        return state if state["host"] == here() else None
    return None


def living(home: Path) -> list[tuple[Path, dict[str, Any]]]:
    """List the directories of the servers that run, with what their keepers wrote."""
    states = [(directory, read_state(directory)) for directory in sorted((home / "servers").glob("*"))]
    return [
        (place, state) for place, state in states if state and (is_alive(state["server"]) or is_alive(state["keeper"]))
    ]


def kept_for(lease: int) -> float:
    """Read the longest keeping time that the users of this server asked for."""
    return max(map(float, os.pread(lease, 65536, 0).split()), default=0.0)


def keep(directory: Path, python: str) -> None:
    """Start the server, publish it, watch it, and leave nothing of it."""
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        command, fd = [python, "-c", BOOTSTRAP], listener.fileno()
        server = subprocess.Popen([*command, str(fd)], stdin=subprocess.PIPE, pass_fds=[fd])
        api_url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    child, me = identity(server.pid) or [server.pid, 0], identity(os.getpid())
    state = {"version": directory.name, "api_url": api_url, "since": time.time(), "host": here()}
    state |= {"auth_string": os.environ.get("PREFECT_SERVER_API_AUTH_STRING"), "server": child, "keeper": me}
    try:
        (directory / "state.json.new").write_text(json.dumps(state))
        (directory / "state.json.new").replace(directory / "state.json")
        watch(server, directory, stop)
    finally:
        if (read_state(directory) or {}).get("keeper") == me:
            (directory / "state.json").unlink()
        end_tree(child, GRACE_SECONDS)
        if server.returncode is not None:
            print(f"The server ended with exit code {server.returncode}", flush=True)


def watch(server: subprocess.Popen[bytes], directory: Path, stop: Event) -> None:
    """Wait until the server ends, a signal comes, or nobody has used it for as long as users asked."""
    lease = private_file(directory / "lease")
    used = time.monotonic()
    while server.poll() is None and not stop.wait(TICK_SECONDS):
        if not lock(lease, exclusive=True):
            used = time.monotonic()
        elif time.monotonic() >= used + kept_for(lease):
            return  # with the lease in hand: whoever comes now waits until this process is gone
        else:
            fcntl.flock(lease, fcntl.LOCK_UN)
        if os.fstat(1).st_size > LOG_BYTES:
            with suppress(OSError):
                shutil.copyfile(directory / "server.log", directory / "server.log.1")
            os.ftruncate(1, 0)


if __name__ == "__main__":
    if os.fork():  # the caller reaps this one at once; the keeper itself is nobody's zombie later
        os._exit(0)
    os.setsid()
    os.umask(0o077)
    os.chdir(sys.argv[1])
    keep(Path(sys.argv[1]), sys.argv[2])
