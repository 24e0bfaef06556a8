"""Tell CI how flow runs ended, as JUnit's XML: one test suite with one test case per run."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from procworker.cli.errors import sentence
from procworker.cli.terminal import ESCAPES
from procworker.errors import ConfigurationError, single
from procworker.run import Run

if TYPE_CHECKING:
    from xml.etree import ElementTree

ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped."""
MOST_CASES, MOST_TAILS = 10_000, 1000
"""How many cases stand in a report, and how many keep the last lines of their output: memory is bounded."""


class Case:
    """One run, or what should have become one."""

    def __init__(self, classname: str, name: str) -> None:
        self.classname = classname
        self.name = name
        self.seconds = 0.0
        self.problem: tuple[str, str, str, str] | None = ("error", "Unknown", "No flow run was started.", "")
        """failure or error, its type, its message, and the last lines of output; None when all went well."""
        self.properties: dict[str, str] = {}
        self.over = False
        self._began = time.monotonic()

    @classmethod
    def of_target(cls, target: str) -> Case:
        """What `run` was asked for: file.py:flow, package.module:flow, flow/deployment or an id."""
        place, _, name = target.rpartition(":" if ":" in target else "/")
        return cls(place.removesuffix(".py").replace(os.sep, ".").strip(".") or "procworker", name)

    @classmethod
    def of_run(cls, run: Run) -> Case:
        """What a worker has run."""
        flow, deployment = (thing.name if thing else "" for thing in (run.flow, run.deployment))
        return cls(".".join(filter(None, [flow, deployment])) or "procworker", run.flow_run.name)

    def ended(self, run: Run, seconds: float, keep_tail: bool = True) -> None:
        """Take down how a run ended."""
        self.over = True
        self.seconds = seconds
        self.properties = {"flow_run_id": str(run.id), "flow_run_name": run.flow_run.name}
        state, tail = run.final_state, "\n".join(run.facts.tail if keep_tail else [])
        remarks = " ".join(run.result.remarks) if run.result else ""
        if state is None:
            refusal = run.claim.refusal or "How it ended could not be found out."
            self.problem = "error", "Unknown", run.mask(refusal), tail
        elif state.type != "COMPLETED":
            kind = "failure" if state.type == "FAILED" else "error"
            self.problem = kind, state.name or state.type, run.mask(state.message or ""), tail
        else:  # well, unless a process of it is still there
            self.problem = ("error", "Unkilled", remarks, tail) if remarks else None

    def broke_off(self, error: BaseException) -> None:
        """Take down why there is no run whose end could be told."""
        self.over = True
        self.seconds = time.monotonic() - self._began
        text = "The command was interrupted." if isinstance(error, KeyboardInterrupt) else sentence(error)
        self.problem = "error", type(single(error)).__name__, text, ""

    def element(self) -> ElementTree.Element:
        from xml.etree import ElementTree  # half a megabyte that most workers do without

        named = {"classname": _legal(self.classname), "name": _legal(self.name), "time": f"{self.seconds:.3f}"}
        case = ElementTree.Element("testcase", named)
        if self.problem:
            kind, type, message, tail = map(_legal, self.problem)
            ElementTree.SubElement(case, kind, {"type": type, "message": message}).text = f"{message}\n\n{tail}".strip()
        return case


class Suite:
    """The cases of one command."""

    def __init__(self, *cases: Case) -> None:
        self.cases = list(cases)
        self._tails = self._left_out = 0
        self._at = datetime.now(timezone.utc)

    def add(self, run: Run, seconds: float) -> Case:
        """Add the case of a run that is over."""
        case = Case.of_run(run)
        case.ended(run, seconds, keep_tail=self._tails < MOST_TAILS)
        self._tails += case.problem is not None
        if len(self.cases) < MOST_CASES:
            self.cases.append(case)
        else:
            self._left_out += 1
        return case

    def broke_off(self, error: BaseException) -> None:
        """The command ends before its time: its open case, or one for the command itself, says why."""
        if not (open := [case for case in self.cases if not case.over]):
            open.append(Case("procworker", "start"))
            self.cases += open
        for case in open:
            case.broke_off(error)

    def xml(self) -> bytes:
        """The report in the form that pytest and most others write it."""
        from xml.etree import ElementTree

        kinds = [case.problem[0] for case in self.cases if case.problem]
        counts = {"tests": len(self.cases), "failures": kinds.count("failure"), "errors": kinds.count("error")}
        facts = {name: str(count) for name, count in counts.items()} | {"skipped": "0"}
        facts["time"] = f"{sum(case.seconds for case in self.cases):.3f}"
        root = ElementTree.Element("testsuites")
        stamp = {"timestamp": self._at.isoformat(timespec="seconds"), "hostname": socket.gethostname()}
        suite = ElementTree.SubElement(root, "testsuite", {"name": "procworker", **facts, **stamp})
        if len(self.cases) == 1 and self.cases[0].properties:  # the schemas know those of suites only
            properties = ElementTree.SubElement(suite, "properties")
            for name, value in self.cases[0].properties.items():
                ElementTree.SubElement(properties, "property", {"name": name, "value": _legal(value)})
        suite.extend(case.element() for case in self.cases)
        if self._left_out:
            ElementTree.SubElement(suite, "system-out").text = f"{self._left_out} more flow runs are left out here."
        document: bytes = ElementTree.tostring(root, "utf-8")
        return b'<?xml version="1.0" encoding="utf-8"?>\n' + document


@contextmanager
def reported(file: str | None, suite: Suite) -> Iterator[None]:
    """Write the suite to the file at the end of the block, whole or not at all; without a file to nowhere.

    Raises ConfigurationError when it cannot be written, if possible before anything is run. An older report goes first:
    nobody shall take it for this one's.
    """
    if file is None:
        yield
        return
    path = Path(file).absolute()  # before anything changes the directory
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with _writing(file):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        part.touch(exist_ok=False)
    try:
        yield
    except BaseException as error:
        suite.broke_off(error)
        raise
    finally:
        with _writing(file):
            part.write_bytes(suite.xml())
            part.replace(path)


@contextmanager
def _writing(file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"--junit {file} cannot be written: {error.strerror or error}") from error


def _legal(text: str) -> str:
    """Take out escape codes, and name every other character that no XML can hold."""
    return ILLEGAL.sub(lambda match: f"#x{ord(match[0]):02X}", ESCAPES.sub("", text))
