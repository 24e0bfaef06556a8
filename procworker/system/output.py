"""Follow a run's output line by line while it waits on disk."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import anyio
import anyio.lowlevel

from procworker.redaction import Mask
from procworker.system.printer import PRINTER
from procworker.system.spool import CAP, Spool
from procworker.system.watch import POLL_SECONDS, Watch

TAIL_LINES = 20
PATIENCE_SECONDS, LINGER_SECONDS = 2.0, 30.0
"""How long a run that has ended waits for a sink that takes nothing, and in all for one that is slow."""
SLICE_SECONDS = 0.002
RETRY_SECONDS = 0.001
GATHER_SECONDS, FIRST_SECONDS, LEAST_SECONDS = 0.01, 0.005, 0.002
"""From one look to the next; from the first write after a silence to the look at it; and at least, however quickly
something is written."""

logger = logging.getLogger(__name__)

Sink = Callable[[str, str], None]
"""Takes (stream name, line).

A sink that can take nothing now raises BlockingIOError: the same line is offered again a little later, and so are all
that follow it in its stream; meanwhile the output waits on disk. Any other OSError or ValueError loses the line.
"""


class Outputs(Protocol):
    """Where a run's output is: two files that it appends to."""

    @property
    def stdout(self) -> Path: ...

    @property
    def stderr(self) -> Path: ...


class _Stream:
    """A spool, and what was read from it but not handed over yet."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.lines: deque[str] = deque()


class Follower:
    """Hand every line of a run's two files to a sink, in order per stream, and keep the last ones in `tail`.

    Each file is kept within `cap` bytes on disk (None: no cap); `cap` and `punch` are Spool's. With `resume`, what is
    there already is not handed over again: only the tail knows it. A `watch` tells of what is written. The `mask` goes
    over every line, also over those that are parted because they are too long.
    """

    def __init__(
        self,
        directory: Outputs,
        sink: Sink | None,
        *,
        resume: bool = False,
        cap: int | None = CAP,
        punch: bool = True,
        watch: Watch | None = None,
        mask: Mask | None = None,
    ) -> None:
        paths = {"stdout": directory.stdout, "stderr": directory.stderr}
        self._mask = mask or Mask()
        spools = [Spool(name, path, cap, punch=punch, mask=self._mask) for name, path in paths.items()]
        self._streams = [_Stream(spool) for spool in spools]
        self._sink = sink
        self._watch = watch or Watch()
        self._resume = resume
        self._room = CAP if cap is None else cap
        self._retry = RETRY_SECONDS
        self._looked, self._sizes = 0.0, [0, 0]
        self._is_quiet = True
        self._taken = self._ended_at = 0.0
        self._ended = anyio.Event()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    def end(self) -> None:
        """The run has ended: read what is there, but nothing that a process allowed to stay writes later."""
        for stream in self._streams:
            stream.spool.stop()
        self._ended_at = time.monotonic()
        self._ended.set()
        self._watch.wake(self)

    @property
    def tail(self) -> list[str]:
        """The last lines."""
        return [self._mask(line) for line in self._tail]

    @property
    def paths(self) -> Sequence[Path]:
        return [stream.spool.path for stream in self._streams]

    def has_news(self) -> bool:
        return not all(stream.spool.is_as_seen() for stream in self._streams)

    async def follow(self) -> None:
        """Read until `end` was called and nothing is left; from then on a sink that takes nothing for 2 s is given up.

        So is one that takes longer than 30 s in all.
        """
        if self._resume:
            for stream in self._streams:
                self._tail.extend(stream.spool.prime())
        while True:
            ended = self._ended.is_set()
            turns = [self._turn(stream) for stream in self._streams]
            if any(busy for busy, _ in turns):
                await anyio.lowlevel.checkpoint()
            elif any(refused for _, refused in turns):
                if ended and self._is_out_of_patience():
                    logger.warning("The rest of a run's output is not shown: its reader takes nothing")
                    self._sink = None
                with anyio.move_on_after(self._retry):
                    await self._rest(ended)
                self._retry = min(2 * self._retry, POLL_SECONDS)
            elif ended:
                break
            else:
                await self._rest(ended)

    async def _rest(self, ended: bool) -> None:
        """Wait until there may be something to do."""
        pause = self._pause()
        if self._watch.is_on and not ended and (self._watch.is_told or pause == POLL_SECONDS):
            await self._watch.news(self)
            self._looked = time.monotonic()  # nothing was written before
            pause = min(pause, FIRST_SECONDS if self._is_quiet else GATHER_SECONDS)
        with anyio.move_on_after(pause):
            await (anyio.sleep_forever() if ended else self._ended.wait())

    def _turn(self, stream: _Stream) -> tuple[bool, bool]:
        """Read a piece or hand over what was read, for a moment; return whether more can be done now, and whether the
        sink refused."""
        more = True
        if stream.lines:
            stream.spool.trim()
        else:
            lines, more = stream.spool.read()
            stream.lines.extend(lines)
        refused = bool(stream.lines) and self._hand_over(stream)
        return not refused and (more or bool(stream.lines)), refused

    def _hand_over(self, stream: _Stream) -> bool:
        """Hand lines over for a moment; return whether the sink refused one."""
        now = time.monotonic()
        stop = now + SLICE_SECONDS
        with PRINTER.batch():
            while stream.lines and now < stop:
                if self._sink is not None:
                    try:
                        self._sink(stream.spool.name, self._mask(stream.lines[0]))
                    except BlockingIOError:
                        return True
                    except (OSError, ValueError):
                        # Nobody reads any more (a closed pipe): the run goes on, and its last lines are kept.
                        pass
                self._tail.append(stream.lines.popleft())
                self._taken = now = time.monotonic()
                self._retry = RETRY_SECONDS
        return False

    def _is_out_of_patience(self) -> bool:
        now = time.monotonic()
        return now - max(self._taken, self._ended_at) > PATIENCE_SECONDS or now - self._ended_at > LINGER_SECONDS

    def _pause(self) -> float:
        """Seconds until the next look: fewer while an eighth of the cap is written in less."""
        now, sizes = time.monotonic(), [stream.spool.size for stream in self._streams]
        growth = max(map(int.__sub__, sizes, self._sizes))
        elapsed, self._looked, self._sizes = now - self._looked, now, sizes
        self._is_quiet = growth <= 0
        if self._is_quiet:
            return POLL_SECONDS
        return min(POLL_SECONDS, max(LEAST_SECONDS, elapsed * self._room / 8 / growth))
