"""Show what a run of this host has written, without getting in its worker's way, and without its secrets."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from procworker.cli.terminal import ESCAPES, Terminal, plain
from procworker.redaction import Mask, secrets_by
from procworker.settings import Settings
from procworker.system.census import HostRun
from procworker.system.child import Child
from procworker.system.printer import PRINTER
from procworker.system.processes import COOKIE, LINUX, Process
from procworker.system.records import read_record
from procworker.system.spool import Spool

LOOK_SECONDS = 0.2
OWN = ("api_url", "api_key", "api_auth_string", "client_custom_headers")
"""Settings that may hold secrets, and that the worker handed down."""


def show_output(run: HostRun, settings: Settings, tail: int | None, follow: bool) -> str | None:
    """Print the run's output, to its end if it is to be followed; or return why that cannot be shown."""
    if follow and _is_to_start(run):
        PRINTER.say(f"Waiting for flow run {plain(run.name)!r} to start ...\n", "stderr")
        while _is_to_start(run):
            time.sleep(LOOK_SECONDS)
            if not _renew(run):
                return "it has ended meanwhile"
    secrets = secrets_of(run, settings)
    if secrets is None:
        return "nobody can tell what is secret in its output" if run.root else "it has not started here"
    show, mask = printer(), Mask(secrets)
    with ExitStack() as stack:
        spools = [spool for name in ("stdout", "stderr") if (spool := _opened(run.path, name, stack, mask))]
        for spool in spools:
            if not follow:
                spool.stop()
            for line in _last(_lines(spool), tail):
                show(mask(line))
        while follow:
            ended = not _renew(run) or run.phase == "ended"
            for spool in spools:
                if ended:
                    spool.stop()
                for line in _lines(spool):
                    show(mask(line))
            if ended:
                break
            time.sleep(LOOK_SECONDS)
    return None


def _is_to_start(run: HostRun) -> bool:
    return run.root is None and run.data.get("phase") in ("claiming", "starting")


def printer() -> Callable[[str], None]:
    """Return what prints a line, and waits for who reads it; escape codes go to terminals only."""
    coloured = Terminal().has_colours

    def show(line: str) -> None:
        sys.stdout.write(PRINTER.harmless(line if coloured else ESCAPES.sub("", line)) + "\n")
        sys.stdout.flush()

    return show


def secrets_of(run: HostRun, settings: Settings) -> frozenset[str] | None:
    """List what the run knows and nobody may see; None where its environment cannot be read (any more)."""
    environ = Child(run.root).environment() if run.root else {}
    if environ.get(COOKIE) != run.path.name:  # a command of somebody's own may have emptied it
        return None
    names = run.data.get("infrastructure", {}).get("secret_names", [])
    if names is None:  # they stand where no variable tells of them
        return None
    return settings.secrets() | secrets_by(names, environ) | _handed_down(environ)


def _handed_down(environ: Mapping[str, str]) -> frozenset[str]:
    """The same for the settings of its worker, which need not be ours."""
    known: dict[str, Any] = {name: environ[key] for name in OWN if (key := f"PREFECT_{name.upper()}") in environ}
    with suppress(ValidationError, ValueError):
        return Settings(**known).secrets()
    return frozenset()


def _renew(run: HostRun) -> bool:
    """Read the record anew; False when it is gone."""
    try:
        run.data = read_record(run.path)
    except (OSError, ValueError):
        return False
    with suppress(KeyError, TypeError):
        run.root = run.root or Process(*run.data["infrastructure"]["process"])
    return True


def _opened(page: Path, name: str, stack: ExitStack, mask: Mask) -> Spool | None:
    """Read a file that may be removed meanwhile. Nothing is ever freed of it: that is its worker's affair."""
    with suppress(OSError):
        descriptor = os.open(page / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        stack.callback(os.close, descriptor)
        return Spool(name, Path(f"/proc/self/fd/{descriptor}") if LINUX else page / name, None, punch=False, mask=mask)
    return None


def _lines(spool: Spool) -> Iterator[str]:
    more = True
    while more:
        lines, more = spool.read()
        yield from lines


def _last(lines: Iterable[str], count: int | None) -> Iterable[str]:
    return lines if count is None else deque(lines, maxlen=count)
