"""What people rely on in templates, beyond test_template.py: odd names, parts of a text, and no server at all."""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

import pytest
from strategies import BLOCK_ID, World, run

from procworker.errors import ConfigurationError
from procworker.template import (
    NotSet,
    TemplateError,
    apply_values,
    resolve_block_document_references,
    resolve_variables,
)

BLOCKS = {("docker-registry", "main"): {"url": "registry.example", "port": 443}, ("secret", "s"): {"value": "hidden"}}


def blocks(template: Any) -> Any:
    world = World(blocks=BLOCKS, documents={BLOCK_ID: {"by": "id", "deep": [1]}})
    return run(resolve_block_document_references(template, world))


def variables(template: Any, **values: Any) -> Any:
    return run(resolve_variables(template, World(variables=values)))


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ('{"user": "{{who}}", "home": "{{$$}}"}', '{"user": "Ada", "home": ""}'),
        ('{"user": "{{who}}", "home": "{{$NOBODY_SET_THIS}}"}', '{"user": "Ada", "home": ""}'),
        ("costs ${{price}}, {{    who }} pays", "costs $5, Ada pays"),
        ("{{ build-image.tag }}", "v1"),
        ("{{ people[0].name }} and {{ people[1] }}", "Ada and None"),
        ("{{ people[2].name }}", NotSet),
        (True, True),
        (2.5, 2.5),
        ([True, 2.5, None, "{{ price }}"], [True, 2.5, None, 5]),
    ],
    ids=repr,
)
def test_values_of_every_kind_go_in(template: Any, filled: Any) -> None:
    values = {"who": "Ada", "price": 5, "build-image": {"tag": "v1"}, "people": [{"name": "Ada"}, None]}

    assert apply_values(template, values, environ={}) == filled


def test_what_is_unset_in_the_template_itself_goes_too_unless_it_is_to_stay() -> None:
    template = {"top": [{"name": NotSet, "age": "{{ age }}"}], "name": NotSet, "text": "Ada {{ missing }}"}

    assert apply_values(template, {"age": 36}) == {"top": [{"age": 36}], "text": "Ada "}
    assert apply_values(template, {"age": 36}, remove_notset=False) == {
        "top": [{"name": NotSet, "age": 36}],
        "name": NotSet,
        "text": "Ada {{ missing }}",
    }


@pytest.mark.parametrize("template", [("{{ a }}",), b"{{ a }}", {"k": ("x",)}, object()], ids=repr)
def test_a_template_of_no_json_type_is_a_value_error(template: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        apply_values(template, {"a": 1})


def test_skipped_names_stay_wherever_they_stand_while_the_others_go() -> None:
    template = {
        "name": "{{ ctx.flow.name }}",
        "job": {"image": "{{ build.image }}", "title": "job-{{ ctx.flow.name }}/{{ ctx.flow_run.name }}-{{ v }}"},
        "tags": ["{{ ctx.flow_run.name }}", "{{ v }}", "{{ missing }}"],
    }

    assert apply_values(template, {"build": {"image": "i:1"}, "v": "1.0"}, skip_prefixes=["ctx."]) == {
        "name": "{{ ctx.flow.name }}",
        "job": {"image": "i:1", "title": "job-{{ ctx.flow.name }}/{{ ctx.flow_run.name }}-1.0"},
        "tags": ["{{ ctx.flow_run.name }}", "1.0"],
    }


def test_what_is_skipped_is_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        apply_values({"a": "{{ ctx.x }}", "b": "{{ nowhere }}"}, {}, warn_on_notset=True, skip_prefixes=["ctx."])

    assert "nowhere" in caplog.text
    assert "ctx.x" not in caplog.text


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{{ prefect.blocks.docker-registry.main.url }}/app", "registry.example/app"),
        ("{{ prefect.blocks.secret.s.value }}/{{ image }}", "hidden/{{ image }}"),
        ("{{ image }}", "{{ image }}"),
        ("{{ $HOME }} {{ prefect.variables.v }}", "{{ $HOME }} {{ prefect.variables.v }}"),
        ([{"$ref": {"block_document_id": BLOCK_ID}}], [{"by": "id", "deep": [1]}]),
        (
            {"a": {"x": {"$ref": {"block_document_id": BLOCK_ID}}, "y": {"$ref": {"block_document_id": BLOCK_ID}}}},
            {"a": {"x": {"by": "id", "deep": [1]}, "y": {"by": "id", "deep": [1]}}},
        ),
        ({"a": {"$ref": {"block_document_id": UUID(BLOCK_ID)}}}, {"a": {"by": "id", "deep": [1]}}),
    ],
    ids=repr,
)
def test_blocks_go_in_and_everything_else_stays(template: Any, filled: Any) -> None:
    assert blocks(template) == filled


def test_a_block_is_read_once_however_its_parts_are_named() -> None:
    world = World(blocks=BLOCKS)
    template = {
        "whole": "{{ prefect.blocks.docker-registry.main }}",
        "part": "http://{{ prefect.blocks.docker-registry.main.url }}:{{ prefect.blocks.docker-registry.main.port }}",
        "again": ["{{ prefect.blocks.docker-registry.main }}"],
    }
    filled = run(resolve_block_document_references(template, world))

    assert filled["part"] == "http://registry.example:443"
    assert filled["whole"] == filled["again"][0] == BLOCKS["docker-registry", "main"]
    assert filled["whole"] is not filled["again"][0]
    assert world.reads == [("docker-registry", "main")]


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        (42, 42),
        ("no placeholder", "no placeholder"),
        ("{{ prefect.variables.a }} - {{ prefect.variables.b }}", "1 - two"),
        ("{{ prefect.variables.none }} - {{ prefect.variables.none_either }}", " - "),
        ("x{{ prefect.variables.none }}y", "xy"),
        ("is {{ prefect.variables.d }}", "is {'k': 'v'}"),
        (
            ["{{ image }}", "{{ prefect.blocks.secret.s }}", "{{ $HOME }}"],
            ["{{ image }}", "{{ prefect.blocks.secret.s }}", "{{ $HOME }}"],
        ),
        (
            {"a": "{{ prefect.variables.a }}", "in": {"b": ["{{ prefect.variables.b }}", 42]}},
            {"a": 1, "in": {"b": ["two", 42]}},
        ),
    ],
    ids=repr,
)
def test_variables_go_in_and_everything_else_stays(template: Any, filled: Any) -> None:
    assert variables(template, a=1, b="two", d={"k": "v"}) == filled


@pytest.mark.parametrize("template", [7, "text", {"key": ["value", "{{ standard }}", "{{ $X }}"]}], ids=repr)
def test_without_references_no_server_is_needed(template: Any) -> None:
    assert run(resolve_block_document_references(template, None)) == template
    assert run(resolve_variables(template, None)) == template


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ prefect.blocks.secret.s }}", "block secret/s"),
        ({"$ref": {"block_document_id": BLOCK_ID}}, f"block {BLOCK_ID}"),
        ("a {{ prefect.variables.v }}", "variable v"),
    ],
    ids=repr,
)
def test_a_reference_without_a_server_to_ask_is_refused_by_name(template: Any, name: str) -> None:
    """Prefect would ask whatever server its settings name; a reference that stays is found out much later."""

    async def stages() -> None:
        await resolve_variables(await resolve_block_document_references(template, None), None)

    with pytest.raises(ConfigurationError, match=name) as refused:
        run(stages())
    assert isinstance(refused.value, TemplateError)
