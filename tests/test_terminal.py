"""What goes to a terminal, and what to anything else."""

from __future__ import annotations

import io
import os
import pty
import struct
import termios
from collections.abc import Iterator
from fcntl import ioctl
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procworker.cli.terminal import Terminal, cut, pad, plain, table, width


@pytest.fixture
def tty() -> Iterator[TextIO]:
    """The program's side of a terminal of 80 columns."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(slave, "w") as stream:
        yield stream
    os.close(master)


def test_a_terminal_has_colours_lines_in_place_and_a_width(tty: TextIO) -> None:
    terminal = Terminal(tty, {"TERM": "xterm"})
    assert terminal.is_live
    assert terminal.columns == 80
    assert terminal.paint("ok", "green", "bold") == "\x1b[32;1mok\x1b[0m"
    assert terminal.fit("x" * 200) == "x" * 78 + "…"


@pytest.mark.parametrize(
    ("environ", "live"), [({"TERM": "xterm", "NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False), ({}, False)]
)
def test_whoever_wants_no_codes_gets_none(tty: TextIO, environ: dict[str, str], live: bool) -> None:
    terminal = Terminal(tty, environ)
    assert terminal.is_live is live
    assert terminal.paint("ok", "green") == "ok"


def test_a_pipe_gets_whole_lines_without_codes() -> None:
    terminal = Terminal(io.StringIO(), {"TERM": "xterm"})
    assert not terminal.is_live
    assert terminal.paint("ok", "red") == "ok"
    assert terminal.fit("x" * 200) == "x" * 200


def test_what_others_write_moves_no_cursor() -> None:
    assert plain("\x1b[31mred\x1b[0m \x1b]0;title\x07\tend\x1b[2K\r\x07") == "red     end"


@given(st.text(), st.integers(1, 50))
def test_a_cut_text_fits_and_begins_as_before(text: str, columns: int) -> None:
    text = plain(text)
    short = cut(text, columns)
    assert width(short) <= columns
    assert short == text or text.startswith(short.removesuffix("…"))


def test_wide_characters_count_twice_and_accents_not_at_all() -> None:
    assert width("日本") == 4
    assert width("e\u0301") == 1
    assert cut("日本語", 4) == "日…"
    assert pad("日", 4) == "日  "


def test_columns_are_as_wide_as_their_widest_text() -> None:
    assert table([["a", "bb", "c"], ["日本", "b", ""]]) == ["a     bb  c", "日本  b"]
