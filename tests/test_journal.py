"""What runs on this host, on disk: whose it is, who may take it over, and what is left alone."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from procworker.system.journal import NEW, STALE_SECONDS, Journal, Page, here, try_lock
from procworker.system.records import LARGEST, ROOM, read_record

API, POOL = "http://127.0.0.1:4200/api", "pool"


def open_page(journal: Journal, **facts: Any) -> Page:
    return journal.page(uuid4(), **{"api": API, "pool": POOL, "phase": "running", **facts})


def abandoned(home: Path, **facts: Any) -> Page:
    """A page whose worker is dead: it lets go without removing anything."""
    dead = Journal(home)
    page = open_page(dead, **facts)
    dead.close()
    return page


def altered(page: Page, **changes: Any) -> None:
    (page.path / "run.json").write_text(json.dumps({**read_record(page.path), **changes}))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def journal(home: Path) -> Iterator[Journal]:
    journal = Journal(home)
    yield journal
    journal.close()


def taken(journal: Journal, api: str = API, pool: str | None = POOL) -> list[Path]:
    return [page.path for page in journal.take_over(api, pool)]


# One page


def test_nothing_is_made_before_the_first_page(home: Path, journal: Journal) -> None:
    assert journal.take_over(API, POOL) == []
    assert not home.exists()


def test_a_page_is_private_and_whole(journal: Journal) -> None:
    page = open_page(journal, secret="s")

    assert stat.S_IMODE(page.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((page.path / "run.json").stat().st_mode) == 0o600
    data = read_record(page.path)
    assert data["flow_run_id"] == page.name.partition(".")[0]
    assert (data["api"], data["pool"], data["owner"], data["place"]) == (API, POOL, journal.owner, here())


def test_what_is_written_is_added_to_what_was_known(journal: Journal) -> None:
    page = open_page(journal)
    page.write(phase="ended", code=3)

    data = read_record(page.path)
    assert (data["phase"], data["code"], data["api"]) == ("ended", 3, API)
    assert [file.name for file in page.path.iterdir()] == ["run.json"]


def test_a_reader_never_sees_half_a_record(journal: Journal) -> None:
    page, ended = open_page(journal, text="x" * 100_000), threading.Event()

    def read() -> None:
        while not ended.is_set():
            read_record(page.path)
            reads.append(1)

    reads: list[int] = []
    reader = threading.Thread(target=read)
    reader.start()
    try:
        while len(reads) < 50 and reader.is_alive():
            page.write(number=len(reads))
    finally:
        ended.set()
        reader.join()
    assert len(reads) >= 50


@pytest.mark.parametrize("half", [b'{"phase": "ended"', b'{"phase": "en', b'{"name": "\xc3', b"\0" * 100])
def test_half_a_line_at_the_end_is_passed_over_and_not_gone_on_with(home: Path, journal: Journal, half: bytes) -> None:
    """The worker was killed, or the disk was full, or the power was cut, amid a line."""
    page = abandoned(home, phase="running")
    with (page.path / "run.json").open("ab") as file:
        file.write(half)

    assert read_record(page.path)["phase"] == "running"
    (ours,) = journal.take_over(API, POOL)
    ours.write(phase="ended")
    assert [read_record(page.path)[name] for name in ("phase", "owner")] == ["ended", journal.owner]


def test_half_a_line_amid_the_others_is_no_record(home: Path, journal: Journal) -> None:
    page = abandoned(home, phase="running")
    with (page.path / "run.json").open("ab") as file:
        file.write(b'{"phase": "en{"phase": "ended"}\n')

    assert taken(journal) == []


def test_a_line_that_was_written_by_half_is_made_good(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    page = open_page(journal, phase="claiming")

    def half(descriptor: int, data: bytes) -> int:
        monkeypatch.undo()
        return os.write(descriptor, data[:5])

    monkeypatch.setattr("procworker.system.records.os.write", half)
    page.write(phase="running")
    page.write(code=3)

    assert page.kept
    assert [read_record(page.path)[name] for name in ("phase", "code")] == ["running", 3]


def test_a_record_does_not_grow_for_ever(journal: Journal) -> None:
    page = open_page(journal)
    whole, largest = (page.path / "run.json").stat().st_size, 0
    for number in range(2000):
        page.write(number=number, text="x" * 100)
        largest = max(largest, (page.path / "run.json").stat().st_size)

    assert ROOM < largest < whole + ROOM + 200
    assert read_record(page.path)["number"] == 1999


def test_a_record_that_would_be_too_large_to_be_read_stays_as_it_was(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    page = open_page(journal)
    page.write(text="x" * (LARGEST - ROOM))

    assert "text" not in read_record(page.path)
    assert not page.kept
    assert "File too large" in caplog.text
    page.write(text="short")
    assert read_record(page.path)["text"] == "short"
    assert page.kept


def test_what_begins_too_large_to_be_read_is_no_record(home: Path, journal: Journal) -> None:
    page = open_page(journal, text="x" * LARGEST)

    assert not page.kept
    assert list((home / "runs").glob("[!.]*")) == []


def test_a_record_of_the_largest_size_can_be_read_with_all_that_is_added(journal: Journal) -> None:
    page = open_page(journal, text="x" * (LARGEST - ROOM - 1000))
    for number in range(200):
        page.write(more="y" * 400, number=number)
        assert read_record(page.path)["number"] == number
    assert page.kept


def test_text_of_any_language_and_of_none_is_kept(journal: Journal) -> None:
    page, text = open_page(journal), "\N{SNOWMAN}\udce9\x00\r\n\u2028\N{PARTY POPPER}"
    page.write(text=text)

    assert read_record(page.path)["text"] == text
    page.write(tail=["\N{PARTY POPPER}" * 2000] * 20, again=["\N{PARTY POPPER}" * 2000] * 20)
    assert len(read_record(page.path)["again"]) == 20
    assert page.kept


def test_a_record_grows_by_what_is_new_alone(journal: Journal) -> None:
    page = open_page(journal)
    for number in range(10):
        page.write(text=str(number) * (LARGEST // 2))

    assert read_record(page.path)["text"][0] == "9"


def test_a_run_has_one_page_until_it_is_removed(journal: Journal) -> None:
    id = uuid4()
    page = journal.page(id)

    assert journal.page(id) is page
    page.remove()
    assert not page.path.exists()
    assert journal.page(id).name != page.name


def test_nothing_is_left_of_a_worker_that_left_nothing(home: Path, journal: Journal) -> None:
    open_page(journal).remove()
    journal.close()

    assert list((home / "runs").iterdir()) == list((home / "workers").iterdir()) == []


@pytest.mark.parametrize("home", ["a file", "/proc/no such place"])
def test_without_a_home_a_page_lies_in_the_temporary_directory(
    tmp_path: Path, home: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").touch()
    journal = Journal(tmp_path / home)
    page = open_page(journal)
    page.write(phase="ended")

    assert page.path.is_relative_to(os.environ["TMPDIR"])
    assert not page.kept
    open_page(journal)
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1
    page.remove()
    assert not page.path.parent.exists()


def test_without_any_place_opening_fails_and_nothing_else_does(
    home: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(journal)
    home.rename(home.with_name("gone"))
    page.write(phase="ended")  # where its directory was taken away
    assert not page.kept
    assert page.data["phase"] == "ended"
    page.remove()
    home.write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(home))
    with pytest.raises(OSError, match="Not a directory"):
        open_page(journal)


def test_a_full_disk_costs_the_record_and_nothing_else(tmp_path: Path) -> None:
    """A file size limit stands in for the disk: what cannot be written is remembered, the old record stays whole."""
    code = f"""if True:
        import resource, signal, sys
        sys.path[:] = {sys.path!r}
        from pathlib import Path
        from uuid import uuid4
        from procworker.system.journal import Journal
        from procworker.system.records import read_record
        page = Journal(Path({str(tmp_path)!r})).page(uuid4(), phase="running")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        page.write(phase="ended")
        assert page.data["phase"] == "ended" and not page.kept
        print(read_record(page.path)["phase"])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout == "running\n", done.stderr


# Taking over


def test_what_a_dead_worker_left_becomes_ours(home: Path, journal: Journal) -> None:
    page = abandoned(home)

    (ours,) = journal.take_over(API, POOL)

    assert ours.path == page.path
    assert ours.data["phase"] == "running"
    assert read_record(page.path)["owner"] == journal.owner
    assert taken(Journal(home)) == []
    assert len(list((home / "workers").iterdir())) == 1
    ours.remove()
    assert not page.path.exists()


def test_what_a_living_worker_has_is_left_to_it(home: Path, journal: Journal) -> None:
    living = Journal(home)
    page = open_page(living)

    assert taken(journal) == []
    living.close()  # the control: now it is dead
    assert taken(journal) == [page.path]


def test_the_end_of_a_process_is_enough(home: Path, journal: Journal) -> None:
    code = f"""if True:
        import os, sys
        sys.path[:] = {sys.path!r}
        from pathlib import Path
        from uuid import uuid4
        from procworker.system.journal import Journal
        journal = Journal(Path({str(home)!r}))
        journal.page(uuid4(), api={API!r}, pool={POOL!r})
        print(journal.owner, flush=True)
        sys.stdin.read()
        os.kill(os.getpid(), 9)"""
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin
    assert worker.stdout
    owner = worker.stdout.readline().strip()
    assert not journal.is_dead(owner)
    assert taken(journal) == []
    worker.stdin.close()
    worker.wait()
    worker.stdout.close()

    assert journal.is_dead(owner)
    assert len(taken(journal)) == 1


@pytest.mark.parametrize(("api", "pool"), [("http://other/api", POOL), (API, "other")])
def test_another_api_or_pool_is_none_of_our_business(home: Path, journal: Journal, api: str, pool: str) -> None:
    page = abandoned(home)

    assert taken(journal, api, pool) == []
    assert taken(journal) == [page.path]


def test_runs_of_no_pool_belong_to_whoever_serves_their_api(home: Path, journal: Journal) -> None:
    page = abandoned(home, pool=None)

    assert taken(journal) == [page.path]


def test_the_pages_of_one_worker_can_be_taken_over_alone(home: Path, journal: Journal) -> None:
    page, other = abandoned(home), abandoned(home)

    assert [ours.path for ours in journal.take_over_from(str(page.data["owner"]))] == [page.path]
    assert taken(journal) == [other.path]


def test_of_two_successors_one_gets_each_page(home: Path) -> None:
    dead = [Journal(home) for _ in range(4)]
    pages = {open_page(journal).path for journal in dead for _ in range(5)}
    for journal in dead:
        journal.close()
    heirs, got = [Journal(home) for _ in range(8)], []
    start = threading.Barrier(len(heirs))

    def take(heir: Journal) -> None:
        start.wait()
        got.extend(taken(heir))

    threads = [threading.Thread(target=take, args=(heir,)) for heir in heirs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for heir in heirs:
        heir.close()

    assert len(got) == len(set(got)) == 20, "none twice, none overlooked"
    assert set(got) == pages


# What is left alone, and named


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "left alone"),
        ('{"version": 1', "left alone"),
        ("[1]", "no record"),
        ('{"version": 1}', "has no owner"),
        ('{"version": 2, "owner": "x", "place": {}, "flow_run_id": "x"}', "a newer procworker"),
        ('{"version": 1, "owner": "../../x", "place": {}, "flow_run_id": "x"}', "no name"),
        ('{"version": 1, "owner": "x", "place": {}, "flow_run_id": "x"}', "place is none"),
        ("[" * 100_000, "left alone"),
        ('"' + "x" * 2_000_000 + '"', "too large"),
    ],
)
def test_what_cannot_be_read_is_left_alone_and_named(
    home: Path, journal: Journal, text: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    page = abandoned(home)
    (page.path / "run.json").write_text(text)

    assert taken(journal) == taken(journal) == []
    assert (page.path / "run.json").read_text() == text
    (message,) = [record.message for record in caplog.records]
    assert str(page.path) in message
    assert why in message


def test_what_belongs_to_another_user_is_left_alone(
    home: Path, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    if os.getuid():
        pytest.skip("needs root")
    page = abandoned(home)
    os.chown(page.path / "run.json", 65534, 65534)

    assert taken(journal) == []
    assert "another user" in caplog.text


def test_what_belongs_to_another_host_is_left_alone(
    home: Path, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    page = abandoned(home)
    altered(page, place={**here(), "host": "elsewhere"})

    assert taken(journal) == []
    assert "'elsewhere'" in caplog.text
    altered(page, place=here())
    assert taken(journal) == [page.path]


def test_after_a_reboot_a_record_is_ours_but_its_pids_mean_nothing(home: Path, journal: Journal) -> None:
    page = abandoned(home)
    altered(page, place={**here(), "boot": "the last one"})

    (ours,) = journal.take_over(API, POOL)
    assert not ours.is_of_this_boot


def test_in_another_container_it_is_alive_as_long_as_its_output_is_locked(
    home: Path, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    page = abandoned(home)
    altered(page, place={**here(), "namespace": 1})
    descriptor = os.open(page.stdout, os.O_WRONLY | os.O_CREAT)
    assert try_lock(descriptor)
    os.set_inheritable(descriptor, True)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    os.close(descriptor)

    assert taken(journal) == []
    assert "another container" in caplog.text
    child.kill()
    child.wait()
    assert child.stdin
    child.stdin.close()
    (ours,) = journal.take_over(API, POOL)
    assert not ours.is_of_this_boot


def test_a_directory_without_a_record_is_removed_when_it_is_old(home: Path, journal: Journal) -> None:
    for age in (0.0, STALE_SECONDS + 1):
        new = home / "runs" / f"{NEW}{age}"
        new.mkdir(parents=True)
        os.utime(new, (time.time() - age, time.time() - age))
    (home / "runs" / "a file").touch()

    assert taken(journal) == []
    assert sorted(path.name for path in (home / "runs").iterdir()) == [f"{NEW}0.0", "a file"]


def test_a_page_is_found_by_its_run(journal: Journal) -> None:
    id = uuid4()
    assert not journal.has(id)
    page = journal.page(id)
    assert journal.has(UUID(page.name.partition(".")[0]))


def test_a_record_that_is_no_file_is_not_waited_for(
    home: Path, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    page = abandoned(home)
    (page.path / "run.json").unlink()
    os.mkfifo(page.path / "run.json")

    assert taken(journal) == []
    assert "is no file" in caplog.text


def test_two_records_of_one_run_are_taken_one_after_the_other(home: Path) -> None:
    id = uuid4()
    for _ in range(2):
        dead = Journal(home)
        dead.page(id, api=API, pool=POOL)
        dead.close()
    first, second = Journal(home), Journal(home)

    assert [len(taken(first)), len(taken(first)), len(taken(second))] == [1, 0, 1]
    first.close()
    second.close()


def test_whose_directory_was_cleared_away_shows_again_that_it_lives(home: Path, journal: Journal) -> None:
    living = Journal(home)
    open_page(living)
    shutil.rmtree(home)
    page = open_page(living)

    assert taken(journal) == []
    living.close()
    assert taken(journal) == [page.path], "the negative control"


def test_the_lock_of_another_host_is_not_even_touched(home: Path, journal: Journal) -> None:
    page = abandoned(home)
    altered(page, place={**here(), "host": "another"})
    lock = home / "workers" / str(page.data["owner"])
    lock.touch()

    assert taken(journal) == []
    assert lock.exists()


def test_what_is_to_be_adopted_is_not_for_a_helper(home: Path, journal: Journal) -> None:
    dead = Journal(home)
    ends, stays = open_page(dead, orphans="kill"), open_page(dead, orphans="adopt")
    dead.close()

    assert [page.path for page in journal.take_over_from(dead.owner)] == [ends.path]
    assert taken(Journal(home)) == [stays.path]


def test_whatever_the_umask_is_all_is_private(home: Path, journal: Journal) -> None:
    before = os.umask(0)
    try:
        page = open_page(journal)
    finally:
        os.umask(before)

    for path in (home, home / "runs", home / "workers", page.path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((page.path / "run.json").stat().st_mode) == 0o600


def test_whatever_lies_in_a_page_goes_with_it(home: Path, journal: Journal) -> None:
    page = open_page(journal)
    (page.path / "made by hand" / "inside").mkdir(parents=True)
    page.remove()
    assert list((home / "runs").iterdir()) == []


def test_what_is_left_of_a_removed_page_is_cleared_away_later(
    home: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(journal)
    (page.path / "stdout").touch()

    def die(path: Path) -> None:
        raise SystemExit

    with monkeypatch.context() as broken_off:
        broken_off.setattr(os, "unlink", die)
        with pytest.raises(SystemExit):
            page.remove()
    (left,) = (home / "runs").iterdir()

    assert left.name.startswith(NEW)
    os.utime(left, (0, 0))
    taken(journal)
    assert not left.exists()
