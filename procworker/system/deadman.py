"""A dead-man's switch: a helper process that does something when we die, however we die.

It waits for the end of a pipe that only we hold, in an interpreter that has loaded next to nothing. What it is to do
travels through the pipe, so that no secret is in its arguments or environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from procworker.system.processes import COOKIE

LEAVE_SECONDS = 5.0
ROOT = str(Path(__file__).parents[2])
"""Where procworker is found, however we were imported."""

# Signals that end a whole terminal or service must not end it: it lives as long as we do, and then for a bounded time.
HELPER = """
import os, signal
for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)): signal.signal(getattr(signal, name), signal.SIG_IGN)
said = b""
while piece := os.read(0, 65536): said += piece
if not said.endswith(b"bye"):
    import json, sys
    head, _, argument = said.partition(b"\\n")
    sys.path[:], module, function = json.loads(head)
    import importlib, pickle
    getattr(importlib.import_module(module), function)(pickle.loads(argument))
"""


@contextmanager
def dead_mans_switch(module: str, function: str, argument: object) -> Iterator[None]:
    """Have `module.function(argument)` called in a process of its own if this one dies inside the block."""
    import pickle  # most workers have no helper

    flags = ["-I", "-S", "-c", HELPER]
    path = [*map(os.path.abspath, sys.path), ROOT]
    helper = subprocess.Popen(
        [sys.executable, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        # An emptied cookie: whoever ends the tree that we belong to leaves the helper alone.
        env={**os.environ, COOKIE: ""},
    )
    assert helper.stdin is not None
    try:
        helper.stdin.write(json.dumps([path, module, function]).encode() + b"\n" + pickle.dumps(argument))
        helper.stdin.flush()
        yield
    finally:
        with suppress(OSError):
            helper.stdin.write(b"bye")
        with suppress(OSError):
            helper.stdin.close()
        try:
            helper.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            helper.kill()
            helper.wait()
