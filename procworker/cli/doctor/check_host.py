"""Checks of this host: directories, limits, what the kernel offers, and where we are."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from procworker.cli.doctor.findings import Finding, fail, ok, warn
from procworker.system.journal import here, try_lock
from procworker.system.records import read_record
from procworker.system.spool import CAP, _punch
from procworker.system.watch import Inotify

try:
    import fcntl
except ImportError:  # Windows: see procworker.system.journal
    fcntl = None  # type: ignore[assignment]

PR_GET_CHILD_SUBREAPER = 37
SCARCE, SPARSE = 64 << 20, 2 * CAP
"""Free bytes below which nothing can work, and below which the output of one run may not fit."""
FEW_FILES = 1024
SERVICES = {
    "GITHUB_ACTIONS": "GitHub Actions",
    "GITLAB_CI": "GitLab CI",
    "BUILDKITE": "Buildkite",
    "JENKINS_URL": "Jenkins",
    "TOX_ENV_DIR": "tox",
    "CI": "CI",
}


def state_directory(home: Path, is_needed: bool) -> list[Finding]:
    """May it be written, is it private, has it room, do locks work there? Without it only the embedded server fails."""
    what, bad = "state directory", fail if is_needed else warn
    place = next(path for path in (home, *home.parents) if path.exists())
    shown = str(home) if place == home else f"{home} (to be made in {place})"
    fix = (
        "set PROCWORKER_HOME to a directory of yours on a local disk: else runs are not safe from their worker's death"
    )
    try:
        with tempfile.TemporaryDirectory(prefix=".procworker-doctor-", dir=place) as folder:
            facilities = _locks_exclude(Path(folder, "lock"))
    except OSError as error:
        return bad(what, f"{shown} cannot be written: {error.strerror or error}", fix)
    if not facilities:
        return bad(what, f"{shown}: its file system keeps no locks (flock)", fix)
    if place == home and hasattr(os, "getuid"):
        status = home.stat()
        if status.st_uid not in (os.getuid(), 0):
            return warn(
                what, f"{home} belongs to another user (uid {status.st_uid})", "set PROCWORKER_HOME to one of yours"
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return warn(what, f"{home} can be written by others", f"chmod go-w {home}")
    return _room(what, shown, place, "free some, or set PROCWORKER_HOME to another disk", bad)


def temporary_directory() -> list[Finding]:
    """Flows without a directory of their own run there."""
    what = "temporary directory"
    try:
        place = tempfile.gettempdir()
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return fail(what, f"cannot be written: {error.strerror or error}", "set TMPDIR to a directory of yours")
    return _room(what, place, Path(place), "free some, or set TMPDIR to another disk", fail)


def _room(what: str, shown: str, place: Path, fix: str, bad: Callable[..., list[Finding]]) -> list[Finding]:
    free = shutil.disk_usage(place).free
    with suppress(OSError, AttributeError):
        counts = os.statvfs(place)
        if counts.f_files and not counts.f_favail:
            return bad(what, f"{shown}: no inodes are free", fix)
    text = f"{shown}, {size_text(free)} free"
    if free < SCARCE:
        return bad(what, text, fix)
    return warn(what, f"{text}: one run may print {size_text(SPARSE)}", fix) if free < SPARSE else ok(what, text)


def size_text(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.0f} TiB"


def _locks_exclude(path: Path) -> bool:
    """Does a lock keep a second one out?"""
    if fcntl is None:
        return True
    with _opened(path) as first, _opened(path) as second:
        return try_lock(first) and not try_lock(second)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def left_behind(home: Path) -> list[Finding]:
    """Runs of workers that have died, and reports that no server has taken yet; nothing is changed."""
    what, runs, reports = "dead workers", Counter[str](), Counter[str]()
    with suppress(OSError):
        for path in (home / "runs").iterdir():
            record = _record(path)
            if record is None or record["place"].get("host") != here()["host"] or _lives(home, record["owner"]):
                continue
            pool = f"of work pool {record['pool']!r}" if record.get("pool") else "of no pool"
            (reports if record.get("phase") == "ended" else runs)[pool] += 1
    if not (runs or reports):
        return ok(what, "nothing of theirs waits")
    parts = [f"{_count(number, 'run')} {pool}" for pool, number in sorted(runs.items())]
    parts += [f"{_count(number, 'undelivered report')} {pool}" for pool, number in sorted(reports.items())]
    fix = "the next `procworker start` of that pool (without a pool: of any) on the same API goes on with them"
    return warn(what, f"they left {', '.join(parts)}", fix)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _record(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        if not path.name.startswith("."):
            return read_record(path)
    return None


def _lives(home: Path, owner: str) -> bool:
    """Does the worker hold its lock? A shared one, held for a moment, disturbs only who looks at the same time."""
    if fcntl is None:
        return True
    try:
        descriptor = os.open(home / "workers" / owner, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def open_files() -> list[Finding]:
    """A worker needs a few files per run, and raises its own limit as far as it may."""
    if sys.platform == "win32":
        return ok("open files", "no limit that matters on Windows")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft_text, hard_text = ("unlimited" if n == resource.RLIM_INFINITY else str(n) for n in (soft, hard))
    text = f"{soft_text}, and up to {hard_text} where that is needed"
    if hard != resource.RLIM_INFINITY and hard < FEW_FILES:
        return warn("open files", text, f"raise the hard limit to {FEW_FILES} or more (ulimit -Hn, LimitNOFILE=)")
    return ok("open files", text)


def kernel(home: Path) -> list[Finding]:
    """What Linux offers beyond POSIX, and what is lost without it."""
    what = "kernel"
    if not sys.platform.startswith("linux"):
        return ok(what, f"{sys.platform}: no cookie, subreaper, inotify or holes in files; see README, Limits")
    trials: dict[str, tuple[Callable[[], object], str]] = {
        "pidfd": (_pidfd, "a thread waits for each process"),
        "subreaper": (_subreaper, "daemons that clear their environment are not found"),
        "inotify": (
            lambda: Inotify().close(),
            "output is looked for ten times a second (fs.inotify.max_user_instances?)",
        ),
        "holes in files": (lambda: _hole(home), "output is kept within 128 instead of 64 MiB"),
    }
    has, lacks = [], []
    for name, (attempt, loss) in trials.items():
        try:
            attempt()
            has.append(name)
        except (OSError, AttributeError) as error:
            lacks.append(f"no {name} ({getattr(error, 'strerror', None) or error}): {loss}")
    if lacks:
        fix = (
            "a newer kernel, another file system for PROCWORKER_HOME, or a container that allows more; all work without"
        )
        return warn(what, "; ".join(lacks), fix)
    return ok(what, f"{os.uname().release} with {', '.join(has)}")


def _pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _subreaper() -> None:
    state = ctypes.c_int()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(state), 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _hole(home: Path) -> None:
    place = next(path for path in (home, *home.parents) if path.exists())
    if not os.access(place, os.W_OK):
        return  # what is wrong with it is said elsewhere
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(bytes(8192))
        file.flush()
        _punch(file.fileno(), 0, 4096)


def container(environ: Mapping[str, str], root: Path = Path("/")) -> list[Finding]:
    """In a container PID 1 has duties that a worker is no good at."""
    kind = environ.get("container") or ("Kubernetes" if environ.get("KUBERNETES_SERVICE_HOST") else "")
    kind = kind or ("Docker" if (root / ".dockerenv").exists() else "")
    kind = kind or ("Podman" if (root / "run/.containerenv").exists() else "")
    if os.getpid() == 1:
        text = f"{kind or 'container'}, and this command is PID 1: it takes no orphans for leftovers of runs"
        return warn("container", text, "start it under an init: docker run --init, or tini")
    if not kind:
        return ok("container", "none seen")
    init = ""
    with suppress(OSError):
        init = (root / "proc/1/comm").read_text().strip()
    return ok("container", f"{kind}; PID 1 is {init!r}" if init else kind)


def automation(environ: Mapping[str, str]) -> list[Finding]:
    """What is different in CI and tox."""
    found = [name for variable, name in SERVICES.items() if environ.get(variable)]
    texts = [found[0]] if found else ["none seen"]
    if environ.get("CI"):
        texts.append("`start` ends its runs when it dies (--orphans kill)")
    if environ.get("CI") or environ.get("TOX_ENV_DIR"):
        texts.append("an embedded server ends with its command (--no-keep)")
    return ok("CI", "; ".join(texts))
