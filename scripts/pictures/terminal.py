"""A terminal that a program cannot tell from a real one, and that can be drawn."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape

import pyte

COLOURS = {"red": "#e06c75", "green": "#7ec16e", "brown": "#d8a657", "blue": "#61afef", "cyan": "#56b6c2"}
FOREGROUND, BACKGROUND, DIM = "#d4d7dd", "#1e2127", "#8a919e"
COLUMN, LINE, MARGIN = 7.8, 17.0, 12.0


class Terminal:
    """One command on a terminal of so many columns and lines."""

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str], cwd: str, columns: int = 80, lines: int = 30):
        self._title = " ".join(["procworker", *argv])
        self.names: dict[str, str] = {}
        """What is drawn in the place of paths that exist on this machine only."""
        self.left_out = ""
        """A line that holds this is not drawn, unless it is empty: it would tell of this machine only."""
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self._fd, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        command = [sys.executable, "-m", "procworker", *argv]
        environ = {**environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environ, cwd=cwd, start_new_session=True
        )
        os.close(slave)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def until(self, holds: Callable[[str], bool], seconds: float = 60) -> None:
        """Go on until the text on the screen is as it should be."""
        deadline = time.monotonic() + seconds
        while not holds(self.text):
            left = deadline - time.monotonic()
            if left <= 0 or not self._read(left):
                raise SystemExit(f"{self._title} never showed what it should:\n{self.text}")

    def finish(self, seconds: float = 60) -> int:
        deadline = time.monotonic() + seconds
        while self._read(max(0.1, deadline - time.monotonic())):
            pass
        return self.process.wait(10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)
        os.close(self._fd)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._fd], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the program has ended
            return False
        self._stream.feed(data)
        return bool(data)

    def svg(self) -> str:
        """Draw the screen as it is now, without its empty end."""
        lines = self.screen.display[: len(self.text.splitlines())]
        shown = [y for y, line in enumerate(lines) if not (self.left_out and self.left_out in line)]
        used = len(shown)
        width, height = self.screen.columns * COLUMN + 2 * MARGIN, (used + 1) * LINE + 2 * MARGIN
        size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
        style = f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13" fill="{FOREGROUND}"'
        parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>']
        parts.append(f'<rect width="100%" height="100%" rx="6" fill="{BACKGROUND}"/>')
        title = (
            self._title
            if len(self._title) < self.screen.columns - 4
            else f"{self._title[: self.screen.columns - 8]} ..."
        )
        parts.append(_text(0, 0, f"$ {title}", f'fill="{DIM}"'))
        for place, y in enumerate(shown, 1):
            parts += self._line(y, place)
        return "\n".join([*parts, "</svg>", ""])

    def _line(self, y: int, place: int) -> list[str]:
        """Pieces of one style each."""
        row, parts, start = self.screen.buffer[y], [], 0
        for x in range(1, self.screen.columns + 1):
            if x == self.screen.columns or row[x][1:] != row[start][1:]:
                text = "".join(row[i].data for i in range(start, x))
                for path, name in self.names.items():
                    text = text.replace(path, name)
                if text.strip():
                    colour = COLOURS.get(row[start].fg)
                    style = f'fill="{colour}"' if colour else ""
                    parts.append(_text(start, place, text, style + (' font-weight="bold"' if row[start].bold else "")))
                start = x
        return parts


def _text(column: int, line: int, text: str, style: str) -> str:
    x, y = MARGIN + column * COLUMN, MARGIN + line * LINE + 13
    length = f'textLength="{len(text) * COLUMN:.1f}" lengthAdjust="spacing"'
    return f'<text x="{x:.1f}" y="{y:.1f}" xml:space="preserve" {length} {style}>{escape(text)}</text>'
