"""Find the Python that runs flows, and what of our own environment must not reach it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from procworker.errors import ConfigurationError

_PROBE = """
import importlib.util, sys
# A mere folder of that name, perhaps in the current directory, has no origin.
if getattr(importlib.util.find_spec("prefect"), "origin", None) is None: sys.exit(3)
from importlib.metadata import version
print(version("prefect"))
"""
VERSION = re.compile(r"\d[\w.+!-]*")
NO_PREFECT = (
    "pip install 'procworker[prefect]', or name a Python that has Prefect with --python or the job variable `python`"
)


@dataclass(frozen=True)
class Interpreter:
    """A Python that has Prefect installed."""

    path: str
    prefect_version: str


def locate(python: str) -> str:
    """Turn a path, a venv or tox env directory, or a command name into the path of an executable Python.

    Raises ConfigurationError when there is none.
    """
    path = os.path.expanduser(python)  # as text: a Path would lose the ./ that says "not from PATH"
    if os.path.isdir(path):
        candidates = [Path(path, "bin", "python"), Path(path, "Scripts", "python.exe")]
        found = next((str(candidate) for candidate in candidates if candidate.exists()), None)
        if found is None:
            raise ConfigurationError(f"python {python!r} is a directory without bin/python: not a virtual environment")
    else:
        found = shutil.which(path)
        if found is None:
            raise ConfigurationError(f"python {python!r} does not exist or is not executable")
    # Not resolved: a venv's python is a link, and only its own path finds the venv's packages.
    return os.path.abspath(found)


def probe(path: str) -> str | None:
    """Return the Prefect version that this Python has, or None; Prefect itself is not imported.

    Raises ConfigurationError when it cannot be run.
    """
    try:
        stamp = os.stat(path).st_mtime_ns
    except OSError as error:
        raise ConfigurationError(f"python {path!r} cannot be used: {error.strerror}") from error
    return _probe(path, stamp)


@lru_cache(maxsize=64)
def _probe(path: str, stamp: int) -> str | None:
    try:
        done = subprocess.run(
            [path, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=20,
            stdin=subprocess.DEVNULL,
            env=inherited(os.environ, path),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigurationError(f"python {path!r} cannot be run: {error}") from error
    version = done.stdout.strip()
    if done.returncode == 3:
        return None
    if done.returncode == 0 and VERSION.fullmatch(version):
        return version
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == 0 or 'version("prefect")' in last:  # what is no Python may quote what we asked
        last = (
            "it does not answer as a Python does; name a Python, a virtual environment or a tox environment directory"
        )
    raise ConfigurationError(f"python {path!r} cannot be used: {last}")


def find_interpreter(python: str | None, environ: Mapping[str, str]) -> Interpreter:
    """Return the Python to run flows with: the one asked for, else the first that has Prefect.

    Looked at in order: procworker's own, VIRTUAL_ENV, `python` on PATH. Raises ConfigurationError with what to type.
    """
    candidates = [locate(python)] if python else list(_candidates(environ))
    for path in candidates:
        try:
            version = probe(path)
        except ConfigurationError:
            if python:
                raise
            continue  # nobody asked for this one
        if version:
            return Interpreter(path, version)
    raise ConfigurationError(f"no Prefect in {' or '.join(candidates)}: {NO_PREFECT}")


def _candidates(environ: Mapping[str, str]) -> Iterator[str]:
    seen = set()
    places = [sys.executable, environ.get("VIRTUAL_ENV"), shutil.which("python", path=environ.get("PATH"))]
    for place in filter(None, places):
        try:
            path = locate(place)
        except ConfigurationError:
            continue
        if path not in seen:
            seen.add(path)
            yield path


def inherited(environ: Mapping[str, str], python: str | None) -> dict[str, str]:
    """Return the environment a child inherits.

    When another interpreter than our own runs the flow, entries under our own virtual environment go: they would
    lend it our packages. A user's own entries stay. What tells of a flow run that we are in ourselves goes in any case:
    the child would take it for its own, and run our flow.
    """
    own = sys.prefix
    child = {name: value for name, value in environ.items() if not name.startswith("PREFECT__")}
    if own == sys.base_prefix or python is None or _within(python, own):
        return child
    for name in ("PATH", "PYTHONPATH"):
        if name in child:
            kept = [entry for entry in child[name].split(os.pathsep) if not (entry and _within(entry, own))]
            child[name] = os.pathsep.join(kept)
            if not child[name]:
                del child[name]
    for name in ("VIRTUAL_ENV", "PYTHONHOME"):
        if name in child and _within(child[name], own):
            del child[name]
    return child


def _within(path: str, folder: str) -> bool:
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    return path == folder or path.startswith(folder + os.sep)
