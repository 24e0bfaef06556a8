"""The template engine gives what Prefect 3.8 gives: generated templates, both engines, one interpreter."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import (
    ENVIRON,
    World,
    job_values,
    nested,
    run,
    scalars,
    standard_names,
    templates,
    values,
    with_angles,
    worlds,
)

from procworker import template as ours
from procworker.errors import ConfigurationError, ObjectNotFound

pytestmark = pytest.mark.real

with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
    patch.setenv("PREFECT_HOME", home)  # importing Prefect makes this directory
    prefect = pytest.importorskip("prefect", reason="compares with an installed Prefect 3.8: there is none here")
    if not prefect.__version__.startswith("3.8."):
        pytest.skip(
            f"compares with Prefect 3.8, whose template engine differs from {prefect.__version__}'s",
            allow_module_level=True,
        )
    import prefect.exceptions
    import prefect.utilities.annotations
    import prefect.utilities.collections as theirs_collections
    import prefect.utilities.templating as theirs


class Difference(NamedTuple):
    """Where procworker differs on purpose; `ours` and `theirs` are results or exceptions."""

    contract: str
    why: str
    template: Any
    values: dict[str, Any]
    ours: Any
    theirs: list[Any]


def deep(levels: int) -> Any:
    nest: Any = "bottom"
    for _ in range(levels):
        nest = [nest]
    return nest


# All of them, at most ten; generated templates keep clear of them.
KNOWN_DIFFERENCES = [
    Difference(
        "4.3: Replacement order is unspecified.",
        "Prefect replaces one by one and may fill what an earlier one put in; we do one pass.",
        "{{ a }}-{{ b }}",
        {"a": "{{ b }}", "b": "{{ a }}"},
        "{{ b }}-{{ a }}",
        ["{{ a }}-{{ a }}", "{{ b }}-{{ b }}"],
    ),
    Difference(
        "4.3: Dict: recurse values. List: recurse.",
        "Nesting has a bound, and is refused by name beyond it.",
        deep(5000),
        {},
        ConfigurationError,
        [RecursionError],
    ),
    Difference(
        '4.4: Dict holding {"$ref": {"block_document_id": id}} -> replaced by that document\'s data.',
        "A $ref of another shape is refused by name; in Prefect it is an AttributeError.",
        {"$ref": "#/definitions/x"},
        {},
        ConfigurationError,
        [AttributeError],
    ),
    Difference(
        '4.4: Dict holding {"$ref": {"block_document_id": id}} -> replaced by that document\'s data.',
        "So is an id that is no text; Prefect asks the server for it.",
        {"$ref": {"block_document_id": 7}},
        {},
        ConfigurationError,
        [prefect.exceptions.ObjectNotFound],
    ),
    Difference(
        "4.4: split on the first two dots after the prefix.",
        "Prefect removes the prefix from the middle of a reference too.",
        "{{ prefect.blocks.t.prefect.blocks.n }}",
        {},
        "at a path",
        [prefect.exceptions.ObjectNotFound],
    ),
    Difference(
        "4.5: Names follow the rest of the dotted text.",
        "The same for variables.",
        "{{ prefect.variables.a.prefect.variables.b }}",
        {},
        "whole name",
        [""],
    ),
    Difference(
        "4.4: 404 -> ObjectNotFound; not found -> ValueError.",
        "Of several errors we raise the one that needs no reading; Prefect the first one it meets.",
        ["{{ prefect.blocks.no.such }}", "{{ prefect.blocks.broken }}"],
        {},
        ValueError,
        [prefect.exceptions.ObjectNotFound],
    ),
    Difference(
        "0: A base job template that uses `<< >>` is accepted by the server.",
        "`<< >>` is a placeholder if its name is known.",
        "<< a >>",
        {"a": 1},
        1,
        ["<< a >>"],
    ),
    Difference(
        "0: A base job template that uses `<< >>` is accepted by the server.",
        "`<<! >>` is a literal `<< >>`.",
        "<<! a >>",
        {"a": 1},
        "<< a >>",
        ["<<! a >>"],
    ),
]


@pytest.fixture(autouse=True, scope="module")
def environ():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRON.items():
            patch.setenv(name, value)
        yield


def examples(count: int):
    more = int(os.environ.get("PROCWORKER_TEST_EXAMPLES", "1"))
    return settings(max_examples=count * more, deadline=None, suppress_health_check=[HealthCheck.too_slow])


async def three_stages(engine: Any, template: Any, job_variables: dict[str, Any], client: World, **options: Any) -> Any:
    filled = engine.apply_values(template, job_variables, **options)
    filled = await engine.resolve_block_document_references(filled, client=client)
    return await engine.resolve_variables(filled, client=client)


def world(facts: dict[str, Any], engine: Any) -> World:
    """Make what the server knows for one engine alone, so that neither sees what the other did to it."""
    if engine is ours:
        return World(**copy.deepcopy(facts))
    return World(**copy.deepcopy(facts), missing=prefect.exceptions.ObjectNotFound(Exception("404")))


def outcome(engine: Any, template: Any, job_variables: dict[str, Any], facts: dict[str, Any], **options: Any) -> str:
    """What three stages give, told with types, order and all; all refusals are alike."""
    template, job_variables = copy.deepcopy((template, job_variables))
    try:
        return told(run(three_stages(engine, template, job_variables, world(facts, engine), **options)))
    except (ValueError, ObjectNotFound, prefect.exceptions.ObjectNotFound):
        return "refused"


def told(result: Any) -> str:
    return repr(result).replace(repr(theirs.NotSet), repr(ours.NotSet))


@examples(1200)
@given(
    template=templates,
    values=values,
    remove_notset=st.booleans(),
    skip_prefixes=st.sampled_from([None, None, [], ["a"], ["prefect.", "$"], ["b", "prefect.blocks.secret"]]),
)
def test_apply_values_gives_what_prefect_gives(template, values, remove_notset, skip_prefixes):
    before = copy.deepcopy((template, values))
    options = {"remove_notset": remove_notset, "skip_prefixes": skip_prefixes}

    mine = ours.apply_values(template, values, **options)

    assert told(mine) == told(theirs.apply_values(template, values, **options))
    assert repr((template, values)) == repr(before)


@examples(1200)
@given(template=templates, values=values, facts=worlds, remove_notset=st.booleans())
def test_three_stages_give_what_prefect_gives(template, values, facts, remove_notset):
    mine, his = (outcome(engine, template, values, facts, remove_notset=remove_notset) for engine in (ours, theirs))

    assert mine == his


@examples(800)
@given(template=templates, values=values, facts=worlds)
def test_angles_with_known_names_give_what_braces_give_in_prefect(template, values, facts):
    names: set[str] = set()
    angled = with_angles(template, names)

    mine = outcome(ours, angled, values, facts, known=names)

    assert mine == outcome(theirs, template, values, facts)


@examples(400)
@given(nest=job_values, path=standard_names)
def test_get_from_dict_finds_what_prefect_finds(nest, path):
    assert repr(ours.get_from_dict(nest, path, "default")) == repr(
        theirs_collections.get_from_dict(nest, path, "default")
    )


paths = standard_names | st.sampled_from(["a.b.c", "a.c", "k.b[0]", "env.K", "env"])
json_dicts = st.dictionaries(st.sampled_from(["a", "b", "c", "k", "K", "env"]), nested(scalars, ["a", "b", "c", "K"]))


@examples(300)
@given(nest=json_dicts, path=paths)
def test_set_in_dict_sets_what_prefect_sets(nest, path):
    def after(set_in_dict: Any) -> str:
        mine = copy.deepcopy(nest)
        try:
            set_in_dict(mine, path, "new")
        except TypeError:
            return "refused"
        return repr(mine)

    assert after(ours.set_in_dict) == after(theirs_collections.set_in_dict)


@examples(300)
@given(base=json_dicts, over=json_dicts)
def test_deep_merge_merges_as_prefect_does(base, over):
    assert repr(ours.deep_merge(base, over)) == repr(theirs_collections.deep_merge(base, over))


@pytest.mark.parametrize("known", KNOWN_DIFFERENCES, ids=lambda known: known.why)
def test_known_difference_is_one_still(known):
    facts = {
        "blocks": {("t", "prefect"): {"blocks": {"n": "at a path"}}},
        "variables": {"a.prefect.variables.b": "whole name"},
    }

    def given_by(engine: Any) -> Any:
        try:
            return run(three_stages(engine, known.template, known.values, world(facts, engine)))
        except Exception as error:
            return error

    def agrees(expected: Any, given: Any) -> bool:
        return isinstance(given, expected) if isinstance(expected, type) else given == expected

    assert agrees(known.ours, given_by(ours))
    assert any(agrees(expected, given_by(theirs)) for expected in known.theirs)


def test_known_differences_are_few():
    assert len(KNOWN_DIFFERENCES) <= 10
