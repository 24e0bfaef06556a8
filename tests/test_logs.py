"""`procworker logs`: a run's output while it runs here, its log on the server else, and never a secret."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from commands import FAST, Command, code_of
from hosts import SECRET, Host, eventually, hosting

from procworker.cli.local_logs import show_output
from procworker.settings import Settings
from procworker.system.journal import Journal
from procworker.system.processes import identify

COLOURED = "\x1b[31mred\x1b[0m"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with hosting(tmp_path, monkeypatch) as host:
        yield host


def add_logs(host: Host, id: UUID, count: int, begin: datetime | None = None) -> None:
    begin = begin or datetime.now(timezone.utc) - timedelta(hours=1)
    host.server.logs.extend(
        {
            "flow_run_id": str(id),
            "name": "prefect.flow_runs",
            "level": 20,
            "message": f"line {number} {SECRET if number == 0 else ''}".strip(),
            "timestamp": (begin + timedelta(milliseconds=number)).isoformat(),
        }
        for number in range(count)
    )


@pytest.mark.slow
def test_the_output_of_a_run_that_runs_here(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """Masked, as often as one likes, and its worker has it all the same."""
    id = host.schedule(print=["one", f"two {SECRET}", f"{COLOURED} three"], err=["four"])
    with host.worker() as worker:
        host.pid_of(id)
        worker.until_it_says("four")
        for _ in range(2):
            assert code_of("logs", str(id)[:13]) == 0
            assert capsys.readouterr().out.splitlines() == ["one", "two ***", "red three", "four"]
        assert code_of("logs", str(id), "-n", "1") == 0
        assert capsys.readouterr().out.splitlines() == ["red three", "four"]
        assert code_of("stop", "--all", "--grace", "1") == 0
    assert worker.out.count("| one\n") == 1


@pytest.mark.slow
def test_following_ends_with_the_run_and_misses_nothing(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    id = host.schedule(
        seconds=1.5, print=[f"line {number} {SECRET}" for number in range(500)], misbehave=["sleep", "1"]
    )
    with host.worker():
        host.pid_of(id)
        assert code_of("logs", "-f", str(id)) == 0
        out = capsys.readouterr().out
        assert [line for line in out.splitlines() if line.startswith("line")] == [f"line {n} ***" for n in range(500)]
        assert SECRET not in out
        host.server.wait_state(id, "COMPLETED")


@pytest.mark.slow
def test_a_run_that_has_not_started_yet_is_waited_for(host: Host) -> None:
    """Its record is there before its process."""
    journal, id = Journal(host.home), uuid4()
    page = journal.page(id, api=host.server.url, flow_run_name="late-owl", phase="starting")
    with Command(host.place / "logs", "logs", "-f", "late-owl", **FAST) as logs:
        logs.until_it_says("Waiting for flow run 'late-owl' to start")
        page.write(phase="running")
        page.remove()
        assert logs.wait() == 2
    assert "From the server, since it has ended meanwhile" in logs.err
    journal.close()


@pytest.mark.slow
def test_without_its_environment_nobody_knows_its_secrets(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose process has ended while its worker was dead: what the server has is shown instead."""
    id = host.schedule(seconds=1, print=[SECRET])
    with host.worker() as worker:
        host.pid_of(id)
        worker.send(signal.SIGKILL)
        worker.wait()
    eventually(lambda: not host.census().runs[0].members, "it has ended")
    add_logs(host, id, 2)

    assert code_of("logs", str(id)) == 0

    said = capsys.readouterr()
    assert "From the server, since nobody can tell what is secret in its output" in said.err
    assert "line 1" in said.out
    assert (host.record_of(id) / "stdout").read_text().strip() == SECRET, "it would have been there"


def test_an_emptied_environment_tells_no_secrets(host: Host) -> None:
    """Such as `env -i` makes it: this process has no cookie either."""
    journal, id = Journal(host.home), uuid4()
    page = journal.page(id, phase="running", infrastructure={"process": identify(os.getpid())})
    page.stdout.write_text(SECRET)
    (run,) = host.census().runs
    assert run.members
    assert "secret" in str(show_output(run, Settings.load(), None, False))
    journal.close()


def test_the_server_s_log_in_pages_and_order(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    id = host.schedule()
    add_logs(host, id, 450)
    host.server.call(host.server._server.logs.reverse)

    assert code_of("logs", str(id)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] if n else line for n, line in enumerate(lines)][1:] == [str(n) for n in range(1, 450)]
    assert " | INFO    | prefect.flow_runs - line 7" in lines[7]

    assert code_of("logs", host.server.run(id).name, "-n", "230") == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [str(n) for n in range(220, 450)]
    assert code_of("logs", str(id), "-n", "0") == 0
    assert capsys.readouterr().out == ""


def test_our_own_secrets_are_masked_in_the_server_s_log(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_KEY", SECRET)
    id = host.schedule()
    add_logs(host, id, 2)
    assert code_of("logs", str(id)) == 0
    assert "line 0 ***" in capsys.readouterr().out


@pytest.mark.slow
def test_the_server_s_log_is_followed_to_the_end_of_the_run(host: Host) -> None:
    """Lines that come late are neither lost nor shown twice."""
    id, begin = host.schedule(), datetime.now(timezone.utc)
    add_logs(host, id, 2, begin)
    with Command(host.place / "logs", "logs", "-f", str(id), **FAST) as logs:
        logs.until_it_says("line 1")
        add_logs(host, id, 3, begin - timedelta(seconds=5))
        host.server.set_state(id, "PENDING")
        host.server.set_state(id, "RUNNING")
        host.server.set_state(id, "COMPLETED")
        assert logs.wait() == 0
    assert sorted(line.partition(" - ")[2] for line in logs.out.splitlines()) == sorted(
        [f"line 0 {SECRET}"] * 2 + ["line 1"] * 2 + ["line 2"]
    )


def test_a_log_that_nobody_has(host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("logs", "no-such-run") == 2
    assert "the server knows none of that id or name" in capsys.readouterr().err
    journal = Journal(host.home)
    journal.page(uuid4(), api="http://other/api", flow_run_name="far-owl", phase="claiming")
    assert code_of("logs", "far-owl") == 2
    assert "set PREFECT_API_URL to http://other/api" in capsys.readouterr().err
    assert code_of("logs", "far-owl", "-n", "-1") == 2
    monkeypatch.delenv("PREFECT_API_URL")
    assert code_of("logs", "no-such-run") == 2
    assert "set PREFECT_API_URL to ask a server" in capsys.readouterr().err
    journal.close()
