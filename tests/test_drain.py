"""`procworker start --drain`: until nothing is due and nothing runs, with exit codes that CI can trust."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import FAST, TEMPLATE, Command, code_of, fake_prefect, flow_file
from misbehave import survivors

from procworker.cli.ci import detect, markdown
from procworker.testing import Beside, serving


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Beside]:
    with serving() as server:
        for name, value in {**FAST, "PREFECT_API_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        for name in ("CI", "GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE", "GITHUB_STEP_SUMMARY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        server.add_pool("pool", base_job_template=TEMPLATE)
        yield server


DRAIN = ("start", "-p", "pool", "--drain")


def schedule(server: Beside, *plans: dict[str, object], **fields: object) -> list[object]:
    deployment = server.add_deployment(pool="pool")
    return [server.schedule(deployment, parameters=plan, **fields) for plan in plans]


def test_an_empty_queue_is_fine_and_over_at_once(server: Beside, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert code_of(*DRAIN) == 0
    assert time.monotonic() - began < 5
    assert capsys.readouterr().out.splitlines()[-1] == "0 flow runs."


def test_everything_that_is_due_is_run_under_a_limit(server: Beside, capsys: pytest.CaptureFixture[str]) -> None:
    ids = schedule(server, *[{"do": "complete"}] * 5)
    assert code_of(*DRAIN, "--limit", "2") == 0
    assert {server.run(id).state.type for id in ids} == {"COMPLETED"}
    assert capsys.readouterr().out.splitlines()[-1] == "5 flow runs: 5 Completed."


def test_what_becomes_due_while_something_runs_is_run_too(server: Beside, tmp_path: Path) -> None:
    (first,) = schedule(server, {"do": "sleep", "seconds": 3})
    with Command(tmp_path, *DRAIN) as worker:
        server.wait_state(first, "RUNNING")
        (second,) = schedule(server, {"do": "complete"})
        assert worker.wait() == 0
    assert server.run(second).state.type == "COMPLETED"


def test_a_run_that_does_not_complete_is_told_by_the_exit_code(server: Beside) -> None:
    schedule(server, {"do": "complete"}, {"do": "fail"})
    assert code_of(*DRAIN) == 1


def test_at_most_so_many_are_taken(server: Beside) -> None:
    ids = schedule(server, *[{"do": "complete"}] * 4)
    assert code_of(*DRAIN, "--max-runs", "3") == 0
    assert sorted(server.run(id).state.type for id in ids) == ["COMPLETED"] * 3 + ["SCHEDULED"]


def test_nothing_within_the_wait_has_a_code_of_its_own(server: Beside) -> None:
    began = time.monotonic()
    assert code_of(*DRAIN, "--wait", "1") == 4
    assert time.monotonic() - began >= 1


def test_the_first_run_is_waited_for(server: Beside, tmp_path: Path) -> None:
    with Command(tmp_path, *DRAIN, "--wait", "30") as worker:
        worker.until_it_says("started!")
        schedule(server, {"do": "complete"})
        assert worker.wait() == 0
    assert worker.out.splitlines()[-1] == "1 flow run: 1 Completed."


def test_after_the_last_run_more_is_waited_for(server: Beside, tmp_path: Path) -> None:
    (first,) = schedule(server, {"do": "complete"})
    with Command(tmp_path, *DRAIN, "--idle-timeout", "2") as worker:
        server.wait_state(first, "COMPLETED")
        (second,) = schedule(server, {"do": "complete"})
        server.wait_state(second, "COMPLETED")
        assert worker.wait() == 0
    assert worker.out.splitlines()[-1] == "2 flow runs: 2 Completed."


def test_a_server_that_falls_silent_while_something_runs_is_waited_for(server: Beside, tmp_path: Path) -> None:
    (first,) = schedule(server, {"do": "sleep", "seconds": 2})
    with Command(tmp_path, *DRAIN) as worker:
        server.wait_state(first, "RUNNING")
        trouble = server.fault("POST", "/get_scheduled_flow_runs", status=503, times=2)
        assert worker.wait() == 0
    assert trouble.count == 2
    assert server.run(first).state.type == "COMPLETED"


def test_a_stop_while_it_waits_is_no_failure(server: Beside, tmp_path: Path) -> None:
    with Command(tmp_path, *DRAIN, "--wait", "60") as worker:
        worker.until_it_says("started!")
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--run-once", "--drain"], "choose one"),
        (["--wait", "5"], "--wait needs --drain"),
        (["--max-runs", "5"], "--max-runs needs --drain"),
        (["--idle-timeout", "5"], "--idle-timeout needs --drain"),
        (["--drain", "--max-runs", "0"], "invalid count value: '0'"),
        (["--drain", "--wait", "soon"], "invalid number of seconds from 0 to 86400 value: 'soon'"),
    ],
)
def test_what_cannot_be_meant_is_refused(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("start", "-p", "pool", *argv) == 2
    assert says in capsys.readouterr().err


# A CI job in miniature


JOB = {
    "good 1": {"do": "complete"},
    "good 2": {"do": "complete"},
    "good 3": {"do": "complete"},
    "fails": {"do": "fail", "message": "no | data\nfor you"},
    "crashes": {"do": "exit", "code": 3, "print": ["::error::not a command", "last words"]},
    "hangs": {"do": "sleep", "term": "die"},
}


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["1", "3"])
def test_a_job_of_six_flows_of_which_three_end_badly(server: Beside, tmp_path: Path, limit: str) -> None:
    template = json.loads(json.dumps(TEMPLATE))
    template["job_configuration"] |= {"timeout_seconds": "{{ timeout_seconds }}"}
    template["variables"]["properties"]["timeout_seconds"] = {}
    server.pools["pool"].base_job_template = template
    deployment = server.add_deployment("nightly", flow="etl", pool="pool")
    for name, plan in JOB.items():
        variables = {"timeout_seconds": 2} if name == "hangs" else {}
        server.schedule(deployment, name=name, parameters=plan, job_variables=variables)
    summary = tmp_path / "summary.md"
    environ = {"CI": "true", "GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)}
    environ["RUNNER_TRACKING_ID"] = tracking = f"github_{tmp_path}"
    with Command(tmp_path, *DRAIN, "--limit", limit, "--junit", "runs.xml", **environ) as worker:
        assert worker.wait(60) == 1, worker.err

    root = ElementTree.fromstring((tmp_path / "runs.xml").read_bytes())
    (suite,) = root
    assert {name: suite.attrib[name] for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "6",
        "failures": "1",
        "errors": "2",
        "skipped": "0",
    }
    cases = {case.attrib["name"]: case for case in suite.iter("testcase")}
    assert set(cases) == set(JOB)
    assert {case.attrib["classname"] for case in cases.values()} == {"etl.nightly"}
    kinds = {name: [(p.tag, p.attrib["type"]) for p in case] for name, case in cases.items()}
    assert kinds["fails"] == [("failure", "Failed")]
    assert kinds["crashes"] == [("error", "Crashed")]
    assert kinds["hangs"] == [("error", "TimedOut")]
    assert "last words" in (cases["crashes"][0].text or "")

    assert worker.out.splitlines()[-1] == "6 flow runs: 3 Completed, 1 Failed, 1 Crashed, 1 TimedOut." or limit == "3"
    commands = [line for line in worker.out.splitlines() if line.startswith("::")]
    assert sum(line.startswith("::error title=etl.nightly%3A flow run ") for line in commands) == 3
    assert "::error::not a command" not in commands
    opened = [line.removeprefix("::group::") for line in commands if line.startswith("::group::")]
    assert opened == (["crashes"] if limit == "1" else []), "several at once cannot be grouped"
    assert commands.count("::endgroup::") == len(opened)
    table = summary.read_text()
    assert "6 flow runs" in table
    assert "| fails | etl.nightly | Failed |" in table
    assert "no \\| data<br>for you" in table
    assert survivors(tracking) == {}


def test_the_childs_environment_keeps_what_the_runner_looks_for(server: Beside, tmp_path: Path) -> None:
    schedule(server, {"do": "complete", "env": ["RUNNER_TRACKING_ID"]})
    with Command(tmp_path, *DRAIN, RUNNER_TRACKING_ID="github_1") as worker:
        assert worker.wait() == 0
    assert "| RUNNER_TRACKING_ID=github_1" in worker.out


# What each system reads


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GITHUB_ACTIONS", ["::group::a: 50%25", "::endgroup::", "::error title=a%3A b%2C c::x%0Ay"]),
        ("BUILDKITE", ["--- a: 50%", "^^^ +++"]),
        ("nobody", []),
    ],
)
def test_each_system_is_spoken_to_in_its_language(name: str, expected: list[str]) -> None:
    lines: list[str] = []
    ci = detect({name: "true"}, lines.append)
    ci.begin("a: 50%")
    ci.begin("a: 50%")
    ci.end(failed=True)
    ci.end()
    ci.problem("a: b, c", "x\ny")
    assert lines == expected


def test_gitlab_folds_sections_whose_names_are_names() -> None:
    lines: list[str] = []
    ci = detect({"GITLAB_CI": "true"}, lines.append)
    ci.begin("keen owl/1")
    ci.end()
    start, end = lines
    assert start.startswith("\x1b[0Ksection_start:")
    assert start.endswith(":run_keen_owl_1[collapsed=true]\r\x1b[0Kkeen owl/1")
    assert end.endswith(":run_keen_owl_1\r\x1b[0K")


@pytest.mark.parametrize(
    ("system", "text", "harmless"),
    [
        ("GITHUB_ACTIONS", "::error::x\n", "|::error::x\n"),
        ("GITHUB_ACTIONS", "why\n \t::error::x\r::error::y", "why\n| \t::error::x\r|::error::y"),
        ("GITHUB_ACTIONS", "owl | ##[error]x", "owl | ##|[error]x"),
        ("GITHUB_ACTIONS", "owl | std::vector", "owl | std::vector"),
        ("GITLAB_CI", "x\x1b[0Ksection_start:1:x\r\x1b[0K", "x\x1b[0Ksection_|start:1:x\r\x1b[0K"),
        ("GITLAB_CI", "section_end:1:x", "section_|end:1:x"),
        ("BUILDKITE", "--- x\n+++ y\n^^^ +++\n~~~ z", "|--- x\n|+++ y\n|^^^ +++\n|~~~ z"),
        ("BUILDKITE", "----", "----"),
        ("TERM", "--- a/file\n::error::x", "--- a/file\n::error::x"),
    ],
)
def test_nothing_that_others_wrote_is_a_command(system: str, text: str, harmless: str) -> None:
    assert detect({system: "true"}, print).harmless(text) == harmless


def test_a_summary_shows_what_failed_first_and_is_bounded() -> None:
    rows = [(f"run {n}", "etl", "Completed", 1.0, "") for n in range(600)] + [("bad", "etl", "Failed", 2.0, "<b>`x`|")]
    lines = markdown("title", rows).splitlines()
    assert lines[4] == "| bad | etl | Failed | 2.0 | &lt;b>\\`x\\`\\| |"
    assert lines[-2] == "and 101 more"


def test_a_summary_that_cannot_be_written_is_said_and_changes_nothing(server: Beside, tmp_path: Path) -> None:
    environ = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "no" / "such")}
    with Command(tmp_path / "cwd", *DRAIN, **environ) as worker:
        assert worker.wait() == 0
    assert "GITHUB_STEP_SUMMARY" in worker.err


@pytest.mark.slow
def test_run_speaks_to_ci_too(server: Beside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow_file(tmp_path / "flows.py")
    summary = tmp_path / "summary.md"
    environ = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)}
    environ["PYTHONPATH"] = str(fake_prefect(tmp_path / "packages"))
    argv = ("-p", "do=fail", "-p", 'print=["here"]', "-p", 'message="the flow failed\\n::error::not a command"')
    with Command(tmp_path, "run", "flows.py:hello", *argv, **environ) as command:
        assert command.wait() == 1, command.err
    first, second, *rest = command.out.splitlines()
    assert (first, second) == ("::group::run-1", "run-1 | here")
    assert "::endgroup::" in rest
    (problem,) = [line for line in rest if line.startswith("::error ")]
    title = "::error title=flows%3A flow run hello is Failed"
    assert problem == f"{title}::the flow failed%0A::error::not a command"
    assert "|::error::not a command" in rest
    assert "| hello | flows | Failed |" in summary.read_text()


@pytest.mark.slow
def test_no_name_of_a_run_is_a_command(server: Beside, tmp_path: Path) -> None:
    flow_file(tmp_path / "flows.py")
    environ = {"GITHUB_ACTIONS": "true", "PYTHONPATH": str(fake_prefect(tmp_path / "packages"))}
    evil = "::error::one\n::error::two"
    with Command(tmp_path, "run", "flows.py:hello", "-p", 'print=["here"]', "--name", evil, **environ) as command:
        assert command.wait() == 0, command.err
    assert not [line for line in command.out.splitlines() if line.startswith("::error")], command.out
    assert "|::error::one\\n::error::two | here" in command.out
