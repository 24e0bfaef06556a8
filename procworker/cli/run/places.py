"""See beforehand whether there is a place for what a flow run writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from procworker.errors import ConfigurationError

NEEDED = 64 * 1024
"""Bytes that there must be room for: records, and the first lines of output."""


def check_places(state_home: Path) -> None:
    """Write to the state directory and to that of temporary files, and remove it again.

    Raises ConfigurationError that names the setting, before a flow run is made that could not be run.
    """
    with _named("PROCWORKER_HOME", state_home):
        state_home.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_to(state_home)
    place = os.environ.get("TMPDIR") or "the directory for temporary files"
    with _named("TMPDIR", place):
        _write_to(Path(tempfile.gettempdir()))


def _write_to(directory: Path) -> None:
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(b"\0" * NEEDED)


@contextmanager
def _named(setting: str, place: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = f"make room there or set {setting} to another directory"
        raise ConfigurationError(f"{setting}: nothing can be written to {place} ({reason}): {advice}") from error
