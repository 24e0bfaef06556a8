"""Count the runs of a command, and tell each one's end to whoever shall know of it."""

from __future__ import annotations

from collections import Counter

import anyio

from procworker.cli.ci import Ci, Row
from procworker.cli.junit import Case, Suite
from procworker.run import Run
from procworker.system.output import Sink

MOST_ROWS = 10_000


class Tally:
    """The ends of runs, in the order in which they came."""

    def __init__(self, suite: Suite, ci: Ci, sink: Sink, one_at_a_time: bool) -> None:
        """Output is grouped by run where only one runs at a time: else the lines of several stand side by side."""
        self._suite = suite
        self._ci = ci
        self._sink = sink
        self._grouped = one_at_a_time
        self.states: Counter[str] = Counter()
        self.rows: list[Row] = []

    def print_line(self, stream: str, line: str) -> None:
        """The sink of the worker: a flow's line in the group of its run."""
        if self._grouped:
            self._ci.begin(line.partition(" | ")[0])
        self._sink(stream, line)

    def add(self, run: Run, case: Case | None = None) -> None:
        """A run is over; it has a case of its own, or becomes one."""
        seconds = max(0.0, anyio.current_time() - run.answered_at)
        case = case or self._suite.add(run, seconds)
        state = run.final_state
        name = (state.name or state.type.title()) if state else "Unknown"
        kind, type, message, _ = case.problem or ("", "", "", "")
        self.states[name] += 1
        if self._grouped:
            self._ci.end(failed=bool(kind))
        if kind:
            self._ci.problem(f"{case.classname}: flow run {case.name} is {type}", message)
        if len(self.rows) < MOST_ROWS:
            self.rows.append((case.name, case.classname, name, seconds, message))

    @property
    def sentence(self) -> str:
        """How many runs ended how."""
        count = self.states.total()
        ends = ", ".join(f"{number} {name}" for name, number in self.states.most_common())
        return f"{count} flow run{'' if count == 1 else 's'}{': ' if ends else ''}{ends}"

    def close(self) -> str | None:
        """Write the summary of the job; returns what went wrong."""
        self._ci.end()
        return self._ci.summary(f"procworker: {self.sentence}", self.rows)
