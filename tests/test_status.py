"""`procworker status`: what runs on this host, on real workers, and what is left out of it by name."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from commands import ROOT, Command, code_of
from hosts import Host, eventually, hosting
from hypothesis import given
from hypothesis import strategies as st

from procworker.cli.overview import duration, shorten
from procworker.home import plain_state_home
from procworker.settings import Settings
from procworker.system.census import DEAD, ELSEWHERE, LIVING, take_census
from procworker.system.journal import Journal, here
from procworker.system.processes import identify
from procworker.system.records import read_record

PROFILES = "active = 'x'\n[profiles.x]\nPROCWORKER_HOME = 'elsewhere'"
FRESH = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with hosting(tmp_path, monkeypatch) as host:
        yield host


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROCWORKER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def status(capsys: pytest.CaptureFixture[str]) -> str:
    assert code_of("status") == 0
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert code_of("status", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def a_record(home: Path, **facts: Any) -> tuple[Journal, UUID]:
    """One run of a worker in this process, which lives until it is closed."""
    journal, id = Journal(home), uuid4()
    journal.introduce(process=identify(os.getpid()), name="in here")
    names = {"flow_run_name": "quiet-owl", "worker": "in here", "orphans": "adopt"}
    journal.page(id, **{"api": "http://a/api", "pool": "pool", "phase": "running", **names, **facts})
    return journal, id


# On real workers


@pytest.mark.slow
def test_a_worker_its_runs_and_their_processes(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    id = host.schedule(misbehave=["sleep"])
    with host.worker("-l", "3") as worker:
        pid = host.pid_of(id)
        eventually(lambda: host.census().runs[0].members[1:], "its child is seen")
        (shown,) = as_json(capsys)["workers"]
        assert (shown["name"], shown["pool"], shown["type"], shown["limit"]) == ("w1", "pool", "process", 3)
        assert (shown["state"], shown["pid"], shown["api"]) == (LIVING, worker.process.pid, host.server.url)
        (run,) = shown["runs"]
        assert (run["id"], run["pid"], run["phase"]) == (str(id), pid, "running")
        assert (run["name"], run["flow"]) == (host.server.run(id).name, "flow")
        assert run["processes"] >= 2
        assert run["memory_bytes"] > 1_000_000
        assert 0 < run["cpu_seconds"] < 60
        assert str(id).startswith(run["short_id"])

        text = status(capsys)
        assert re.search(rf"^Worker 'w1' of pool 'pool', pid {worker.process.pid}, 1 of 3 runs", text)
        assert re.search(rf"^{run['short_id']}  {run['name']} .* running .* {pid} ", text, re.M)
        worker.send(signal.SIGKILL)
        worker.wait()

        (shown,) = as_json(capsys)["workers"]
        assert (shown["state"], shown["runs"][0]["pid"]) == (DEAD, pid)
        assert "kept for the next `procworker start --pool pool`" in status(capsys)
        assert code_of("stop", "--all", "--grace", "0") == 0
    capsys.readouterr()
    assert status(capsys) == "Nothing runs here.\n"


@pytest.mark.slow
def test_an_idle_worker_is_shown_as_long_as_it_lives(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    with host.worker() as worker:
        assert re.search("^Worker 'w1' of pool 'pool', pid .*\n  idle$", status(capsys), re.M)
        worker.send(signal.SIGKILL)
        worker.wait()
        assert status(capsys) == "Nothing runs here.\n"
        assert list((host.home / "workers").iterdir()), "nobody has cleared its file away yet"
    with host.worker() as worker:
        (own,) = host.census().workers
        files = host.home / "workers"
        eventually(lambda: [file.name for file in files.iterdir()] == [own.owner], "the dead one's is cleared away")
        worker.send(signal.SIGTERM)
        worker.wait()
    assert not list((host.home / "workers").iterdir())


# Records of all kinds


def test_nothing_is_no_error(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(capsys) == "Nothing runs here.\n"
    empty = {"version": 1, "home": str(home), "workers": [], "servers": [], "problems": []}
    assert as_json(capsys) == empty
    assert not home.exists()


def test_looking_changes_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even the lock of a dead worker, which others want to take."""
    dead, _ = a_record(home)
    dead.close()
    living, _ = a_record(home)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}

    assert {worker["state"] for worker in as_json(capsys)["workers"]} == {LIVING, DEAD}

    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before
    living.close()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "no record"),
        ('{"version": 2, "owner": "x", "place": {}, "flow_run_id": "x"}', "a newer procworker"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(
    home: Path, text: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, id = a_record(home)
    bad = home / "runs" / "bad"
    bad.mkdir()
    (bad / "run.json").write_text(text)

    document = as_json(capsys)

    assert [run["id"] for worker in document["workers"] for run in worker["runs"]] == [str(id)]
    (problem,) = document["problems"]
    assert problem["path"] == str(bad)
    assert reason in problem["reason"]
    assert f"Left out: {bad}: " in status(capsys)
    good.close()


@pytest.mark.parametrize("told", ['{"version": 1, "place"', "", "[1]\n", '{"version": 1, "place": 3}\n', "\0\0\0\n"])
def test_a_worker_s_file_that_is_half_written_says_nothing(home: Path, told: str) -> None:
    """Whether it lives is told by its lock then."""
    journal, id = a_record(home)
    (home / "workers" / journal.owner).write_text(told)

    (worker,) = take_census(home).workers

    assert (worker.standing, worker.fact("name"), worker.fact("pool")) == (LIVING, "in here", "pool")
    journal.close()
    assert [worker.standing for worker in take_census(home).workers] == [DEAD]
    assert [run.id for run in take_census(home).runs] == [str(id)]


def test_a_run_of_another_host_is_shown_as_such(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its pid is a stranger's here, and its lock is not looked at."""
    journal, _ = a_record(home, infrastructure={"process": [os.getpid(), 1.0]})
    page = next((home / "runs").iterdir())
    file = page / "run.json"
    file.write_text(json.dumps({**read_record(page), "place": {**here(), "host": "other"}}))
    (home / "workers" / journal.owner).unlink()

    (worker,) = as_json(capsys)["workers"]

    assert worker["state"] == ELSEWHERE
    assert (worker["runs"][0]["processes"], worker["runs"][0]["memory_bytes"]) == (0, 0)
    assert "is on another host" in status(capsys)
    journal.close()


def test_a_reused_pid_is_nobody(home: Path) -> None:
    journal, _ = a_record(home, infrastructure={"process": [os.getpid(), 1.0]})
    assert [run.members for run in take_census(home).runs] == [[]]
    file = home / "workers" / journal.owner
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "process": [os.getpid(), 1.0]}) + "\n")
    assert [worker.standing for worker in take_census(home).workers] == [DEAD]
    journal.close()


@pytest.mark.parametrize(
    ("phase", "reason", "shown"),
    [
        ("claiming", None, "claiming"),
        ("running", None, "running"),
        ("running", "cancelled", "cancelling"),
        ("running", "timed out", "timing out"),
        ("running", "worker stopped", "stopping"),
        ("ended", "cancelled", "ended"),
    ],
)
def test_the_phase_says_what_goes_on(home: Path, phase: str, reason: str | None, shown: str) -> None:
    journal, _ = a_record(home, phase=phase, facts={"reason": reason})
    assert [run.phase for run in take_census(home).runs] == [shown]
    journal.close()


def test_a_record_without_what_is_new_is_shown_too(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As older versions wrote it: no times, no flow, an empty file of the worker."""
    journal, id = a_record(home)
    page = next((home / "runs").iterdir())
    file = page / "run.json"
    data = read_record(page)
    del data["times"]
    file.write_text(json.dumps(data))
    (home / "workers" / journal.owner).write_text("")

    (worker,) = as_json(capsys)["workers"]

    assert (worker["state"], worker["name"], worker["pid"]) == (LIVING, "in here", None)
    assert (worker["runs"][0]["id"], worker["runs"][0]["flow"]) == (str(id), None)
    assert worker["runs"][0]["seconds"] < 60
    journal.close()


def test_what_a_worker_tells_is_shown_and_changes(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(home)
    journal.introduce(process=identify(os.getpid()), name="teller", pool="pool")
    assert not home.exists(), "nothing is made before there is something to tell"
    journal.tell({"why": "x" * 5000})
    journal.tell({"why": "the pool is paused"})

    assert "Worker 'teller' of pool 'pool'" in status(capsys)
    assert as_json(capsys)["workers"][0]["why"] == "the pool is paused"
    assert (home / "workers" / journal.owner).stat().st_mode & 0o777 == 0o600
    journal.tell({"why": None})
    assert "  idle" in status(capsys)
    journal.close()
    assert status(capsys) == "Nothing runs here.\n"


@pytest.mark.parametrize("nonsense", [None, 3, "text", [], {}, [[]], {"process": 3}, True])
def test_fields_of_another_kind_than_ours_are_borne(
    home: Path, nonsense: object, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = (
        "flow_run_name",
        "flow_name",
        "phase",
        "times",
        "facts",
        "job",
        "infrastructure",
        "pool",
        "orphans",
        "api",
    )
    journal, id = a_record(home)
    page = next((home / "runs").iterdir())
    file = page / "run.json"
    file.write_text(json.dumps({**read_record(page), **dict.fromkeys(fields, nonsense)}))
    told = home / "workers" / journal.owner
    own = dict.fromkeys(("process", "name", "pool", "limit", "why", "type"), nonsense)
    told.write_text(json.dumps({**json.loads(told.read_text()), **own}) + "\n")

    assert as_json(capsys)["workers"][0]["runs"][0]["id"] == str(id)
    assert str(id)[:8] in status(capsys)
    journal.close()


NUMBERS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan"), "huge": 10**400, "-1": -1, "0.5": 0.5}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_no_clock_are_borne(home: Path, number: float, capsys: pytest.CaptureFixture[str]) -> None:
    journal, id = a_record(home)
    page = next((home / "runs").iterdir())
    file = page / "run.json"
    record = read_record(page)
    record |= {"times": {record["phase"]: number}, "infrastructure": {"process": [number, number]}}
    file.write_text(json.dumps(record))
    told = home / "workers" / journal.owner
    told.write_text(json.dumps({**json.loads(told.read_text()), "process": [number, number], "limit": number}) + "\n")

    assert as_json(capsys)["workers"][0]["runs"][0]["id"] == str(id)
    assert str(id)[:8] in status(capsys)
    journal.close()


def test_names_of_others_move_no_cursor(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal, _ = a_record(home, flow_run_name="evil\x1b[2J\nname", flow_name="\x1b]0;t\x07f")
    assert "\x1b" not in status(capsys)
    assert "evilname" in status(capsys)
    journal.close()


# Watching


def watching(place: Path, columns: int, until: Callable[[str], bool], **environ: str) -> tuple[str, int]:
    """What `status --watch` writes on a terminal, until it is interrupted, and its exit code."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 8, columns, 0, 0))
    command = [sys.executable, "-m", "procworker", "status", "--watch"]
    env = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT), **environ}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=place, env=env)
    os.close(slave)
    said, deadline = "", time.monotonic() + 20
    try:
        while not until(said):
            assert time.monotonic() < deadline, said
            said += os.read(master, 65536).decode()
        process.send_signal(signal.SIGINT)
        code = process.wait(10)
    finally:
        process.kill()
        process.wait()
        os.close(master)
    return said, code


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_is_drawn_over_in_place(home: Path, tmp_path: Path, columns: int) -> None:
    """More runs than it has lines: none scrolls away."""
    workers = [a_record(home, flow_run_name="a-name-that-is-long" * 4)[0] for _ in range(9)]

    said, code = watching(tmp_path, columns, lambda said: said.count("\x1b[J") >= 2)

    assert code == 0
    first, second = said.split("\x1b[J")[:2]
    assert second.startswith("\x1b[7F"), "back to the first line that was drawn"
    for screen in (first, second.removeprefix("\x1b[7F")):
        lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", screen).splitlines()
        assert len(lines) == 7
        assert max(map(len, lines)) < columns
        assert lines[-1].endswith("lines more")
    for worker in workers:
        worker.close()


@pytest.mark.slow
def test_no_colours_where_none_are_wanted(home: Path, tmp_path: Path) -> None:
    worker, _ = a_record(home)
    said, _ = watching(tmp_path, 80, lambda said: said.count("\x1b[J") >= 2, NO_COLOR="1")
    assert set(re.findall(r"\x1b\[[0-9;]*([A-Za-z])", said)) == {"F", "J", "K"}
    said, _ = watching(tmp_path, 80, lambda said: "quiet-owl" in said, TERM="dumb")
    assert "\x1b" not in said
    worker.close()


@pytest.mark.slow
def test_a_pipe_gets_a_block_for_each_change(home: Path, tmp_path: Path) -> None:
    worker, _ = a_record(home)
    with Command(tmp_path / "watch", "status", "--watch", "--json") as watch:
        watch.until_it_says("quiet-owl")
        other, _ = a_record(home, flow_run_name="loud-owl")
        watch.until_it_says("loud-owl")
        watch.send(signal.SIGINT)
        assert watch.wait() == 0
    blocks = [json.loads(line) for line in watch.out.splitlines()]
    assert [len(block["workers"]) for block in blocks] == [1, 2]
    other.close()
    worker.close()


# Small parts


def test_status_loads_no_more_than_it_needs(home: Path) -> None:
    """What takes long to import is not wanted for a look."""
    journal, _ = a_record(home)
    code = FRESH + "from procworker.cli import main; main(['status']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, timeout=60)
    assert "quiet-owl" in done.stdout
    assert not {"httpx", "pydantic", "asyncio", "procworker.settings"} & set(done.stdout.splitlines()[-1].split())
    journal.close()


@given(st.lists(st.uuids().map(str), min_size=1, max_size=30), st.integers(0, 20))
def test_short_ids_are_beginnings_that_tell_runs_apart(ids: list[str], alike: int) -> None:
    ids = [ids[0][:alike] + id[alike:] for id in ids]  # as those that are made within a second
    short = shorten(ids)
    assert set(short) == set(ids)
    for id, text in short.items():
        assert len(text) >= 8
        assert [other for other in short if other.startswith(text)] == [id]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0s"), (59.9, "59s"), (61, "1m 1s"), (3600, "1h 0m"), (90_000, "1d 1h")]
)
def test_times_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("environ", "files", "is_plain"),
    [
        ({}, {}, True),
        ({"PROCWORKER_HOME": "~/state"}, {}, True),
        ({"procworker_home": "relative"}, {".env": "PROCWORKER_HOME=elsewhere"}, True),
        ({"TOX_ENV_DIR": "/tox"}, {}, True),
        ({"XDG_STATE_HOME": "/xdg"}, {".env": "OTHER=1"}, True),
        ({}, {".env": "PROCWORKER_HOME=elsewhere"}, False),
        ({}, {"pyproject.toml": "[tool.procworker]\nhome = 'elsewhere'"}, False),
        ({}, {"prefect.toml": "home = 'p'", "p/profiles.toml": PROFILES}, False),
        ({"PREFECT_HOME": "p"}, {"p/profiles.toml": PROFILES}, False),
        ({"PREFECT_PROFILES_PATH": "$PREFECT_HOME/q.toml", "PREFECT_HOME": "p"}, {"p/q.toml": PROFILES}, False),
        ({"PREFECT_PROFILES_PATH": "q.toml"}, {"q.toml": PROFILES}, False),
    ],
)
def test_the_quick_way_to_the_state_directory_leads_to_the_same(
    tmp_path: Path, environ: dict[str, str], files: dict[str, str], is_plain: bool
) -> None:
    environ = {"HOME": str(tmp_path / "me"), **environ}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    found = plain_state_home(environ, tmp_path)

    assert (found is not None) is is_plain
    truth = Settings.load(environ, tmp_path).state_home
    assert found in (None, truth)
    assert is_plain or truth.name == "elsewhere"
