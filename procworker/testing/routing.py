"""From a method and a path to the function that answers, and what its answer checks first."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID

from procworker.testing.messages import Request
from procworker.testing.rows import Row

T = TypeVar("T")
Route = TypeVar("Route", bound=Callable[..., Any])
Answer = tuple[int, Any]
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []


class Refused(Exception):
    """The request gets this status instead of an answer."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


def route(method: str, path: str) -> Callable[[Route], Route]:
    """Answer this method and path with the decorated function; `{name}` becomes an argument."""
    pattern = re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", path) + "/?")

    def register(function: Route) -> Route:
        ROUTES.append((method, pattern, function))
        return function

    return register


def body(request: Request, allowed: str, required: str = "") -> Row:
    """The JSON object of an action; like Prefect's models it forbids fields it does not know."""
    return checked(request.json, allowed, required)


def checked(given: Any, allowed: str, required: str = "") -> Row:
    """The same for any object inside a body."""
    if not isinstance(given, dict):
        raise Refused(422, "a JSON object is required")
    if extra := given.keys() - set(f"{allowed} {required}".split()):
        raise Refused(422, f"extra fields not permitted: {sorted(extra)}")
    if missing := set(required.split()) - given.keys():
        raise Refused(422, f"field required: {sorted(missing)}")
    return given


def find(table: dict[Any, T], key: Any, what: str) -> T:
    """The row with this key (an id or a name), or 404."""
    try:
        return table[key if key in table else UUID(str(key))]
    except (KeyError, ValueError):
        raise Refused(404, f"{what} {key} not found") from None


def fits(value: Any, rule: Row | None) -> bool:
    """Whether a value passes a filter such as {"any_": [...]}."""
    rule, text = rule or {}, str(value)
    any_, not_any = rule.get("any_"), rule.get("not_any_")
    return (any_ is None or text in map(str, any_)) and (not not_any or text not in map(str, not_any))


def limit_of(given: Row) -> int:
    """How many rows are asked for."""
    limit = given.get("limit")
    if limit is not None and not 0 <= limit <= 200:
        raise Refused(422, "limit: Input should be less than or equal to 200")
    return 200 if limit is None else limit
