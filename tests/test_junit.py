"""`procworker run --junit FILE`: what CI reads of a flow run; and `--job-variable`, which CI files write."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import FAST, Command, code_of, fake_prefect, flow_file

from procworker.testing import Beside, serving

pytestmark = pytest.mark.slow

SUITE = {"name", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname"}
"""The attributes that the schemas of Jenkins and of pytest allow, and that every reader knows."""


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
    flow_file(place / "flows.py")
    monkeypatch.setenv("PYTHONPATH", str(fake_prefect(tmp_path / "prefect")))
    monkeypatch.chdir(place)
    return place


def case_in(file: Path) -> ElementTree.Element:
    """The one test case of a report that a strict reader takes."""
    root = ElementTree.fromstring(file.read_bytes())
    assert (root.tag, [child.tag for child in root]) == ("testsuites", ["testsuite"])
    (suite,) = root
    assert set(suite.attrib) == SUITE
    *before, case = suite
    assert [child.tag for child in before] in ([], ["properties"])
    assert all(set(entry.attrib) == {"name", "value"} for entry in suite.iter("property"))
    assert (case.tag, set(case.attrib)) == ("testcase", {"classname", "name", "time"})
    problems = [child.tag for child in case]
    assert problems in ([], ["failure"], ["error"])
    counts = {"tests": "1", "skipped": "0"}
    counts |= {"failures": str(problems.count("failure")), "errors": str(problems.count("error"))}
    assert counts.items() <= suite.attrib.items()
    assert float(suite.attrib["time"]) == float(case.attrib["time"]) >= 0
    assert all(set(child.attrib) == {"type", "message"} for child in case)
    return case


def test_a_completed_run_is_a_test_case_that_passed(server: Beside, place: Path) -> None:
    assert code_of("run", "flows.py:hello", "--junit", "deep/er/cell.xml") == 0

    case = case_in(place / "deep/er/cell.xml")
    assert (case.attrib["classname"], case.attrib["name"], len(case)) == ("flows", "hello", 0)
    told = {e.attrib["name"]: e.attrib["value"] for e in ElementTree.parse("deep/er/cell.xml").iter("property")}
    (flow_run,) = server.runs.values()
    assert told == {"flow_run_id": str(flow_run.id), "flow_run_name": flow_run.name}
    assert os.listdir(place / "deep/er") == ["cell.xml"], "nothing half-written is left"


@pytest.mark.parametrize(
    ("do", "kind", "type", "message"),
    [
        ("fail", "failure", "Failed", "the flow failed"),
        ("exit", "error", "Crashed", "Flow run infrastructure exited with"),
        ("cancel", "error", "Cancelled", ""),
    ],
)
def test_any_other_end_is_told_with_the_message_and_the_last_lines(
    server: Beside, place: Path, do: str, kind: str, type: str, message: str
) -> None:
    lines = '["first", "second", "\\u001b[31mred\\u001b[0m \\u0000\\u001b <&>]]> \\ud83d\\ude00"]'
    assert code_of("run", "flows.py:hello", "-p", f"do={do}", "-p", f"print={lines}", "--junit", "cell.xml") == 1

    (problem,) = case_in(place / "cell.xml")
    assert (problem.tag, problem.attrib["type"]) == (kind, type)
    assert problem.attrib["message"].startswith(message)
    assert (problem.text or "").endswith("first\nsecond\nred #x00#x1B <&>]]> \U0001f600")
    assert problem.attrib["message"] in (problem.text or "")


def test_no_secret_stands_in_a_report(server: Beside, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "of the environment")
    said = ["-p", "do=fail", "-p", 'env=["DB_PASSWORD", "MY_TOKEN"]']
    said += ["-p", "message=of the environment, of the variables"]
    given = ["-jv", "env.MY_TOKEN=of the variables", "--junit", "cell.xml"]
    assert code_of("run", "flows.py:hello", *said, *given) == 1

    (problem,) = case_in(place / "cell.xml")
    assert problem.text == "***, ***\n\nDB_PASSWORD=***\nMY_TOKEN=***"
    assert "of the" not in (place / "cell.xml").read_text()


def test_a_run_that_was_never_made_is_an_error(server: Beside, place: Path) -> None:
    server.down()
    unreachable = ["run", "flows.py:hello", "--startup-timeout", "0", "--junit", "cell.xml"]
    assert code_of(*unreachable) == 3
    (problem,) = case_in(place / "cell.xml")
    assert (problem.tag, problem.attrib["type"]) == ("error", "Unreachable")
    assert "cannot be reached" in problem.attrib["message"]

    assert code_of("run", "etl/nightly", "-p", "x", "--junit", "cell.xml") == 2
    (problem,) = case_in(place / "cell.xml")
    assert "must be written KEY=VALUE" in problem.attrib["message"]


def test_a_killed_command_leaves_no_report_of_an_earlier_run(server: Beside, place: Path) -> None:
    report = place / "cell.xml"
    assert code_of("run", "flows.py:hello", "--junit", str(report)) == 0
    with Command(
        place / "killed", "run", str(place / "flows.py:hello"), "-p", "do=sleep", "--junit", str(report)
    ) as run:
        ((_, flow_run),) = server.wait_for(lambda: list(server.runs.items())[1:])
        server.wait_state(flow_run.id, "RUNNING")
        run.send(signal.SIGKILL)
        run.wait()
    assert not report.exists()
    server.wait_state(flow_run.id, "CRASHED")


def test_an_interrupted_run_is_an_error(server: Beside, place: Path) -> None:
    report = place / "cell.xml"
    with Command(place / "cut", "run", str(place / "flows.py:hello"), "-p", "do=sleep", "--junit", str(report)) as run:
        ((id, _),) = server.wait_for(lambda: list(server.runs.items()))
        server.wait_state(id, "RUNNING")
        run.send(signal.SIGINT)
        assert run.wait() == 130
    (problem,) = case_in(report)
    assert (problem.tag, problem.attrib["type"]) == ("error", "Cancelled")


def test_a_report_that_cannot_be_written_is_said_before_anything_runs(
    server: Beside, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "file").touch()
    assert code_of("run", "flows.py:hello", "--junit", "file/cell.xml") == 2
    assert "--junit file/cell.xml cannot be written: " in capsys.readouterr().err
    assert not server.runs


# Job variables


def test_a_job_variable_is_read_as_a_template_that_needs_no_escaping(
    server: Beside, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CELL", "py311")
    server.add_variable("greeting", "Hi")
    pairs = [
        "env.A=<< prefect.variables.greeting >>, << $CELL >>!",
        "env.B=<<! $CELL >> << EOF >>",
        f"working_dir={place}",
    ]
    flags = [word for pair in pairs for word in ("--job-variable", pair)]
    assert code_of("run", "flows.py:hello", *flags, "-p", 'env=["A", "B", "cwd"]') == 0

    shown = [line.partition(" | ")[2] for line in capsys.readouterr().out.splitlines()]
    assert shown[:3] == ["A=Hi, py311!", "B=<< $CELL >> << EOF >>", f"cwd={place}"]


def test_job_variables_go_over_those_of_a_deployment(
    server: Beside, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.add_deployment("nightly", flow="etl", job_variables={"env": {"A": "1", "B": "1"}})
    assert code_of("run", "etl/nightly", "-jv", 'env={"B": 2}', "-p", 'env=["A", "B"]') == 0
    assert [line.partition(" | ")[2] for line in capsys.readouterr().out.splitlines()][:2] == ["A=1", "B=2"]
    (flow_run,) = server.runs.values()
    assert flow_run.job_variables == {"env": {"B": 2}}


def test_what_a_job_variable_cannot_be_is_said(server: Beside, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("run", "flows.py:hello", "-jv", "env.A=<< $NOT_PASSED >>") == 2
    assert "<< $NOT_PASSED >>: the environment variable NOT_PASSED is not set" in capsys.readouterr().err
    assert code_of("run", str(server.schedule()), "-jv", "env.A=1") == 2
    assert "leave out --job-variable" in capsys.readouterr().err
