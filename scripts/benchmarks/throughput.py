"""30 no-op flow runs that are due at once, four at a time (--limit 4), under a worker of each kind in turn.

They are ordered before; time counts from the moment when they are due. All workers run at their default settings, but
that they take nothing before it is due. The server's share of the CPU is given beside, for all runs need it; "first
Running -> last end" leaves out how long the worker took to look for the first time. Peak memory is the PSS of the
worker and all that it has started.
"""

import argparse
import time
from datetime import datetime

from procworker.errors import ProcworkerError
from scripts.benchmarks.figures import Row, Sample, compare, prefixed
from scripts.benchmarks.lab import Lab, wait_until
from scripts.benchmarks.processes import Peak, calm
from scripts.benchmarks.runs import (
    COLD,
    OVER,
    PREFECT,
    PUNCTUAL,
    WARM,
    Side,
    alternate,
    count,
    of,
    order_at_once,
    sides,
    watch,
)

OPTIONS = {"rounds": (3, "rounds of each kind"), "runs": (30, "flow runs in a round")}
LIMIT, LONGEST_SECONDS = 4, 600.0
ALL, OWN = "due -> all Completed, s", "first Running -> last end, s"


def measure(lab: Lab, arguments: argparse.Namespace) -> list[Row]:
    """Alternate; one run of each kind warms up."""
    with sides(lab, WARM, COLD, PREFECT, options=["--limit", str(LIMIT)], **PUNCTUAL) as opened:
        for side in opened:
            watch(lab, side)
        calm(opened[0].worker)
        runs = arguments.runs
        warm, cold, theirs = alternate(opened, arguments.rounds, lambda side: burst(lab, side, runs), shown=ALL)
    rows = prefixed("fork: ", compare(warm, theirs, {ALL: 0.18}, of="ratio"))
    return rows + prefixed("spawn: ", compare(cold, theirs, {}))


def burst(lab: Lab, side: Side, number: int) -> Sample:
    """Let a worker do so many runs."""
    before = count(lab, side, *OVER)
    with Peak(side.worker) as peak:
        due = order_at_once(lab, side, number)
        used = server_cpu(lab)
        wait_until(lambda: count(lab, side, *OVER) >= before + number, "the last run", 0.25, LONGEST_SECONDS)
        over, used = time.time(), server_cpu(lab) - used
    if failed := count(lab, side, *OVER[1:]):
        raise ProcworkerError(f"{failed} runs of {side.pool} did not complete")
    rows = lab.api("POST", "/flow_runs/filter", {**of(side, OVER[0]), "sort": "END_TIME_DESC", "limit": number})
    first, last = min(map(moment, rows, ["start_time"] * number)), max(map(moment, rows, ["end_time"] * number))
    return {
        ALL: over - due,
        OWN: last - first,
        "runs a second": number / (over - due),
        "server's CPU, cores": used / (over - due),
        "peak PSS of the worker's tree, MB": peak.megabytes,
    }


def moment(row: dict[str, str], name: str) -> float:
    return datetime.fromisoformat(row[name].replace("Z", "+00:00")).timestamp()


def server_cpu(lab: Lab) -> float:
    return sum(lab.server.cpu_times()[:2])
