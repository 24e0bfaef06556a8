"""How soon a flow run starts that was just created, under workers at their default settings, which poll now and then.

"Busy" is within 30 seconds of the end of another run under that worker, at a random moment of up to ten seconds after
it; "idle" is later than that. Prefect's worker, ours (cold) and ours with start_method fork (warm) take turns. Created
-> Running is the server's own account; spawn is when the kernel started the first process of the run.
"""

import argparse
import random
import time
from functools import partial

from scripts.benchmarks.figures import Row, Sample, compare, prefixed
from scripts.benchmarks.lab import Lab
from scripts.benchmarks.runs import COLD, PREFECT, WARM, Seen, Side, alternate, sides, watch

OPTIONS = {"rounds": (5, "runs of each kind in either state")}
BUSY_SECONDS, LONGEST_LOOK_SECONDS = 31.0, 10.0
"""When each worker of ours is idle again; how seldom any worker looks then."""
BUSY, IDLE, SPAWN, RUNNING = "busy", "idle", "created -> spawn, s", "created -> Running, s"
SOON = f"{BUSY}: {RUNNING}"


def measure(lab: Lab, arguments: argparse.Namespace) -> list[Row]:
    """Alternate; one run of each kind warms up."""
    with sides(lab, WARM, COLD, PREFECT) as opened:
        ended = {side.kind: watch(lab, side).gone for side in opened}
        sample = partial(both, lab, ended)
        warm, cold, theirs = alternate(opened, arguments.rounds, sample, shown=SOON)
    rows = prefixed("warm, ", compare(warm, theirs, {SOON: 0.15}, of="ratio"))
    return rows + prefixed("cold, ", compare(cold, theirs, {SOON: 0.45}, of="ratio"))


def both(lab: Lab, ended: dict[str, float], side: Side) -> Sample:
    """Take the times of a run of an idle worker, and of one soon after it; keep when the last one has ended."""
    time.sleep(max(0.0, ended[side.kind] + BUSY_SECONDS + random.uniform(0, LONGEST_LOOK_SECONDS) - time.time()))
    idle = watch(lab, side)
    time.sleep(random.uniform(0, LONGEST_LOOK_SECONDS))
    busy = watch(lab, side)
    ended[side.kind] = busy.gone
    return times(BUSY, busy) | times(IDLE, idle)


def times(state: str, seen: Seen) -> Sample:
    return {f"{state}: {SPAWN}": seen.spawned - seen.created, f"{state}: {RUNNING}": seen.until_running}
