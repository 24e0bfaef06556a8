"""Show what runs on this host: workers, their flow runs, embedded servers.

Needs no server: it reads what the workers of this user wrote down, and the table of processes.

Examples:
  procworker status
  procworker status --watch
  procworker status --json | jq '.workers[].runs[].name'
"""

from __future__ import annotations

import argparse

TYPE_CHECKING = False  # see procworker/__init__.py
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from procworker.cli.overview import Meter

WATCH_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for a machine to read")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="look again every second: in place on a terminal, elsewhere whenever something has changed",
    )


def execute(arguments: argparse.Namespace) -> int:
    from procworker.cli.overview import Meter

    home = state_home(arguments.profile)
    if arguments.watch:
        try:
            return _watch(home, arguments.json)
        except KeyboardInterrupt:  # the way to leave it
            return 0
    _show(_look(home, Meter()), arguments.json)
    return 0


def state_home(profile: str | None) -> Path:
    """Return the state directory; all settings are read only where they may name it."""
    import os
    from pathlib import Path

    from procworker.home import plain_state_home

    if (home := plain_state_home(os.environ, Path.cwd(), profile)) is not None:
        return home
    from procworker.settings import Settings

    return Settings.load(profile=profile).state_home


def _look(home: Path, meter: Meter) -> dict[str, Any]:
    from procworker.cli.overview import as_json
    from procworker.system.census import take_census

    census = take_census(home)
    servers: list[dict[str, Any]] = []
    if (home / "servers").is_dir():
        from procworker.local.keeper import living

        servers = [
            {"version": state["version"], "url": state["api_url"], "pid": state["server"][0]}
            for _, state in living(home)
        ]
    return as_json(census, servers, home, meter.percents(census.runs))


def _show(document: dict[str, Any], json: bool) -> None:
    from procworker.cli.overview import lines
    from procworker.cli.terminal import Terminal

    print(_as_text(document) if json else "\n".join(lines(document, Terminal())), flush=True)


def _as_text(document: dict[str, Any], indent: int | None = 2) -> str:
    import json

    return json.dumps(document, indent=indent)


def _watch(home: Path, json: bool) -> int:
    import time

    from procworker.cli.overview import Meter, lines, without_measures
    from procworker.cli.terminal import Terminal

    terminal, meter = Terminal(), Meter()
    drawn, known = 0, None
    while True:
        document = _look(home, meter)
        if terminal.is_live and not json:
            drawn = _draw(lines(document, terminal), drawn)
        elif (now := without_measures(document)) != known:
            text = (
                _as_text(document, None) if json else "\n".join([*([""] if known else []), *lines(document, terminal)])
            )
            print(text, flush=True)
            known = now
        time.sleep(WATCH_SECONDS)


def _draw(lines: list[str], drawn: int) -> int:
    """Write over what was drawn before, in one piece, and no further down than the terminal reaches."""
    import os
    import sys

    try:
        room = max(2, os.get_terminal_size(sys.stdout.fileno()).lines - 1)
    except (OSError, ValueError):
        room = 24
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} lines more"]
    home = f"\x1b[{min(drawn, room)}F" if drawn else ""
    sys.stdout.write(home + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
    sys.stdout.flush()
    return len(lines)
