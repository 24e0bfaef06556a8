"""Placeholders: what each stage fills in, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import logging
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BLOCK_ID, World, run, templates, values, with_angles, worlds

from procworker.errors import ConfigurationError, ObjectNotFound, Unauthorized
from procworker.template import (
    MAX_DEPTH,
    NotSet,
    TemplateError,
    apply_values,
    deep_merge,
    get_from_dict,
    resolve_block_document_references,
    resolve_variables,
    set_in_dict,
    unknown_placeholders,
)


def resolve(template: Any, values: dict[str, Any] | None = None, world: World | None = None, **options: Any) -> Any:
    """Take a template through the three stages."""
    client = world or World()
    filled = apply_values(template, values or {}, **options)
    filled = run(resolve_block_document_references(filled, client))
    return run(resolve_variables(filled, client))


# --- apply_values


@pytest.mark.parametrize("value", [None, 0, False, 0.0, "", [], {}, 3, "text", ["a", 1], {"b": {"c": None}}], ids=repr)
@pytest.mark.parametrize("template", ["{{ a }}", "{{a}}", "<< a >>", "<<a>>", "{{\ta\n}}"])
def test_a_placeholder_that_is_the_whole_text_keeps_the_type_of_its_value(template, value):
    assert apply_values(template, {"a": value}) is value


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("x {{ a }} y", "x 1 y"),
        ("{{ a }}{{ a }}<< a >>", "111"),
        (" {{ a }}", " 1"),
        ("{{ n }}/{{ f }}/{{ l }}", "None/False/[1, 'x']"),
        ("{{ d.k }} {{ l[1] }} {{ l.0 }} {{ l[-1] }}", "v x 1 x"),
        ("{{ c-d }}", "dash"),
        ("${{ a }} {{{ a }}} {{ a b }} {{ }}", "$1 {1} {{ a b }} {{ }}"),
        ("before {{ missing }} after", "before  after"),
        ("{{ d.missing }}|{{ a.b }}|{{ l[9] }}", "||"),
        ("\\1 {{ back }}", "\\1 \\g<0>"),
        (7, 7),
        (None, None),
        ({"{{ a }}": ["{{ a }}", {"deep": "<< l[1] >>"}]}, {"{{ a }}": [1, {"deep": "x"}]}),
        (
            {"gone": "{{ missing }}", "none": "{{ n }}", "items": ["{{ missing }}", "{{ a }}"]},
            {"none": None, "items": [1]},
        ),
    ],
    ids=repr,
)
def test_values_go_in_by_name_and_path(template, filled):
    values = {
        "a": 1, "n": None, "f": False, "l": [1, "x"], "d": {"k": "v"}, "c-d": "dash", "back": "\\g<0>"
    }  # fmt: skip
    assert apply_values(template, values) == filled


def test_a_dict_key_that_is_a_number_cannot_be_reached():
    assert apply_values("{{ d.1 }}", {"d": {"1": "text key"}}) is NotSet


def test_a_whole_text_without_value_is_notset_and_stays_in_a_dict_if_asked():
    template = {"k": "{{ missing }}", "l": ["{{ missing }}"], "t": "t {{ missing }}"}

    assert apply_values("{{ missing }}", {}) is NotSet
    assert apply_values("{{ missing }}", {}, remove_notset=False) is NotSet
    assert apply_values(template, {}, remove_notset=False) == {**template, "l": []}


def test_environment_variables_are_text_also_when_they_are_the_whole_text_or_unset():
    template = {"set": "{{ $X }}", "in": "<< $X >>:{{ $MISSING }}{{ $$X }}", "unset": "<< $MISSING >>"}

    assert apply_values(template, {}, environ={"X": "1"}) == {"set": "1", "in": "1:1", "unset": ""}


def test_the_environment_is_read_at_the_call(monkeypatch):
    monkeypatch.setenv("PW_TEST_SET", "now")

    assert apply_values("{{ $PW_TEST_SET }}", {}) == "now"


def test_skipped_prefixes_and_references_stay():
    template = [
        "{{ ctx.flow.name }}",
        "{{ prefect.blocks.a.b }}",
        "<< prefect.variables.v >>",
        "{{ a }} << ctx.x >>",
    ]

    assert apply_values(template, {"a": 1, "ctx": {}}, skip_prefixes=["ctx."]) == [
        *template[:3],
        "1 << ctx.x >>",
    ]


def test_a_missing_value_is_warned_about_if_asked(caplog):
    with caplog.at_level(logging.WARNING):
        apply_values(["{{ nowhere }}", "<< $NOWHERE >>", "{{ here }}"], {"here": 1}, warn_on_notset=True, environ={})

    assert [record.args for record in caplog.records] == [("{{ nowhere }}",), ("<< $NOWHERE >>",)]


def test_what_is_not_json_is_refused():
    with pytest.raises(TemplateError, match="set") as refused:
        apply_values({"k": [{1, 2}]}, {})

    assert isinstance(refused.value, ConfigurationError)
    assert isinstance(refused.value, ValueError)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(template=templates, values=values, facts=worlds)
def test_nothing_given_is_changed(template, values, facts):
    world = World(**facts)
    given = (template, values, facts)
    before = copy.deepcopy(given)

    with suppress(ValueError, ObjectNotFound):
        resolve(template, values, world)

    assert repr(given) == repr(before)


# --- << >>


@pytest.mark.parametrize(
    "text",
    [
        "cat << EOF >> file",
        "cat <<EOF>> file\nhello\nEOF",
        "cat <<-EOF >> file",
        "cat <<'EOF' >> file",
        "grep x <<< $HOME >> file",
        "grep x <<<a>> file",
        "echo $((1 << 3 >> 1))",
        "std::cout << x >> y; << EOF.x[1] >>",
        "<< >>",
        "<<",
        "<< two words >>",
        "<< a",
        "<< a }}",
        "{{ a >>",
        "<< prefect >>",
    ],
)
def test_angles_with_an_unknown_name_stay_byte_for_byte(text):
    assert resolve(text, {"a": 1, "b": 2}, environ={"HOME": "/home"}) == text
    assert resolve({"script": [f"{text} {{{{ b }}}}"]}, {"a": 1, "b": 2}) == {"script": [f"{text} 2"]}


shell_text = st.lists(
    st.sampled_from([" ", "\n", "cat", "<<", ">>", ">", "<", "EOF", "-", "'", ".x", "[0]", "!", "{", "}", "\u00a0"]),
    max_size=12,
).map("".join)


@settings(max_examples=500, deadline=None)
@given(text=shell_text.filter(lambda text: "<<!" not in text and "{{" not in text))
def test_any_text_of_unknown_names_stays_byte_for_byte(text):
    assert resolve([text], {"a": 1}) == [text]


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(template=templates, values=values, facts=worlds)
def test_angles_give_what_braces_give_when_all_names_are_known(template, values, facts):
    names: set[str] = set()
    angled = with_angles(template, names)

    def outcome(template: Any) -> str:
        try:
            return repr(resolve(template, values, World(**facts), known=names))
        except (ValueError, ObjectNotFound) as error:
            return type(error).__name__

    assert outcome(angled) == outcome(template)


def test_a_declared_name_without_value_acts_as_in_braces():
    template = {"gone": "<< env >>", "text": "-<< env.X >>-", "stays": "<< other >>"}

    assert apply_values(template, {}, known=["env"]) == {"text": "--", "stays": "<< other >>"}


def test_the_context_is_filled_in_when_it_is_given():
    name = "<< ctx.flow.name >>-<< n >>"

    assert resolve(name, {"n": 1}) == "<< ctx.flow.name >>-1"
    assert apply_values(name, {"ctx": {"flow": {"name": "etl"}}}) == "etl-<< n >>"


@pytest.mark.parametrize(
    ("text", "literal"),
    [
        ("<<! a >>", "<< a >>"),
        ("<<!a>>", "<<a>>"),
        ("<<! $HOME >> {{ a }} <<! unknown >>", "<< $HOME >> 1 << unknown >>"),
        ("<<! prefect.blocks.secret.s >>", "<< prefect.blocks.secret.s >>"),
        ("<<! prefect.variables.v >>", "<< prefect.variables.v >>"),
        ("<<! prefect.variables.v >> << prefect.variables.v >>", "<< prefect.variables.v >> <<! a >>"),
        ("<<!! a >>", "<<! a >>"),
        ("cat <<! >> file", "cat <<! >> file"),
        ("{{! a }}", "{{! a }}"),
    ],
)
def test_an_escape_becomes_literal_once_and_last(text, literal):
    world = World(variables={"v": "<<! a >>"})

    assert resolve(text, {"a": 1}, world) == literal
    assert resolve("{{ text }}", {"a": 1, "text": text.replace("{{ a }}", "1")}, world) == literal
    assert unknown_placeholders(text, ["a"]) == []


def test_unknown_placeholders_come_with_the_nearest_known_name():
    template = {
        "a": "<< workin_dir >> << working_dir >> {{ brace }} << $X >> << prefect.variables.v >>",
        "b": ["cat << EOF >> file", "<< workin_dir >> << envv.SOME_NAME >> <<! escaped >>"],
    }

    assert unknown_placeholders(template, ["working_dir", "env"]) == [
        ("workin_dir", "working_dir"),
        ("EOF", None),
        ("envv.SOME_NAME", "env"),
    ]


# --- stages


def test_what_a_stage_puts_in_is_read_by_later_stages_only():
    world = World(
        blocks={("secret", "s"): {"value": "{{ a }} {{ prefect.blocks.secret.s }} {{ prefect.variables.v }}"}},
        variables={"v": "{{ a }} {{ prefect.variables.v }}"},
    )
    filled = resolve("{{ a }}", {"a": "{{ b }} << prefect.blocks.secret.s >>", "b": "never"}, world)

    assert filled == "{{ b }} {{ a }} {{ prefect.blocks.secret.s }} {{ a }} {{ prefect.variables.v }}"


def test_a_value_is_not_expanded_again_in_its_own_pass():
    assert apply_values("{{ a }} {{ b }}", {"a": "{{ b }}", "b": "{{ a }}"}) == "{{ b }} {{ a }}"


# --- blocks


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{{ prefect.blocks.secret.s }}", "hidden"),
        ("{{ prefect.blocks.secret.s.value }}", "hidden"),
        ("Bearer << prefect.blocks.secret.s >>!", "Bearer hidden!"),
        ("{{ prefect.blocks.json.j }}", {"k": [1, {"x": None}], "values": "no value"}),
        ("{{ prefect.blocks.json.j.k[0] }}", 1),
        ("{{ prefect.blocks.json.j.value.k[1].x }}", None),
        ("{{ prefect.blocks.json.j.values }}", "no value"),
        ("{{ prefect.blocks.json.j.value.values }}", "no value"),
        ("{{ prefect.blocks.json.j.valu }}", ValueError),
        ("{{ prefect.blocks.my-db.d.host }}:{{ prefect.blocks.my-db.d.port }}", "db:5432"),
        ("{{ prefect.blocks.my-db.d }}", {"host": "db", "port": 5432}),
        ("{{ prefect.blocks.my-db.d.value }}", ValueError),
        ("{{ prefect.blocks.my-db.d. }}", ValueError),
        ("url {{ prefect.blocks.my-db.d }}", ValueError),
        ("{{ prefect.blocks.secret }}", ValueError),
        ("{{ prefect.blocks. }}", ValueError),
        ("{{ prefect.blocks.secret. }}", ObjectNotFound),
        (
            {"k": [{"$ref": {"block_document_id": BLOCK_ID}, "beside": "{{ prefect.blocks.no.such }}"}]},
            {"k": [{"by": "id"}]},
        ),
        ({"$ref": {}, "k": "{{ prefect.blocks.secret.s }}"}, {"$ref": {}, "k": "hidden"}),
        ({"$ref": {"block_document_id": None}}, {"$ref": {"block_document_id": None}}),
    ],
    ids=repr,
)
def test_blocks_are_resolved(template, filled):
    world = World(
        blocks={
            ("secret", "s"): {"value": "hidden"},
            ("json", "j"): {"value": {"k": [1, {"x": None}], "values": "no value"}},
            ("my-db", "d"): {"host": "db", "port": 5432},
        },
        documents={BLOCK_ID: {"by": "id"}},
    )
    if isinstance(filled, type):
        with pytest.raises(filled):
            resolve(template, {}, world)
    else:
        assert resolve(template, {}, world) == filled


def test_a_block_is_read_once_and_given_as_separate_copies():
    world = World(blocks={("json", "j"): {"value": ["x"]}}, documents={BLOCK_ID: {"k": []}})
    whole, reference = "{{ prefect.blocks.json.j }}", {"$ref": {"block_document_id": BLOCK_ID}}

    template = [whole, whole, reference, reference]
    first, second, third, fourth = run(resolve_block_document_references(template, world))
    first.append("changed")
    third["k"].append("changed")

    assert (second, fourth) == (["x"], {"k": []})
    assert world.blocks["json", "j"] == {"value": ["x"]}
    assert world.reads == [BLOCK_ID, ("json", "j")]


@pytest.mark.parametrize(
    "reference", ["x", None, [], 1, {"block_document_id": 7}, {"block_document_id": ["x"]}], ids=repr
)
def test_a_reference_of_another_shape_is_refused_by_name(reference):
    with pytest.raises(ConfigurationError, match=r"\$ref.*block_document_id"):
        resolve({"env": {"$ref": reference}})


@pytest.mark.parametrize("error", [ObjectNotFound("404 Not Found", 404), Unauthorized("403 Forbidden", 403)])
@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ prefect.blocks.secret.my-key }}", "secret/my-key"),
        ({"$ref": {"block_document_id": BLOCK_ID}}, BLOCK_ID),
    ],
    ids=["by name", "by id"],
)
def test_a_block_that_cannot_be_read_is_named(template, name, error):
    with pytest.raises(type(error), match=f"{name}.*{error}") as raised:
        resolve(template, {}, World(missing=error))

    assert raised.value.status_code == error.status_code


def test_a_refusal_does_not_show_what_the_block_holds():
    world = World(blocks={("secret", "s"): {"value": {"password": "hunter2"}}})

    for template in ("x {{ prefect.blocks.secret.s }}", "{{ prefect.blocks.secret.s.user }}"):
        with pytest.raises(TemplateError) as raised:
            resolve(template, {}, world)
        assert "hunter2" not in str(raised.value)
        assert "prefect.blocks.secret.s" in str(raised.value)


# --- variables


@pytest.mark.parametrize("value", [None, 0, False, "", ["x"], {"k": 1}, "text"], ids=repr)
def test_variables_are_typed_as_the_whole_text_and_text_inside(value):
    world = World(variables={"v": value})

    assert resolve("{{ prefect.variables.v }}", {}, world) == value
    assert resolve("a << prefect.variables.v >> b", {}, world) == f"a {value} b"


def test_a_missing_variable_is_empty_and_each_is_read_once():
    world = World(variables={"dotted.name": 1})
    template = {
        "k": "{{ prefect.variables.none }}",
        "l": ["-{{ prefect.variables.none }}-", "{{ prefect.variables.dotted.name }}"],
    }

    assert resolve(template, {}, world) == {"k": "", "l": ["--", 1]}
    assert world.reads == ["none", "dotted.name"]


def test_a_variable_that_cannot_be_read_is_named():
    class Refusing(World):
        async def read_variable_by_name(self, name: str) -> Any:
            raise Unauthorized("403 Forbidden", 403)

    with pytest.raises(Unauthorized, match=r"variable v.*403 Forbidden"):
        resolve("{{ prefect.variables.v }}", {}, Refusing())


# --- bounds


def nest(levels: int, shape: Any = lambda inner: [inner]) -> Any:
    value: Any = "{{ a }}"
    for _ in range(levels):
        value = shape(value)
    return value


shapes = pytest.mark.parametrize("shape", [lambda inner: [inner], lambda inner: {"k": inner}], ids=["list", "dict"])


@shapes
def test_nesting_up_to_the_bound_is_fine(shape):
    filled = resolve(nest(MAX_DEPTH, shape), {"a": 1})

    assert repr(filled) == repr(nest(MAX_DEPTH, shape)).replace("'{{ a }}'", "1")


@shapes
@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 10_000])
def test_nesting_beyond_the_bound_is_refused_in_every_stage(shape, levels):
    deep = nest(levels, shape)
    world = World(blocks={("t", "n"): {"value": deep}}, documents={BLOCK_ID: {"value": deep}})
    began = time.process_time()

    for refused in (
        lambda: apply_values(deep, {}),
        lambda: apply_values("in text: {{ v }}", {"v": deep}),
        lambda: resolve("{{ v }}", {"v": deep}),
        lambda: run(resolve_block_document_references("{{ prefect.blocks.t.n }}", world)),
        lambda: run(resolve_block_document_references({"$ref": {"block_document_id": BLOCK_ID}}, world)),
        lambda: resolve("-{{ prefect.variables.v }}-", {}, World(variables={"v": deep})),
        lambda: run(resolve_variables(deep, World())),
        lambda: unknown_placeholders(deep, []),
    ):
        with pytest.raises(ConfigurationError, match="nested deeper"):
            refused()
    assert time.process_time() - began < 20, "what is not linear takes minutes"


def test_a_list_or_dict_that_holds_itself_is_refused():
    endless: list[Any] = ["x"]
    endless.append({"again": endless})

    for template in (endless, "{{ v }}", "-{{ v }}-"):
        with pytest.raises(ConfigurationError, match="nested deeper"):
            resolve(template, {"v": endless})


@pytest.mark.parametrize("start", ["", "{{", "<<"])
@pytest.mark.parametrize("part", [" ", "a", "!", "{{", "<< ", "{{ a", "<< a ", "{{ a }}", "<< unknown >>"])
def test_a_megabyte_of_text_takes_no_more_than_a_moment(start, part):
    huge = start + part * (1_000_000 // len(part))
    began = time.process_time()

    apply_values([huge], {"a": ""})

    assert time.process_time() - began < 20, "what is not linear takes minutes"


# --- paths


def test_paths_lead_through_dicts_and_lists():
    nested = {"a": {"b": [0, {"c": "found"}], "": "empty"}, "s": "text"}

    assert get_from_dict(nested, "a.b[1].c") == "found"
    assert get_from_dict(nested, "a.b.1.c") == "found"
    assert get_from_dict(nested, "a.") == "empty"
    assert get_from_dict(nested, "s[0]") == "t"
    assert get_from_dict(nested, "a.x.c", "default") == "default"
    assert get_from_dict(nested, "9" * 5000) is None


def test_setting_a_path_changes_no_dict_that_was_put_in_before():
    inner = {"kept": 1}
    target: dict[str, Any] = {}

    set_in_dict(target, "env.deep", inner)
    set_in_dict(target, "env.deep.new[0]", 2)

    assert target == {"env": {"deep": {"kept": 1, "new": {"0": 2}}}}
    assert inner == {"kept": 1}


def test_setting_a_path_through_a_value_is_refused():
    with pytest.raises(TypeError, match=r"'env\.X\.y'.*'X'"):
        set_in_dict({"env": {"X": "text"}}, "env.X.y", 1)


def test_deep_merge_merges_dicts_and_changes_neither():
    base, over = {"a": {"x": 1, "y": {"z": 1}}, "b": {"k": 1}}, {"a": {"y": {"w": 2}}, "b": 3}

    assert deep_merge(base, over) == {"a": {"x": 1, "y": {"z": 1, "w": 2}}, "b": 3}
    assert (base, over) == ({"a": {"x": 1, "y": {"z": 1}}, "b": {"k": 1}}, {"a": {"y": {"w": 2}}, "b": 3})
