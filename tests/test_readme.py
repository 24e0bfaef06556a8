"""What the README shows works as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import anyio
import anyio.to_thread
from fake_server import FakeServer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.rst").read_text(encoding="utf-8")


def worker_example() -> str:
    """The file that the section "Write a worker" shows."""
    block = re.search(r"\.\. code-block:: python\n\n(.*?)\n\S", README, re.DOTALL)
    assert block is not None
    return re.sub(r"^    ", "", block[1], flags=re.MULTILINE)


async def test_the_example_of_a_worker_runs(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text(worker_example())
    server.add_pool("echoes", type="echo")
    id = server.schedule(server.add_deployment(pool="echoes", job_variables={"word": "Goodbye"}))
    environ = {**os.environ, "PREFECT_API_URL": server.url, "PYTHONPATH": str(ROOT)}

    done = await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "echo.py", "echoes"],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    )

    assert (done.returncode, f"Goodbye, world! ({id})" in done.stdout) == (0, True), done.stderr
    assert server.run(id).state.type == "PENDING"  # the example runs no flow, and its word is taken for it


def test_every_command_line_of_the_readme_parses() -> None:
    from procworker.cli import build_parser

    shown = re.findall(r"^    procworker (?!-)(.*?)(?:  #.*)?$", README, re.MULTILINE)
    assert len(shown) >= 5
    for line in shown:
        build_parser().parse_args(line.split())


def test_every_option_stands_in_the_readme() -> None:
    from procworker.cli import build_parser

    text = build_parser().format_help()
    commands = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    for command in commands.values():  # type: ignore[union-attr]
        text += command.format_help()
    for option in sorted(set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help"}):
        plain = option.replace("--no-", "--")
        assert plain.removeprefix("--") in README, f"{option} is not in README.rst"
