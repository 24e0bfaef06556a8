"""Every command, option and file that the README shows is one that there is."""

from __future__ import annotations

import argparse
import configparser
import re
import shlex
from pathlib import Path

import pytest

from procworker.cli import COMMANDS, build_parser

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
