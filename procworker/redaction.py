"""Known secrets, and texts without them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote, unquote

SECRET = re.compile(r"SECRET|PASSW|(KEY|TOKEN|AUTH|AUTH_STRING|AUTHORIZATION|CREDENTIALS?|COOKIE)$", re.I)
"""Names of what holds a secret."""
SHORTEST, SHORTEST_CREDENTIAL = 6, 4
"""Characters: the asterisks of shorter ones would punch holes into innocent words."""
STARS = "***"

Text = TypeVar("Text", str, bytes)


class Mask:
    """Replace known secrets in a text by asterisks, also where they overlap.

    Those of several lines are found line by line, and each also as JSON, repr and URLs spell it.
    """

    def __init__(self, secrets: Iterable[str] = (), shortest: int = SHORTEST) -> None:
        lines = {line.strip() for secret in secrets for line in secret.splitlines()}
        spelt = {form for line in lines if len(line) >= shortest for form in _spellings(line)}
        known = sorted(spelt, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, known))) if known else None
        self._starts = _starts_of(known)
        self._bytes = _starts_of([form.encode("utf-8", "surrogateescape") for form in known])
        self.longest = max((len(form.encode("utf-8", "surrogateescape")) for form in known), default=0)
        """Bytes of the longest."""

    def __call__(self, text: str) -> str:
        if self._pattern is None or not self._pattern.search(text):
            return text
        parts, end = [], 0
        for start, stop in _spans(self._starts, text):
            parts += [text[end:start], STARS]
            end = stop
        return "".join([*parts, text[end:]])

    def seam(self, data: bytes, at: int) -> tuple[int, int]:
        """Where to part data around `at` without parting a secret: before it, and behind it; twice `at` mostly."""
        for start, stop in _spans(self._bytes, data):
            if start < at < stop:
                return start, stop
        return at, at


@lru_cache(maxsize=64)
def mask_of(secrets: frozenset[str]) -> Mask:
    """One mask for the many runs that have the same secrets."""
    return Mask(secrets)


@lru_cache(maxsize=1024)
def _looks_secret(name: str) -> bool:
    return SECRET.search(name) is not None


def secrets_in(environ: Mapping[str, Any]) -> frozenset[str]:
    """List the values whose names look secret, and the passwords in URLs."""
    found = set()
    for name, value in environ.items():
        if not isinstance(value, str):
            continue
        passwords = [value, *value.split()[-1:]] if _looks_secret(name) else []  # "Bearer x", and x
        passwords += value.split(":", 1)[1:] if name.upper().endswith("AUTH_STRING") else []
        passwords += re.findall(r"://[^/\s:@]*:([^/\s]+)@", value) if "://" in value else []
        found |= {text for password in passwords for text in (password, unquote(password))}
    return frozenset(
        text for text in found if len(text) >= SHORTEST_CREDENTIAL and text.lower() not in ("true", "false")
    )


def names_of(secrets: frozenset[str], environ: Mapping[str, str]) -> list[str] | None:
    """Name the variables that tell who reads the environment later what is secret, beyond those that look it.

    None where they do not tell it: a secret stands somewhere else, or inside of a longer text.
    """
    if not (more := secrets and secrets - secrets_in(environ)):
        return []
    return sorted(name for name, value in environ.items() if value in more) if more <= set(environ.values()) else None


def secrets_by(names: Iterable[str], environ: Mapping[str, str]) -> frozenset[str]:
    """List what names_of and the names themselves tell of an environment."""
    return secrets_in(environ) | {environ[name] for name in names if name in environ}


def secrets_of_block(document: Any) -> frozenset[str]:
    """List the texts of a block document that its type, its schema or their names call secret."""
    paths = [str(path).split(".") for path in _get(document, "block_schema", "fields", "secret_fields") or ()]
    if _get(document, "block_type", "slug") == "secret":
        paths.append(["*"])
    found: set[str] = set()

    def visit(value: Any, place: list[str], secret: bool) -> None:
        secret = secret or any(_leads_to(path, place) for path in paths)
        if isinstance(value, Mapping):
            for key, inner in value.items():
                visit(inner, [*place, str(key)], secret or bool(SECRET.search(str(key))))
        elif isinstance(value, list):
            for inner in value:
                visit(inner, place, secret)
        elif isinstance(value, str) and secret:
            found.add(value)

    visit(getattr(document, "data", None), [], False)
    return frozenset(found)


def _get(document: Any, *keys: str) -> Any:
    value = getattr(document, "model_extra", None)
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _leads_to(path: list[str], place: list[str]) -> bool:
    """Is this the place that a path means, whose last part may be `*` for all that is there?"""
    if path[-1:] == ["*"]:
        return len(place) >= len(path) and place[: len(path) - 1] == path[:-1]
    return place == path


def _spellings(secret: str) -> set[str]:
    return {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], quote(secret, safe="", errors="replace")}


def _starts_of(known: list[Text]) -> re.Pattern[Text] | None:
    """Matches, empty, wherever one of them begins, and captures the longest."""
    if not known:
        return None
    if isinstance(known[0], bytes):
        return re.compile(b"(?=(" + b"|".join(map(re.escape, known)) + b"))")
    return re.compile("(?=(" + "|".join(map(re.escape, known)) + "))")


def _spans(starts: re.Pattern[Text] | None, text: Text) -> Iterator[tuple[int, int]]:
    """Yield where secrets stand; those that overlap as one."""
    if starts is None:
        return
    start = stop = -1
    for match in starts.finditer(text):
        if match.start(1) >= stop:
            if stop >= 0:
                yield start, stop
            start = match.start(1)
        stop = max(stop, match.end(1))
    if stop >= 0:
        yield start, stop
