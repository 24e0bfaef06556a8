"""What a terminal can show: its width, colours, and lines that are drawn anew in place."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TextIO

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")
STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
PIPE_COLUMNS = 100


class Terminal:
    """Where our lines go. What is no terminal, or TERM=dumb, gets no escape code; NO_COLOR takes the colours."""

    def __init__(self, stream: TextIO | None = None, environ: Mapping[str, str] | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._environ = os.environ if environ is None else environ
        tty = self._stream is not None and self._stream.isatty()
        self.is_a_terminal = tty
        """Also one that takes no escape codes."""
        self.is_live = tty and self._environ.get("TERM", "dumb") != "dumb"
        """May lines be drawn anew?"""
        self.has_colours = self.is_live and not self._environ.get("NO_COLOR")

    @property
    def columns(self) -> int:
        """Its width now; 100 where there is no terminal."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or PIPE_COLUMNS
        except (OSError, ValueError, AttributeError):
            return PIPE_COLUMNS

    def paint(self, text: str, *styles: str) -> str:
        """Return the text in these STYLES, where there are colours."""
        codes = ";".join(STYLES[style] for style in styles)
        return f"\x1b[{codes}m{text}\x1b[0m" if self.has_colours and codes and text else text

    def fit(self, line: str) -> str:
        """Cut one line without escape codes to the width, so that it never wraps; elsewhere leave it whole."""
        return cut(line, self.columns - 1) if self.is_live else line


def plain(text: str) -> str:
    """Take escape codes and all other control characters out of what somebody else has written; tabs are blanks."""
    text = ESCAPES.sub("", text).replace("\t", "    ")
    return "".join(character for character in text if unicodedata.category(character) != "Cc")


def width(text: str) -> int:
    """How many columns a text without escape codes takes."""
    if text.isascii():
        return len(text)
    return sum(_columns_of(character) for character in text)


def cut(text: str, columns: int) -> str:
    """Return the text, or as much of its front as fits with an ellipsis behind it."""
    if width(text) <= columns:
        return text
    kept, room = [], columns - 1
    for character in text:
        room -= _columns_of(character)
        if room < 0:
            break
        kept.append(character)
    return "".join(kept) + "…"[: max(columns, 0)]


def pad(text: str, columns: int) -> str:
    """Fill a text without escape codes up with blanks."""
    return text + " " * (columns - width(text))


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay rows of texts out in columns, two blanks apart; the last column is left as it is."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([*map(pad, row[:-1], widths), row[-1]]).rstrip() for row in rows]


def _columns_of(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
