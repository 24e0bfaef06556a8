"""Job configurations come out as Prefect 3.8 makes them: generated templates and variables, one interpreter."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import World, run, with_angles, worlds

from procworker.configuration import BaseJobConfiguration, merge_job_variables
from procworker.errors import ObjectNotFound

pytestmark = pytest.mark.real

with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
    patch.setenv("PREFECT_HOME", home)  # importing Prefect makes this directory
    prefect = pytest.importorskip("prefect", reason="compares with an installed Prefect 3.8: there is none here")
    if not prefect.__version__.startswith("3.8."):
        pytest.skip(f"compares with Prefect 3.8, not {prefect.__version__}", allow_module_level=True)
    import prefect.exceptions
    from prefect.workers.base import BaseJobConfiguration as Theirs

# What a variable puts in holds no placeholder of the same stage: see KNOWN_DIFFERENCES of the template engine.
references = ["", "plain", "{{ prefect.variables.v }}", "{{ prefect.variables.missing }}/x"]
references += ["{{ prefect.blocks.secret.one }}"]
standards = ["{{ a }}", "{{ b.c }}", "{{ a }}/{{ env }}", "{{ missing }}", "x {{ missing }} y", "{{ $HOME }}"]
texts = st.sampled_from(references + standards)
scalars = st.sampled_from([None, 0, False, 1, True, 2.5, *references])
envs = st.dictionaries(st.sampled_from(["A", "B", "C"]), scalars, max_size=3)
properties = st.dictionaries(
    st.sampled_from(["a", "b", "env", "labels", "name", "command"]),
    st.just({}) | st.fixed_dictionaries({"type": st.just("string"), "default": scalars | envs}),
    max_size=5,
)
jobs = st.fixed_dictionaries(
    {},
    optional={
        "env": st.just("{{ env }}") | st.dictionaries(st.sampled_from(["A", "B"]), texts | scalars, max_size=2) | texts,
        "labels": st.just("{{ labels }}") | st.dictionaries(st.sampled_from(["x", "y"]), texts, max_size=2),
        "name": st.just("{{ name }}") | texts,
        "command": st.just("{{ command }}") | texts,
        "unknown": texts,
    },
)
variables = st.dictionaries(
    st.sampled_from(["a", "b", "b.c", "b.c.d", "env", "env.A", "env.B", "labels", "labels.x", "name", "command"]),
    scalars | envs,
    max_size=6,
)


def outcome(cls: Any, job: Any, schema: Any, values: Any, world: Any, missing: Any) -> Any:
    """The configuration as plain data, or None where it is refused."""
    template = {"job_configuration": copy.deepcopy(job), "variables": {"properties": copy.deepcopy(schema)}}
    client = World(**copy.deepcopy(world), missing=missing)
    try:
        return run(cls.from_template_and_values(template, copy.deepcopy(values), client=client)).model_dump()
    except Exception:
        return None


MISSING_THERE = prefect.exceptions.ObjectNotFound(http_exc=Exception("404"))
MISSING_HERE = ObjectNotFound("404", 404)
MORE = int(os.environ.get("PROCWORKER_TEST_EXAMPLES", "1"))
EXAMPLES = settings(max_examples=800 * MORE, deadline=None, suppress_health_check=list(HealthCheck))


@EXAMPLES
@given(jobs, properties, variables, worlds)
def test_a_configuration_is_what_prefect_makes_of_template_and_values(
    job: Any, schema: Any, values: Any, world: Any
) -> None:
    # There Prefect fails by accident (a TypeError), even when the text stands for a mapping.
    assume(not (isinstance(job.get("env"), dict) and isinstance(schema.get("env", {}).get("default"), str)))
    ours = outcome(BaseJobConfiguration, job, schema, values, world, MISSING_HERE)

    assert ours == outcome(Theirs, job, schema, values, world, MISSING_THERE)


@EXAMPLES
@given(jobs, properties, variables, worlds)
def test_angle_placeholders_make_the_same_configuration_when_all_names_are_known(
    job: Any, schema: Any, values: Any, world: Any
) -> None:
    names: set[str] = set()
    angled = with_angles(job, names)
    declared = {name: {} for name in names if not name.startswith(("$", "prefect"))} | schema

    ours = outcome(BaseJobConfiguration, angled, declared, values, world, MISSING_HERE)

    assert ours == outcome(BaseJobConfiguration, job, declared, values, world, MISSING_HERE)


@EXAMPLES
@given(variables, variables)
def test_deployment_and_run_are_merged_as_prefect_does(deployment: Any, flow_run: Any) -> None:
    theirs = {**copy.deepcopy(deployment)}
    above = copy.deepcopy(flow_run)
    # What Prefect does with an `env` of the run that is no mapping is an error later or here; ours is one later.
    if isinstance(theirs.get("env"), dict):
        if not isinstance(above.get("env", {}), dict):
            return
        theirs["env"].update(above.pop("env", {}))
    theirs.update(above)

    assert merge_job_variables(deployment, flow_run) == theirs
