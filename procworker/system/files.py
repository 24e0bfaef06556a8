"""Have more files open than programs usually may; what we start does not inherit that (Linux, for programs only)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

ENOUGH = 65_536
_before: tuple[int, int] | None = None
"""The limits that children get back, while ours are raised."""


@contextmanager
def raised_file_limit() -> Iterator[None]:
    """Within the block the soft limit of open files is as high as the hard one allows: each run takes some."""
    global _before
    if not sys.platform.startswith("linux"):  # elsewhere a child's limits cannot be set from outside
        yield
        return
    import resource

    soft, hard = _before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, ENOUGH)), hard))
    try:
        yield
    finally:
        _before = None
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def restore_file_limit(pid: int) -> None:
    """Give a child that was just started the limits that we were started with."""
    if _before is not None:
        import resource

        with suppress(OSError, ValueError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, _before)
