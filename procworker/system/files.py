"""Have more files open than programs usually may, once that is needed (Linux, for programs only).

What we start gets its own limits back, though a moment after its start. So a worker that has few files open, which is
most of them, leaves its limit alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

ENOUGH = 65_536


class _Limit:
    """The soft limit of open files, and what it was."""

    def __init__(self) -> None:
        self.may_be_raised = False
        self.before: tuple[int, int] | None = None

    def make_room(self) -> None:
        """Raise it when half of it is used up."""
        if not self.may_be_raised or self.before is not None:
            return
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(OSError, ValueError):
            if len(os.listdir("/proc/self/fd")) > soft // 2:
                resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, ENOUGH)), hard))
                self.before = soft, hard

    def restore(self, pid: int) -> None:
        """Give a child that was just started the limits that we were started with."""
        if self.before is not None:
            import resource

            with suppress(OSError, ValueError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, self.before)


file_limit = _Limit()
"""That of this process."""


@contextmanager
def raised_file_limit() -> Iterator[None]:
    """Within the block the soft limit of open files is raised when it is needed."""
    file_limit.may_be_raised = sys.platform.startswith("linux")  # elsewhere a child's limits cannot be set from outside
    try:
        yield
    finally:
        file_limit.may_be_raised = False
        if file_limit.before is not None:
            import resource

            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, file_limit.before)
            file_limit.before = None
