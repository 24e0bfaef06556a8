"""Parameters of `procworker run` are checked before anything is made, and never harder than Prefect checks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from procworker.cli.run.parameters import check_deployment, check_entrypoint
from procworker.cli.run.signature import read_signature, source_of
from procworker.errors import ConfigurationError
from procworker.server.models import Deployment

HEAD = "from prefect import flow\nfrom typing import *\nimport typing as t\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prefect() -> Any:
    """The installed Prefect, whose verdicts ours are compared with."""
    prefect = pytest.importorskip("prefect", reason="compares with an installed Prefect 3.8: there is none here")
    if not prefect.__version__.startswith("3.8."):
        pytest.skip(f"compares with Prefect 3.8, and here is {prefect.__version__}")
    return prefect


def refusal(function: str, given: dict[str, Any], version: str = "3.8.8", head: str = HEAD) -> str:
    """What is said about these parameters of the flow f; empty when they pass."""
    Path("flows.py").write_text(head + function)
    try:
        check_entrypoint("flows.py:f", given, "", version)
    except ConfigurationError as error:
        return str(error)
    return ""


def flow(signature: str, decorator: str = "@flow", before: str = "") -> str:
    return f"{before}{decorator}\ndef f({signature}): ...\n"


# Names


@pytest.mark.parametrize(
    ("signature", "given", "says"),
    [
        ("name: str", {"nmae": "x"}, "flow 'f' has no parameter 'nmae'; did you mean 'name'? It takes name: str"),
        ("a, b: int = 1", {"zzz": 1}, "flow 'f' has no parameter 'zzz'. It takes a, b: int"),
        ("", {"x": 1}, "flow 'f' has no parameter 'x'. It takes no parameters"),
        ("a: int", {}, "flow 'f' needs the parameter 'a: int': add -p a=VALUE"),
        ("a, *, b", {"a": 1}, "flow 'f' needs the parameter 'b': add -p b=VALUE"),
        ("**rest", {"x": 1}, "what goes into **rest is written -p 'rest={\"x\": ...}'. It takes rest"),
    ],
)
def test_a_name_that_the_flow_does_not_know_or_misses(signature: str, given: dict[str, Any], says: str) -> None:
    assert refusal(flow(signature), given).endswith(says)
    assert refusal(flow(signature, "@flow(validate_parameters=False)"), given).endswith(says)
    assert refusal(f"@flow(name='n')\nasync def f({signature}): ...", given).endswith(says)


@pytest.mark.parametrize(
    ("signature", "given"),
    [
        ("a=1, /, b=2, *, c=3", {"a": 1, "b": 2, "c": 3}),
        ("a=1, /, b=2, *, c=3", {}),
        ("*args, **kwargs", {"args": [1], "kwargs": {"x": 1}}),
        ("*args, **kwargs", {}),
        ("self_evident: 'Model'", {"self_evident": {"x": 1}}),
    ],
)
def test_names_that_pass(signature: str, given: dict[str, Any]) -> None:
    assert refusal(flow(signature), given) == ""


@pytest.mark.parametrize(
    "source",
    [
        "f = flow(make())\n",
        "from elsewhere import f\n",
        "import elsewhere as f\n",
        flow("a: int", "@flow\n@decorated"),
        flow("a: int", "@decorated\n@flow"),
        flow("a: int", "@task"),
        flow("a: int") + "f = other(f)\n",
        flow("a: int") + flow("b"),
        "if True:\n    @flow\n    def f(a: int): ...\n",
        "def broken(:\n",
    ],
)
def test_what_takes_more_than_reading_is_left_to_prefect(source: str) -> None:
    assert refusal(source, {"zzz": "x"}) == ""


# Types: the same verdict as Prefect's


VALUES = [1, 0, 5.0, 5.5, True, None, "x", "5", "5.0", "yes", "", [], ["1"], ["x"], {}, {"k": "1"}, {"k": "x"}]
ANNOTATIONS = ["int", "float", "str", "bool", "list", "dict", "'int | None'", "int | str", "Optional[bool]"]
ANNOTATIONS += ["List[int]", "list[int]", "dict[str, int]", "t.Union[int, None]", "list['int']", "Dict[str, 'float']"]
ANNOTATIONS += ["Any", "tuple[int, int]", "list[Any]", "int | Unknown"]


@pytest.mark.parametrize("annotation", ANNOTATIONS)
def test_prefect_is_never_outdone(prefect: Any, annotation: str) -> None:
    import typing

    space = {**vars(typing), "t": typing, "Unknown": dict, "flow": prefect.flow}
    exec(flow(f"a: {annotation}"), space)
    for value in VALUES:
        try:
            space["f"].validate_parameters({"a": value})
            passes = True
        except prefect.exceptions.ParameterTypeError:
            passes = False
        ours = refusal(flow(f"a: {annotation}"), {"a": value})
        exact = not {"Any", "tuple[int, int]", "list[Any]", "int | Unknown"} & {annotation}
        assert not (ours and passes), (value, ours)
        assert bool(ours) is not passes or not exact, value


@pytest.mark.parametrize(
    ("annotation", "value", "says"),
    [
        ("int", "x", "flow 'f': parameter 'a' must be int, not a text"),
        ("int", 1.5, "flow 'f': parameter 'a' must be int, not a number"),
        ("list[int]", ["x"], "flow 'f': parameter 'a' must be list[int], not a list"),
        ("Optional[dict]", True, "flow 'f': parameter 'a' must be Optional[dict], not true or false"),
        (
            "str",
            5,
            "must be str, not a number: a text that reads like JSON is written in two pairs of quotes, -p 'name=",
        ),
        ("int", None, "must be int, not null"),
    ],
)
def test_a_type_that_does_not_fit_is_said_without_the_value(annotation: str, value: Any, says: str) -> None:
    assert says in refusal(flow(f"a: {annotation}"), {"a": value})


@pytest.mark.parametrize("value", [{"$ref": "x"}, [{"$ref": "x"}], {"a": {"__prefect_kind": "json", "value": "1"}}])
def test_what_prefect_fills_in_is_not_looked_at(value: Any) -> None:
    assert refusal(flow("a: int"), {"a": value}) == ""


def test_types_are_left_alone_where_prefect_does_so() -> None:
    assert refusal(flow("a: int", "@flow(validate_parameters=False)"), {"a": "x"}) == ""
    assert refusal(flow("a: int", "@flow(validate_parameters=SOMETIMES)"), {"a": "x"}) == ""
    assert refusal(flow("a: int", "@flow(**options)"), {"a": "x"}) == ""
    assert refusal(flow("a: int"), {"a": "x"}, version="2.20.26") == "", "its pydantic may be 1"
    assert refusal(flow("a: int", before="from numbers import Complex as int\n"), {"a": "x"}) == ""


# Modules


def test_a_module_is_found_by_its_path_and_not_imported(here: Path) -> None:
    for folder in (here / "package", here / "more" / "away" / "inner"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise SystemExit('imported')\n" + HEAD + flow("a: int"))
        (folder / "module.py").write_text("raise SystemExit('imported')\n" + HEAD + flow("b: int"))
    path = [str(here / "more"), ""]
    assert source_of("package.module:f", here, path) == (here / "package" / "module.py", "f")
    assert source_of("package:f", here, path) == (here / "package" / "__init__.py", "f")
    assert source_of("away.inner.module:f", here, path) == (here / "more" / "away" / "inner" / "module.py", "f")
    assert source_of("gone.module:f", here, path) is None
    (here / "away").mkdir()
    assert source_of("away.inner:f", here, path) is None, "Python finds the first folder of that name"
    with pytest.raises(ConfigurationError, match="has no parameter 'c'"):
        check_entrypoint("package.module:f", {"c": 1}, "", "3.8.8")


def test_a_default_is_told_by_the_signature(here: Path) -> None:
    (here / "flows.py").write_text(HEAD + flow("a: int, b: 'str | None' = None, *c, d=1, **e"))
    signature = read_signature(here / "flows.py", "f")
    assert signature is not None
    assert [str(parameter) for parameter in signature.parameters.values()] == ["a: int", "b: str | None", "d", "c", "e"]
    assert [name for name, parameter in signature.parameters.items() if parameter.required] == ["a"]


# Deployments

SCHEMA = {
    "type": "object",
    "required": ["day", "level"],
    "properties": {
        "day": {"type": "string", "format": "date", "title": "day"},
        "count": {"type": "integer", "default": 1},
        "ratio": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "level": {"allOf": [{"$ref": "#/definitions/Level"}]},
        "names": {"type": "array", "items": {"type": "string"}},
        "box": {"$ref": "#/definitions/Box"},
        "block": {"$ref": "#/definitions/Block"},
        "odd": {"type": "whatever", "not": {}},
        "free": {},
    },
    "definitions": {
        "Level": {"enum": ["low", "high"], "type": "string"},
        "Box": {
            "type": "object",
            "required": ["x"],
            "properties": {"x": {"type": "integer"}, "more": {"$ref": "#/definitions/Box"}},
        },
        "Block": {"type": "object", "required": ["x"], "block_type_slug": "json", "properties": {}},
    },
}
GOOD = {"day": "2026-01-01", "level": "low"}


def deployed(given: dict[str, Any], *, enforced: bool | None = True, schema: Any = SCHEMA, **defaults: Any) -> str:
    row: dict[str, Any] = {"id": "6d7b2a34-4d1f-4b1c-9f4f-3a3a7b0e8f00", "name": "nightly"}
    row |= {"parameter_openapi_schema": schema, "enforce_parameter_schema": enforced, "parameters": defaults}
    try:
        check_deployment("etl/nightly", Deployment.model_validate(row), given)
    except ConfigurationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"dya": 1},
            "deployment 'etl/nightly' has no parameter 'dya'; did you mean 'day'? It takes day: string, count: ",
        ),
        ({"level": "low"}, "deployment 'etl/nightly' needs the parameter 'day: string': add -p day=VALUE"),
        ({**GOOD, "day": 5}, "parameter 'day' must be string, not a number: a text that reads like JSON"),
        ({**GOOD, "count": "x"}, "parameter 'count' must be integer, not a text"),
        ({**GOOD, "count": True}, "parameter 'count' must be integer, not true or false"),
        ({**GOOD, "count": 1.5}, "parameter 'count' must be integer, not a number"),
        ({**GOOD, "ratio": "x"}, "parameter 'ratio' must be number or null, not a text"),
        ({**GOOD, "level": "middle"}, "parameter 'level' must be one of low, high, not a text"),
        ({**GOOD, "names": ["a", 1]}, "parameter 'names' must be an array of string, not a list"),
        ({**GOOD, "box": {"x": "1"}}, "parameter 'box' must be an object whose 'x' is integer, not an object"),
        ({**GOOD, "box": {}}, "parameter 'box' must be an object with 'x', not an object"),
        ({**GOOD, "day": None}, "parameter 'day' must be string, not null"),
    ],
)
def test_what_a_deployment_does_not_take(given: dict[str, Any], says: str) -> None:
    assert says in deployed(given)


@pytest.mark.parametrize(
    "given",
    [
        {"count": 2.0, "ratio": None, "names": []},
        {"ratio": 1, "box": {"x": 1, "more": {"x": 2, "more": None}}},
        {"block": {"$ref": {"block_document_id": "x"}}, "odd": "x", "free": [1], "names": None},
        {"count": {"__prefect_kind": "workspace_variable", "variable_name": "n"}},
    ],
)
def test_what_a_deployment_takes(given: dict[str, Any]) -> None:
    assert deployed({**GOOD, **given}) == ""


def test_the_deployments_own_values_need_not_be_given() -> None:
    assert deployed({"level": "low"}, day="2026-01-01") == ""


def test_where_the_schema_is_not_enforced_only_names_count() -> None:
    for enforced in (False, None):
        assert deployed({**GOOD, "count": "x", "level": "middle"}, enforced=enforced) == ""
        assert "has no parameter 'dya'" in deployed({"dya": 1}, enforced=enforced)
        assert "needs the parameter 'level'" in deployed({"day": "x"}, enforced=enforced)
    variadic = {"properties": {"args": {"title": "args"}}, "required": ["args"]}
    assert deployed({}, schema=variadic, enforced=False) == ""


@pytest.mark.parametrize("schema", [{}, {"properties": {}}, {"properties": None}, {"properties": []}])
def test_a_schema_that_tells_nothing_refuses_nothing(schema: Any) -> None:
    assert deployed({"x": 1}, schema=schema) == ""


def test_a_schema_of_itself_ends() -> None:
    schema = {"properties": {"a": {"$ref": "#/definitions/A"}}, "definitions": {"A": {"$ref": "#/definitions/A"}}}
    assert deployed({"a": 1}, schema=schema) == ""


def test_no_schema_refuses_what_prefects_server_takes(prefect: Any) -> None:
    """With schemas that Prefect makes, and the check of its server."""
    from prefect.utilities.callables import parameter_schema
    from prefect.utilities.schema_tools.validation import is_valid

    space: dict[str, Any] = {}
    code = "from typing import *\nfrom enum import Enum\nclass E(Enum):\n    a = 'x'\n    b = '5'\n"
    exec(code, space)
    for annotation in [
        "int",
        "float",
        "str",
        "bool",
        "list",
        "dict",
        "list[int]",
        "dict[str, int]",
        "Optional[int]",
        "E",
    ]:
        for default in ("", " = None"):
            exec(f"def f(a: {annotation}{default}): ...", space)
            schema = parameter_schema(space["f"]).model_dump()
            for value in VALUES:
                ours = deployed({"a": value}, schema=json.loads(json.dumps(schema)))
                assert not (ours and is_valid({"a": value}, schema)), (annotation, default, value, ours)
