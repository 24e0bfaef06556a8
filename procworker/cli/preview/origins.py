"""Where each value of a job comes from: each input is replaced by a mark of its own, and the marks show where it goes.

Nothing but the code that fills a job template tells which input ends up where, so it is that code which is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from procworker.configuration import fill_template, merge_job_variables
from procworker.template import BLOCK, PLACEHOLDER, VARIABLE

JSON = dict[str, Any]
Path = tuple[Any, ...]

MARK = re.compile("\ufdd0(\\d+)\ufdd1")
"""A text that is in no job: these characters are none."""
CONTEXT = "ctx"


@dataclass(frozen=True)
class Inputs:
    """What a job is made from, but for host and run."""

    template: JSON
    deployment: JSON
    run: JSON

    @property
    def defaults(self) -> JSON:
        """The values that the template itself offers."""
        schemas = self.template["variables"].get("properties") or {}
        return {
            name: schema["default"]
            for name, schema in schemas.items()
            if isinstance(schema, dict) and schema.get("default") is not None
        }

    def filled(self) -> JSON:
        return fill_template(self.template, merge_job_variables(self.deployment, self.run))

    def marked(self, marks: list[tuple[str, Path]]) -> Inputs:
        """The same with a mark in place of each single value: its number is the place in the list."""
        schemas = self.template["variables"].get("properties") or {}
        defaults = {
            name: {**schemas[name], "default": _marked(value, "defaults", (name,), marks)}
            for name, value in self.defaults.items()
        }
        variables = {**self.template["variables"], "properties": {**schemas, **defaults}}
        deployment = _marked(self.deployment, "deployment", (), marks)
        return Inputs({**self.template, "variables": variables}, deployment, _marked(self.run, "run", (), marks))


@dataclass
class Trace:
    """The filled job, and for each place in it the inputs that it comes from: (layer, path)."""

    filled: JSON
    sources: dict[Path, list[tuple[str, Path]]] = field(default_factory=dict)

    def of(self, *path: Any) -> list[tuple[str, Path]]:
        """What a value comes from; empty when the template itself says it, or nobody."""
        for length in range(len(path), 0, -1):
            if found := self.sources.get(path[:length]):
                return found
        return []


def traced(inputs: Inputs) -> Trace:
    """Raises what filling the template raises."""
    marks: list[tuple[str, Path]] = []
    sources: dict[Path, list[tuple[str, Path]]] = {}
    for path, text in _texts(inputs.marked(marks).filled()):
        if found := MARK.findall(text):
            sources[path] = [marks[int(number)] for number in found]
    return Trace(inputs.filled(), sources)


def references(value: Any) -> list[str]:
    """What a value of the filled job takes from the server."""
    found = []
    for _, text in _texts(value):
        for match in PLACEHOLDER.finditer(text):
            if not match["escape"] and match["name"].startswith((BLOCK, VARIABLE)):
                found.append(match["name"])
    if isinstance(value, dict) and isinstance(value.get("$ref"), dict):
        found.append(f"{BLOCK}{value['$ref'].get('block_document_id')}")
    return list(dict.fromkeys(found))


def environment_names(value: Any) -> list[str]:
    """The variables of our own environment that a text of the template takes in."""
    matches = [match for _, text in _texts(value) for match in PLACEHOLDER.finditer(text) if not match["escape"]]
    return list(dict.fromkeys(match["name"].lstrip("$") for match in matches if match["name"].startswith("$")))


def complaints(inputs: Inputs, trace: Trace, environ: Mapping[str, str]) -> list[str]:
    """What somebody will not have meant: names that nobody knows, and variables that the template does not use."""
    known = set(inputs.template["variables"].get("properties") or {})
    given = {name.partition(".")[0] for name in (*inputs.deployment, *inputs.run)}
    job = inputs.template["job_configuration"]
    found = []
    for path, text in (*_texts(job), *_texts_put_in(inputs, trace)):
        for match in PLACEHOLDER.finditer(text):
            name, place = match["name"], f"{match.group()} in {_spelt(path)}"
            if match["escape"] or name.startswith((BLOCK, VARIABLE, f"{CONTEXT}.")):
                continue
            if name.startswith("$"):
                if name.lstrip("$") not in environ:
                    found.append(f"{place}: the environment has no {name.lstrip('$')}, so it is empty")
            elif match["braces"] and _first(name) not in known | given:
                found.append(f"{place} is no variable of the template, so it is empty{_meant(name, known)}")
    used = {_first(match["name"]) for _, text in _texts(job) for match in PLACEHOLDER.finditer(text)}
    used |= {"env"} if isinstance(job.get("env"), dict) else set()
    for name in sorted(given - used):
        found.append(f"the job variable {name!r} is not used by the template{_meant(name, known & used)}")
    return found


def _texts_put_in(inputs: Inputs, trace: Trace) -> Iterator[tuple[Path, str]]:
    """Texts of job variables whose placeholders were filled: those that are put in as a whole keep theirs."""
    for path, sources in trace.sources.items():
        for layer, source in sources:
            value = _value_at(
                {"defaults": inputs.defaults, "deployment": inputs.deployment, "run": inputs.run}[layer], source
            )
            if isinstance(value, str) and value != _value_at(trace.filled, path):
                yield path, value


def _value_at(value: Any, path: Path) -> Any:
    for key in path:
        if not isinstance(value, dict | list):
            return None
        value = value.get(key) if isinstance(value, dict) else value[key]
    return value


def _first(name: str) -> str:
    return name.partition(".")[0].partition("[")[0]


def leftovers(value: Any) -> list[str]:
    """Placeholders that are in the finished job still: nothing fills them any more."""
    return [f"{match.group()} in {_spelt(path)} stays as it is" for path, text in _texts(value)
            for match in PLACEHOLDER.finditer(text)]  # fmt: skip


def without_server(value: Any, missing: list[str]) -> Any:
    """Keep references to the server as literal texts, and list them."""

    def keep(match: Any) -> str:
        if match["escape"] or not match["name"].startswith((BLOCK, VARIABLE)):
            return str(match.group())
        missing.append(match["name"])
        return f"<<! {match['name']} >>"

    if isinstance(value, str):
        return PLACEHOLDER.sub(keep, value)
    if isinstance(value, list):
        return [without_server(item, missing) for item in value]
    if isinstance(value, dict):
        return {key: without_server(item, missing) for key, item in value.items()}
    return value


def _meant(name: str, known: set[str]) -> str:
    nearest = get_close_matches(name.partition(".")[0], sorted(known), 1, 0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _spelt(path: Path) -> str:
    return ".".join(map(str, path)) or "the job"


def _texts(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, (*path, key))


def _marked(value: Any, layer: str, path: Path, marks: list[tuple[str, Path]]) -> Any:
    """A reference to a block is a single value, and so is a list."""
    if isinstance(value, dict) and "$ref" not in value:
        return {key: _marked(inner, layer, (*path, key), marks) for key, inner in value.items()}
    if path == ("env",):  # only a mapping may stand there, or nothing
        return value
    marks.append((layer, path))
    return f"\ufdd0{len(marks) - 1}\ufdd1"
