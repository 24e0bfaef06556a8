"""A line that stays below all that is printed to a terminal."""

from __future__ import annotations

import os
import select
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from procworker.system.printer import Printer

SILENCE_SECONDS = 0.1


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """stdout and stderr on one terminal; what was written to it since the last call."""
    master, slave = os.openpty()
    os.set_blocking(master, False)
    with os.fdopen(slave, "w") as out, os.fdopen(os.dup(slave), "w") as err:

        def written() -> str:
            data = b""
            while select.select([master], [], [], SILENCE_SECONDS)[0]:  # the kernel hands it over in its own time
                data += os.read(master, 1 << 16)
            return data.decode().replace("\r\n", "\n")

        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = out, err
        try:
            yield written
        finally:
            sys.stdout, sys.stderr = before
            termios.tcflow(slave, termios.TCOON)
    os.close(master)


def test_a_footer_stays_below_what_is_printed() -> None:
    with terminal() as written:
        printer = Printer()
        printer.footer("one")
        assert written() == "one"
        printer.footer("one")
        assert written() == "", "nothing is new"
        printer.print_line("stdout", "line")
        assert written() == "\r\x1b[Kline\none"
        printer.say("a\nb\n", "stderr")
        assert written() == "\r\x1b[Ka\nb\none"
        printer.footer("two")
        assert written() == "\r\x1b[Ktwo"
        with printer.batch():
            printer.print_line("stdout", "c")
            printer.footer("three")
            printer.print_line("stderr", "d")
            assert written() == ""
        assert written() == "\r\x1b[Kc\nd\nthree"
        printer.footer("")
        assert written() == "\r\x1b[K"
        printer.say("end\n")
        assert written() == "end\n"


def test_a_terminal_that_takes_nothing_gets_the_footer_once_when_it_does_again() -> None:
    with terminal() as written:
        printer = Printer()
        termios.tcflow(sys.stdout.fileno(), termios.TCOOFF)  # Ctrl-S
        for number in range(100):
            printer.footer(f"footer {number}")
        printer.say("line\n")
        assert written() == ""
        termios.tcflow(sys.stdout.fileno(), termios.TCOON)
        assert printer.drain()
        text = written()
        assert text.count("footer 99") == 1
        assert text.endswith("line\nfooter 99")
        assert text.count("footer") <= 2


def test_who_is_no_terminal_program_may_use_a_footer_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    Printer().footer("nothing of it where the stream is somebody else's")
    assert capsys.readouterr().out == ""
