"""What a worker has started, as it is seen from outside.

A run is a child of its worker, or of a zygote: an interpreter of ours that is forked for each run.
"""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import psutil

from scripts.benchmarks.lab import wait_until

SAMPLE_SECONDS, CALM_SECONDS = 0.5, 1.0


class Cpu(NamedTuple):
    """CPU seconds of a worker itself, and of all else that it has started and that has ended (or is a zygote)."""

    worker: float
    rest: float


def is_zygote(child: psutil.Process) -> bool:
    """Ask only of a worker's own children: the forks of a zygote have its command line."""
    with suppress(psutil.Error, IndexError):
        return child.cmdline()[-1].endswith("_zygote.py")
    return False


def zygotes(worker: psutil.Popen) -> list[psutil.Process]:
    return [child for child in worker.children() if is_zygote(child)]


def first_processes(worker: psutil.Popen) -> set[psutil.Process]:
    """The first process of each run that lives."""
    own, found = set(worker.children()), set[psutil.Process]()
    for child in own:
        if not is_zygote(child):
            found.add(child)
            continue
        with suppress(psutil.Error):
            found.update(child.children())
    return found


def born(process: psutil.Process) -> float:
    """When the kernel started it, as time.time() has it, to a hundredth of a second; now, if it has gone already."""
    now = time.time()
    with suppress(OSError):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return now - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return now


def cpu(worker: psutil.Popen) -> Cpu:
    """A run counts when it has ended: to whoever waited for it, which is the worker or a zygote."""
    times = worker.cpu_times()
    warm = sum(sum(zygote.cpu_times()[:4]) for zygote in zygotes(worker))
    return Cpu(times.user + times.system, times.children_user + times.children_system + warm)


def calm(worker: psutil.Popen) -> float:
    """Wait until the zygotes have nothing more to do; return the CPU seconds that they have used themselves."""

    def is_calm() -> bool:
        before = own()
        time.sleep(CALM_SECONDS)
        return own() == before

    def own() -> float:
        return sum(sum(zygote.cpu_times()[:2]) for zygote in zygotes(worker))

    wait_until(is_calm, "a zygote that is done")
    return own()


def memory(processes: Iterable[psutil.Process]) -> float:
    """Their proportional set size in MB: what several share counts once."""
    total = 0
    for process in processes:
        with suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 1e6


def tree(worker: psutil.Popen) -> list[psutil.Process]:
    return [worker, *worker.children(recursive=True)]


class Peak:
    """The most memory that the tree of a worker had while this context was open."""

    def __init__(self, worker: psutil.Popen) -> None:
        self.megabytes = 0.0
        self._worker = worker
        self._over = Event()
        self._thread = Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            with suppress(psutil.Error):
                self.megabytes = max(self.megabytes, memory(tree(self._worker)))
