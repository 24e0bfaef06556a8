"""What a person asks of a run of a worker on the same host: a file in the run's private directory.

The worker obeys, for it alone can prove which processes are its own. Who asks touches the worker's file afterwards.
"""

from __future__ import annotations

import json
import math
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

WISH = "stop"
LARGEST = 4096
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

Wish = dict[str, Any]
"""That the run be ended: {"grace": seconds, or None for those of the job}."""


def ask_to_stop(page: Path, worker: Path, grace: float | None) -> None:
    """Ask the worker with this file to end the run with this directory; asked again, the grace can only get shorter.

    Raises OSError, also where the directory is not ours alone.
    """
    directory = os.open(page, os.O_RDONLY | os.O_DIRECTORY | NO_LINK)
    try:
        status = os.fstat(directory)
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(f"{page} is not private to us")
        with suppress(FileNotFoundError):
            os.unlink(WISH + ".new", dir_fd=directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK
        with open(os.open(WISH + ".new", flags, 0o600, dir_fd=directory), "w") as file:
            json.dump({"grace": grace}, file)
        os.rename(WISH + ".new", WISH, src_dir_fd=directory, dst_dir_fd=directory)
    finally:
        os.close(directory)
    now = time.time_ns()  # the kernel's own clock of files has larger steps
    os.utime(worker, ns=(now, now), follow_symlinks=False)


def take_wish(page: Path) -> Wish | None:
    """Return what was asked of the run, once; what is no wish of ours counts for nothing."""
    path = page / WISH
    try:
        with open(os.open(path, os.O_RDONLY | NO_LINK), "rb") as file:
            status = os.fstat(file.fileno())
            is_ours = stat.S_ISREG(status.st_mode) and (not hasattr(os, "getuid") or status.st_uid == os.getuid())
            wish = json.loads(file.read(LARGEST)) if is_ours else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        wish = None
    with suppress(OSError):
        path.unlink()
    if not isinstance(wish, dict):
        return None
    grace = wish.get("grace")
    if isinstance(grace, int | float) and math.isfinite(grace) and grace >= 0:
        return {"grace": float(grace)}
    return {"grace": None}
