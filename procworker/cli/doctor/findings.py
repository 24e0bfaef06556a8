"""What a check of `procworker doctor` has found, and how that is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from procworker.cli.layout import lines_of, visible
from procworker.cli.terminal import Terminal
from procworker.errors import single
from procworker.outcome import one_line

Status = Literal["ok", "warn", "FAIL"]
COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "red"}
INDENT = 6


@dataclass(frozen=True)
class Finding:
    """One line: how it stands, with what, and what mends it when it does not stand well."""

    status: Status
    what: str
    text: str
    fix: str = ""

    def row(self) -> dict[str, str]:
        return {"status": self.status, "what": self.what, "finding": self.text, "fix": self.fix}


Check = Callable[..., list[Finding]]


def ok(what: str, text: str) -> list[Finding]:
    return [Finding("ok", what, text)]


def warn(what: str, text: str, fix: str) -> list[Finding]:
    return [Finding("warn", what, text, fix)]


def fail(what: str, text: str, fix: str) -> list[Finding]:
    return [Finding("FAIL", what, text, fix)]


def guarded(what: str, check: Check, *args: Any) -> list[Finding]:
    """What a check finds; one that breaks hides none of the others."""
    try:
        return check(*args)
    except Exception as error:
        return broken(what, error)


def broken(what: str, error: BaseException) -> list[Finding]:
    return fail(what, f"this check broke: {one_line(single(error))}", "please report it as a bug of procworker")


def told(findings: Sequence[Finding]) -> list[str]:
    """The lines for people."""
    terminal = Terminal()
    lines = []
    for finding in findings:
        head = (f"{finding.status:4}  ", COLOURS[finding.status])
        lines += lines_of(terminal, [head, (f"{finding.what}: ", "bold"), (visible(finding.text), "")], INDENT)
        if finding.fix and finding.status != "ok":
            lines += lines_of(terminal, [(" " * INDENT + "-> ", "dim"), (visible(finding.fix), "")], INDENT + 3)
    return lines
