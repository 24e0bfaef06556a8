"""A job as a preview shows it: every value with where it came from, and no secret."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from procworker.cli.preview.origins import Path, Trace, environment_names, references
from procworker.errors import ConfigurationError
from procworker.redaction import SECRET, Mask, secrets_in
from procworker.run import CANCEL_GRACE_SECONDS
from procworker.settings import Settings
from procworker.system.child import join_command, parse_command
from procworker.system.interpreter import locate
from procworker.system.processes import COOKIE
from procworker.template import BLOCK

JSON = dict[str, Any]

NEW, NEW_ID = "<new>", "00000000-0000-0000-0000-000000000000"
HIDDEN = "***"
USER_INFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")
EMBEDDED = "embedded server"
AT_START = (COOKIE, "PREFECT__CONTROL_PORT", "PREFECT__CONTROL_TOKEN")
"""What each process gets anew, with values that nobody knows before."""


@dataclass(frozen=True)
class Value:
    """What one setting or variable is (None: not there), and where that came from."""

    value: Any
    origin: str

    def row(self) -> dict[str, Any]:
        return {"value": self.value, "origin": self.origin}


@dataclass
class View:
    """All that is to be shown of a job."""

    title: str
    command: list[str] = field(default_factory=list)
    settings: dict[str, Value] = field(default_factory=dict)
    added: dict[str, Value] = field(default_factory=dict)
    changed: dict[str, Value] = field(default_factory=dict)
    removed: dict[str, Value] = field(default_factory=dict)
    inherited: dict[str, Value] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def row(self, everything: bool) -> dict[str, Any]:
        groups = ["added", "changed", "removed", *(["inherited"] if everything else [])]
        environment = {group: {name: v.row() for name, v in getattr(self, group).items()} for group in groups}
        settings = {name: value.row() for name, value in self.settings.items()}
        return {
            "target": self.title,
            "command": self.command,
            "settings": settings,
            "environment": environment,
            "inherited_count": len(self.inherited),
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Speaker:
    """Says in words where the values of a job come from."""

    trace: Trace
    job: JSON
    """The template's job configuration, not filled."""
    names: Mapping[str, str]
    """What each layer is called, and the template itself."""
    own: Collection[str]
    """Variables that are procworker's and not the pool's."""
    by_itself: Collection[Path]
    """What the command adds to the job variables it was given."""

    def origin(self, *path: Any) -> str:
        """Say where the value at this place of the job comes from."""
        words = [self._said(layer, source, path) for layer, source in self.trace.of(*path)]
        value, said = _at(self.trace.filled, path), _at(self.job, path)
        if not words and value is not None:
            words.append(self.names["template"])
        words += [f"${name}" for name in environment_names(said)]
        words += [reference.removeprefix("prefect.") for reference in references(value)]
        return ", ".join(dict.fromkeys(words)) or "default"

    def _said(self, layer: str, source: Path, path: Path) -> str:
        if layer == "run" and source in self.by_itself:
            return "this command"
        if layer == "defaults" and source[0] in self.own:
            return "default"
        spelt = ".".join(map(str, source))
        return self.names[layer] if spelt == ".".join(map(str, path)) else f"{self.names[layer]} ({spelt})"

    def is_of_a_block(self, *path: Any) -> bool:
        return any(name.startswith(BLOCK) for name in references(_at(self.trace.filled, path)))


class Secrecy:
    """Hides what no output may show: by name, by value, and by descent from a block."""

    def __init__(self, values: Iterable[str], of_blocks: Iterable[str]) -> None:
        self._mask = Mask(values)
        blocks = sorted({text for text in of_blocks if text}, key=len, reverse=True)
        self._of_blocks = re.compile("|".join(map(re.escape, blocks))) if blocks else None

    def shown(self, name: str, value: Any, of_block: bool = False) -> Any:
        """Return a value as it may be shown under this name."""
        if isinstance(value, dict):
            return {key: self.shown(str(key), inner, of_block) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.shown(name, inner, of_block) for inner in value]
        if value is None or value == "" or isinstance(value, bool):
            return value
        if SECRET.search(name):
            return HIDDEN
        text = str(value)
        if of_block and self._of_blocks:
            text = self._of_blocks.sub(HIDDEN, text)
        text = self.text(text)
        return value if text == str(value) else text

    def text(self, text: str) -> str:
        text = self._mask(USER_INFO.sub(HIDDEN, text))
        return text.replace(NEW_ID, NEW)


def environment_into(
    view: View,
    final: Mapping[str, str],
    of_job: Mapping[str, str | None],
    settings: Settings,
    speaker: Speaker,
    secrecy: Secrecy,
    environ: Mapping[str, str],
) -> None:
    """Sort the variables of a job into what is added, changed, removed and inherited."""

    def origin(name: str) -> str:
        if name in of_job and of_job[name] == final.get(name):
            return speaker.origin("env", name)
        if name.startswith("PREFECT__") and name in final:
            return "the run's own"
        if name in settings.exported and name in final:
            return settings.origins.get(name, "settings")
        if name in final:
            return "environment" if name in environ else "default"
        if name.startswith("PREFECT__"):
            return "tells of a flow run that this command is in"
        return "procworker's own, hidden from another Python"

    for name in sorted({*final, *environ}):
        where, value = origin(name), final.get(name)
        of_block = name in of_job and speaker.is_of_a_block("env", name)
        entry = Value(NEW if where == EMBEDDED else secrecy.shown(name, value, of_block), where)
        if name not in environ:
            view.added[name] = entry
        elif value is None:
            view.removed[name] = entry
        elif value != environ[name]:
            cut = where == "environment"
            view.changed[name] = Value(entry.value, "environment, without procworker's own entries" if cut else where)
        else:
            view.inherited[name] = entry
    for name in AT_START:
        view.added[name] = Value(NEW, "every start")


def settings_into(
    view: View, configuration: Any, own_command: bool, python: Value, speaker: Speaker, secrecy: Secrecy
) -> None:
    """Say everything about a job but its environment."""

    def setting(name: str, value: Any) -> Value:
        return Value(secrecy.shown("", value, speaker.is_of_a_block(name)), speaker.origin(name))

    argv = parse_command(configuration.command)
    view.command = secrecy.shown("", argv, speaker.is_of_a_block("command"))
    directory, grace = configuration.working_dir, configuration.grace_seconds
    place = os.path.expanduser(directory) if directory else f"a new one in {tempfile.gettempdir()}, removed afterwards"
    view.settings = {
        "command": setting("command", join_command(view.command))
        if own_command
        else Value(join_command(view.command), "default"),
        "working_dir": setting("working_dir", place),
        "python": python,
        "start_method": setting("start_method", configuration.start_method),
        "timeout_seconds": setting("timeout_seconds", configuration.timeout_seconds),
        "grace_seconds": setting("grace_seconds", CANCEL_GRACE_SECONDS if grace is None else grace),
        "leftovers": setting("leftovers", configuration.leftovers),
        "stream_output": setting("stream_output", configuration.stream_output),
    }
    if directory and not os.path.isdir(place):
        view.notes.append(f"the working directory {view.settings['working_dir'].value} does not exist: it would crash")
    if configuration.start_method == "fork" and not configuration._is_forkable:
        view.notes.append("start_method 'fork' has no effect: a command of one's own is spawned")


def python_of(configuration: Any, option: str | None, speaker: Speaker, environ: Mapping[str, str]) -> Value:
    """Say which Python runs the flow, and why that one."""
    found = configuration._interpreter
    if found is None:
        return Value(configuration.python, "the command chooses its own Python")
    text = f"{found.path} (Prefect {found.prefect_version})"
    if configuration.python:
        return Value(text, speaker.origin("python"))
    if option:
        return Value(text, "--python")
    for place, why in ((sys.executable, "procworker's own"), (environ.get("VIRTUAL_ENV"), "VIRTUAL_ENV")):
        try:
            if place and locate(place) == found.path:
                return Value(text, why)
        except ConfigurationError:
            continue
    return Value(text, "python on PATH")


def secrets_of(settings: Settings, *environments: Mapping[str, str | None]) -> set[str]:
    """Every value that settings and environments show to be secret."""
    return {*settings.secrets(), *(secret for environ in environments for secret in secrets_in(environ))}


def _at(value: Any, path: Path) -> Any:
    """The value at a path; a text or a reference on the way stands for all below it."""
    for key in path:
        if not isinstance(value, dict) or "$ref" in value:
            return value
        value = value.get(key)
    return value
