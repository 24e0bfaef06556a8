"""The line at the bottom of a terminal that tells how a flow run is doing."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

import anyio

from procworker.cli.run.meter import Meter, size
from procworker.cli.run.receipt import COLOURS
from procworker.cli.terminal import Terminal, cut, plain
from procworker.errors import Unreachable
from procworker.outcome import Reason
from procworker.run import Run
from procworker.server.client import Client
from procworker.system.output import Sink
from procworker.system.printer import PRINTER

DRAW_SECONDS, FIRST_SECONDS, ASK_SECONDS, PATIENCE_SECONDS = 0.5, 1.0, 2.0, 5.0
COST = 10
"""The server is left alone for so many times what its answers took."""
WIDE, NAME_COLUMNS = 100, 24
ECHO_COLUMNS = 3
"""Room for the ^C that a terminal writes behind the line, which must not wrap for it."""
PREFECTS_LOG = re.compile(r"\d\d:\d\d:\d\d(?:\.\d+)? \| [A-Z]+ +\| ")
ENDING = {Reason.CANCELLED: "Cancelling", Reason.TIMED_OUT: "Timed out, ending", Reason.STOPPED: "Ending"}
TYPES = {"completed": ["COMPLETED"], "running": ["RUNNING"], "failed": ["FAILED", "CRASHED"]}


class Live:
    """What is known of a run right now, as one line that is drawn anew in place; nothing at all without a terminal."""

    def __init__(self, terminal: Terminal, meter: Meter, environ: Mapping[str, str], sink: Sink) -> None:
        """`sink` takes the run's lines."""
        self._terminal, self._meter, self._sink = terminal, meter, sink
        self._is_shown = terminal.is_live and not environ.get("CI")  # the log of a CI job is read later
        self._has_name_below = {"stdout": self._is_shown, "stderr": self._is_shown and Terminal(sys.stderr).is_live}
        self._run: Run | None = None
        self._began = time.monotonic()
        self._state = ""
        self._type = ""
        self._tasks: dict[str, int] = {}
        self._last = ""
        self._asked = ""

    def take(self, stream: str, line: str) -> None:
        """Print a line of the run (without its name, where the line at the bottom has it), and keep it."""
        self._last = line
        if self._run is not None and self._has_name_below[stream]:
            line = line.removeprefix(f"{self._run.flow_run.name} | ")
        self._sink(stream, line)

    async def show(self, run: Run, client: Client) -> None:
        """Draw the line until cancelled, and take it away."""
        if not self._is_shown:
            return
        self._run, self._began = run, time.monotonic()
        try:
            async with anyio.create_task_group() as beside:
                beside.start_soon(self._ask_on, run, client)
                while True:
                    self.draw()
                    await anyio.sleep(DRAW_SECONDS)
        finally:
            self._run = None
            PRINTER.footer("")

    def ask(self, what: str) -> None:
        """Show at once what a signal has asked for, such as Cancelling."""
        self._asked = what
        self.draw()

    def draw(self) -> None:
        """Draw the line as it is now, if it is shown at all."""
        if self._run is not None:
            PRINTER.footer(self._text(self._run))

    async def _ask_on(self, run: Run, client: Client) -> None:
        """Ask the server how far it is; one that is away is asked again later, one that refuses is not."""
        with suppress(Exception):  # a line for the eye is worth no run
            await anyio.sleep(FIRST_SECONDS)
            while True:
                began = time.monotonic()
                with anyio.move_on_after(PATIENCE_SECONDS), suppress(Unreachable):
                    await self._ask(run, client)
                await anyio.sleep(max(ASK_SECONDS, COST * (time.monotonic() - began)))

    async def _ask(self, run: Run, client: Client) -> None:
        flow_run = await client.read_flow_run(run.id, retries=0)
        self._state, self._type = flow_run.state_name or "", flow_run.state_type or ""
        total = await client.count_task_runs(run.id, retries=0)
        counts = {}
        if total:
            counts = {name: await client.count_task_runs(run.id, types, retries=0) for name, types in TYPES.items()}
        self._tasks = {"total": total, **counts} if total else {}

    def _text(self, run: Run) -> str:
        state = self._words(run)
        head = f"{cut(plain(run.flow_run.name), NAME_COLUMNS)} | "
        parts = [f"{head}{state} {_clock(time.monotonic() - self._began)}"]
        parts += filter(None, [self._task_words(), self._usage(), self._last_line(run)])
        line = cut(" | ".join(parts), self._terminal.columns - ECHO_COLUMNS)
        if not line.startswith(head + state):
            return line
        colour = COLOURS.get(self._type, "cyan") if run.reason is None and not self._asked else "yellow"
        return head + self._terminal.paint(state, colour) + line[len(head + state) :]

    def _words(self, run: Run) -> str:
        if self._asked or run.reason is not None:
            return self._asked or ENDING[run.reason or Reason.CANCELLED]
        if run.identifier is None:
            return "Preparing"
        return plain(self._state) if self._state not in ("", "Pending") else "Starting"

    def _task_words(self) -> str:
        if not (total := self._tasks.get("total")):
            return ""
        counts = {name: self._tasks.get(name, 0) for name in TYPES}
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        if self._terminal.columns < WIDE:
            return f"{counts['completed']}/{total} tasks{failed}"
        running = f", {counts['running']} running" if counts["running"] else ""
        return f"{counts['completed']} of {total} tasks completed{running}{failed}"

    def _usage(self) -> str:
        meter = self._meter
        shown = [f"{meter.percent:.0f}% CPU"] if meter.percent is not None else []
        return ", ".join([*shown, size(meter.memory)] if meter.memory else shown)

    def _last_line(self, run: Run) -> str:
        name = run.flow_run.name
        text = PREFECTS_LOG.sub("", plain(self._last.removeprefix(f"{name} | ")), count=1)
        return text.removeprefix(f"Flow run {name!r} - ").strip()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
