"""Show what a person sees: `run` while it runs and when it has ended, `status --watch`, `preview` and `doctor`."""

from __future__ import annotations

import os
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import anyio.from_thread

from procworker.cli.common import embedded
from procworker.settings import Settings
from scripts.pictures.terminal import Terminal

FLOWS = """
import time

from prefect import flow, task


@task
def extract(day):
    time.sleep(2)


@task
def load(day):
    time.sleep(1)


@flow(log_prints=True)
def etl(days: int = 5):
    for day in range(days):
        print(f"day {day}")
        extract(day)
        load(day)
"""
HERE = Path(__file__).parent


@contextmanager
def server(place: Path) -> Iterator[dict[str, str]]:
    """The environment of somebody who has a Prefect server, for as long as the context is open."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "PROCWORKER"))}
    environ = {
        **known,
        "HOME": str(place),
        "PROCWORKER_HOME": str(place / "state"),
        "PREFECT_HOME": str(place / ".prefect"),
    }
    settings = Settings.load(environ, place)
    with anyio.from_thread.start_blocking_portal() as portal:
        context = embedded(settings, sys.executable, keep=False)
        with portal.wrap_async_context_manager(context) as there:
            yield {
                **environ,
                **{name: there.exported[name] for name in there.exported if name.startswith("PREFECT_API")},
            }


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "project")
        place.mkdir()
        (place / "flows.py").write_text(textwrap.dedent(FLOWS).lstrip())
        with server(place) as environ:
            for name, columns in (("run", 80), ("receipt", 80), ("status", 100), ("preview", 80), ("doctor", 80)):
                if not names or name in names:
                    (HERE / f"{name}.svg").write_text(globals()[f"draw_{name}"](environ, str(place), columns))


def terminal_of(argv: list[str], environ: dict[str, str], place: str, columns: int = 80, lines: int = 30) -> Terminal:
    terminal = Terminal(argv, environ, place, columns, lines)
    terminal.names = {place: "/home/me/project", str(Path(sys.prefix).parent): "/home/me"}
    return terminal


def draw_run(environ: dict[str, str], place: str, columns: int) -> str:
    """In the middle of it, with its live line."""
    with closing(terminal_of(["run", "flows.py:etl", "-p", "days=3"], environ, place, columns)) as terminal:
        terminal.until(lambda text: "day 1" in text and "MB" in text)
        return terminal.svg()


def draw_receipt(environ: dict[str, str], place: str, columns: int) -> str:
    with closing(terminal_of(["run", "flows.py:etl", "-p", "days=1"], environ, place, columns)) as terminal:
        terminal.finish()
        return terminal.svg()


def draw_status(environ: dict[str, str], place: str, columns: int) -> str:
    with (
        closing(terminal_of(["run", "flows.py:etl", "-p", "days=9"], environ, place)) as first,
        closing(terminal_of(["run", "flows.py:etl", "-p", "days=8"], environ, place)) as second,
    ):
        for other in (first, second):
            other.until(lambda text: "day 0" in text)
        with closing(terminal_of(["status", "--watch"], environ, place, columns)) as terminal:
            terminal.until(lambda text: text.count("running") == 2)
            return terminal.svg()


def draw_preview(environ: dict[str, str], place: str, columns: int) -> str:
    argv = [
        "preview",
        "flows.py:etl",
        "-p",
        "days=3",
        "-jv",
        "timeout_seconds=60",
        "-jv",
        "env.API_TOKEN=hunter2-hunter2",
    ]
    with closing(terminal_of(argv, environ, place, columns, lines=60)) as terminal:
        terminal.finish()
        return terminal.svg()


def draw_doctor(environ: dict[str, str], place: str, columns: int) -> str:
    with closing(terminal_of(["doctor"], environ, place, columns, lines=60)) as terminal:
        terminal.left_out = "container:"
        terminal.finish()
        return terminal.svg()


if __name__ == "__main__":
    main(sys.argv[1:])
