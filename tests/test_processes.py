"""The mark of a process that is amid an exec, when the kernel shows no environment of it for a moment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from misbehave import SLEEP

from procworker.system import processes
from procworker.system.processes import COOKIE, EXEC_LOOKS, mark

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")

OURS = f"HOME=/\0{COOKIE}=ours\0".encode()


def stat(memory: int, environ_start: int) -> bytes:
    """A line as of /proc/PID/stat: the 23rd field is the size of memory, the 50th where the environment begins."""
    fields = {1: "7", 2: "(a b) c)", 3: "S", 23: str(memory), 50: str(environ_start)}
    return " ".join(fields.get(number, "0") for number in range(1, 53)).encode()


def looks(monkeypatch: pytest.MonkeyPatch, environs: list[bytes | None], line: bytes | None) -> list[str]:
    """Let /proc show these environments one after the other, the last for ever; return what is read."""
    read: list[str] = []

    def shown(path: str) -> bytes | None:
        read.append(path.rpartition("/")[2])
        if read[-1] == "stat":
            return line
        return environs.pop(0) if len(environs) > 1 else environs[0]

    monkeypatch.setattr(processes, "_read", shown)
    return read


@pytest.mark.parametrize("empty", [1, 5, EXEC_LOOKS])
def test_the_mark_of_a_process_amid_an_exec_is_waited_for(monkeypatch: pytest.MonkeyPatch, empty: int) -> None:
    read = looks(monkeypatch, [*empty * [b""], OURS], stat(4096, 0))

    assert mark(7) == "ours"
    assert read.count("environ") == empty + 1


def test_what_has_come_since_it_was_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looks(monkeypatch, [b"", OURS], stat(4096, 1))

    assert mark(7) == "ours"


@pytest.mark.parametrize("line", [stat(0, 0), stat(4096, 1), None], ids=["kernel thread", "emptied", "gone"])
def test_what_has_no_environment_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, line: bytes | None) -> None:
    read = looks(monkeypatch, [b""], line)

    assert mark(7) is None
    assert read == ["environ", "stat", "environ"]


def test_a_process_of_another_user_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment cannot be read, and where that begins is not told."""
    read = looks(monkeypatch, [None], stat(4096, 0))

    assert mark(7) is None
    assert read == ["environ"]


def test_nobody_is_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    read = looks(monkeypatch, [b""], stat(4096, 0))

    assert mark(7) is None
    assert read.count("environ") == EXEC_LOOKS + 1


def test_the_kernel_tells_what_is_amid_an_exec() -> None:
    """Were the fields others, nobody would be waited for, or everybody."""
    with (
        subprocess.Popen(SLEEP, env={}) as empty,
        subprocess.Popen(SLEEP, env={**os.environ, COOKIE: "ours"}) as marked,
    ):
        try:
            assert mark(marked.pid) == "ours"
            assert mark(empty.pid) is None
            assert not processes._is_amid_exec(empty.pid)
            line = processes._read(f"/proc/{empty.pid}/stat")
            assert line
            assert int(line.split()[23 - 1]) > 0 < int(line.split()[50 - 1])
        finally:
            empty.kill()
            marked.kill()
