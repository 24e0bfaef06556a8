"""A command on a terminal of its own, and what a person sees there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from commands import ROOT

CODE = re.compile(r"\x1b\[[0-9;?]*([A-Za-z])|([\r\n\b])|([^\x1b\r\n\b]+)")


class OnTerminal:
    """`python -m procworker` with a terminal as stdin, stdout and stderr; killed at the end of the block."""

    def __init__(self, place: Path, *argv: str, columns: int = 80, stderr: Path | None = None, **environ: str) -> None:
        self._master, slave = pty.openpty()
        self.columns, self.chunks = columns, list[str]()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environ = {**os.environ, "TERM": "xterm", "CI": "", **environ}
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [environ.get("PYTHONPATH"), str(ROOT)]))
        command = [sys.executable, "-m", "procworker", *argv]

        def lead() -> None:  # as a shell does, so that Ctrl-C is a signal
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        with (stderr or Path(os.devnull)).open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=slave,
                stdout=slave,
                stderr=errors if stderr else slave,
                cwd=place,
                env=environ,
                preexec_fn=lead,
            )
        os.close(slave)

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        if exc_info[0] is not None:
            print(repr(self.chunks))

    @property
    def written(self) -> str:
        return "".join(self.chunks)

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def until(self, pattern: str, seconds: float = 20) -> None:
        """Read until what was written matches."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.written):
            assert time.monotonic() < deadline, f"{pattern!r} is not in {self.written!r}"
            assert self._read(0.1), f"{pattern!r} is not in {self.written!r}"

    def wait(self, seconds: float = 20) -> int:
        """Read to the end; the exit code."""
        deadline = time.monotonic() + seconds
        while self._read(0.1):
            assert time.monotonic() < deadline, f"still running: {self.written!r}"
        return self.process.wait(5)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError:  # everybody has closed the other side
            return False
        self.chunks.append(data.decode(errors="replace"))
        return bool(data)

    @property
    def screen(self) -> list[str]:
        """The lines that stand there, of a terminal with no bottom: what moves the cursor is what we use."""
        return seen(self.written, self.columns)


def seen(written: str, columns: int) -> list[str]:
    """What a terminal of this width shows; raises AssertionError for a code that it does not know."""
    lines, column = [""], 0
    for match in CODE.finditer(written):
        letter, control, text = match.groups()
        if control == "\n":
            lines.append("")
        elif control == "\r":
            column = 0
        elif control == "\b":
            column -= 1
        elif letter == "K":
            lines[-1] = lines[-1][:column]
        elif letter == "m":
            pass
        elif letter:
            raise AssertionError(f"an unknown code: {match[0]!r}")
        else:
            for character in text or "":
                if column == columns:
                    lines.append("")
                    column = 0
                lines[-1] = (lines[-1].ljust(column))[:column] + character + lines[-1][column + 1 :]
                column += 1
    return lines
