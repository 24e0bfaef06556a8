"""Tell CI how a flow run ended: `procworker run --junit FILE` writes a test suite with one test case."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

from procworker.cli.errors import sentence
from procworker.errors import ConfigurationError, single
from procworker.run import Run

COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped."""


class Case:
    """One target and what became of it."""

    def __init__(self, target: str) -> None:
        place, _, name = target.rpartition(":" if ":" in target else "/")
        self.classname = place.removesuffix(".py").replace(os.sep, ".").strip(".") or "procworker"
        self.name = name
        self.seconds = 0.0
        self.problem: tuple[str, str, str, str] | None = ("error", "Unknown", "No flow run was started.", "")
        """failure or error, its type, its message, and the last lines of output; None when all went well."""
        self.properties: dict[str, str] = {}
        self._began = time.monotonic()
        self._at = datetime.now(timezone.utc)

    def ended(self, run: Run, seconds: float) -> None:
        """Take down how a run ended."""
        self.seconds = seconds
        self.properties = {"flow_run_id": str(run.id), "flow_run_name": run.flow_run.name}
        state, tail = run.final_state, "\n".join(run.facts.tail)
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
        self.seconds = time.monotonic() - self._began
        text = "The command was interrupted." if isinstance(error, KeyboardInterrupt) else sentence(error)
        self.problem = "error", type(single(error)).__name__, text, ""

    def xml(self) -> bytes:
        """The report in the form that pytest and most others write it."""
        kind = self.problem[0] if self.problem else ""
        counts = {"tests": "1", "failures": str(int(kind == "failure")), "errors": str(int(kind == "error"))}
        counts |= {"skipped": "0", "time": f"{self.seconds:.3f}"}
        root = ElementTree.Element("testsuites")
        stamp = {"timestamp": self._at.isoformat(timespec="seconds"), "hostname": socket.gethostname()}
        suite = ElementTree.SubElement(root, "testsuite", {"name": "procworker", **counts, **stamp})
        if self.properties:
            properties = ElementTree.SubElement(suite, "properties")
            for name, value in self.properties.items():
                ElementTree.SubElement(properties, "property", {"name": name, "value": _legal(value)})
        named = {"classname": _legal(self.classname), "name": _legal(self.name), "time": f"{self.seconds:.3f}"}
        case = ElementTree.SubElement(suite, "testcase", named)
        if self.problem:
            kind, type, message, tail = map(_legal, self.problem)
            ElementTree.SubElement(case, kind, {"type": type, "message": message}).text = f"{message}\n\n{tail}".strip()
        document: bytes = ElementTree.tostring(root, "utf-8")
        return b'<?xml version="1.0" encoding="utf-8"?>\n' + document


@contextmanager
def reported(file: str | None, target: str) -> Iterator[Case]:
    """Write the case to the file at the end of the block, whole or not at all; without a file to nowhere.

    Raises ConfigurationError when it cannot be written, if possible before anything is run. An older report goes first:
    nobody shall take it for this one's.
    """
    case = Case(target)
    if file is None:
        yield case
        return
    path = Path(file).absolute()  # before anything changes the directory
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with _writing(file):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        part.touch(exist_ok=False)
    try:
        yield case
    except BaseException as error:
        case.broke_off(error)
        raise
    finally:
        with _writing(file):
            part.write_bytes(case.xml())
            part.replace(path)


@contextmanager
def _writing(file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"--junit {file} cannot be written: {error.strerror or error}") from error


def _legal(text: str) -> str:
    """Take out colours, and name every other character that no XML can hold."""
    return ILLEGAL.sub(lambda match: f"#x{ord(match[0]):02X}", COLOURS.sub("", text))
