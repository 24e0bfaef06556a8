"""Read and write what a journal has on disk: the record of a run, and what a worker's file says of it."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from procworker.system.wishes import NO_LINK

JSON = dict[str, Any]

VERSION = 1
LARGEST, ROOM = 1024 * 1024, 64 * 1024
"""Bytes of a record that is still read, and of changes that are added before it is written as a whole again."""


def read_record(path: Path) -> JSON:
    """Read a record; ValueError says why it cannot be ours to judge."""
    file = path / "run.json"
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("its run.json is no file")
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise ValueError("it belongs to another user")
    if status.st_size > LARGEST:
        raise ValueError("its run.json is too large")
    data = _joined(file.read_bytes())
    if not isinstance(data.get("version"), int):
        raise ValueError("its run.json is no record")
    if data["version"] > VERSION:
        raise ValueError(f"a newer procworker wrote it (version {data['version']})")
    for key, kind in {"owner": str, "place": dict, "flow_run_id": str}.items():
        if not isinstance(data.get(key), kind):
            raise ValueError(f"its run.json has no {key}")
    if not data["owner"].isalnum():
        raise ValueError("its owner is no name")
    if not {"host", "boot", "namespace"} <= data["place"].keys():
        raise ValueError("its place is none")
    return data


def read_told(place: Path) -> JSON | None:
    """Read what a worker's file says of it; None where it says nothing (yet, or no longer)."""
    try:
        with open(os.open(place, os.O_RDONLY | NO_LINK), "rb") as file:
            line, end, _ = file.read(LARGEST).partition(b"\n")
        told = json.loads(line) if end else None
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(told, dict) and isinstance(told.get("place"), dict) and told.get("version") == VERSION
    return told if is_ours else None


def _joined(text: bytes) -> JSON:
    """Put a record together: a line with all of it, then lines with what changed. Half a line at the end is no line."""
    data: JSON = {}
    for line in text.splitlines(keepends=True):
        try:
            part = json.loads(line)
        except (ValueError, RecursionError) as error:
            if data and not line.endswith(b"\n"):  # its worker was about to write it
                break
            raise ValueError(f"its run.json is no JSON: {error}") from error
        if not isinstance(part, dict):
            raise ValueError("its run.json is no record")
        data |= part
    return data


def write_record(path: Path, data: JSON) -> None:
    """Replace the record as a whole; after a power cut an older one may stand there, or none."""
    new = path / "run.json.new"
    new.unlink(missing_ok=True)
    append_line(path, line_of(data), new=True, name=new.name)
    new.replace(path / "run.json")


def line_of(data: JSON) -> bytes:
    """The line of a record that says so much; OSError where nobody would read a record with such a line."""
    line = json.dumps(data, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
    if len(line) > LARGEST - ROOM:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return line


def append_line(path: Path, line: bytes, *, new: bool = False, name: str = "run.json") -> None:
    """Add a line to a record, or begin a new one; OSError when that was not possible as a whole."""
    flags = os.O_CREAT | os.O_EXCL if new else os.O_APPEND
    descriptor = os.open(path / name, os.O_WRONLY | NO_LINK | flags, 0o600)
    try:
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)
