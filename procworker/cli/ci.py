"""Speak to the CI system that we run in: groups of output, annotations, a summary of the job.

Nothing that a flow prints or that somebody named is taken for a command to it: PRINTER asks `harmless` about each line.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

MOST_ROWS = 500
"""Of runs in a summary: GitHub takes 1 MiB."""

Row = tuple[str, str, str, float, str]
"""A run's name, what it is a run of, its final state, its seconds, and its message."""


class Ci:
    """None of them: nothing is grouped, and nothing annotated."""

    weak_spot: re.Pattern[str] | None = None
    """Where a character more, in a line of somebody else's, keeps it from being a command."""

    def __init__(self, environ: Mapping[str, str], say: Callable[[str], object]) -> None:
        self._environ = environ
        self._say = say
        self._group: str | None = None

    def harmless(self, text: str) -> str:
        """Return lines that are not ours so that none of them is a command."""
        if self.weak_spot is None:
            return text
        return "".join(self.weak_spot.sub("|", line) for line in text.splitlines(keepends=True))

    def begin(self, title: str) -> None:
        """What follows is about this, and can be folded; nothing happens where that is open already."""
        if self._group != title:
            self.end()
            self._group = title
            self._open(title)

    def end(self, failed: bool = False) -> None:
        if self._group is not None:
            self._close(self._group, failed)
            self._group = None

    def problem(self, title: str, message: str) -> None:
        """Show that something went wrong where people look first."""

    def summary(self, title: str, rows: Sequence[Row]) -> str | None:
        """Show a table in the summary of the job; returns what went wrong."""
        return None

    def _open(self, title: str) -> None:
        pass

    def _close(self, title: str, failed: bool) -> None:
        pass


class GitHub(Ci):
    """Workflow commands, and the file of the step's summary."""

    weak_spot = re.compile(
        r"^(?=\s*::)|(?<=##)(?=\[)"
    )  # the runner trims lines, and takes the old form anywhere in them

    def _open(self, title: str) -> None:
        self._say(f"::group::{_github(title)}")

    def _close(self, title: str, failed: bool) -> None:
        self._say("::endgroup::")

    def problem(self, title: str, message: str) -> None:
        named = _github(title).replace(":", "%3A").replace(",", "%2C")
        self._say(f"::error title={named}::{_github(message or title)}")

    def summary(self, title: str, rows: Sequence[Row]) -> str | None:
        path = self._environ.get("GITHUB_STEP_SUMMARY")
        if not path:
            return None
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(markdown(title, rows))
        except OSError as error:
            return f"GITHUB_STEP_SUMMARY {path} cannot be written: {error.strerror or error}"
        return None


class GitLab(Ci):
    """Sections of the job's log, folded."""

    weak_spot = re.compile(r"(?<=section_)(?=(?:start|end):)")

    def _open(self, title: str) -> None:
        name = f"run_{_section(title)}"
        self._say(f"\x1b[0Ksection_start:{time.time():.0f}:{name}[collapsed=true]\r\x1b[0K{title}")

    def _close(self, title: str, failed: bool) -> None:
        self._say(f"\x1b[0Ksection_end:{time.time():.0f}:run_{_section(title)}\r\x1b[0K")


class Buildkite(Ci):
    """Groups of the job's log; that of a run that failed stands open."""

    weak_spot = re.compile(r"^(?=(?:---|\+\+\+|~~~|\^\^\^) )")

    def _open(self, title: str) -> None:
        self._say(f"--- {title}")

    def _close(self, title: str, failed: bool) -> None:
        if failed:
            self._say("^^^ +++")


def detect(environ: Mapping[str, str], say: Callable[[str], object]) -> Ci:
    """Return the one that these variables tell of."""
    systems = {"GITHUB_ACTIONS": GitHub, "GITLAB_CI": GitLab, "BUILDKITE": Buildkite}
    found = next((system for name, system in systems.items() if environ.get(name, "").lower() in ("true", "1")), Ci)
    return found(environ, say)


def markdown(title: str, rows: Sequence[Row]) -> str:
    """A table of the runs, those that failed first."""
    ordered = sorted(rows, key=lambda row: row[2] == "Completed")
    lines = [f"### {_cell(title)}", "", "| flow run | flow | state | seconds | message |", "|---|---|---|--:|---|"]
    for name, flow, state, seconds, message in ordered[:MOST_ROWS]:
        lines.append(f"| {_cell(name)} | {_cell(flow)} | {_cell(state)} | {seconds:.1f} | {_cell(message)} |")
    if len(rows) > MOST_ROWS:
        lines.append(f"\nand {len(rows) - MOST_ROWS} more")
    return "\n".join([*lines, "", ""])


def _cell(text: str) -> str:
    text = text.strip()[:500].replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "\\`")
    return "<br>".join(text.splitlines())


def _github(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _section(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", title)
