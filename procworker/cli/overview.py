"""What runs on this host, for people (lines) and for machines (JSON)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from procworker.cli.terminal import Terminal, cut, plain, table, width
from procworker.system.census import DEAD, ELSEWHERE, LIVING, Census, HostRun
from procworker.system.processes import age

JSON = dict[str, Any]

HEAD = ["RUN", "NAME", "FLOW", "PHASE", "FOR", "PID", "PROCS", "CPU", "MEMORY"]
NUMBERS = frozenset({"FOR", "PID", "PROCS", "CPU", "MEMORY"})
SHORTEST = 8
NOTHING = "Nothing runs here."


class Meter:
    """The share of a CPU that a run takes: since the last look, or else since its start, as `ps` has it."""

    def __init__(self) -> None:
        self._before: dict[Path, tuple[float, float]] = {}

    def percents(self, runs: Sequence[HostRun]) -> dict[Path, float | None]:
        now = time.monotonic()
        found: dict[Path, float | None] = {}
        for run in runs:
            then, seconds = self._before.get(run.path, (now, 0.0))
            elapsed, spent = now - then, run.cpu_seconds - seconds
            if run.path not in self._before:
                elapsed, spent = (age(run.root) if run.root else 0.0), run.cpu_seconds
            found[run.path] = 100 * max(0.0, spent) / elapsed if run.members and elapsed > 0 else None
        self._before = {run.path: (now, run.cpu_seconds) for run in runs}
        return found


def shorten(ids: Sequence[str]) -> dict[str, str]:
    """Shorten ids to one length at which no two are alike; those that are made in a row begin alike."""
    different = set(ids)
    for length in range(SHORTEST, 36):
        if len({id[:length] for id in different}) == len(different):
            return {id: id[:length].rstrip("-") for id in different}
    return {id: id for id in different}


def as_json(census: Census, servers: Sequence[JSON], home: Path, percents: dict[Path, float | None]) -> JSON:
    """Everything, in keys that stay (README: What runs here)."""
    short, now = shorten([run.id for run in census.runs]), time.time()
    workers = [
        {
            "id": worker.owner,
            "state": worker.standing,
            "name": worker.fact("name"),
            "type": worker.fact("type"),
            "pool": worker.fact("pool"),
            "api": worker.fact("api"),
            "pid": worker.pid,
            "limit": worker.fact("limit"),
            "why": worker.fact("why"),
            "runs": [_run_as_json(run, short[run.id], now, percents[run.path]) for run in worker.runs],
        }
        for worker in census.workers
    ]
    problems = [{"path": str(path), "reason": reason} for path, reason in census.problems]
    return {"version": 1, "home": str(home), "workers": workers, "servers": servers, "problems": problems}


def _run_as_json(run: HostRun, short: str, now: float, percent: float | None) -> JSON:
    return {
        "id": run.id,
        "short_id": short,
        "name": run.name,
        "flow": str(run.data.get("flow_name") or "") or None,
        "phase": run.phase,
        "since": datetime.fromtimestamp(run.began, timezone.utc).isoformat(timespec="milliseconds"),
        "seconds": round(max(0.0, now - run.began), 1),
        "orphans": run.data.get("orphans"),
        "pid": run.pid,
        "processes": len(run.members),
        "cpu_seconds": round(run.cpu_seconds, 2),
        "cpu_percent": None if percent is None else round(percent, 1),
        "memory_bytes": run.memory_bytes,
    }


def without_measures(document: JSON) -> JSON:
    """The same without what changes by itself from one look to the next."""
    measures = {"seconds", "cpu_seconds", "cpu_percent", "memory_bytes", "since"}
    workers = [
        {**worker, "runs": [{k: v for k, v in run.items() if k not in measures} for run in worker["runs"]]}
        for worker in document["workers"]
    ]
    return {**document, "workers": workers}


def lines(document: JSON, terminal: Terminal) -> list[str]:
    """Lay it out for people; nothing is wider than the terminal."""
    told: list[str] = []
    rows = [_row(run) for worker in document["workers"] for run in worker["runs"]]
    laid = _laid_out([HEAD, *rows], terminal) if rows else [""]
    head, left = laid[0], iter(laid[1:])
    for worker in document["workers"]:
        said, *more = [terminal.fit(plain(line)) for line in _about(worker)]
        told.append(terminal.paint(said, "bold"))
        told += [terminal.paint(line, "yellow") for line in more]
        if worker["runs"]:
            told.append(terminal.paint(head, "dim"))
            told += [next(left) for _ in worker["runs"]]
    for server in document["servers"]:
        said = f"Prefect {server['version']} server at {server['url']} (pid {server['pid']})"
        told.append(terminal.paint(terminal.fit(said), "bold"))
    for problem in document["problems"]:
        said = plain(f"Left out: {problem['path']}: {problem['reason']}")
        told.append(terminal.paint(terminal.fit(said), "yellow"))
    return told or [NOTHING]


def _about(worker: JSON) -> list[str]:
    """Who it is, and, when it needs saying, how it is and what becomes of its runs."""
    runs, pool = worker["runs"], worker["pool"]
    said = f"Worker {worker['name'] or worker['id']!r}" + (f" of pool {pool!r}" if pool else "")
    at = f", at {worker['api']}" if worker["api"] else ""
    if worker["state"] == LIVING:
        full = f", {len(runs)} of {worker['limit']} runs" if worker["limit"] else ""
        why = worker["why"] or ("" if runs else "idle")
        pid = f", pid {worker['pid']}" if worker["pid"] else ""
        return [f"{said}{pid}{full}{at}", *([f"  {why}"] if why else [])]
    if worker["state"] == DEAD:
        start = f"`procworker start{f' --pool {pool}' if pool else ''}`"
        adopted, ended = (sum((run["orphans"] == "kill") is kill for run in runs) for kill in (False, True))
        fates = [f"  {adopted} kept for the next {start}"] * bool(adopted) + [f"  {ended} being ended"] * bool(ended)
        return [f"{said} is dead{at}", *fates]
    return [f"{said} {'is on another host' if worker['state'] == ELSEWHERE else 'may live or not'}{at}"]


def _row(run: JSON) -> list[str]:
    lives = run["processes"] > 0
    return [
        run["short_id"],
        plain(run["name"]),
        plain(run["flow"] or "-"),
        run["phase"],
        duration(run["seconds"]),
        str(run["pid"] or "-"),
        str(run["processes"]),
        f"{run['cpu_percent']:.0f}%" if run["cpu_percent"] is not None else "-",
        size(run["memory_bytes"]) if lives else "-",
    ]


def _laid_out(rows: list[list[str]], terminal: Terminal) -> list[str]:
    """A table with numbers to the right; on a terminal names give way until it fits."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    widths = [max(map(width, column)) for column in columns]
    if terminal.is_live:
        over = sum(widths) + 2 * (len(widths) - 1) - (terminal.columns - 1)
        for place, least in ((2, 6), (1, 8)):
            taken = max(0, min(over, widths[place] - least))
            over -= taken
            widths[place] -= taken
            columns[place] = [cut(text, widths[place]) for text in columns[place]]
    for place, name in enumerate(rows[0]):
        if name in NUMBERS:
            columns[place] = [" " * (widths[place] - width(text)) + text for text in columns[place]]
    return [terminal.fit(line) for line in table([list(row) for row in zip(*columns, strict=True)])]


def duration(seconds: float) -> str:
    """A time for people: two units at most."""
    whole = int(seconds)
    for unit, name, least, smaller in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit:
            return f"{whole // unit}{name} {whole % unit // least}{smaller}"
    return f"{seconds:.1f}s" if seconds < 10 else f"{whole}s"


def size(number: int) -> str:
    """Bytes for people."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
