"""`procworker stop`: the worker that owns a run ends it, and nobody else; without a server, too."""

from __future__ import annotations

import json
import re
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import pytest
from commands import code_of
from hosts import Host, eventually, hosting

from procworker.cancels import CancelWatch
from procworker.loops import Moved
from procworker.system.journal import Journal
from procworker.system.processes import identify
from procworker.system.wishes import ask_to_stop, take_wish


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with hosting(tmp_path, monkeypatch) as host:
        yield host


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROCWORKER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# On real workers


@pytest.mark.slow
def test_the_owner_ends_the_run_and_says_so_to_the_server(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """A run by its name, another by the beginning of its id; a third goes on."""
    ids = [host.schedule(term="die") for _ in range(3)]
    with host.worker():
        pids = [host.pid_of(id) for id in ids]
        names = [host.server.run(id).name for id in ids]

        assert code_of("stop", names[0], str(ids[1])[:20], str(ids[1])) == 0

        out = capsys.readouterr().out
        assert re.search(rf"^Cancelled: flow run '{names[0]}' \({ids[0]}\) after \d", out, re.M)
        assert len(out.splitlines()) == 2, "who is named twice is ended once"
        assert [bool(identify(pid)) for pid in pids] == [False, False, True]
        history = [state.name for state in host.server.run(ids[0]).states]
        assert history[-2:] == ["Cancelling", "Cancelled"]
        assert [run.id for run in host.census().runs] == [str(ids[2])]

        assert code_of("stop", "--all") == 0
        assert not host.census().runs
        assert code_of("stop", "--all") == 0
        assert capsys.readouterr().out.endswith("Nothing runs here.\n")


@pytest.mark.slow
def test_a_run_can_be_ended_while_the_server_is_away(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """One that ignores SIGTERM; asked again, the grace gets shorter."""
    id = host.schedule(term="ignore")
    with host.worker() as worker:
        pid = host.pid_of(id)
        with host.server.outage():
            ask_to_stop(host.record_of(id), host.home / "workers" / host.census().workers[0].owner, 600)
            eventually(lambda: host.census().runs[0].phase == "cancelling", "the worker has seen it")
            assert identify(pid)

            assert code_of("stop", str(id), "--grace", "0.5") == 0

            assert "Ended, and the server does not answer: flow run" in capsys.readouterr().out
            assert not identify(pid)
            assert host.census().runs[0].phase == "ended"
            assert code_of("stop", str(id)) == 0
            assert "Ended before: " in capsys.readouterr().out
        host.server.wait_state(id, "CANCELLED")
        assert worker.process.poll() is None


@pytest.mark.slow
def test_a_worker_that_does_not_obey(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    id = host.schedule(term="die")
    monkeypatch.setattr("procworker.cli.stop.EXTRA_SECONDS", 1.0)
    with host.worker() as worker:
        pid = host.pid_of(id)
        worker.send(signal.SIGSTOP)
        try:
            assert code_of("stop", str(id), "--grace", "0") == 1
            assert "Still running: flow run" in capsys.readouterr().err
            assert identify(pid), "it is its worker's alone to end it"
        finally:
            worker.send(signal.SIGCONT)
        host.server.wait_state(id, "CANCELLED")


@pytest.mark.slow
def test_a_dead_worker_s_run_is_ended_in_its_place(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the other one is left for the next start, which goes on with it."""
    ids = [host.schedule(seconds=2 + 600 * first) for first in (True, False)]
    with host.worker() as worker:
        pids = [host.pid_of(id) for id in ids]
        worker.send(signal.SIGKILL)
        worker.wait()

        monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
        assert code_of("stop", str(ids[0])) == 1
        said = capsys.readouterr().err
        assert "set PREFECT_API_URL to " + host.server.url in said
        assert "`procworker start --pool pool`" in said
        assert identify(pids[0]), "what cannot be reported is left alone"

        monkeypatch.setenv("PREFECT_API_URL", host.server.url)
        assert code_of("stop", str(ids[0]), "--grace", "5") == 0

        out = capsys.readouterr().out
        assert re.search(r"^Cancelled: flow run .*; its worker is dead", out), out
        assert not identify(pids[0])
        assert identify(pids[1])
        assert host.server.run(ids[0]).state.type == "CANCELLED"
    with host.worker():
        host.server.wait_state(ids[1], "COMPLETED")


@pytest.mark.slow
def test_the_report_of_a_run_ended_without_a_server_is_kept(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("procworker.heir.LAST_REPORT_SECONDS", 1.0)
    id = host.schedule(term="die")
    with host.worker() as worker:
        pid = host.pid_of(id)
        worker.send(signal.SIGKILL)
        worker.wait()
        with host.server.outage():
            assert code_of("stop", str(id), "--grace", "0") == 0
        assert "Ended: flow run" in capsys.readouterr().out
        assert not identify(pid)
    with host.worker():
        host.server.wait_state(id, "CANCELLED")


# Elsewhere, and nowhere


def test_a_run_of_the_server_s_is_cancelled_there(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    id = host.schedule()
    host.server.set_state(id, "PENDING")
    host.server.set_state(id, "RUNNING")

    assert code_of("stop", str(id)) == 0
    assert "does not run on this host" in capsys.readouterr().out
    assert host.server.run(id).state.type == "CANCELLING"

    host.server.set_state(id, "CANCELLED")
    assert code_of("stop", host.server.run(id).name) == 0
    assert "had ended before" in capsys.readouterr().out


@pytest.mark.parametrize("word", [str(uuid4()), "no-such-run", "abcdef12"])
def test_what_nobody_knows(host: Host, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("stop", word) == 2
    assert f"no flow run {word!r} runs here" in capsys.readouterr().err


def test_what_nobody_can_be_asked_about(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("stop", "no-such-run") == 2
    assert "set PREFECT_API_URL to ask a server" in capsys.readouterr().err


def test_a_word_that_may_mean_several_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(home)
    for name in ("one", "two", "two"):
        id = uuid4().hex
        journal.page(f"abcd1234{id[8:]}", flow_run_name=name, phase="running")  # type: ignore[arg-type]

    for word in ("abcd", "ABCD1234", "two"):
        assert code_of("stop", "one", word) == 2
        said = capsys.readouterr().err
        assert f"{word!r} may mean several flow runs" in said
        assert said.count("abcd1234") == (2 if word == "two" else 3)
    assert journal.wishes() == [], "nothing is ended when a word is not understood"
    journal.close()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "say --all"),
        (["x", "--all"], "say --all"),
        (["x", "--grace", "-1"], "--grace"),
        (["x", "--grace", "inf"], "--grace"),
    ],
)
def test_usage(home: Path, argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("stop", *argv) == 2
    assert text in capsys.readouterr().err


# Wishes on disk


@pytest.fixture
def asked(home: Path) -> Iterator[Callable[..., Any]]:
    """Ask for the end of one run; what its worker hears of it."""
    journal, id = Journal(home), uuid4()
    page = journal.page(id, phase="running")

    def ask(grace: float | None = None) -> Any:
        ask_to_stop(page.path, home / "workers" / journal.owner, grace)
        return journal.wishes()

    ask.page, ask.journal, ask.id = page, journal, id  # type: ignore[attr-defined]
    yield ask
    journal.close()


def test_a_wish_is_heard_once(asked: Any) -> None:
    assert asked.journal.wishes() == []
    assert asked(1.5) == [(asked.id, {"grace": 1.5})]
    assert asked.journal.wishes() == []
    assert asked(None) == [(asked.id, {"grace": None})]
    assert [file.name for file in asked.page.path.iterdir()] == ["run.json"]


def test_wishes_in_a_row_are_all_heard(asked: Any) -> None:
    """However coarse the clock of the file system is."""
    for number in range(200):
        assert asked(float(number)) == [(asked.id, {"grace": float(number)})]


def test_a_run_that_has_ended_is_not_ended_again(asked: Any) -> None:
    asked.page.write(phase="ended")
    assert asked(1.0) == []


def test_who_takes_a_run_over_hears_what_its_dead_worker_was_asked(home: Path) -> None:
    dead, heir, id = Journal(home), Journal(home), uuid4()
    page = dead.page(id, api="a", pool="p", phase="running")
    heir.page(uuid4(), api="a", pool="p", phase="running")
    heir.wishes()
    ask_to_stop(page.path, home / "workers" / dead.owner, 2)
    dead.close()
    heir.take_over("a", "p")
    assert heir.wishes() == [(id, {"grace": 2.0})]
    heir.close()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"grace": "soon"}', '{"grace": NaN}', '{"grace": -1}', "[" * 4000]
)
def test_a_wish_that_makes_no_sense_asks_for_no_time(asked: Any, text: str) -> None:
    (asked.page.path / "stop").write_text(text)
    assert take_wish(asked.page.path) == ({"grace": None} if text.startswith('{"') else None)
    assert not (asked.page.path / "stop").exists()


def test_a_wish_is_written_into_a_private_directory_only(asked: Any, tmp_path: Path) -> None:
    """And never through a link, whoever has put it there."""
    page, owner = asked.page.path, tmp_path / "worker"
    owner.touch()
    (page / "stop.new").symlink_to(tmp_path / "victim")
    ask_to_stop(page, owner, 1)
    assert not (tmp_path / "victim").exists()
    assert stat.S_IMODE((page / "stop").stat().st_mode) == 0o600

    link = tmp_path / "link"
    link.symlink_to(page)
    with pytest.raises(OSError, match=r"Not a directory|Too many"):
        ask_to_stop(link, owner, 1)
    page.chmod(0o770)
    with pytest.raises(PermissionError, match="not private"):
        ask_to_stop(page, owner, 1)
    page.chmod(0o700)


def test_a_link_is_no_wish(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({"grace": 0}))
    (asked.page.path / "stop").symlink_to(tmp_path / "file")
    assert take_wish(asked.page.path) is None
    assert (tmp_path / "file").exists()


# The watch


class Runs(dict[Any, Any]):
    """Runs at hand that remember how they were cancelled."""

    def add(self, id: Any) -> list[float | None]:
        graces: list[float | None] = []

        class Run:
            async def cancel(self, grace: float | None) -> None:
                graces.append(grace)

        self[id] = Run()
        return graces


async def until(fact: Callable[[], Any]) -> None:
    while not fact():  # noqa: ASYNC110
        await anyio.sleep(0.01)


async def test_a_wish_waits_for_no_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question to the server hangs; the next watch begins anew."""
    monkeypatch.setattr("procworker.cancels.CANCEL_POLL_SECONDS", 0.0)
    monkeypatch.setattr("procworker.cancels.WISH_SECONDS", 0.01)
    journal, id, moved, runs, asked = Journal(home), uuid4(), Moved(), Runs(), []
    page = journal.page(id, phase="running")

    async def hang() -> None:
        asked.append(anyio.current_time())
        await anyio.sleep_forever()

    watch = CancelWatch(hang, runs, moved, journal)
    for _ in range(2):
        graces = runs.add(id)
        watch.watching = True
        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch.watch)
                await until(lambda: asked)
                ask_to_stop(page.path, home / "workers" / journal.owner, 3)
                await until(graces.copy)
                runs.clear()
                moved.notify()
        assert graces == [3.0]
        assert not watch.watching
        assert len(asked) == 1, "one question at a time"
        asked.clear()
    journal.close()
