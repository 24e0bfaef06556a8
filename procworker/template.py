"""Fill `{{ name }}` and `<< name >>` placeholders in nested data.

`{{ name }}` gives what Prefect gives. `<< name >>` is for places where braces are taken: a known name, `$X`
or `prefect.*` gives the same there, any other name stays. `<<! name >>` ends as a literal `<< name >>`.

Three stages, each one pass: `apply_values`, `resolve_block_document_references`, `resolve_variables`. What a
stage puts in is read by the stages after it, never again by itself; escapes end in the last one.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from itertools import repeat
from typing import Any, Protocol
from uuid import UUID

from procworker.errors import ApiError, ConfigurationError
from procworker.redaction import secrets_of_block

logger = logging.getLogger(__name__)

PLACEHOLDER = re.compile(
    # Not after a third `<`: that is a shell's here-string.
    r"(?:(?P<braces>\{\{)|(?<!<)<<(?P<escape>!*))\s*(?P<name>[\w.\-\[\]$]+)\s*(?(braces)\}\}|>>)"
)
BLOCK, VARIABLE = "prefect.blocks.", "prefect.variables."
BLOCK_NAME = re.compile(r"prefect\.blocks\.([^.]*)\.([^.]*)(?:\.(.*))?")
NUMBER = re.compile(r"-?\d+(?:_\d+)*")
MAX_DEPTH = 200
ValueOf = Callable[["re.Match[str]", bool], Any]  # from a placeholder, and whether it is the whole text


class NotSet:
    """Stands for a value that nobody gave, where None is a value."""


class TemplateError(ConfigurationError, ValueError):
    """A template cannot be filled; a ValueError too, because Prefect raises that."""


class Resolver(Protocol):
    """Reads from the server what has `data` (a block) or `value` (a variable; None if it is missing)."""

    async def read_block_document_by_name(self, name: str, block_type_slug: str) -> Any: ...
    async def read_block_document(self, block_document_id: Any) -> Any: ...
    async def read_variable_by_name(self, name: str) -> Any: ...


def apply_values(
    template: Any,
    values: Mapping[str, Any],
    remove_notset: bool = True,
    warn_on_notset: bool = False,
    skip_prefixes: Iterable[str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    known: Collection[str] = frozenset(),
) -> Any:
    """Fill in values and environment variables; a placeholder that is the whole text keeps its value's type.

    Without a value a whole text becomes NotSet, which takes its key or item away, and a part of a text "".
    `known` are names for `<< >>` beside those in values. References to blocks and variables stay.
    """
    environ = os.environ if environ is None else environ
    known = {*known, *values}
    untouched = (BLOCK, VARIABLE, *(skip_prefixes or ()))

    def value_of(match: re.Match[str], is_whole: bool) -> Any:
        name = match["name"]
        if match["escape"] or name.startswith(untouched) or _is_unknown(match, known):
            return match.group()
        if name.startswith("$"):
            value, is_whole = environ.get(name.lstrip("$"), NotSet), False  # text, set or not
        else:
            value = get_from_dict(values, name, NotSet)
        if value is NotSet and warn_on_notset:
            logger.warning("No value for the placeholder %s", match.group())
        if value is NotSet and not is_whole:
            return "" if remove_notset else match.group()
        return value

    return _fill(template, value_of, keep_notset=not remove_notset, only_json=True)


def fill_environment(template: Any, environ: Mapping[str, str]) -> Any:
    """Fill `<< $NAME >>` and nothing else; raises TemplateError for a variable that is not set."""

    def value_of(match: re.Match[str], is_whole: bool) -> Any:
        name = match["name"]
        if match["braces"] or match["escape"] or not name.startswith("$"):
            return match.group()
        if (value := environ.get(name.lstrip("$"))) is None:
            raise TemplateError(f"{match.group()}: the environment variable {name.lstrip('$')} is not set")
        return value

    return _fill(template, value_of)


async def resolve_block_document_references(
    template: Any, client: Resolver | None = None, secrets: set[str] | None = None
) -> Any:
    """Put the data of blocks in place of `prefect.blocks.TYPE.NAME[.PATH]` and of `$ref` dicts.

    What of them is secret is added to `secrets`.
    """
    by_id: dict[str, Any] = {}
    by_name: dict[tuple[str, str], Any] = {}

    def data_of(node: dict[str, Any]) -> Any:
        reference = node.get("$ref", {})
        id = reference.get("block_document_id") or "" if isinstance(reference, dict) else None
        if not isinstance(id, (str, UUID)):
            raise TemplateError('"$ref" must be {"block_document_id": "..."}')
        return _fill(by_id.setdefault(str(id))) if id else NotSet

    def value_of(match: re.Match[str], is_whole: bool) -> Any:
        if not match["name"].startswith(BLOCK) or match["escape"]:
            return match.group()
        if not (parts := BLOCK_NAME.fullmatch(match["name"])):
            raise TemplateError(f"{match.group()}: a block is named {BLOCK}TYPE.NAME")
        slug, name, path = parts.groups()
        if (value := by_name.setdefault((slug, name))) is None:
            return None  # in the first round
        if set(value) == {"value"} and not re.match(r"value(?:[.\[]|$)", path or ""):
            value = value["value"]  # a block that is nothing but a `value` stands for it
        if path is not None and (value := get_from_dict(value, path, NotSet)) is NotSet:
            raise TemplateError(f"{match.group()}: the block has nothing at {path!r}")
        if isinstance(value, (dict, list)) and not is_whole:
            raise TemplateError(f"{match.group()} is a {type(value).__name__}: inside a text, add a path")
        return _fill(value)

    _fill(template, value_of, data_of)  # a first round, to learn what has to be read
    documents = []
    for id in by_id:
        documents.append(document := await _read(f"block {id}", client.read_block_document(id) if client else None))
        by_id[id] = document.data
    for slug, name in by_name:
        answer = client.read_block_document_by_name(name=name, block_type_slug=slug) if client else None
        documents.append(document := await _read(f"block {slug}/{name}", answer))
        by_name[slug, name] = document.data
    if secrets is not None:
        secrets.update(*map(secrets_of_block, documents))
    return _fill(template, value_of, data_of)


async def resolve_variables(template: Any, client: Resolver | None = None) -> Any:
    """Put variables in place of `prefect.variables.NAME`, "" for a missing one; and end escapes."""
    values: dict[str, Any] = {}

    def value_of(match: re.Match[str], is_whole: bool) -> Any:
        if match["escape"]:
            return match.group().replace("!", "", 1)
        return values.setdefault(match["name"]) if match["name"].startswith(VARIABLE) else match.group()

    _fill(template, value_of)  # a first round, to learn what has to be read
    for reference in values:
        name = reference.removeprefix(VARIABLE)
        variable = await _read(f"variable {name}", client.read_variable_by_name(name=name) if client else None)
        values[reference] = "" if variable is None else variable.value
    return _fill(template, value_of)


def unknown_placeholders(template: Any, known: Collection[str]) -> list[tuple[str, str | None]]:
    """List the names in `<< name >>` that nobody knows, each with the known name nearest to it."""
    from difflib import get_close_matches  # as a rule nobody needs it

    found: dict[tuple[str, bool], None] = {}
    _fill(template, lambda match, _: found.setdefault((match["name"], _is_unknown(match, known))))
    names = [name for name, is_unknown in found if is_unknown]
    return [(name, next(iter(get_close_matches(_split(name)[0], known, 1)), None)) for name in names]


def get_from_dict(nested: Any, path: str, default: Any = None) -> Any:
    """Follow a path such as `a.b[0]` through dicts and lists; what reads as a number is one."""
    try:
        for key in _split(path):
            nested = nested[int(key) if NUMBER.fullmatch(key) else key]
    except (TypeError, ValueError, LookupError):
        return default
    return nested


def set_in_dict(nested: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a path; dicts on the way are made, or replaced by a changed copy."""
    *parents, last = _split(path)
    for parent in parents:
        if not isinstance(inner := nested.get(parent, {}), dict):
            raise TypeError(f"{path!r} leads through a value that is not a dict, at {parent!r}")
        nested[parent] = dict(inner)
        nested = nested[parent]
    nested[last] = value


def deep_merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay one dict over another; where both hold a dict, these are merged likewise."""
    both = {key for key, value in over.items() if isinstance(value, dict) and isinstance(base.get(key), dict)}
    return {**base, **over, **{key: deep_merge(base[key], over[key]) for key in both}}


def _fill(
    root: Any,
    value_of: ValueOf = lambda match, is_whole: match.group(),
    on_dict: Callable[[dict[str, Any]], Any] = lambda node: NotSet,
    *,
    keep_notset: bool = False,
    only_json: bool = False,
) -> Any:
    """Rebuild dicts and lists with the placeholders in their texts filled, without what becomes NotSet.

    What `on_dict` gives for a dict stands for all of it, unless NotSet. Keys are never filled.
    """

    def part(match: re.Match[str]) -> str:
        value = value_of(match, False)
        _fill(value)  # raises on a depth that str() might not survive
        return str(value)

    def visit(node: Any, depth: int) -> Any:  # by map(), which costs one Python frame per level
        if isinstance(node, str):
            whole = PLACEHOLDER.fullmatch(node)
            return value_of(whole, True) if whole else PLACEHOLDER.sub(part, node)
        if not isinstance(node, (dict, list)):
            if only_json and not (node is None or node is NotSet or isinstance(node, (int, float))):
                raise TemplateError(f"a template holds JSON values, not {type(node).__name__}")
            return node
        if depth > MAX_DEPTH:
            raise TemplateError(f"a template or a value is nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, list):
            return [item for item in list(map(visit, node, repeat(depth + 1))) if item is not NotSet]
        if (replacement := on_dict(node)) is not NotSet:
            return replacement
        filled = zip(node, list(map(visit, node.values(), repeat(depth + 1))), strict=True)
        given = {key: value for key, value in filled if value is not NotSet}
        return {**node, **given} if keep_notset else given

    return visit(root, 1)


def _is_unknown(match: re.Match[str], known: Collection[str]) -> bool:
    """Is this a `<< name >>` that means nothing here?"""
    is_known = match["name"].startswith(("$", "prefect.")) or _split(match["name"])[0] in known
    return not (match["braces"] or match["escape"] or is_known)


def _split(path: str) -> list[str]:
    return path.replace("[", ".").replace("]", "").split(".")


async def _read(what: str, answer: Awaitable[Any] | None) -> Any:
    """Wait for an answer of the server; an error then says what was asked for."""
    if answer is None:
        raise TemplateError(f"{what}, which the job refers to, cannot be read without a client")
    try:
        return await answer
    except ApiError as error:
        told = type(error)(f"{what}, which the job refers to: {error}", error.status_code)
        told.retry_after = error.retry_after
        raise told from error
