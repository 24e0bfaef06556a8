"""What a look at the processes of a run tells, and that it changes nothing for them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable

import anyio
import psutil
import pytest

from procworker.cli.run.meter import Meter, size
from procworker.system.processes import Entry, Process, identify
from procworker.system.tree import Family

BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint('ready', flush=True)\ntime.sleep(60)"
FREE = 1 << 23
"""Beyond all pids of a Linux host."""


async def test_a_tree_is_measured_until_it_ends() -> None:
    meter = Meter()
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, start_new_session=True
    ) as child:
        try:
            root = identify(child.pid)
            assert root is not None
            assert child.stdout is not None
            child.stdout.readline()
            async with anyio.create_task_group() as beside:
                beside.start_soon(meter.run)
                await anyio.wait_all_tasks_blocked()
                assert (meter.seen, meter.peak) == (0, 0), "nobody has said whom to look at"
                meter.watch(Family(root, "a cookie"))
                with anyio.fail_after(10):
                    while meter.percent is None:  # noqa: ASYNC110
                        await anyio.sleep(0.01)
                beside.cancel_scope.cancel()
            assert meter.memory == pytest.approx(psutil.Process(child.pid).memory_info().rss, rel=0.3)
            assert meter.seconds >= 0.25
        finally:
            child.kill()
    before = meter.seconds, meter.peak
    meter.look()
    assert (meter.seconds, meter.peak, meter.memory, meter.seen) == (*before, 0, 1)


def test_an_early_look_does_not_lose_the_session_of_a_fork() -> None:
    """It leads its session a moment after it was forked; who sits in that session later is still found."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK") if sys.platform == "linux" else time.time()
    root, other = Process(FREE, now), Process(FREE + 1, now + 1)
    early = [Entry(root, 1, 7, False)]
    late = [Entry(root, 1, FREE, False), Entry(other, 1, FREE, False)]
    scans: list[Iterable[Entry]] = [early, late]
    family = Family(root, "a cookie", scan=lambda: scans.pop(0))

    assert family.members() == {root}
    assert family.members() == {root, other}


@pytest.mark.parametrize(
    ("count", "text"), [(1, "1 MB"), (97_400_000, "97 MB"), (999_000_000, "999 MB"), (1_250_000_000, "1.2 GB")]
)
def test_memory_is_written_for_people(count: int, text: str) -> None:
    assert size(count) == text
