"""What the README shows works as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from commands import fake_prefect

from procworker.testing.api import PrefectApi

ASYNCIO = """
import pytest


@pytest.fixture
def anyio_backend():
    return "asyncio"
"""
NAP = """
import time

from prefect import flow


@flow
def nap(seconds: float) -> None:
    for _ in range(int(seconds * 20)):
        time.sleep(0.05)
"""
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.rst").read_text(encoding="utf-8")


def python_of(section: str) -> str:
    """The first file of Python that a section shows."""
    block = re.search(rf"^{section}\n-+\n.*?\.\. code-block:: python\n\n(.*?)\n\S", README, re.DOTALL | re.MULTILINE)
    assert block is not None
    return re.sub(r"^    ", "", block[1], flags=re.MULTILINE)


def worker_example() -> str:
    """The file that the section "Write a worker" shows."""
    return python_of("Write a worker")


def run_tests_example(place: Path, **environ: str) -> str:
    """Have the section "Test your flows" tested by pytest in a project of its own; what pytest says."""
    (plugins,) = re.findall(r"^    (pytest_plugins = .*)$", README, re.MULTILINE)
    (place / "conftest.py").write_text(f"{plugins}\n\n{ASYNCIO}")
    (place / "flows.py").write_text(NAP)
    (place / "test_nap.py").write_text(python_of("Test your flows"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-rA", "--rootdir", "."],
        cwd=place,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_example_of_tests_passes(tmp_path: Path, no_survivors: Callable[[str], None]) -> None:
    """With an engine of ours, which waits as long as the parameter says."""
    no_survivors(f"README_TESTS={tmp_path}")
    fake_prefect(tmp_path / "packages")
    path = os.pathsep.join([str(tmp_path / "packages"), str(ROOT)])

    said = run_tests_example(tmp_path, PYTHONPATH=path, README_TESTS=str(tmp_path))

    assert "4 passed" in said
    assert not list((tmp_path / "clean" / "home").rglob("*")), "nothing is written where the user's things are"


async def test_the_example_of_a_worker_runs(server: PrefectApi, tmp_path: Path) -> None:
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


def test_the_tox_ini_shown_is_the_one_tested() -> None:
    shown = textwrap.indent((ROOT / "tests" / "example_tox" / "tox.ini").read_text(encoding="utf-8"), "    ")
    assert shown in README


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
