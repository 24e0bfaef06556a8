"""A child that behaves badly on request, and a look at what it left behind; needs nothing but Python.

    python misbehave.py MODE [ARGUMENT]

Each mode says `CHILD <pid>` for every descendant and `READY <pid> <pgid> <sid>` once it misbehaves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

FOREVER = 600.0
SLEEP = [sys.executable, "-S", "-E", "-c", f"import time; time.sleep({FOREVER})"]
COOKIE, OPTED_OUT = "PROCWORKER_RUN", "of somebody else"
MODES: dict[str, Callable[..., None]] = {}


def mode(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a mode; its name with dashes is what the command line says."""
    MODES[function.__name__.replace("_", "-")] = function
    return function


def say(*words: object) -> None:
    """One line, at once and in one write, so that lines of several processes do not mix."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def ready() -> None:
    """Tell the test that from now on the mode is what it says."""
    say("READY", os.getpid(), os.getpgrp(), os.getsid(0))


def wait(seconds: float = FOREVER) -> None:
    """Sleep through signals that have handlers."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(left)


def start(command: list[str], **how: object) -> subprocess.Popen[bytes]:
    """Start a descendant and name it."""
    child = subprocess.Popen(command, **how)
    say("CHILD", child.pid)
    return child


@mode
def sleep(seconds: str = "600") -> None:
    """Do nothing for a while, and die of the first signal."""
    ready()
    wait(float(seconds))


@mode
def exit(code: str = "0") -> None:
    """End with this code."""
    ready()
    sys.exit(int(code))


@mode
def die(number: str = "9") -> None:
    """End by this signal."""
    ready()
    if int(number) not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(int(number), signal.SIG_DFL)
    os.kill(os.getpid(), int(number))
    wait()


@mode
def ignore_term() -> None:
    """Take no notice of TERM, INT and HUP."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ready()
    wait()


@mode
def slow_term(seconds: str = "1") -> None:
    """Take this long to end after TERM, then end with 0."""

    def tidy_up(*_: object) -> None:
        say("TERM")
        time.sleep(float(seconds))
        say("TIDY")
        os._exit(0)

    signal.signal(signal.SIGTERM, tidy_up)
    ready()
    wait()


@mode
def stop_itself() -> None:
    """Stop, so that TERM alone has no effect."""
    ready()
    os.kill(os.getpid(), signal.SIGSTOP)
    wait()


@mode
def sh_wait() -> None:
    """A shell between us and the one that matters."""
    tell, told = os.pipe()
    shell = start(["sh", "-c", f"sleep {FOREVER:.0f} & echo $! >&{told}; wait"], pass_fds=[told])
    say("CHILD", int(os.read(tell, 99)))
    ready()
    shell.wait()


@mode
def sh_child() -> None:
    """Name a child without a mark of its own, in a session of its own, and wait."""
    start(SLEEP, env={}, start_new_session=True)
    wait()


@mode
def setsid() -> None:
    """A child in a session of its own."""
    start(SLEEP, start_new_session=True)
    ready()
    wait()


@mode
def daemon() -> None:
    """Fork twice, so that the daemon is nobody's child; then wait."""
    _daemonize()
    ready()
    wait()


@mode
def daemon_exit(code: str = "0") -> None:
    """The same, but end at once."""
    _daemonize()
    ready()
    sys.exit(int(code))


@mode
def daemon_clean() -> None:
    """A daemon that also cleared its environment, so that no cookie tells where it came from; then wait."""
    _daemonize(env={})
    ready()
    wait()


@mode
def leave(mode: str) -> None:
    """Start another mode and end with 0 as soon as it is ready."""
    child = start([*SLEEP[:3], __file__, mode], stdout=subprocess.PIPE)
    assert child.stdout
    for line in child.stdout:
        _write(line)
        if line.startswith(b"READY"):
            break
    sys.stdout.flush()
    os._exit(0)


@mode
def opt_out() -> None:
    """A child, and its child, that wish to be left alone when this ends; no daemons."""
    start([*SLEEP[:3], __file__, "sh-child"], env={**os.environ, COOKIE: OPTED_OUT})
    ready()
    wait()


@mode
def pool(size: str = "3") -> None:
    """The workers of a multiprocessing pool, busy."""
    import multiprocessing

    workers = multiprocessing.get_context("fork").Pool(int(size), initializer=_busy)
    workers.map_async(time.sleep, [FOREVER] * int(size))
    ready()
    wait()


@mode
def zombie_maker(count: str = "20") -> None:
    """Children that end and are never waited for; then a sleeping one."""
    for _ in range(int(count)):
        if os.fork() == 0:
            os._exit(0)
    start(SLEEP)
    ready()
    wait()


@mode
def change_group() -> None:
    """A child that leads a process group of its own, and one in its parent's new group."""
    os.setpgid(0, 0) if os.getpgrp() != os.getpid() else None
    child = start(SLEEP, preexec_fn=lambda: os.setpgid(0, 0))
    start(SLEEP, preexec_fn=lambda: os.setpgid(0, child.pid))
    ready()
    wait()


@mode
def keep_stdout(code: str = "0") -> None:
    """End at once, while a grandchild keeps standard output open."""
    start(SLEEP)
    ready()
    sys.exit(int(code))


@mode
def nohup() -> None:
    """Leave a background child that ignores HUP and TERM; end with 0."""
    _start_deaf()
    ready()
    os._exit(0)


@mode
def deaf_child() -> None:
    """The same child, but wait; and die of the first signal."""
    _start_deaf()
    ready()
    wait()


@mode
def forker(every: str = "0.005") -> None:
    """A new short-lived child every few milliseconds, at most 200 alive; deaf to TERM, and so are they."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    ready()
    for _ in range(int(30 / float(every))):
        if (pid := os.fork()) == 0:
            time.sleep(200 * float(every))
            os._exit(0)
        say("CHILD", pid)
        time.sleep(float(every))


@mode
def tree(depth: str = "3") -> None:
    """A chain of this many descendants, each the parent of the next, all asleep."""
    root, (tell, told) = os.getpid(), os.pipe()
    for _ in range(int(depth)):
        if os.fork():
            break
        say("CHILD", os.getpid())
    os.close(told)
    if os.getpid() == root:
        os.read(tell, 1)  # ends when the last of them has closed its end
        ready()
    wait()


@mode
def close_stdout() -> None:
    """Close both outputs and live on."""
    ready()
    os.close(1)
    os.close(2)
    wait()


@mode
def huge_line(size: str = "5000000") -> None:
    """One line of so many bytes."""
    ready()
    _write(b"x" * int(size) + b"\n")


@mode
def binary() -> None:
    """Every byte there is, no line end, no valid text."""
    ready()
    _write(bytes(range(256)) * 16)


@mode
def split_text() -> None:
    """A multi-byte character, one byte at a time."""
    ready()
    for byte in "snow ☃ man\n".encode():
        _write(bytes([byte]))
        time.sleep(0.01)


@mode
def spin(seconds: str = "600") -> None:
    """Numbered lines as fast as they go."""
    ready()
    end, number = time.monotonic() + float(seconds), 0
    while time.monotonic() < end:
        _write(b"".join(b"line %d\n" % (number + i) for i in range(100)))
        number += 100


@mode
def lines(count: str = "10", every: str = "0") -> None:
    """So many numbered lines on standard output, and as many on standard error."""
    ready()
    for number in range(int(count)):
        _write(b"out %d\n" % number)
        os.write(2, b"err %d\n" % number)
        time.sleep(float(every))


@mode
def truncate_output() -> None:
    """What `echo x > /dev/stdout` does when standard output is a file."""
    ready()
    say("before")
    with open("/dev/stdout", "wb") as stdout:
        stdout.write(b"after\n")


def _start_deaf() -> None:
    deaf = "signal.signal(15, signal.SIG_IGN); print('DEAF', flush=True)"
    code = f"import signal, time; {deaf}; time.sleep({FOREVER})"
    child = start(["nohup", *SLEEP[:-1], code], stdout=subprocess.PIPE)
    assert child.stdout
    child.stdout.readline()


def _busy() -> None:
    say("CHILD", os.getpid())


def _daemonize(**how: object) -> None:
    """Start a sleeper through a parent that ends at once; when this returns, init has adopted it."""
    popen = f"subprocess.Popen({SLEEP!r}, start_new_session=True)"
    code = f"import subprocess; print('CHILD', {popen}.pid)"
    subprocess.run([sys.executable, "-S", "-E", "-c", code], check=True, **how)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def survivors(cookie: str) -> dict[int, str]:
    """The living processes, other than this one, whose environment holds the string: pid and command line."""
    found = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            with open(f"/proc/{pid}/environ", "rb") as environ, open(f"/proc/{pid}/cmdline", "rb") as command:
                if pid != os.getpid() and cookie.encode() in environ.read():
                    found[pid] = command.read().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
    return found


if __name__ == "__main__":
    MODES[sys.argv[1]](*sys.argv[2:])
