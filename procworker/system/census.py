"""What runs on this host, read as data from the state directory and the table of processes.

Nothing is taken over, changed or signalled. Whether a worker lives is told by its process where its file names that;
else by its lock, which is tried for a moment, shared, so that two who look do not see each other.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from procworker.system.journal import NEW, here
from procworker.system.processes import LINUX, Process, age, identify, scan
from procworker.system.records import JSON, read_record, read_told
from procworker.system.tree import Snapshot

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ENDING = {"cancelled": "cancelling", "timed out": "timing out", "worker stopped": "stopping"}
"""Why a worker ends a run, and what its phase is called meanwhile."""
LATEST = 2**32
"""A moment that no clock of ours shows: in 2106."""
LIVING, DEAD, ELSEWHERE, UNKNOWN = "living", "dead", "elsewhere", "unknown"


@dataclass
class HostRun:
    """One record and what is seen of its processes."""

    path: Path
    data: JSON
    root: Process | None = None
    """Its first process, where its pid means something here."""
    members: list[int] = field(default_factory=list)
    cpu_seconds: float = 0.0
    memory_bytes: int = 0

    @property
    def id(self) -> str:
        return str(self.data["flow_run_id"])

    @property
    def name(self) -> str:
        return str(self.data.get("flow_run_name") or "")

    @property
    def pid(self) -> int | None:
        known = self.data.get("infrastructure")
        process = _process(known.get("process")) if isinstance(known, dict) else None
        return process.pid if process else None

    @property
    def phase(self) -> str:
        """claiming, starting, running, cancelling, timing out, stopping or ended."""
        phase = str(self.data.get("phase") or "running")
        facts = self.data.get("facts")
        reason = facts.get("reason") if isinstance(facts, dict) else None
        return phase if phase == "ended" else ENDING.get(str(reason), phase)

    @property
    def began(self) -> float:
        """When it was claimed, or has started running, or has ended: in seconds since 1970."""
        times = self.data.get("times")
        found = times.get(str(self.data.get("phase"))) if isinstance(times, dict) else None
        if isinstance(found, int | float) and 0 <= found < LATEST:
            return float(found)
        if self.root is not None and self.members:
            return time.time() - age(self.root)
        with suppress(OSError):
            return (self.path / "run.json").stat().st_mtime
        return time.time()


@dataclass
class HostWorker:
    """Who owns runs, or waits for some."""

    owner: str
    standing: str
    """living, dead, elsewhere (another host) or unknown."""
    told: JSON
    """What its own file says of it."""
    runs: list[HostRun]

    @property
    def pid(self) -> int | None:
        process = _process(self.told.get("process"))
        return process.pid if process else None

    def fact(self, name: str) -> Any:
        """Return what it says of itself, or else what its runs say of it."""
        said = {"name": "worker"}.get(name, name)
        return self.told.get(name, next((run.data.get(said) for run in self.runs), None))


@dataclass
class Census:
    """Everything at one moment. `problems` are paths that could not be read, with the reason."""

    workers: list[HostWorker]
    problems: list[tuple[Path, str]]

    @property
    def runs(self) -> list[HostRun]:
        return [run for worker in self.workers for run in worker.runs]

    def worker_of(self, run: HostRun) -> HostWorker:
        return next(worker for worker in self.workers if run in worker.runs)


def take_census(home: Path) -> Census:
    """Look once. What is gone meanwhile, or cannot be read, is never fatal."""
    problems: list[tuple[Path, str]] = []
    runs: dict[str, list[HostRun]] = {}
    for run in _records(home, problems):
        runs.setdefault(str(run.data["owner"]), []).append(run)
    told = dict(_files(home, problems))
    workers = []
    for owner in sorted({*runs, *told}):
        own = sorted(runs.get(owner, []), key=lambda run: run.began)
        standing = standing_of(home, owner, told.get(owner), own[0].data["place"] if own else None)
        if own or standing == LIVING:
            workers.append(HostWorker(owner, standing, told.get(owner, {}), own))
    order = [LIVING, DEAD, ELSEWHERE, UNKNOWN]
    workers.sort(key=lambda worker: (order.index(worker.standing), str(worker.fact("name"))))
    count_processes([run for worker in workers for run in worker.runs])
    return Census(workers, problems)


def standing_of(home: Path, owner: str, told: JSON | None, place: JSON | None) -> str:
    """Say whether a worker lives. `place` is where its records are from."""
    place = told["place"] if told else place
    if place is None:
        return UNKNOWN
    if place.get("host") != here()["host"]:
        return ELSEWHERE
    if told and place == here() and (process := _process(told.get("process"))):
        return LIVING if identify(process.pid) == process else DEAD
    return _standing_by_lock(home / "workers" / owner)


def _standing_by_lock(path: Path) -> str:
    """Try the lock of a file that was locked before anything named it: in another container, or of an older worker."""
    if fcntl is None:
        return UNKNOWN
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return DEAD
    except OSError:
        return UNKNOWN
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return DEAD
    except BlockingIOError:
        return LIVING
    except OSError:
        return UNKNOWN
    finally:
        os.close(descriptor)


def _records(home: Path, problems: list[tuple[Path, str]]) -> Iterator[HostRun]:
    for path in _listed(home / "runs", problems):
        if path.name.startswith(NEW):
            continue
        try:
            if not stat.S_ISDIR(path.lstat().st_mode):
                continue
            data = read_record(path)
        except FileNotFoundError:
            continue  # its worker has just removed it
        except OSError as error:
            problems.append((path, error.strerror or str(error)))
        except ValueError as error:
            problems.append((path, str(error)))
        else:
            yield HostRun(path, data, _root(data))


def _files(home: Path, problems: list[tuple[Path, str]]) -> Iterator[tuple[str, JSON]]:
    for path in _listed(home / "workers", problems):
        if told := read_told(path):
            yield path.name, told


def _listed(directory: Path, problems: list[tuple[Path, str]]) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append((directory, error.strerror or str(error)))
        return []


def _root(data: JSON) -> Process | None:
    known = data.get("infrastructure") if data["place"] == here() else None
    return _process(known.get("process")) if isinstance(known, dict) else None


def _process(value: Any) -> Process | None:
    """Read a pid and a start time."""
    if isinstance(value, list) and len(value) == 2 and all(map(_is_sane, value)):
        return Process(int(value[0]), value[1])
    return None


def _is_sane(number: Any) -> bool:
    return isinstance(number, int | float) and 0 <= number < 2**63


def count_processes(runs: Iterable[HostRun]) -> None:
    """Find the living processes of all runs in one scan, as those who end them do, and what they take."""
    runs = [run for run in runs if run.data["place"] == here()]
    if not runs:
        return
    with suppress(OSError):
        for run, pids in _families(runs, Snapshot(scan())).items():
            run_of = runs[run]
            run_of.members = sorted(pids)
            for pid in pids:
                _weigh(run_of, pid)


def _families(runs: list[HostRun], seen: Snapshot) -> Mapping[int, set[int]]:
    """Pids by the place of their run in the list: by cookie, else by session, else by descent."""
    cookies = {run.path.name: number for number, run in enumerate(runs)}
    roots = {run.root: number for number, run in enumerate(runs) if run.root is not None}
    eldest = min((root.start for root in roots), default=0.0) if len(roots) == len(runs) else 0.0
    leaders = {root.pid: number for root, number in roots.items()}
    found: dict[int, int | None] = {}

    def run_of(pid: int) -> int | None:
        if pid in found:
            return found[pid]
        found[pid] = None  # whatever a table of processes that changes while it is read says: no endless descent
        entry = seen.entries.get(pid)
        if entry is None or (LINUX and entry.process.start < eldest):
            return None
        if entry.process in roots:
            found[pid] = roots[entry.process]
        elif (cookie := seen.mark(pid)) is not None:
            found[pid] = cookies.get(cookie)
        elif entry.session in leaders and entry.process.start >= runs[leaders[entry.session]].root.start:  # type: ignore[union-attr]
            found[pid] = leaders[entry.session]
        else:
            found[pid] = run_of(entry.parent)
        return found[pid]

    families: dict[int, set[int]] = {}
    for pid, entry in seen.entries.items():
        number = None if entry.dead else run_of(pid)
        if number is not None:
            families.setdefault(number, set()).add(pid)
    return families


def _weigh(run: HostRun, pid: int) -> None:
    """Add what one process takes: its CPU time with that of children it has waited for, and its memory."""
    with suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        with process.oneshot():
            run.memory_bytes += process.memory_info().rss
            run.cpu_seconds += sum(process.cpu_times()[:4])
