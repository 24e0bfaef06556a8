"""Hypothesis strategies for job templates, and a stand-in for what the server knows."""

from __future__ import annotations

import re
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from procworker.errors import ObjectNotFound

ENVIRON = {"PW_TEST_SET": "from env", "PW_TEST_EMPTY": ""}
BLOCK_ID = "4c1ad0a7-0000-4000-8000-000000000001"

ODD_NAMES = [
    "-",
    ".",
    "[0]",
    "]",
    "a$",
    "a..b",
    "a.",
    ".a",
    "a]b",
    "b[-1]",
    "b[00]",
    "1_0",
    "prefect",
    "prefect.other",
]
STANDARD_NAMES = ["a", "b", "c-d", "é", "1", "env", "a.b", "a.b.c", "b[0]", "b.0", "b[1].k", "env.K", "x.y"]
ENV_NAMES = ["$PW_TEST_SET", "$PW_TEST_EMPTY", "$PW_TEST_MISSING", "$$PW_TEST_SET", "$", "$PW_TEST_SET.x"]
BLOCK_TYPES, BLOCK_DOCUMENTS = ["secret", "my-type"], ["one", "two-2"]
BLOCK_PATHS = [
    "",
    "",
    "",
    "",
    ".value",
    ".value",
    ".k",
    ".k",
    ".value.k",
    ".value[0]",
    ".k[0].b",
    ".values",
    ".0",
    ".",
]
VARIABLES = ["v", "w-1", "dotted.name", "missing"]

spaces = st.sampled_from(["", " ", " ", "  ", "\t", "\n", "\u00a0"])
# No piece can become a part of a placeholder together with its neighbours.
plain_text = st.sampled_from(
    [
        "",
        " ",
        "/",
        "text/",
        "é/",
        "/$X/",
        "${X}",
        "{",
        "}",
        "{}",
        "{{ }}",
        "{{ two words }}",
        "{{a/b}}",
        "%s",
        "\\1",
        "\n",
        "!",
    ]
)
standard_names = (
    st.sampled_from(STANDARD_NAMES) | st.sampled_from(ODD_NAMES) | st.text("abk01.-[]$_é", min_size=1, max_size=6)
)
env_names = st.sampled_from(ENV_NAMES)
block_names = st.builds(
    "prefect.blocks.{}.{}{}".format,
    st.sampled_from(BLOCK_TYPES),
    st.sampled_from([*BLOCK_DOCUMENTS * 5, "missing"]),
    st.sampled_from(BLOCK_PATHS),
)
variable_names = st.sampled_from(VARIABLES).map("prefect.variables.{}".format)


@dataclass
class World:
    """What the server knows, and a client that reads it: ours, and one that passes for Prefect's."""

    blocks: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    missing: Exception = field(default_factory=lambda: ObjectNotFound("404 Not Found", 404))
    reads: list[Any] = field(default_factory=list)

    async def __aenter__(self) -> World:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def read_block_document_by_name(self, name: str, block_type_slug: str) -> Any:
        return Found(data=self._find(self.blocks, (block_type_slug, name)))

    async def read_block_document(self, block_document_id: str) -> Any:
        return Found(data=self._find(self.documents, block_document_id))

    async def read_variable_by_name(self, name: str) -> Any:
        self.reads.append(name)
        return Found(value=self.variables[name]) if name in self.variables else None

    def _find(self, known: dict[Any, Any], key: Any) -> Any:
        self.reads.append(key)
        if key not in known:
            raise self.missing
        return known[key]


@dataclass
class Found:
    """A block document or a variable."""

    data: Any = None
    value: Any = None


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run what only awaits a World, which never waits; thousands of event loops would take long."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a World does not wait")


def with_angles(template: Any, names: set[str] | None = None) -> Any:
    """Write every `{{ name }}` as `<< name >>`, and collect the names."""

    def angles(match: re.Match[str]) -> str:
        if names is not None:
            names.add(re.split(r"[.\[]", match["name"])[0].replace("]", ""))
        return match.expand(r"<<\g<before>\g<name>\g<after>>>")

    if isinstance(template, str):
        return re.sub(r"\{\{(?P<before>\s*)(?P<name>[\w.\-\[\]$]+)(?P<after>\s*)\}\}", angles, template)
    if isinstance(template, list):
        return [with_angles(item, names) for item in template]
    if isinstance(template, dict):
        return {key: with_angles(value, names) for key, value in template.items()}
    return template


def placeholders(names: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """`{{ name }}`, with any white space."""
    return st.builds("{{{{{}{}{}}}}}".format, spaces, names, spaces)


def texts(names: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """A text that is a placeholder, has some, or has none."""
    one = placeholders(names)
    return one | st.lists(one | plain_text, min_size=2, max_size=6).map("".join)


def nested(leaves: st.SearchStrategy[Any], keys: list[str], max_leaves: int = 8) -> st.SearchStrategy[Any]:
    """JSON values over these leaves."""
    key = st.sampled_from(keys)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(key, inner, max_size=3),
        max_leaves=max_leaves,
    )


scalars = st.sampled_from([None, 0, False, 0.0, 1, True, -1, 1.5, float("nan"), 2**70])
references = st.sampled_from(
    [
        {"$ref": {"block_document_id": BLOCK_ID}},
        {"$ref": {"block_document_id": BLOCK_ID}, "beside": "{{ prefect.blocks.none.such }}"},
        {"$ref": {"block_document_id": ""}, "beside": "{{ a }}"},
        {"$ref": {}},
    ]
)

# What each stage puts in may hold references for the stages after it; for itself, see KNOWN_DIFFERENCES.
variable_values = nested(scalars | texts(standard_names | env_names | block_names), ["value", "k"], 4)
block_values = nested(scalars | texts(variable_names), ["value", "values", "k", "b"], 5)
block_data = (
    st.fixed_dictionaries({"value": block_values})
    | st.fixed_dictionaries({"value": block_values, "k": block_values})
    | st.fixed_dictionaries({"k": block_values}, optional={"values": block_values, "0": block_values})
)
job_values = nested(scalars | texts(block_names | variable_names), ["a", "b", "c", "k", "K", "0"], 5)
values = st.dictionaries(
    st.sampled_from(["a", "b", "c-d", "é", "1", "env", "", "$PW_TEST_SET"]), job_values, max_size=5
)

all_names = standard_names | env_names | block_names | variable_names
leaves = texts(all_names) | texts(standard_names) | texts(block_names | variable_names) | references | scalars
keys = ["command", "env", "{{ a }}", "k", "$"]
templates = st.dictionaries(st.sampled_from(keys), nested(leaves, keys, 6), min_size=1, max_size=4) | leaves
worlds = st.fixed_dictionaries(
    {
        "blocks": st.fixed_dictionaries({(slug, name): block_data for slug in BLOCK_TYPES for name in BLOCK_DOCUMENTS}),
        "documents": st.fixed_dictionaries({BLOCK_ID: block_data}),
        "variables": st.fixed_dictionaries({name: variable_values for name in VARIABLES if name != "missing"}),
    }
)
