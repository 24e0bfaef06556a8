"""The last lines of a run: how it ended, what it cost, and what became of its processes."""

from __future__ import annotations

import re
import sys

from procworker.cli.layout import lines_of
from procworker.cli.run.meter import Meter, size
from procworker.cli.terminal import Terminal
from procworker.run import Run

COLOURS = {"COMPLETED": "green", "FAILED": "red", "CRASHED": "red", "CANCELLED": "yellow"}
MISSING_MODULE = re.compile(r"ModuleNotFoundError: No module named '([^']+)'")
CANCELLED = "Flow run was cancelled."
"""What engines and we ourselves say of it, which says no more than the state does."""


def children_cpu_seconds() -> float | None:
    """CPU seconds of all children that have ended; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def receipt(run: Run, wall: float, cpu: float | None, meter: Meter, terminal: Terminal) -> str:
    """Say state, wall and CPU seconds, peak memory, processes, exit code and what was left behind.

    `cpu` is what ended children used meanwhile; a fork's is seen by the meter alone.
    """
    state = run.final_state
    name = state.name or state.type if state else "Unknown"
    parts = [f"{wall:.1f} s"]
    if cpu is not None or meter.seconds:
        parts.append(f"{max(cpu or 0.0, meter.seconds):.1f} s CPU")
    if meter.peak:
        parts.append(f"peak {size(meter.peak)}")
    if meter.family is not None:
        parts.append(_counted(max(meter.seen, 1), "process"))
    if run.result is not None:
        parts.append(f"exit {run.result.status_code}")
    parts += _remains(run, meter)
    why = run.claim.refusal if state is None else state.message if state.type != "COMPLETED" else None
    why = None if why == CANCELLED else why
    colour = COLOURS.get(state.type, "bold") if state else "red"
    lines = lines_of(terminal, [(name, colour), (f": flow run {run.flow_run.name!r} ({', '.join(parts)})", "")], 2)
    return "\n".join([*lines, *(run.mask(text) for text in (why, _advice(run)) if text)])


def _advice(run: Run) -> str | None:
    """Say what helps, where the last lines of output tell that."""
    if run.final_state is None or run.final_state.type not in ("CRASHED", "FAILED"):
        return None
    missing = next(filter(None, map(MISSING_MODULE.search, reversed(run.facts.tail))), None)
    interpreter = getattr(run.configuration, "_interpreter", None)
    if missing is None or interpreter is None:
        return None
    advice = "install it there, name another Python with --python, or run where the module is found"
    return f"{interpreter.path} has no module {missing[1]!r}: {advice}"


def _remains(run: Run, meter: Meter) -> list[str]:
    """Say what was ended, and what is still there."""
    family = meter.family
    if family is None:
        return []
    said = []
    ended = len(family.ended - family.survivors)
    if run.reason is not None and ended:
        said.append(f"{ended} ended")
    elif ended:
        said.append(f"{ended} left behind and ended")
    if family.survivors:
        said.append(f"{len(family.survivors)} could not be killed")
    elif getattr(run.configuration, "leftovers", "kill") == "allow" and (allowed := family.members()):
        said.append(f"{len(allowed)} left behind as allowed")
    elif not said or run.reason is not None:
        said.append("0 left behind")
    return said


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}es"
