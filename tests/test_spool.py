"""The file behind a stream: bounded on disk whatever is written, and what is missing is said."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from procworker.system import spool as module
from procworker.system.spool import CHUNK, LINE_LIMIT, Spool

CAP = 256 * 1024
MARK = re.compile(r"\[procworker: (\d+) bytes of stdout were dropped here, no more than 256 KiB are kept\]")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "stdout"
    path.touch()
    return path


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def numbered(first: int, count: int, width: int = 100) -> bytes:
    return b"".join(b"%d ".ljust(width, b"x") % n + b"\n" for n in range(first, first + count))


def read_all(spool: Spool) -> list[str]:
    lines, more = [], True
    while more:
        new, more = spool.read()
        lines += new
    return lines


def assert_complete(lines: list[str], written: bytes) -> None:
    """The lines are those that were written, but for as many bytes as the marks say, where they say it."""
    rest = written.decode().splitlines(keepends=True)
    place = 0
    for line in lines:
        if mark := MARK.fullmatch(line):
            missing = int(mark[1])
            while missing > 0:
                missing -= len(rest[place])
                place += 1
            assert missing == 0, "whole lines were dropped"
        else:
            assert rest[place] == line + "\n"
            place += 1
    assert place == len(rest)


def test_what_was_read_is_freed_and_nothing_is_lost(path: Path) -> None:
    spool, lines, written = Spool("stdout", path, CAP), [], b""
    for turn in range(100):
        append(path, piece := numbered(500 * turn, 500))
        written += piece
        lines += read_all(spool)
        assert disk(path) <= CAP
    assert_complete(lines, written)
    assert not any(map(MARK.fullmatch, lines))


@pytest.mark.parametrize("punch", [True, False])
def test_what_nobody_reads_is_bounded_and_the_cut_is_marked(path: Path, punch: bool) -> None:
    spool, written = Spool("stdout", path, CAP, punch=punch), b""
    for turn in range(100):
        append(path, piece := numbered(500 * turn, 500))
        written += piece
        spool.trim()
        assert disk(path) <= (CAP if punch else 2 * CAP) + len(piece)
    lines = read_all(spool)
    assert MARK.fullmatch(lines[0])
    assert sum(len(line) + 1 for line in lines[1:]) >= (CAP * 3 // 16 if punch else CHUNK // 2)
    assert_complete(lines, written)


@pytest.mark.parametrize("share", [8, 4, 3])
def test_there_is_room_for_what_is_written_until_the_next_look(
    path: Path, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    monkeypatch.setattr("procworker.system.spool.time", SimpleNamespace(monotonic=itertools.count(0.0, 0.01).__next__))
    spool, piece, most = Spool("stdout", path, CAP), numbered(0, 5000)[: CAP // share], 0
    for _ in range(100):
        append(path, piece)
        most = max(most, disk(path))
        spool.trim()
    assert CAP // 2 <= most <= CAP


def test_one_burst_below_the_cap_is_kept_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("procworker.system.spool.time", SimpleNamespace(monotonic=itertools.count(0.0, 0.01).__next__))
    spool = Spool("stdout", path, CAP)
    spool.trim()
    append(path, written := numbered(0, 5000)[: CAP * 3 // 4].rpartition(b"\n")[0] + b"\n")
    for _ in range(5):
        spool.trim()
    assert "".join(line + "\n" for line in read_all(spool)).encode() == written


def test_what_waits_for_long_is_kept_up_to_the_cap(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("procworker.system.spool.time", SimpleNamespace(monotonic=itertools.count(0.0, 0.1).__next__))
    spool, written = Spool("stdout", path, CAP), b""
    while len(written) < CAP * 15 // 16:
        append(path, piece := numbered(len(written), 20))
        written += piece
        spool.trim()
    lines = read_all(spool)
    assert not any(map(MARK.fullmatch, lines))
    assert "".join(line + "\n" for line in lines).encode() == written


def test_what_an_adopted_run_had_written_before_is_no_pace(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("procworker.system.spool.time", SimpleNamespace(monotonic=itertools.count(0.0, 0.01).__next__))
    append(path, numbered(0, 5000)[: CAP // 2])
    spool = Spool("stdout", path, CAP)
    spool.prime()
    written = b""
    for turn in range(10):
        append(path, piece := numbered(turn, 100))
        written += piece
        spool.trim()
    assert "".join(line + "\n" for line in read_all(spool)).encode().endswith(written)


def test_a_pace_is_forgotten_in_seconds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("procworker.system.spool.time", SimpleNamespace(monotonic=lambda: now[0]))
    spool = Spool("stdout", path, CAP)

    def look(after: float, size: int) -> None:
        now[0] += after
        append(path, b"x" * size)
        spool.trim()

    for _ in range(5):
        look(0.01, CAP // 4)
    assert spool._room <= CAP * 3 // 4
    for _ in range(50):
        look(0.1, 0)
    assert spool._room > CAP * 15 // 16


def test_without_a_cap_the_disk_fills(path: Path) -> None:
    """The control."""
    spool = Spool("stdout", path, None)
    for turn in range(100):
        append(path, numbered(500 * turn, 500))
        spool.trim()
    assert disk(path) > 10 * CAP


def test_where_the_system_makes_no_holes_the_file_is_emptied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_fallocate", lambda: None)
    spool, lines, written = Spool("stdout", path, CAP), [], b""
    for turn in range(100):
        append(path, piece := numbered(500 * turn, 500))
        written += piece
        lines += read_all(spool)
        assert disk(path) <= 2 * CAP
    assert_complete(lines, written)
    assert not any(map(MARK.fullmatch, lines))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.one_of(st.integers(1, 4000), st.sampled_from(["read", "read all", "trim"])), max_size=60),
    st.booleans(),
)
def test_whenever_it_is_read_each_byte_is_a_line_or_in_a_mark(steps: list[int | str], punch: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stdout")
        path.touch()
        spool, lines, written, number = Spool("stdout", path, CAP, punch=punch), [], b"", 0
        for step in steps:
            if step == "read":
                lines += spool.read()[0]
            elif step == "read all":
                lines += read_all(spool)
            elif step == "trim":
                spool.trim()
            else:
                append(path, piece := numbered(number, int(step), 50))
                written, number = written + piece, number + int(step)
        spool.stop()
        assert_complete(lines + read_all(spool), written)


def test_a_mark_counts_what_was_read_of_a_line_but_not_shown(path: Path) -> None:
    spool = Spool("stdout", path, CAP)
    append(path, b"half a line")
    assert read_all(spool) == []
    append(path, b"x" * 4 * CAP)
    spool.trim()
    append(path, b"\nlast\n")
    mark, *lines, last = read_all(spool)
    match = MARK.fullmatch(mark)
    assert match
    assert int(match[1]) + len("".join(lines)) == len("half a line") + 4 * CAP
    assert last == "last"


def test_a_long_line_is_cut_between_characters(path: Path) -> None:
    spool, text = Spool("stdout", path), "a" + "☃" * 100_000
    append(path, text.encode())
    lines = read_all(spool)
    spool.stop()
    lines += read_all(spool)
    assert "".join(lines) == text
    assert max(len(line.encode()) for line in lines) <= LINE_LIMIT


# Writers that truncate


@pytest.mark.parametrize(
    "then", [b"new 1\n", b"new\n", b"longer than before\n", b"new\n" * 1000], ids=["same size", "less", "more", "much"]
)
def test_what_replaces_the_output_is_read_whatever_its_size(path: Path, then: bytes) -> None:
    spool = Spool("stdout", path)
    append(path, b"old 1\n")
    assert read_all(spool) == ["old 1"]
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before:  # the clock of some file systems ticks every 10 ms
        path.write_bytes(then)
    assert read_all(spool) == then.decode().splitlines()
    append(path, b"next\n")
    assert read_all(spool) == ["next"]


def test_what_replaces_freed_output_is_read_as_well(path: Path) -> None:
    spool, piece = Spool("stdout", path, CAP), numbered(0, 5000)
    append(path, piece)
    read_all(spool)
    append(path, piece)
    read_all(spool)
    assert disk(path) < len(piece)
    path.write_bytes(2 * piece + b"end\n")
    assert read_all(spool)[-1] == "end"


def test_a_line_that_was_cut_off_ends_there(path: Path) -> None:
    spool = Spool("stdout", path)
    append(path, b"a\nb")
    assert read_all(spool) == ["a"]
    path.write_bytes(b"c\n")
    assert read_all(spool) == ["b", "c"]


def test_the_hole_before_a_writer_that_does_not_append_is_no_output(path: Path) -> None:
    spool = Spool("stdout", path)
    with path.open("wb", buffering=0) as writer:
        writer.write(b"a\n" * 5000)
        assert len(read_all(spool)) == 5000
        os.truncate(path, 0)
        writer.write(b"b\n")
        assert [line.strip("\0") for line in read_all(spool)] == ["b"]


# Going on where another left off


def test_after_priming_only_new_lines_are_read(path: Path) -> None:
    append(path, b"1\n2\n")
    spool = Spool("stdout", path)
    assert spool.prime() == ["1", "2"]
    append(path, b"3\n")
    assert read_all(spool) == ["3"]
    path.write_bytes(b"4\n5\n6\n")
    assert read_all(spool) == ["4", "5", "6"]


def test_priming_knows_the_last_whole_lines_of_a_long_output(path: Path) -> None:
    append(path, numbered(0, 10_000) + b"half")
    spool = Spool("stdout", path)
    lines = spool.prime()
    assert lines == numbered(10_000 - len(lines), len(lines)).decode().splitlines()
    assert 0 < len(lines) <= LINE_LIMIT // 101
    append(path, b" and half\n")
    assert read_all(spool) == ["half and half"]


def test_priming_is_not_led_astray_by_what_was_freed(path: Path) -> None:
    before = Spool("stdout", path, CAP)
    for turn in range(10):
        append(path, numbered(turn * 5000, 5000))
        read_all(before)
    spool = Spool("stdout", path, CAP)
    assert spool.prime()[-1].startswith("49999 ")
    append(path, b"x" * 2 * CAP + b"\nlast\n")
    assert read_all(spool)[-1] == "last"


def test_what_is_not_there_is_empty(tmp_path: Path) -> None:
    spool = Spool("stdout", tmp_path / "missing")
    assert spool.prime() == []
    assert spool.read() == ([], False)
    spool.trim()
    spool.stop()
    assert spool.read() == ([], False)
