"""One file that processes append to: read line by line, while its oldest part is freed beyond a cap."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from io import FileIO
from pathlib import Path

from procworker.redaction import Mask

CAP = 64 * 1024 * 1024
"""Bytes that one stream may take on disk."""
CHUNK = 64 * 1024
LINE_LIMIT = 64 * 1024
"""Bytes after which a line without an end is cut and goes on as the next one."""
MEASURE_SECONDS = 0.002
LOOK_SECONDS = 0.007
"""From one measure of how quickly a file grows to the next, and from one look to the next: at least."""

_PAGE = 4096
_HEAD = 64
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")


class Spool:
    """A file read in bounded pieces; it is kept within `cap` bytes on disk (None: no cap) while others append to it.

    Freeing makes a hole at the front of the file. What was read is freed first; when more than the cap is unread, the
    oldest unread part goes too, and a line in its place says how many bytes it had. Where the system makes no holes
    (or with `punch` false) the file is emptied whenever all of it was read, or, with such a line, at twice the cap.
    What is written in the microseconds between reading the last byte and emptying it is lost then.

    A writer may truncate the file (`echo x > /dev/stdout`). It is read anew from its start then, unless it is no
    shorter and begins as before; what nobody had read yet is lost.

    No secret that the `mask` knows is parted where a line is.
    """

    def __init__(
        self, name: str, path: Path, cap: int | None = CAP, *, punch: bool = True, mask: Mask | None = None
    ) -> None:
        self.name = name
        self.path = path
        self._cap = sys.maxsize if cap is None else cap
        self._punch = punch
        self._mask = mask or Mask()
        self._size = 0
        self._offset = 0  # of what is read next
        self._freed = 0  # nothing before it takes space
        self._head = b""  # how the file began when it was read
        self._changed = 0
        self._measured_at, self._measured, self._speed = time.monotonic(), 0, 0.0
        self._pace = self._longest = 0.0  # bytes a second; seconds from one look to the next
        self._end = sys.maxsize
        self._rest = b""  # was read, but is no line yet
        self._unsplit = False  # the rest may hold whole lines
        self._dropped = 0

    def stop(self) -> None:
        """Read no further than the file reaches now, and free nothing any more."""
        try:
            self._end = self._see()
        except OSError:
            self._end = self._offset

    def prime(self) -> list[str]:
        """Go to the end; return the complete lines of the last 64 KiB that are there."""
        try:
            size = min(os.stat(self.path).st_size, self._end)
            with open(self.path, "rb", buffering=0) as file:
                self._head = file.read(min(_HEAD, size))
                start = file.seek(_data_from(file, max(0, size - LINE_LIMIT), size))
                data = file.read(size - start)
        except OSError:
            return []
        self._size = self._measured = self._offset = start + len(data)
        if start:
            first = _LINE_END.search(data)
            data = data[first.end() if first else self._mask.seam(data, self._mask.longest)[1] :]
        return [_text(line) for line in self._split(data)]

    def read(self) -> tuple[list[str], bool]:
        """Return the new complete lines, and whether more is waiting; after `stop`, the last line needs no end.

        One stat when there is nothing new.
        """
        data = b""
        try:
            size = self._look()
            if size > self._offset:
                with open(self.path, "rb", buffering=0) as file:
                    data = self._next(file, size)
        except OSError:
            size = self._offset
        more = self._offset < size
        last = not more and self._end < sys.maxsize
        if not (data or self._unsplit or self._dropped or last):
            return [], False
        lines = self._split(data)
        if last and self._rest:
            lines.append(self._rest)
            self._rest = b""
        return [*self._mark(), *map(_text, lines)], more

    def is_as_seen(self) -> bool:
        """Is nothing new in the file since the last look? One stat."""
        try:
            status = os.stat(self.path)
        except OSError:
            return True
        return (status.st_size, status.st_mtime_ns) == (self._size, self._changed)

    def trim(self) -> None:
        """Keep the cap while nothing is read. One stat, unless there is much to free."""
        with suppress(OSError):
            self._look()

    @property
    def size(self) -> int:
        """Bytes that were ever written, at the last look; less after the file was truncated."""
        return self._size

    @property
    def _room(self) -> int:
        """The cap without twice what may be written until the next look at the pace of late, but a quarter at least."""
        return max(self._cap // 4, self._cap - int(2 * self._pace * max(self._longest, LOOK_SECONDS)))

    def _see(self) -> int:
        """Return the size, and begin again where a writer truncated the file."""
        status = os.stat(self.path)
        size, changed = status.st_size, status.st_mtime_ns
        is_changed = (size, changed) != (self._size, self._changed)
        if size < self._offset or (is_changed and not self._begins_as_before()):
            self._offset = self._freed = 0
            self._head = b""
            if self._rest:
                self._rest += b"\n"
                self._unsplit = True
            if self._end < sys.maxsize:  # by one that was allowed to stay
                self._end = 0
        self._size, self._changed = size, changed
        self._measure()
        return size

    def _measure(self) -> None:
        """Find out how quickly it grows and how late a look may come: the most of late, forgotten within seconds.

        One burst is no pace, nor is all that there is at the first look: it takes two looks in a row.
        """
        now = time.monotonic()
        if (elapsed := now - self._measured_at) >= MEASURE_SECONDS:
            still = max(0.0, 1 - elapsed)
            speed, before = (self._size - self._measured) / elapsed, self._speed
            self._pace, self._speed = max(min(speed, before), self._pace * still), speed
            if min(speed, before) > 0:  # who waits for news looks at no certain time
                self._longest = max(elapsed, self._longest * still)
            self._measured_at, self._measured = now, self._size

    def _begins_as_before(self) -> bool:
        with open(self.path, "rb", buffering=0) as file:
            return file.read(len(self._head)) == self._head

    def _look(self) -> int:
        """Free what must be freed, and return how far to read."""
        self._see()
        if self._end == sys.maxsize and self._size - self._freed > self._room * 3 // 4:
            if self._punch:
                self._free()
            else:
                self._empty()
        return min(self._size, self._end)

    def _next(self, file: FileIO, size: int) -> bytes:
        file.seek(self._offset)
        data = file.read(min(CHUNK, size - self._offset))
        if data.startswith(b"\0") and self._skip_hole(file):
            data = file.read(min(CHUNK, max(0, size - self._offset)))
        if len(self._head) == self._offset < _HEAD:
            self._head += data[: _HEAD - self._offset]
        self._offset += len(data)
        return data

    def _skip_hole(self, file: FileIO) -> bool:
        """A writer that does not append leaves a hole when the file was truncated; what it skipped is no output."""
        start = file.seek(_data_from(file, self._offset, self._size))
        if start == self._offset:
            return False
        if self._freed == self._offset:
            self._freed = start
        self._offset = start
        return True

    def _free(self) -> None:
        """Make a hole that grows rarely: by a quarter of the cap, unless the cap is reached."""
        unread, taken = self._size - self._offset, self._size - self._freed
        room = self._room
        keep = room * 3 // 4 if unread > room else max(unread, room // 2)
        hole = (self._size - keep) // _PAGE * _PAGE
        if hole <= self._freed or (taken <= room and hole - self._freed < room // 4):
            return
        with open(self.path, "r+b", buffering=0) as file:
            if os.fstat(file.fileno()).st_size < self._size:  # truncated by a writer, just now
                return
            start = self._line_start(file, hole) if hole > self._offset else self._offset
            try:
                _punch(file.fileno(), self._freed, hole)
            except OSError as error:
                self._punch = error.errno == errno.EINTR
                return
        self._freed, self._head = hole, bytes(_HEAD)
        if start > self._offset:
            self._drop(start)

    def _empty(self) -> None:
        """Without holes: cut the file to nothing, once all but a little of it was read and the rest is in memory."""
        little = min(CHUNK, self._cap // 4)
        if self._size - self._offset > little and self._size - self._freed <= 2 * self._cap:
            return
        with open(self.path, "r+b", buffering=0) as file:
            self._skip_hole(file)
            if self._size - self._offset > little:
                if self._size - self._freed <= 2 * self._cap:
                    return
                self._drop(self._line_start(file, self._size - little))
            file.seek(self._offset)
            for _ in range(16):  # a writer may be quick, but not so quick
                data = file.read(CHUNK)
                self._rest += data
                self._unsplit = True
                self._offset += len(data)
                if not data:
                    os.ftruncate(file.fileno(), 0)
                    self._offset = self._freed = 0
                    self._head = b""
                    break
        self._size = self._offset

    def _line_start(self, file: FileIO, offset: int) -> int:
        """The first start of a line from offset on; about offset itself where a line is longer than any may be."""
        start = file.seek(max(0, offset - 1 - self._mask.longest))
        data = file.read(LINE_LIMIT + self._mask.longest)
        if found := _LINE_END.search(data, offset - 1 - start):
            return start + found.end()
        return start + self._mask.seam(data, offset - start)[1]

    def _drop(self, start: int) -> None:
        self._dropped += len(self._rest) + start - self._offset
        self._rest = b""
        self._offset = start

    def _mark(self) -> list[str]:
        dropped, self._dropped = self._dropped, 0
        cap = _size_text(self._cap)
        what = f"{dropped} bytes of {self.name} were dropped here, no more than {cap} are kept"
        return [f"[procworker: {what}]"] if dropped else []

    def _split(self, data: bytes) -> list[bytes]:
        data = self._rest + data
        self._unsplit = False
        last = b"\r" if data.endswith(b"\r") else b""  # what follows may be its \n
        if b"\r" in data:
            data = data.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = data.split(b"\n")
        self._rest += last
        while len(self._rest) > LINE_LIMIT + self._mask.longest:
            before, behind = self._mask.seam(self._rest, _character_start(self._rest, LINE_LIMIT))
            cut = before or behind
            lines.append(self._rest[:cut])
            self._rest = self._rest[cut:]
        return lines


def _character_start(text: bytes, offset: int) -> int:
    """Where the UTF-8 character at this offset starts; the offset itself where the bytes are none."""
    for start in range(offset, offset - 4, -1):
        if text[start] & 0xC0 != 0x80:
            return start
    return offset


def _text(line: bytes) -> str:
    return line.rstrip(b"\r").decode("utf-8", "replace")


def _size_text(size: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} bytes"


def _data_from(file: FileIO, offset: int, size: int) -> int:
    """Where the first data from offset on starts, at most `size`; offset itself where the system cannot tell."""
    try:
        return min(os.lseek(file.fileno(), offset, os.SEEK_DATA), size)
    except OSError as error:
        return size if error.errno == errno.ENXIO else offset
    except AttributeError:
        return offset


def _punch(fd: int, start: int, end: int) -> None:
    """Give the blocks between two offsets back; the size stays. Raises OSError where that is not possible."""
    fallocate = _fallocate()
    if fallocate is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    keep_size, punch_hole = 0x01, 0x02
    fallocate(fd, keep_size | punch_hole, start, end - start)


@cache
def _fallocate() -> Callable[[int, int, int, int], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        function = getattr(libc, "fallocate64", None) or libc.fallocate
    except (ImportError, OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

    def fallocate(fd: int, mode: int, start: int, length: int) -> None:
        if function(fd, mode, start, length):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    return fallocate
