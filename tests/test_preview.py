"""`procworker preview`: the job that a run would be, where each value is from, no secret, and nothing done for it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from commands import FAST, ROOT, Command, code_of, fake_prefect, flow_file

from procworker import ProcessWorker
from procworker.cli.layout import lines_of, visible
from procworker.cli.preview.job_view import AT_START, NEW
from procworker.cli.preview.origins import Inputs, complaints, traced
from procworker.cli.terminal import Terminal
from procworker.testing import Beside, serving

DUMP = """
import json, os, sys
if __name__ == "__main__":
    facts = {"argv": sys.orig_argv, "cwd": os.getcwd(), "env": dict(os.environ)}
    open(os.environ["FACTS"], "w").write(json.dumps(facts))
"""


def template(**env: Any) -> dict[str, Any]:
    """That of a pool which gives its jobs these variables."""
    made = ProcessWorker.get_default_base_job_template()
    made["variables"]["properties"]["env"]["default"] = env
    return made


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Beside]:
    with serving() as server:
        for name, value in {**FAST, "PREFECT_API_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        yield server
        assert {request.method for request in server.requests} <= {"GET"}, "a preview only reads"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with flows.py and, on the path, a Prefect."""
    path = tmp_path / "place"
    path.mkdir()
    flow_file(path / "flows.py")
    monkeypatch.setenv("PYTHONPATH", str(fake_prefect(tmp_path / "prefect", DUMP)))
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def nightly(server: Beside, place: Path) -> Any:
    """A deployment that sets something in every way, of a pool that does so too."""
    server.add_pool(base_job_template=template(POOL="pool", BOTH="pool"))
    server.add_block("db", "secret", {"value": "pw7"})
    server.add_variable("city", "Paris")
    env = {
        "BOTH": "deployment",
        "DB": "postgres://me:{{ prefect.blocks.secret.db }}@host/db",
        "CITY": "{{ prefect.variables.city }}",
        "LANG": None,
    }
    variables = {"env": env, "timeout_seconds": 60}
    return server.add_deployment("nightly", flow="etl", job_variables=variables, parameters={"day": 1})


def preview(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """What the command says in JSON; it must go well."""
    code = code_of("preview", *argv, "--json")
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    found: dict[str, Any] = json.loads(captured.out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the command refuses with."""
    assert code_of("preview", *argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def variables(view: dict[str, Any]) -> dict[str, Any]:
    """All variables that the run has, with their origins."""
    groups = view["environment"]
    return {**groups.get("inherited", {}), **groups["added"], **groups["changed"]}


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_run_gets_exactly_what_was_previewed(
    method: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = tmp_path / "facts"
    monkeypatch.setenv("LANG", "C")
    monkeypatch.setenv("GREETED", "you")
    argv = ["flows.py:hello", "-p", "name=x", "-jv", "env.GREETING=Hello << $GREETED >>", "-jv", "env.LANG=null"]
    argv += ["-jv", f"env.FACTS={facts}", "-jv", f"start_method={method}"]
    with serving() as server:
        monkeypatch.setenv("PREFECT_API_URL", server.url)
        shown = preview(capsys, *argv, "--all")
        assert not server.requests
        code_of("run", *argv)
        found = json.loads(facts.read_text())

    values = {name: entry["value"] for name, entry in variables(shown).items()}
    anew = {name for name, value in values.items() if value == NEW}
    assert anew >= {*AT_START, "PREFECT__FLOW_RUN_ID", "PREFECT__FLOW_ID", "PREFECT__WORKER_NAME"}
    ours = {"LC_CTYPE", "_", "__PYVENV_LAUNCHER__"}  # Python's and the shell's own doing
    assert values.keys() - ours == found["env"].keys() - ours
    assert {k: v for k, v in values.items() if k not in anew | ours} == {
        k: v for k, v in found["env"].items() if k not in anew | ours
    }
    assert "LANG" in shown["environment"]["removed"]
    assert shown["settings"]["working_dir"]["value"] == found["cwd"] == str(place)
    if method == "spawn":
        assert shown["command"] == found["argv"]


def test_each_value_has_its_origin(
    nightly: Any, monkeypatch: pytest.MonkeyPatch, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / ".env").write_text("PREFECT_LOGGING_LEVEL=DEBUG\n")
    monkeypatch.setenv("LANG", "C")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(uuid4()))
    argv = ("etl/nightly", "-jv", "env.X=1", "-jv", "leftovers=allow", "-p", "token=abc")
    shown = preview(capsys, *argv, "--all")

    origins = {name: entry["origin"] for name, entry in variables(shown).items()}
    assert {name: origins[name] for name in ("POOL", "BOTH", "DB", "CITY", "X", "PATH", "PYTHONUNBUFFERED")} == {
        "POOL": "work pool 'pool'",
        "BOTH": "deployment 'nightly'",
        "DB": "deployment 'nightly', blocks.secret.db",
        "CITY": "deployment 'nightly', variables.city",
        "X": "command line",
        "PATH": "environment",
        "PYTHONUNBUFFERED": "default",
    }
    assert origins["PREFECT_LOGGING_LEVEL"] == str(place / ".env")
    assert origins["PREFECT__DEPLOYMENT_NAME"] == origins["PREFECT__FLOW_RUN_ID"] == "the run's own"
    assert shown["environment"]["removed"]["LANG"]["origin"] == "deployment 'nightly'"
    settings = {name: (entry["value"], entry["origin"]) for name, entry in shown["settings"].items()}
    assert settings["timeout_seconds"] == (60, "deployment 'nightly'")
    assert settings["leftovers"] == ("allow", "command line")
    assert settings["start_method"] == ("spawn", "work pool 'pool'")
    assert settings["grace_seconds"] == (30, "default")
    assert settings["parameters"] == ({"day": 1, "token": "***"}, "command line, deployment 'nightly'")
    assert settings["python"] == (f"{sys.executable} (Prefect 3.8.8)", "procworker's own")
    assert settings["working_dir"][0].startswith("a new one in ")


def test_a_flow_run_and_a_pool(server: Beside, nightly: Any, capsys: pytest.CaptureFixture[str]) -> None:
    id = str(server.schedule(nightly, job_variables={"env": {"BOTH": "run"}}))
    shown = preview(capsys, id, "--pool", "pool")

    run = variables(shown)
    assert run["BOTH"] == {"value": "run", "origin": "flow run 'run-1'"}
    assert run["PREFECT__FLOW_RUN_ID"]["value"] == id


def test_the_pools_own_variables_are_told_from_ours(
    server: Beside, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pool made by Prefect knows no leftovers."""
    made = template()
    for name in ProcessWorker.extra_variables:
        del made["job_configuration"][name], made["variables"]["properties"][name]
    made["job_configuration"]["env"] = {"FIXED": "1", "HOMELY": "{{ $HOME }}/x", "GREETING": "Hello {{ whom }}"}
    made["variables"]["properties"]["whom"] = {"default": "pool"}
    server.add_pool(base_job_template=made)
    server.add_deployment("d", flow="f")
    shown = preview(capsys, "f/d", "-jv", "whom=me")

    settings = shown["settings"]
    assert (settings["stream_output"]["origin"], settings["leftovers"]["origin"]) == ("work pool 'pool'", "default")
    run = variables(shown)
    assert run["FIXED"] == {"value": "1", "origin": "work pool 'pool', template"}
    assert run["HOMELY"] == {"value": f"{os.environ['HOME']}/x", "origin": "work pool 'pool', template, $HOME"}
    assert run["GREETING"] == {"value": "Hello me", "origin": "command line (whom)"}


# What it must not do


CANARIES = {
    "PREFECT_API_KEY": "canary-key-1",
    "MY_TOKEN": "canary-token-2",
    "DATABASE": "postgres://me:canary-password-3@host/db",
    "PREFECT_CLIENT_CUSTOM_HEADERS": '{"X-Secret": "canary-header-4"}',
    "SHORT_PASSWORD": "can5",
}


@pytest.mark.parametrize("form", ["--json", "--all"])
def test_no_secret_is_shown(
    form: str, server: Beside, nightly: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("INNOCENT", "see canary-key-1")
    block = {"user": "canary-user-6", "port": 7777, "inner": {"list": ["canary-item-7"]}}
    server.add_block("all", "thing", block)
    server.deployments[nightly].job_variables["env"] |= {
        "USER_OF_IT": "{{ prefect.blocks.thing.all.user }}",
        "PORT_OF_IT": "port {{ prefect.blocks.thing.all.port }}",
        "ITEM_OF_IT": "{{ prefect.blocks.thing.all.inner.list[0] }}",
    }
    argv = ("-jv", "env.GIVEN_SECRET=canary-given-8", "-p", "password=canary-parameter-9", "--all")
    assert code_of("preview", "etl/nightly", *argv, form) == 0
    out, err = capsys.readouterr()

    assert "canary" not in out + err
    assert not {"can5", "7777", "pw7"} & set(re.findall(r"\w+", out + err))
    assert "postgres://***@host/db" in out
    assert "INNOCENT" in out


def test_a_value_of_a_block_is_in_no_error_either(
    server: Beside, nightly: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.deployments[nightly].job_variables["timeout_seconds"] = "{{ prefect.blocks.secret.db }}"
    line = refused(capsys, "etl/nightly")
    assert "timeout_seconds" in line
    assert "pw7" not in line


def test_without_a_server_none_is_started_and_what_needs_one_is_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = preview(capsys, "flows.py:hello", "-jv", "env.DB={{ prefect.blocks.secret.db }}")

    assert not list(Path(os.environ["PROCWORKER_HOME"]).iterdir())
    assert variables(shown)["PREFECT_API_URL"] == {"value": NEW, "origin": "embedded server"}
    assert variables(shown)["PREFECT_API_AUTH_STRING"] == {"value": NEW, "origin": "embedded server"}
    assert variables(shown)["DB"]["value"] == "<< prefect.blocks.secret.db >>"
    assert shown["notes"] == ["prefect.blocks.secret.db is read from the server, and there is none yet"]


@pytest.mark.parametrize("argv", [("etl/nightly",), (str(uuid4()),), ("flows.py:hello", "--pool", "p")])
def test_what_only_a_server_knows_needs_one(
    argv: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "PREFECT_API_URL is not set" in refused(capsys, *argv)


def test_mistakes_are_refused_with_what_to_change(
    server: Beside, nightly: Any, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    id = server.schedule(nightly)
    server.add_pool("docker", type="docker")
    for argv, text in {
        ("etl/weekly",): "the server has no deployment 'etl/weekly'",
        (str(uuid4()),): "the server has no flow run",
        (str(id), "-p", "a=1"): "leave out --param",
        ("etl/nightly", "--pool", "none"): "the server has no work pool 'none'",
        ("etl/nightly", "--pool", "docker"): "choose another pool",
        ("etl/nightly", "-jv", "x"): "must be written KEY=VALUE",
        ("flows.py:goodbye",): "has no flow 'goodbye'; it has: flow, hello",
        ("flows.py:hello", "--python", "/nowhere"): "'/nowhere' does not exist",
        ("etl/nightly", "-jv", "timeout_seconds=-1"): "timeout_seconds: Input should be greater than 0",
        ("etl/nightly", "-jv", "env.X={{ prefect.blocks.secret.none }}"): "block secret/none",
    }.items():
        assert text in refused(capsys, *argv)
    server.delete_deployment(nightly)
    assert "is gone: it would be cancelled" in refused(capsys, str(id))


def test_a_server_that_is_away_is_told_in_one_line(
    server: Beside, nightly: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with server.outage():
        assert code_of("preview", "etl/nightly") == 3
    assert "check PREFECT_API_URL" in capsys.readouterr().err


def test_what_cannot_be_meant_is_noted(server: Beside, nightly: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server.pools["pool"].base_job_template["job_configuration"]["labels"] = {"a": "{{ envv }}", "b": "{{ $NO_SUCH }}"}
    argv = ("-jv", "timeout=5", "-jv", "env.A={{ typo }}", "-jv", "env.B={{ prefect.variables.none }}")
    shown = preview(capsys, "etl/nightly", *argv, "-jv", "working_dir=/nowhere/at/all", "-jv", "start_method=fork")

    assert shown["notes"] == [
        "{{ envv }} in labels.a is no variable of the template, so it is empty; did you mean 'env'?",
        "{{ $NO_SUCH }} in labels.b: the environment has no NO_SUCH, so it is empty",
        "{{ typo }} in env.A is no variable of the template, so it is empty",
        "the job variable 'timeout' is not used by the template; did you mean 'timeout_seconds'?",
        "the server has no variable 'none': empty",
        "the working directory /nowhere/at/all does not exist: it would crash",
    ]


def test_a_command_of_ones_own_chooses_its_python(
    server: Beside, nightly: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = preview(capsys, "etl/nightly", "-jv", "command=sh -c 'a b'", "-jv", "start_method=fork")

    assert shown["command"] == ["sh", "-c", "a b"]
    assert shown["settings"]["command"] == {"value": "sh -c 'a b'", "origin": "command line"}
    assert shown["settings"]["python"]["origin"] == "the command chooses its own Python"
    assert "start_method 'fork' has no effect: a command of one's own is spawned" in shown["notes"]


# For people


@pytest.mark.parametrize("environ", [{"TERM": "xterm"}, {"TERM": "dumb"}])
def test_on_a_terminal_of_80_columns_nothing_wraps_by_itself(environ: dict[str, str], place: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    argv = ["preview", "flows.py:hello", "-jv", f"env.LONG={'x' * 300}", "-jv", f"env.WORDS={'word ' * 60}"]
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)])
    command = [sys.executable, "-m", "procworker", *argv]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**os.environ, "PYTHONPATH": path, **environ})
    os.close(theirs)
    out = b""
    try:
        while data := os.read(ours, 65536):
            out += data
    except OSError:
        pass  # the other end is closed
    os.close(ours)

    assert process.wait() == 0
    text = out.decode()
    assert ("\x1b[" in text) == (environ == {"TERM": "xterm"})
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    assert all(len(line) < 80 for line in lines)
    assert sum(line.count("x") for line in lines if not line.strip().strip("x")) == 300
    assert sum(line.count("word ") for line in lines) >= 55


def test_in_a_pipe_each_value_is_one_line(place: Path, tmp_path: Path) -> None:
    argv = ("preview", str(place / "flows.py:hello"), "-jv", f"env.LONG={'x' * 300}", "-jv", "env.ODD=a\\\nb\x1b[31m")
    with Command(tmp_path / "elsewhere", *argv) as command:
        assert command.wait() == 0
    assert f"+ LONG={'x' * 300}  (command line)\n" in command.out
    assert r"+ ODD=a\\n" in command.out.replace("\\\\\\n", r"\\n")
    assert "\x1b" not in command.out


def test_wide_characters_and_long_words_are_laid_out_by_their_width() -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    class Narrow(Terminal):
        columns = 29  # type: ignore[assignment]

    lines = lines_of(Narrow(Screen(), {}), [("head: ", "bold"), ("語" * 17 + " the end", "")], 4)
    assert lines == ["head:", "    " + "語" * 12, "    " + "語" * 5 + " the end"]
    assert visible("a\nb\x1b\u202e") == "a\\nb\\x1b\\u202e"


# The trace itself


def test_a_trace_follows_values_wherever_they_are_put() -> None:
    job = {"command": "{{ a }} {{ b }}", "labels": {"x": "{{ b }}", "y": "fixed"}, "env": "{{ env }}"}
    properties = {"a": {"default": 1}, "b": {"default": "pool"}, "env": {"default": {"E": "1"}}, "c": {}}
    inputs = Inputs({"job_configuration": job, "variables": {"properties": properties}}, {"b": "d"}, {"env.F": "2"})
    trace = traced(inputs)

    assert trace.filled == {"command": "1 d", "labels": {"x": "d", "y": "fixed"}, "env": {"E": "1", "F": "2"}}
    assert trace.of("command") == [("defaults", ("a",)), ("deployment", ("b",))]
    assert trace.of("labels", "x") == [("deployment", ("b",))]
    assert trace.of("labels", "y") == []
    assert trace.of("env", "E") == [("defaults", ("env", "E"))]
    assert trace.of("env", "F") == [("run", ("env.F",))]
    assert complaints(inputs, trace, {}) == []


@pytest.mark.parametrize("env", [None, {}, {"$ref": {"block_document_id": "1"}}])
def test_a_trace_fails_only_where_filling_fails(env: Any) -> None:
    properties = {"env": {"default": {"E": "1"}}, "a": {"default": None}}
    inputs = Inputs(
        {"job_configuration": {"env": "{{ env }}"}, "variables": {"properties": properties}}, {"env": env}, {}
    )
    assert traced(inputs).filled == inputs.filled()
    assert traced(inputs).of("env", "E") == [("defaults", ("env", "E"))]


def test_parameters_are_checked_as_run_checks_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "checked.py").write_text("from prefect import flow\n\n@flow\ndef sized(count: int): ...\n")
    assert code_of("preview", "checked.py:sized", "-p", "cuont=3") == 2
    assert "has no parameter 'cuont'; did you mean 'count'?" in capsys.readouterr().err
    assert code_of("preview", "checked.py:sized", "-p", "count=3") == 0
    assert code_of("preview", "checked.py:sized") == 0, "the job alone"
