"""Our own output: whole lines in order for who reads them, and nobody who does not can make us wait."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from commands import FAST, ROOT, TEMPLATE
from hypothesis import given, settings
from hypothesis import strategies as st
from misbehave import survivors

from procworker.system.printer import LogStream, Printer, print_line
from procworker.testing import Beside, serving

pytestmark = pytest.mark.slow

CAPACITY = 4096
"""What the pipes of these tests hold."""


class Pipe:
    """A pipe with a small buffer; closed at the end of the block."""

    def __init__(self) -> None:
        import fcntl

        self.reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, CAPACITY)
        self.file = os.fdopen(writer, "w", encoding="utf-8")

    def read(self) -> bytes:
        """What is there now."""
        read = b""
        while select.select([self.reader], [], [], 0)[0] and (piece := os.read(self.reader, 65536)):
            read += piece
        return read

    def fill(self) -> None:
        os.set_blocking(self.file.fileno(), False)
        with suppress(BlockingIOError):
            while True:
                os.write(self.file.fileno(), b"#")
        os.set_blocking(self.file.fileno(), True)

    def close(self) -> None:
        for close in (lambda: os.close(self.reader), self.file.close):
            with suppress(OSError):
                close()

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@contextmanager
def printing_to_a_pipe() -> Iterator[Pipe]:
    """Our stdout and stderr go there, for the length of the block (pytest would undo what a fixture changes)."""
    with pytest.MonkeyPatch.context() as patch, Pipe() as pipe:
        patch.setattr(sys, "stdout", pipe.file)
        patch.setattr(sys, "stderr", pipe.file)
        yield pipe


def print_until_blocked(printer: Printer, lines: Iterator[str], stream: str = "stdout") -> tuple[list[str], str]:
    """The lines that were taken, and the one that was not."""
    taken = []
    for line in lines:
        try:
            printer.print_line(stream, line)
        except BlockingIOError:
            return taken, line
        taken.append(line)
    raise AssertionError("the lines ended before the pipe was full")


def test_lines_are_printed_where_they_belong(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("stdout", "out ☃")
    print_line("stderr", "err ☃")
    assert capsys.readouterr() == ("out ☃\n", "err ☃\n")


def test_on_a_terminal_without_unicode_lines_are_escaped_not_dropped() -> None:
    code = (
        "from procworker.system.printer import print_line; print_line('stdout', 'C:\\\\ ☃'); print_line('stderr', '☃')"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], capture_output=True, env=env)
    assert done.stdout == b"C:\\ \\u2603\n"
    assert done.stderr.endswith(b"\\u2603\n")


def test_a_reader_that_pauses_gets_every_line_whole_and_in_order() -> None:
    with printing_to_a_pipe() as pipe:
        printer = Printer()
        lines = (f"{number} {'x' * (number % 7000)}" for number in range(300))
        read, expected = b"", []
        for line in lines:
            while True:
                try:
                    printer.print_line("stdout" if len(line) % 2 else "stderr", line)
                    break
                except BlockingIOError:
                    read += pipe.read()
            expected.append(line + "\n")
        while not printer.flush():
            read += pipe.read()
        assert (read + pipe.read()).decode() == "".join(expected)


def test_what_a_full_pipe_took_a_part_of_is_finished_first() -> None:
    with printing_to_a_pipe() as pipe:
        printer = Printer()
        printer.print_line("stdout", "a" * 3 * CAPACITY)
        with pytest.raises(BlockingIOError):
            printer.print_line("stderr", "b")
        printer.say("c\n")
        read = b""
        while not printer.flush():
            read += pipe.read()
        assert read + pipe.read() == b"a" * 3 * CAPACITY + b"\nc\n"


def test_the_pipe_stays_as_it_was_given_to_us() -> None:
    with printing_to_a_pipe() as pipe:
        printer = Printer()
        print_until_blocked(printer, iter("abcdefg" * CAPACITY))
        assert os.get_blocking(pipe.file.fileno())


def test_a_plain_write_would_wait() -> None:
    """The control: what the printer avoids."""
    with printing_to_a_pipe() as pipe:
        pipe.fill()
        child = subprocess.Popen(["echo"], stdout=pipe.file)
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(1)
            Printer().say("x\n")
            assert child.poll() is None
            pipe.read()
            assert child.wait(20) == 0
        finally:
            child.kill()
            child.wait()


def test_a_reader_that_has_left_loses_lines_and_nothing_else() -> None:
    with printing_to_a_pipe() as pipe:
        printer = Printer()
        printer.print_line("stdout", "x" * 2 * CAPACITY)
        os.close(pipe.reader)
        with pytest.raises(BrokenPipeError):
            printer.print_line("stdout", "y")
        printer.say("z\n")
        assert printer.flush()
        assert printer.drain()


def test_our_own_messages_wait_and_the_oldest_go() -> None:
    with printing_to_a_pipe() as pipe:
        printer = Printer(limit=1000)
        pipe.fill()
        for number in range(1000):
            printer.say(f"{number:08}\n")
        assert not printer.flush()

        read = b""
        while not printer.flush():
            read += pipe.read()
        first, mark, *lines = (read + pipe.read()).lstrip(b"#").decode().splitlines()
        assert first == "00000000"
        assert mark == f"[procworker: {999 - len(lines)} lines were dropped here, nobody read them]"
        assert lines == [f"{number:08}" for number in range(1000 - len(lines), 1000)]
        assert len(lines) == 1000 // 9


def test_the_end_waits_a_little_for_a_reader() -> None:
    with printing_to_a_pipe() as pipe:
        printer = Printer()
        pipe.fill()
        printer.say("bye\n", "stderr")
        began = time.monotonic()
        assert not printer.drain(0.2)
        assert 0.2 <= time.monotonic() - began < 2
        pipe.read()
        assert printer.drain(20)
        assert pipe.read() == b"bye\n"


def test_a_stream_that_was_closed_before_we_started_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    printer = Printer()
    printer.print_line("stdout", "x")
    printer.say("x\n")
    assert printer.drain()


def test_a_stream_that_is_closed_now_is_no_error_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = open(tmp_path / "file", "w")  # noqa: SIM115
    file.close()
    monkeypatch.setattr(sys, "stdout", file)
    with pytest.raises(ValueError, match="closed"):
        Printer().print_line("stdout", "x")
    Printer().say("x\n")


def test_what_others_printed_before_comes_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        print("first")
        Printer().print_line("stdout", "second")
        print("third")
    assert (tmp_path / "file").read_text() == "first\nsecond\nthird\n"


def test_a_full_disk_loses_lines_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        printer = Printer()
        with pytest.raises(OSError, match="No space"):
            printer.print_line("stdout", "x")
        printer.say("x\n")
        assert printer.drain()


@pytest.mark.parametrize("kind", ["terminal", "socket"])
def test_terminals_and_sockets_that_nobody_reads_are_no_wait(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "terminal":
        reader, writer = pty.openpty()
        file = os.fdopen(writer, "w")
    else:
        ours, theirs = socket.socketpair()
        reader, file = theirs.detach(), os.fdopen(ours.detach(), "w")
    monkeypatch.setattr(sys, "stdout", file)
    printer = Printer()
    began = time.monotonic()
    taken, refused = print_until_blocked(printer, (f"{number} {'x' * 700}" for number in range(100_000)))
    assert time.monotonic() - began < 10

    text, wanted = b"", "".join(line + "\n" for line in [*taken, refused]).encode()
    deadline = time.monotonic() + 20
    offered = False
    while len(text) < len(wanted) and time.monotonic() < deadline:
        if select.select([reader], [], [], 0.01)[0]:
            text += os.read(reader, 65536).replace(b"\r\n", b"\n").replace(b"\r", b"")
        if not offered:
            try:
                printer.print_line("stdout", refused)
                offered = True
            except BlockingIOError:
                pass
        printer.flush()
    file.close()
    os.close(reader)
    assert text == wanted


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(st.integers(0, 3 * CAPACITY), st.sampled_from(["read", "log"])), max_size=30))
def test_nothing_is_lost_or_mixed_whenever_it_is_read(steps: list[int | str]) -> None:
    with printing_to_a_pipe() as pipe:
        printer, read, expected = Printer(), b"", ""
        for number, step in enumerate(steps):
            if step == "read":
                read += pipe.read()
            elif step == "log":
                LogStream(printer).write(f"log {number}\n")
                expected += f"log {number}\n"
            else:
                line = f"{number} {'x' * int(step)}"
                try:
                    printer.print_line("stdout", line)
                    expected += line + "\n"
                except BlockingIOError:
                    pass
        while not printer.flush():
            read += pipe.read()
        assert (read + pipe.read()).decode() == expected


# The command, and readers that are none


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Beside]:
    with serving() as server:
        server.add_pool(base_job_template=TEMPLATE)
        for name, value in {**FAST, "PREFECT_API_URL": server.url, "PREFECT_LOGGING_LEVEL": "DEBUG"}.items():
            monkeypatch.setenv(name, value)
        yield server
    found = survivors(f"PROCWORKER_HOME={os.environ['PROCWORKER_HOME']}")
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    assert not found


def start(out: Any, err: Any, *argv: str, shell: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "procworker", "start", "-p", "pool", *argv]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env)


def ended(worker: subprocess.Popen[bytes], seconds: float = 30) -> int:
    try:
        return worker.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError("the worker does not end") from None
    finally:
        worker.kill()
        worker.wait()


def talkative(server: Beside, count: int = 2000) -> Any:
    lines = [f"{number} {'x' * 100}" for number in range(count)]
    return server.schedule(server.add_deployment(), parameters={"print": lines, "err": lines})


@pytest.mark.parametrize("which", ["stdout", "stderr", "both"])
def test_a_worker_whose_output_nobody_reads_works_on(server: Beside, which: str) -> None:
    with Pipe() as full, open(os.devnull, "wb") as null:
        full.fill()
        out = null if which == "stderr" else full.file
        err = null if which == "stdout" else full.file
        worker = start(out, err)
        try:
            for _ in range(2):
                server.wait_state(talkative(server), "COMPLETED", timeout=30)
            polls = len(server.seen("POST", "/get_scheduled_flow_runs"))
            deadline = time.monotonic() + 20
            while len(server.seen("POST", "/get_scheduled_flow_runs")) < polls + 5:
                assert time.monotonic() < deadline, "the worker does not poll any more"
                time.sleep(0.02)
            worker.send_signal(signal.SIGTERM)
            assert ended(worker) == 0
        finally:
            worker.kill()
            worker.wait()


def test_a_reader_that_begins_late_is_shown_what_waited(server: Beside) -> None:
    with Pipe() as full:
        full.fill()
        flow_run = talkative(server, 50)
        worker = start(full.file, full.file, "--run-once")
        try:
            server.wait_state(flow_run, "COMPLETED", timeout=30)
            read = b""
            full.file.close()
            while piece := os.read(full.reader, 65536):
                read += piece
            assert ended(worker) == 0
        finally:
            worker.kill()
            worker.wait()
    lines = read.lstrip(b"#").decode().splitlines()
    assert any("started!" in line for line in lines)
    assert any("stopped!" in line for line in lines)


@pytest.mark.parametrize("shell", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_worker_without_output_works(server: Beside, shell: str) -> None:
    flow_run = talkative(server, 10)
    with open(os.devnull, "wb") as null:
        worker = start(null, null, "--run-once", shell=shell)
        assert ended(worker) == 0
    assert server.wait_state(flow_run, "COMPLETED").type == "COMPLETED"


def test_a_worker_whose_reader_has_left_works(server: Beside) -> None:
    with Pipe() as pipe:
        worker = start(pipe.file, pipe.file)
        try:
            os.read(pipe.reader, 1)
            os.close(pipe.reader)
            for _ in range(2):
                server.wait_state(talkative(server), "COMPLETED", timeout=30)
            worker.send_signal(signal.SIGTERM)
            assert ended(worker) in (0, 141)
        finally:
            worker.kill()
            worker.wait()
