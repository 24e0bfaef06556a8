"""The last line of a run: how it ended and what it cost."""

from __future__ import annotations

import sys

from procworker.run import Run


def children_cpu_seconds() -> float:
    """CPU seconds of all children that have ended; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0.0
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def receipt(run: Run, wall: float, cpu: float) -> str:
    """Say state, wall and CPU seconds, exit code and what was left behind."""
    state = run.final_state
    name = state.name or state.type if state else "Unknown"
    parts = [f"{wall:.1f} s", f"{cpu:.1f} s CPU"]
    if run.result is not None:
        parts.append(f"exit {run.result.status_code}")
    why = run.claim.refusal if state is None else state.message if state.type != "COMPLETED" else None
    message = f"\n{why}" if why else ""
    return f"{name}: flow run {run.flow_run.name!r} ({', '.join(parts)}){message}"
