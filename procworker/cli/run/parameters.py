"""Check a flow's parameters before anything is made: names, what is missing, and types, never harder than Prefect."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from procworker.cli.run.signature import Signature, read_signature, source_of
from procworker.errors import ConfigurationError
from procworker.server.models import Deployment

JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int, float),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
REFERENCES = {"$ref", "__prefect_kind"}
"""In values: what Prefect puts something else in place of."""
DEEPEST = 20


def check_entrypoint(entrypoint: str, given: Mapping[str, Any], path: str, prefect_version: str) -> None:
    """Check against the signature of the flow's function, as far as its source tells.

    `path` is PYTHONPATH. Raises ConfigurationError.
    """
    source = source_of(entrypoint, Path.cwd(), path.split(os.pathsep))
    if source is None or (signature := read_signature(*source)) is None:
        return
    flow = f"flow {source[1]!r}"
    _check_names(flow, given, signature.parameters, [str(p) for p in signature.parameters.values()], signature.keywords)
    for parameter in signature.parameters.values():
        if parameter.required and parameter.name not in given:
            raise ConfigurationError(f"{flow} needs the parameter {str(parameter)!r}: add -p {parameter.name}=VALUE")
    # Prefect 2 on pydantic 1 takes more.
    if signature.validated and not prefect_version.startswith("2."):
        _check_types(flow, signature, given)


def check_deployment(name: str, deployment: Deployment, given: Mapping[str, Any]) -> None:
    """Check against the schema that the flow had when it was deployed.

    Types only where the server enforces them. Raises ConfigurationError.
    """
    schema, title = deployment.parameter_openapi_schema, f"deployment {name!r}"
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not properties:  # not known, or not told
        return
    enforced = getattr(deployment, "enforce_parameter_schema", None) is True
    required = schema.get("required") or []
    defaults = getattr(deployment, "parameters", None) or {}
    if not schema.get("additionalProperties"):
        keywords = "kwargs" if "kwargs" in properties else None
        _check_names(title, given, properties, [_described(name, properties[name]) for name in properties], keywords)
    for missing in [name for name in required if name not in given and name not in defaults]:
        if enforced or _is_typed(properties.get(missing)):  # *args and **kwargs of a flow stand here too
            text = _described(missing, properties.get(missing))
            raise ConfigurationError(f"{title} needs the parameter {text!r}: add -p {missing}=VALUE")
    for name in given if enforced else ():
        value, wanted = given[name], properties.get(name)
        if _refers(value) or (value is None and name not in required):
            continue
        if misfit := _misfit(value, wanted, schema, 0):
            raise ConfigurationError(f"{title}: parameter {name!r} must be {misfit}, not {_kind(value)}{_hint(wanted)}")


def _check_names(
    what: str, given: Collection[str], known: Collection[str], listed: Collection[str], keywords: str | None
) -> None:
    for name in given:
        if name in known:
            continue
        text = f"{what} has no parameter {name!r}"
        near = difflib.get_close_matches(name, known, 1)
        if near:
            text += f"; did you mean {near[0]!r}?"
        elif keywords:
            text += f"; what goes into **{keywords} is written -p '{keywords}={{\"{name}\": ...}}'."
        else:
            text += "."
        raise ConfigurationError(f"{text} It takes {', '.join(listed) or 'no parameters'}")


def _check_types(what: str, signature: Signature, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        parameter = signature.parameters[name]
        if parameter.type is Any or _refers(value):
            continue
        try:
            TypeAdapter(parameter.type).validate_python(value)
        except ValidationError:
            hint = _hint({"type": "string"} if parameter.type is str else None)
            wanted = f"{parameter.annotation}, not {_kind(value)}"
            raise ConfigurationError(f"{what}: parameter {name!r} must be {wanted}{hint}") from None


def _kind(value: Any) -> str:
    """Say what a value is without showing it: it may be a secret."""
    names = {
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _hint(schema: Any) -> str:
    is_text = isinstance(schema, dict) and schema.get("type") == "string"
    return ": a text that reads like JSON is written in two pairs of quotes, -p 'name=\"...\"'" if is_text else ""


def _described(name: str, schema: Any) -> str:
    kind = schema.get("type") if isinstance(schema, dict) else None
    return f"{name}: {kind}" if isinstance(kind, str) else name


def _is_typed(schema: Any) -> bool:
    return isinstance(schema, dict) and bool(schema.keys() & {"type", "anyOf", "allOf", "oneOf", "$ref", "enum"})


def _refers(value: Any) -> bool:
    """Does Prefect put something else in place of it, or of a part of it?"""
    if isinstance(value, dict):
        return bool(value.keys() & REFERENCES) or any(map(_refers, value.values()))
    return isinstance(value, list) and any(map(_refers, value))


def _misfit(value: Any, schema: Any, root: Mapping[str, Any], depth: int) -> str:
    """Say what the value should be; empty when it fits, or when the schema says more than is understood here."""
    if not isinstance(schema, dict) or depth > DEEPEST or "block_type_slug" in schema:
        return ""
    schema = {**schema}
    if isinstance(reference := schema.pop("$ref", None), str):
        _, _, path = reference.partition("#/")
        place, _, name = path.partition("/")
        known = root.get(place)
        if misfit := _misfit(value, known.get(name) if isinstance(known, dict) else None, root, depth + 1):
            return misfit
    for part in schema.get("allOf") or ():
        if misfit := _misfit(value, part, root, depth + 1):
            return misfit
    for choices in (schema.get("anyOf"), schema.get("oneOf")):
        misfits = [_misfit(value, part, root, depth + 1) for part in choices or ()]
        if misfits and all(misfits):
            return " or ".join(dict.fromkeys(misfits))
    if isinstance(options := schema.get("enum"), list) and value not in options:
        return f"one of {', '.join(map(str, options))}"
    return _wrong_type(value, schema) or _wrong_part(value, schema, root, depth)


def _wrong_type(value: Any, schema: Mapping[str, Any]) -> str:
    kinds = schema.get("type")
    wanted = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(wanted, list) or not all(kind in JSON_TYPES for kind in wanted):
        return ""
    fits = any(_is_of_type(value, kind) for kind in wanted)
    return "" if fits else " or ".join(wanted)


def _is_of_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, JSON_TYPES[kind])


def _wrong_part(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> str:
    """Look into lists and objects."""
    if isinstance(value, list) and isinstance(items := schema.get("items"), dict) and "prefixItems" not in schema:
        for item in value:
            if misfit := _misfit(item, items, root, depth + 1):
                return f"an array of {misfit}"
    properties = schema.get("properties")
    if isinstance(value, dict) and isinstance(properties, dict):
        for name in schema.get("required") or ():
            if name not in value:
                return f"an object with {name!r}"
        for name in value.keys() & properties.keys():
            optional = value[name] is None and name not in (schema.get("required") or ())
            if not optional and (misfit := _misfit(value[name], properties[name], root, depth + 1)):
                return f"an object whose {name!r} is {misfit}"
    return ""
