"""`procworker run` as a daily tool: the line on a terminal, the receipt, --env, --timeout, and what mistakes tell."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from commands import FAST, Command, code_of, fake_prefect
from misbehave import survivors
from terminals import OnTerminal, seen

from procworker.cli import build_parser
from procworker.cli.common import SAME_SIGNAL_SECONDS
from procworker.cli.terminal import plain
from procworker.testing import Beside, serving

FLOW = """\
from prefect import flow


@flow
def hello(name="world", do="complete", seconds=0, print=(), err=(), env=(), term="crash", misbehave=(), message=""):
    pass
"""
slow = pytest.mark.slow
FIGURES = r"\d+\.\d s, \d+\.\d s CPU(, peak \d+ MB)?"  # a process that ends at once is not seen


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Beside]:
    with serving() as server:
        for name, value in {**FAST, "PREFECT_API_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def place(server: Beside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a flow and a Prefect that is the mini engine."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "flows.py").write_text(FLOW)
    monkeypatch.setenv("PYTHONPATH", str(fake_prefect(tmp_path / "prefect")))
    monkeypatch.chdir(place)
    return place


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    found = survivors(f"PROCWORKER_HOME={os.environ['PROCWORKER_HOME']}")
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    assert not found


def pairs(**parameters: Any) -> list[str]:
    return [word for name, value in parameters.items() for word in ("-p", f"{name}={json.dumps(value)}")]


def last_run(server: Beside) -> Any:
    return list(server.runs.values())[-1]


def begun(server: Beside) -> Any:
    """The run, once it is running."""
    ((id, flow_run),) = server.wait_for(lambda: list(server.runs.items()))
    server.wait_state(id, "RUNNING")
    return flow_run


def add_tasks(server: Beside, flow_run_id: Any, **counts: int) -> None:
    """Task runs in these states, as an engine makes them."""
    for type, count in counts.items():
        for number in range(count):
            body = {"flow_run_id": str(flow_run_id), "task_key": type, "dynamic_key": str(number)}
            httpx.post(f"{server.url}/task_runs/", json={**body, "state": {"type": type}}).raise_for_status()


# The line on a terminal


@slow
@pytest.mark.parametrize(
    ("columns", "environ", "tasks", "state"),
    [
        (80, {}, "2/5 tasks, 1 failed", "\x1b[36mRunning\x1b[0m"),
        (200, {"NO_COLOR": "1"}, "2 of 5 tasks completed, 2 running, 1 failed", "Running"),
    ],
)
def test_a_line_at_the_bottom_tells_how_the_run_is_doing(
    server: Beside, place: Path, columns: int, environ: dict[str, str], tasks: str, state: str
) -> None:
    said = pairs(do="sleep", print=["12:00:00.123 | INFO    | Flow run 'run-1' - Loading " + "x" * 300])
    with OnTerminal(place, "run", "flows.py:hello", *said, columns=columns, **environ) as terminal:
        add_tasks(server, begun(server).id, COMPLETED=2, RUNNING=2, FAILED=1)
        terminal.until(re.escape(f"run-1 | {state} 0:0") + rf"\d \| {re.escape(tasks)} \| \d+% CPU, \d+ MB \| Load")
        terminal.type(b"\x03")
        assert terminal.wait() == 130

    # It goes only to come back with the same write; what is taken away for good is taken away last.
    *pieces, receipt = terminal.written.split("\r\x1b[K")
    drawn = [seen(piece, 1000)[-1] for piece in pieces]
    assert all(line.startswith("run-1 | ") for line in drawn)
    assert any(line.endswith("^C") for line in drawn), "what the terminal itself writes there"
    assert all(len(line) < columns for line in drawn), "it never wraps"
    assert plain(receipt).startswith("Cancelled: ")
    first, *rest = [line.rstrip() for line in terminal.screen]
    assert first.startswith("12:00:00.123 | INFO    | Flow run 'run-1' - Loading")
    assert not [line for line in rest if re.search(r"\| (Preparing|Starting|Running|Cancelling) ", line)], "it has gone"
    assert environ == {} or not re.search(r"\x1b\[[0-9;]*m", terminal.written)


def plain_lines(text: str) -> list[str]:
    lines = text.replace("\r\n", "\n").splitlines()
    assert "\r" not in text.replace("\r\n", "\n")
    assert "\x1b" not in text
    return lines


@slow
def test_a_dumb_terminal_and_a_pipe_get_plain_lines(server: Beside, place: Path, tmp_path: Path) -> None:
    said = pairs(print=["first", "second"], seconds=0.3)
    with OnTerminal(place, "run", "flows.py:hello", *said, TERM="dumb") as terminal:
        assert terminal.wait() == 0
    with Command(tmp_path / "pipe", "run", str(place / "flows.py:hello"), *said) as command:
        assert command.wait() == 0
    for name, text in (("run-1", terminal.written), ("run-2", command.out)):
        first, second, receipt, *rest = plain_lines(text)
        assert [first, second] == [f"{name} | first", f"{name} | second"]
        assert receipt.startswith(f"Completed: flow run {name!r} (")
        assert all(line.startswith("  ") for line in rest)
        assert not rest or name == "run-1", "a pipe gets whole lines"
    assert command.err == ""
    assert not server.seen("POST", "/task_runs/count"), "who shows no counts asks for none"


@slow
def test_what_goes_elsewhere_does_not_touch_the_line(server: Beside, place: Path, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    with OnTerminal(place, "run", "flows.py:hello", *pairs(err=["Oh."], seconds=1), stderr=errors) as terminal:
        assert terminal.wait() == 0
    assert errors.read_text() == "run-1 | Oh.\n"
    assert "| Oh." in terminal.written  # in the line at the bottom
    assert "run-1 | Oh." not in terminal.screen


@slow
@pytest.mark.parametrize("fault", [{"status": 404, "body": '{"detail": "no"}'}, {"hang": True}])
def test_a_server_that_does_not_tell_changes_nothing(server: Beside, place: Path, fault: dict[str, Any]) -> None:
    broken = server.fault("POST", "/task_runs/count", **fault)
    with OnTerminal(place, "run", "flows.py:hello", *pairs(seconds=1.2)) as terminal:
        assert terminal.wait() == 0
    if "hang" in fault:
        server.call(broken.release)
    assert broken.count == 1
    assert "Completed" in terminal.written
    assert "Traceback" not in terminal.written


@slow
def test_ctrl_c_cancels_and_says_so(server: Beside, place: Path) -> None:
    said = pairs(do="sleep", misbehave=["sleep"])
    with OnTerminal(place, "run", "flows.py:hello", *said) as terminal:
        begun(server)
        terminal.until("READY")
        terminal.type(b"\x03")
        terminal.until(r"\| \x1b\[33mCancelling\x1b\[0m 0:")
        assert terminal.wait() == 130
    lines = terminal.screen
    assert "Cancelling flow run 'run-1', which may take 30 s; a second Ctrl-C kills it at once" in "".join(lines)
    end = next(number for number, line in enumerate(lines) if line.startswith("Cancelled: "))
    receipt = " ".join(line.strip() for line in lines[end:])
    assert re.search(r"2 processes, exit -?\d+, 2 ended, 0 left behind\)", receipt)
    assert last_run(server).state.type == "CANCELLED"


@slow
def test_a_second_ctrl_c_kills_at_once_and_says_so(server: Beside, place: Path) -> None:
    with OnTerminal(place, "run", "flows.py:hello", *pairs(do="sleep", term="ignore")) as terminal:
        begun(server)
        terminal.type(b"\x03")
        terminal.until("a second Ctrl-C")
        time.sleep(SAME_SIGNAL_SECONDS + 0.1)  # what counts once is this time itself
        terminal.type(b"\x03")
        terminal.until("Killing flow run 'run-1' at once")
        assert terminal.wait(10) == 130
    assert "exit -9, 1 ended, 0 left behind)" in " ".join(line.strip() for line in terminal.screen)


# The receipt


@pytest.mark.parametrize(
    ("parameters", "code", "receipt"),
    [
        ({"seconds": 0.3}, 0, rf"Completed: flow run 'run-1' \({FIGURES}, 1 process, exit 0, 0 left behind\)\n"),
        (
            {"misbehave": ["sleep"], "seconds": 0.5},
            0,
            rf"Completed: flow run 'run-1' \({FIGURES}, 2 processes, exit 0, 1 left behind and ended\)\n",
        ),
        (
            {"do": "fail", "message": "no such table"},
            1,
            rf"Failed: flow run 'run-1' \({FIGURES}, 1 process, exit 0, 0 left behind\)\nno such table\n",
        ),
        (
            {"do": "exit"},
            1,
            rf"Crashed: flow run 'run-1' \({FIGURES}, 1 process, exit 3, 0 left behind\)\nFlow run infr",
        ),
    ],
)
def test_the_receipt(
    server: Beside, place: Path, parameters: dict[str, Any], code: int, receipt: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert code_of("run", "flows.py:hello", *pairs(**parameters)) == code
    assert re.search(f"(?m)^{receipt}", capsys.readouterr().out)


def test_what_may_stay_is_counted(server: Beside, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = pairs(misbehave=["sleep"], seconds=0.5)
    assert code_of("run", "flows.py:hello", *said, "-jv", "leftovers=allow") == 0
    out = capsys.readouterr().out
    left = psutil.Process(int(re.findall(r"READY (\d+)", out)[0]))
    left.kill()
    left.wait(10)
    assert out.endswith("exit 0, 1 left behind as allowed)\n")


@slow
def test_memory_and_cpu_are_those_of_the_whole_tree(
    server: Beside, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hog = "import sys, time\nblock = bytearray(60_000_000)\nfor page in range(0, len(block), 4096): block[page] = 1\n"
    hog += "while time.process_time() < 0.5: pass\n"
    hog += "print(flush=True)\nsys.stdin.read()"  # until its parent lets it go
    engine = f"import subprocess, sys, time\nhow = [sys.executable, '-c', {hog!r}]\npipe = subprocess.PIPE\n"
    engine += "hogs = [subprocess.Popen(how, stdin=pipe, stdout=pipe) for _ in 'ab']\n"
    engine += "[hog.stdout.readline() for hog in hogs]\ntime.sleep(2.5)\n[hog.communicate() for hog in hogs]\n"
    monkeypatch.setenv("PYTHONPATH", str(fake_prefect(tmp_path / "hogs", engine)))
    assert code_of("run", "flows.py:hello") == 1  # it reports nothing

    seconds, peak, count = re.findall(r"(\d+\.\d) s CPU, peak (\d+) MB, (\d) processes", capsys.readouterr().out)[0]
    assert float(seconds) >= 1
    assert 120 <= int(peak) < 250
    assert count == "3"


def test_no_secret_stands_in_the_receipt(server: Beside, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = pairs(do="fail", message="wrong password: open sesame", env=["DB_PASSWORD"])
    assert code_of("run", "flows.py:hello", *said, "--env", "DB_PASSWORD=open sesame") == 1
    out, err = capsys.readouterr()
    assert "open sesame" not in out + err
    assert "run-1 | DB_PASSWORD=***\n" in out
    assert out.endswith("\nwrong password: ***\n")


# --env, --env-file, --timeout, --name


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What the flow found in its environment."""
    return dict(line.partition(" | ")[2].split("=", 1) for line in capsys.readouterr().out.splitlines() if "=" in line)


def test_variables_come_from_the_command_line_the_caller_and_files(
    server: Beside, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FROM_HERE", "a=b ü")
    (place / "first.env").write_text("A=1\nB='two # words'\nexport lower_case=x\n# nothing\nC=old\n")
    (place / "second.env").write_text('A=2\nD="two\\nlines"\n')
    flags = ["--env-file", "first.env", "--env", "C=new", "--env", "FROM_HERE", "--env-file", "second.env"]
    flags += ["--env", "E=", "-jv", "env.A=job", "-jv", "env.F=job"]
    names = ["A", "B", "C", "E", "F", "FROM_HERE", "lower_case"]
    assert code_of("run", "flows.py:hello", *flags, *pairs(env=names)) == 0
    expected = {"A": "2", "B": "two # words", "C": "new", "E": "", "F": "job", "FROM_HERE": "a=b ü", "lower_case": "x"}
    assert expected.items() <= shown(capsys).items()


def test_what_is_given_so_stays_on_this_host(server: Beside, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job variable is told to the server, where others read it; --env is not."""
    server.add_deployment("nightly", flow="etl", job_variables={"env": {"A": "1", "B": "1"}})
    given = ["--env", "B=2", "--env", "API_TOKEN=keep me here", "-jv", "env.C=3"]
    assert code_of("run", "etl/nightly", *given, *pairs(env=["A", "B", "C", "API_TOKEN"])) == 0
    assert {"A": "1", "B": "2", "C": "3", "API_TOKEN": "***"}.items() <= shown(capsys).items()
    assert last_run(server).job_variables == {"env.C": "3"} or last_run(server).job_variables == {"env.C": 3}
    id = server.schedule(server.add_deployment())
    assert code_of("run", str(id), "--env", "API_TOKEN=keep me here") == 0
    assert not [request for request in server.requests if b"keep me" in request.body]


@pytest.mark.parametrize("target", ["flows.py:hello", "etl/nightly"])
def test_a_timeout_ends_the_run(server: Beside, place: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    server.add_deployment("nightly", flow="etl")
    assert code_of("run", target, *pairs(do="sleep"), "--timeout", "0.5", "--name", "in time") == 1
    out = capsys.readouterr().out
    assert re.search(
        r"(?m)^TimedOut: flow run 'in time' \(.*, 1 ended, 0 left behind\)\nThe flow run exceeded its", out
    )
    assert (last_run(server).state.name, last_run(server).name) == ("TimedOut", "in time")


def test_help_teaches_with_examples_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("run", "--help") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) < 80
    examples = re.findall(r"(?m)^  procworker (.+)$", out)
    assert 2 <= len(examples) <= 4
    for example in examples:
        assert build_parser().parse_args(shlex.split(example)).command == "run"


# Mistakes: one line that names the fix, and nothing was made


@pytest.fixture
def mistake(server: Beside, place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that cannot work; what it says."""

    def make(*argv: str, code: int = 2) -> str:
        assert code_of("run", *argv) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("procworker: error: "), err
        assert err.count("\n") == 1, err
        assert not server.runs
        return err

    return make


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        (["-p", "nmae=x"], "flow 'hello' has no parameter 'nmae'; did you mean 'name'? It takes name, do, seconds"),
        (["-p", "name"], "parameter 'name' must be written KEY=VALUE"),
        (
            ["--env", "NOT_SET_HERE"],
            "--env NOT_SET_HERE: this variable is not set here: write --env NOT_SET_HERE=VALUE",
        ),
        (["--env", "=x"], "--env: '' is no name of a variable: write NAME=VALUE"),
        (["--env-file", "gone.env"], "--env-file gone.env does not exist"),
        (["--env-file", "."], "--env-file . is a directory"),
        (["--timeout", "0"], "--timeout must be a number of seconds above 0, not 0"),
        (["--timeout", "nan"], "--timeout must be a number of seconds above 0, not nan"),
        (["-jv", "env=x"], "the job variable 'env' must be an object: write env.NAME=VALUE"),
        (["--python", "/no/such/python"], "python '/no/such/python' does not exist or is not executable"),
        (["--python", "/bin/ls"], "python '/bin/ls' cannot be used: "),
        (["--python", "."], "python '.' is a directory without bin/python: not a virtual environment"),
    ],
)
def test_a_mistake_in_an_option_is_said_in_one_line(mistake: Callable[..., str], flags: list[str], fix: str) -> None:
    assert fix in mistake("flows.py:hello", *flags)


@pytest.mark.parametrize(
    ("target", "fix"),
    [
        ("gone.py:hello", "flow file 'gone.py' does not exist (looked in "),
        ("flows.py:hallo", "'flows.py' has no flow 'hallo'; it has: "),
        ("flows.py", "names no flow: write flows.py:FLOW"),
        ("hello", "is no file.py:flow, no package.module:flow, no flow/deployment and no flow run id"),
        ("etl/nightly", "the server has no deployment 'etl/nightly'"),
    ],
)
def test_a_mistake_in_the_target_is_said_in_one_line(mistake: Callable[..., str], target: str, fix: str) -> None:
    assert fix in mistake(target)


def test_a_python_without_prefect_is_said(mistake: Callable[..., str], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    assert re.search(
        r"no Prefect in .*python: pip install .* --python", mistake("flows.py:hello", "--python", str(python))
    )


def test_a_server_that_is_not_there_is_said(mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
    text = mistake("flows.py:hello", "--startup-timeout", "0", code=3)
    assert "cannot be reached, check PREFECT_API_URL (most end in /api) and the server: " in text


def test_a_wrong_url_is_said(server: Beside, mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    server.fault("GET", "/health", status=404, body='{"detail": "Not Found"}')
    assert "check PREFECT_API_URL (most end in /api)" in mistake("flows.py:hello")
    monkeypatch.setenv("PREFECT_API_URL", "127.0.0.1:4200")
    assert "did you mean 'http://127.0.0.1:4200/api'?" in mistake("flows.py:hello")


@pytest.mark.parametrize("name", ["PROCWORKER_HOME", "TMPDIR"])
def test_a_place_where_nothing_can_be_written_is_said(
    mistake: Callable[..., str], place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").touch()
    monkeypatch.setenv(name, str(place / "file" / "inner"))
    if name == "TMPDIR":  # where Python would look next
        monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(place / "file" / "inner")])
    text = mistake("flows.py:hello")
    assert f"{name}: nothing can be written to " in text
    assert f"set {name} to another directory" in text


def test_a_module_that_is_not_there_is_told_by_the_last_lines(
    server: Beside, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be there for the flow's Python alone: who has to find it says so."""
    monkeypatch.setenv("PYTHONPATH", str(fake_prefect(tmp_path / "loads", "import not_there.flows\n")))
    assert code_of("run", "not_there.flows:hello") == 1
    out, err = capsys.readouterr()
    assert "ModuleNotFoundError: No module named 'not_there'" in out + err
    assert re.search(r"(?m)^Crashed: flow run 'run-1' \(", out)
    assert re.search(r"\n/.* has no module 'not_there': install it there, name another Python with --python, or", out)
