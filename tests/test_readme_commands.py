"""Every command, option and file that the README shows is one that there is."""

from __future__ import annotations

import argparse
import configparser
import re
import shlex
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import FAST, TEMPLATE, Command, fake_prefect

from procworker.cli import COMMANDS, build_parser
from procworker.testing import Beside, serving

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.rst").read_text(encoding="utf-8")
FOREIGN = {"--quick", "--full"}
"""Options of other programs that the text mentions."""


def blocks() -> list[str]:
    """The literal blocks, without their indentation."""
    found = re.findall(r"::\n\n((?:    .*\n|\n)+)", README)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in found]


def commands() -> list[str]:
    """Every line that starts procworker, wherever it stands: in a shell, a tox.ini, a CI file, a unit."""
    lines = [line for block in blocks() for line in block.splitlines()]
    found = [
        re.search(r"(?:^|- |run: |commands = |ExecStart=\S*/|\$ )(procworker [a-z].*)$", line.strip()) for line in lines
    ]
    return sorted({match[1] for match in found if match})


def parsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def test_there_are_commands_to_look_at() -> None:
    shown = {command.split()[1] for command in commands()}
    assert shown >= {"start", "run", "status", "logs", "stop", "preview", "doctor"}


@pytest.mark.parametrize("command", commands())
def test_a_command_that_is_shown_can_be_typed(command: str) -> None:
    arguments = build_parser().parse_args(shlex.split(command, comments=True)[1:])
    assert arguments.command in COMMANDS


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_stands_in_the_readme(name: str) -> None:
    for action in parsers()[name]._actions:
        if action.help != argparse.SUPPRESS and action.dest != "help":
            for option in [option for option in action.option_strings if option.startswith("--")]:
                either = option.replace("--no-", "--[no-]"), option.replace("--", "--[no-]", 1)
                assert any(spelt in README for spelt in (option, *either)), f"{name} {option}"


def test_every_option_in_the_readme_is_one() -> None:
    known = {
        option
        for parser in [build_parser(), *parsers().values()]
        for a in parser._actions
        for option in a.option_strings
    }
    text = re.sub(r"--\[no-\]([a-z-]+)", r"--\1 --no-\1", README)
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert mentioned - known <= FOREIGN


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_teaches_by_examples_that_can_be_typed(name: str) -> None:
    lines = (COMMANDS[name].__doc__ or "").splitlines()
    examples = [line.strip() for line in lines if line.startswith("  procworker ")]
    assert examples or name in ("template", "server")
    for example in examples:
        build_parser().parse_args(shlex.split(example.partition(" | ")[0], comments=True)[1:])


def test_the_files_for_ci_are_yaml_that_runs_procworker() -> None:
    yaml = pytest.importorskip("yaml")
    files = [yaml.safe_load(block) for block in blocks() if re.match(r"(on|steps|flows):", block)]
    assert len(files) == 3
    for file in files:
        assert "procworker" in str(file)
        assert "runs.xml" in str(file)


def test_the_unit_for_systemd_leaves_flows_to_the_worker() -> None:
    (text,) = [block for block in blocks() if "[Service]" in block]
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read_string(text)
    assert unit["Service"]["KillMode"] == "process"
    assert unit["Service"]["ExecStart"].endswith("procworker start --pool laptop")
    assert int(unit["Service"]["TimeoutStopSec"]) > 10 + 10 + 10


# They do what they say


CODES = {
    "procworker run flows.py:hello -p cuont=3": 2,  # it shows what is said of a typing error
    "procworker doctor --python .venv --server": 1,  # there is no .venv here
}
FLOWS = """
from prefect import flow


@flow
def hello(name: str = "you", count: int = 1, cell: str = ""): ...
"""
ENDLESS = ("procworker start --pool laptop", "procworker status --watch")


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_a_command_that_is_shown_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """In a directory that has what the README speaks of, on a server that knows it."""
    place = tmp_path / "place"
    (place / "package").mkdir(parents=True)
    (place / "flows.py").write_text(FLOWS)
    (place / "package" / "module.py").write_text(FLOWS)
    monkeypatch.setenv("PYTHONPATH", str(fake_prefect(tmp_path / "prefect")))
    monkeypatch.setenv("TEAM", "data team")
    with serving() as server:
        environ = {**FAST, "PREFECT_API_URL": server.url}
        for pool in ("laptop", "ci"):
            server.add_pool(pool, base_job_template=TEMPLATE)
        for flow, name in (("hello", "nightly"), ("etl", "nightly")):
            server.add_deployment(name, flow=flow, pool="laptop")
        server.schedule(server.add_deployment("due", flow="hello", pool="ci"))
        argv = shlex.split(command, comments=True)[1:]
        if match := re.search(r"[0-9a-f]{8}-[0-9a-f-]{27}", command):
            known = server.schedule(server.add_deployment("known", pool="laptop"))
            argv[argv.index(match[0])] = str(known)
        with ExitStack() as stack:
            if argv[0] in ("logs", "stop"):
                argv = [*argv[:1], running(stack, server, place, environ), *argv[2:]]
            with Command(place, *argv, **environ) as shown:
                if command in ENDLESS:
                    shown.until_it_says("started!" if argv[0] == "start" else "Nothing runs here.")
                    shown.send(signal.SIGINT)
                assert shown.wait(60) == CODES.get(command, 0), shown.out + shown.err
    assert "Traceback" not in shown.err


def running(stack: ExitStack, server: Beside, place: Path, environ: dict[str, str]) -> str:
    """The id of a flow run that runs here for some seconds."""
    id = server.schedule(server.add_deployment("here", pool="laptop"), parameters={"do": "sleep", "seconds": 4})
    stack.enter_context(Command(place.parent / "worker", "start", "--pool", "laptop", "--run-once", **environ))
    server.wait_state(id, "RUNNING")
    return str(id)
