"""The command line as tests use it: within this process or as a user has it, and a fake server beside it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

from workers import ENGINE, engine_command

from procworker.cli import main

ROOT = Path(__file__).parents[1]
FAST = {"PREFECT_WORKER_QUERY_SECONDS": "0.05", "PREFECT_CLIENT_MAX_RETRIES": "0"}
TEMPLATE = {
    "job_configuration": {"command": "{{ command }}", "env": "{{ env }}", "name": "{{ name }}"},
    "variables": {"properties": {"command": {"default": engine_command()}, "env": {}, "name": {}}},
}
"""A pool's template whose runs are those of the mini engine."""


def code_of(*argv: str) -> int:
    """The exit code of the command, run within this process; one that goes on for 30 s is broken off."""
    # The command sets up logging for its process, which here is that of all tests.
    loggers = [logging.getLogger(name) for name in ("procworker", "prefect")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(30)
    try:
        return main(argv)
    except SystemExit as ended:  # argparse, for --help and for usage errors
        return int(ended.code or 0)
    finally:
        signal.alarm(0)
        for logger, (logger.handlers, level, logger.propagate) in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _give_up(number: int, frame: object) -> None:
    raise TimeoutError("the command does not end")


class Command:
    """`python -m procworker` as a user has it; killed at the end of the block if it still runs."""

    def __init__(self, place: Path, *argv: str, ignoring: tuple[int, ...] = (), **environ: str) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self._out, self._err = place / "out", place / "err"

        def ignore() -> None:
            for number in ignoring:
                signal.signal(number, signal.SIG_IGN)

        environ = {**os.environ, **environ}
        path = os.pathsep.join(filter(None, [environ.get("PYTHONPATH"), str(ROOT)]))
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "procworker", *argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=place,
                env={**environ, "PYTHONPATH": path},
                preexec_fn=ignore if ignoring else None,
            )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if exc_info[0] is not None:
            print(self.out, self.err, sep="\n")  # pytest shows it with the failure

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.process.send_signal(number)

    def wait(self, seconds: float = 20) -> int:
        """The exit code."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        raise AssertionError(f"still running after {seconds} s\n{self.out}\n{self.err}")

    def until_it_says(self, text: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.out + self.err:
            assert time.monotonic() < deadline, f"{text!r} is not in\n{self.out}\n{self.err}"
            time.sleep(0.02)


AS_MAIN = "if __name__ == '__main__': import runpy, sys; runpy.run_path({path!r}, run_name='__main__')\n"
"""A module that runs a file, when it is run itself."""


def fake_prefect(place: Path, engine: str = AS_MAIN.format(path=str(ENGINE))) -> Path:
    """A directory for PYTHONPATH with a "Prefect 3.8.8" whose engine is the mini engine, or the code that is given."""
    (place / "prefect").mkdir(parents=True)
    (place / "prefect" / "__init__.py").touch()
    (place / "prefect" / "engine.py").write_text(engine)
    information = place / "prefect-3.8.8.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: prefect\nVersion: 3.8.8\n")
    return place


def flow_file(path: Path) -> Path:
    """A file with the flow `hello`, whose parameters cannot be seen; nothing here imports it."""
    path.write_text(
        textwrap.dedent("""\
            from prefect import flow

            @flow(name="say-hello")
            @takes_anything
            def hello(name: str = "world"):
                print(name)
            """)
    )
    return path
