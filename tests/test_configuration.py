"""From job template and variables to the job."""

from __future__ import annotations

import copy
from typing import Any
from uuid import uuid4

import pytest
from pydantic import Field, ValidationError

from procworker.configuration import (
    BaseJobConfiguration,
    BaseVariables,
    BaseWorkerResult,
    default_template,
    fill_template,
    merge_job_variables,
    with_extra_variables,
)
from procworker.errors import ConfigurationError
from procworker.process import ProcessJobConfiguration, ProcessVariables, ProcessWorker
from procworker.server.models import Deployment, Flow, FlowRun, WorkPool

TEMPLATE = default_template(ProcessJobConfiguration, ProcessVariables)


def template(job: dict[str, Any], **properties: Any) -> dict[str, Any]:
    return {"job_configuration": job, "variables": {"properties": properties}}


def test_the_run_wins_over_the_deployment_key_by_key_only_in_env() -> None:
    merged = merge_job_variables(
        {"env": {"A": "1", "B": "1"}, "labels": {"x": "1"}, "name": "d"},
        {"env": {"B": "2", "C": None}, "labels": {"y": "2"}},
    )

    assert merged == {"env": {"A": "1", "B": "2", "C": None}, "labels": {"y": "2"}, "name": "d"}


def test_merging_leaves_its_arguments_alone() -> None:
    deployment, run = {"env": {"A": "1"}}, {"env": {"B": "2"}}
    before = copy.deepcopy((deployment, run))

    merge_job_variables(deployment, run)

    assert (deployment, run) == before
    assert merge_job_variables(None, None) == {}
    assert merge_job_variables({"env": "text"}, run) == {"env": {"B": "2"}}
    assert merge_job_variables(deployment, {"env": None}) == {"env": {"A": "1"}}


def test_env_is_laid_template_then_default_then_variables() -> None:
    base = template(
        {"env": {"A": "template", "B": "template", "C": "template"}},
        env={"type": "object", "default": {"B": "default", "C": "default"}},
    )

    assert fill_template(base, {"env": {"C": "run"}})["env"] == {"A": "template", "B": "default", "C": "run"}


def test_a_default_env_replaces_a_placeholder_and_is_merged_with_the_run() -> None:
    base = template({"env": "{{ env }}"}, env={"default": {"A": "1"}})

    assert fill_template(base, {})["env"] == {"A": "1"}
    assert fill_template(base, {"env": {"B": "2"}})["env"] == {"A": "1", "B": "2"}


def test_null_defaults_count_as_missing_and_falsy_ones_do_not() -> None:
    base = template({"a": "{{ a }}", "b": "{{ b }}"}, a={"default": None}, b={"default": 0})

    assert fill_template(base, {}) == {"b": 0}


def test_dotted_names_reach_into_mappings_and_plain_names_win() -> None:
    base = template({"env": "{{ env }}", "x": "{{ x }}"}, env={}, x={})

    assert fill_template(base, {"env.A": "1", "env.B": "1", "env": {"B": "2"}})["env"] == {"A": "1", "B": "2"}
    assert fill_template(base, {"x.y.z": 1})["x"] == {"y": {"z": 1}}
    with pytest.raises(ConfigurationError, match=r"'x\.y\.z'"):
        fill_template(base, {"x.y": 1, "x.y.z": 2})


def test_the_cached_template_and_the_variables_are_never_changed() -> None:
    base = template({"env": {"A": "1"}}, env={"default": {"B": "1"}})
    values = {"env": {"C": "1"}, "env.D": "1"}
    before = copy.deepcopy((base, values))

    fill_template(base, values)

    assert (base, values) == before


def test_a_template_without_its_parts_says_which() -> None:
    with pytest.raises(ConfigurationError, match="'variables'"):
        fill_template({"job_configuration": {}}, {})


def test_an_unknown_angle_placeholder_stays_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    base = template({"command": "run << comand >>"}, command={})

    assert fill_template(base, {})["command"] == "run << comand >>"
    assert "<< comand >> in the job template is no variable and stays: did you mean 'command'?" in caplog.text
    caplog.clear()
    fill_template(template({"command": "cat << EOF >> file", "name": "<< ctx.flow.name >>"}, command={}), {})
    assert not caplog.text


async def test_block_and_variable_references_are_looked_up() -> None:
    class Resolver:
        async def read_block_document_by_name(self, name: str, block_type_slug: str) -> Any:
            return FlowRun.model_construct(data={"value": f"{block_type_slug}/{name}"})

        async def read_block_document(self, id: Any) -> Any:
            return FlowRun.model_construct(data={"KEY": "from-id"})

        async def read_variable_by_name(self, name: str) -> Any:
            return FlowRun.model_construct(value=f"variable {name}")

    configuration = await ProcessJobConfiguration.from_template_and_values(
        TEMPLATE,
        {
            "name": "<< prefect.variables.v >>",
            "command": "{{ prefect.blocks.secret.token }} --x",
            "env": {"$ref": {"block_document_id": "1"}},
        },
        Resolver(),
    )

    assert configuration.name == "variable v"
    assert configuration.command == "secret/token --x"
    assert configuration.env == {"KEY": "from-id"}


def test_values_of_env_become_text_and_null_stays() -> None:
    configuration = BaseJobConfiguration(env={"A": True, "B": 1, "C": None})  # type: ignore[dict-item]

    assert configuration.env == {"A": "True", "B": "1", "C": None}
    for wrong in (["A"], None, "A=1"):
        with pytest.raises(ValidationError, match="env"):
            BaseJobConfiguration(env=wrong)  # type: ignore[arg-type]


def test_a_blank_command_is_no_command() -> None:
    assert BaseJobConfiguration(command="").command is None
    assert BaseJobConfiguration(command="prefect flow-run execute").is_using_a_runner
    assert not BaseJobConfiguration().is_using_a_runner


def prepared(configuration: BaseJobConfiguration, **options: Any) -> BaseJobConfiguration:
    flow_run = FlowRun(id=uuid4(), name="lucky-lynx", flow_id=uuid4(), deployment_id=uuid4(), parameters={"day": 1})
    deployment = Deployment(id=flow_run.deployment_id, name="nightly", updated="2026-01-01T00:00:00+02:00")  # type: ignore[arg-type]
    flow = Flow(id=flow_run.flow_id, name="etl")  # type: ignore[arg-type]
    pool = WorkPool(id=uuid4(), name="pool")
    configuration._inherited = options.pop("inherited", {})
    configuration.prepare(flow_run, deployment, flow, pool, "w1", options.pop("worker_id", None))
    return configuration


def test_a_job_is_prepared_with_environment_labels_name_and_command() -> None:
    done = prepared(BaseJobConfiguration(env={"A": "job"}, labels={"own": "1"}), inherited={"A": "below", "B": "below"})

    assert done.env["A"] == "job"
    assert done.env["B"] == "below"
    assert done.env["PREFECT__FLOW_NAME"] == "etl"
    assert done.env["PREFECT__DEPLOYMENT_NAME"] == "nightly"
    assert done.env["PREFECT__WORKER_NAME"] == "w1"
    assert "PREFECT__WORKER_ID" not in done.env
    assert done.labels["prefect.io/deployment-updated"] == "2025-12-31T22:00:00+00:00"
    assert done.labels["prefect.io/worker-name"] == "w1"
    assert done.labels["own"] == "1"
    assert (done.name, done.command) == ("lucky-lynx", "prefect flow-run execute")


def test_null_in_env_removes_what_is_inherited_but_not_the_runs_own_variables() -> None:
    done = prepared(
        BaseJobConfiguration(env={"A": None, "PREFECT__FLOW_RUN_ID": "forged"}), inherited={"A": "1", "B": "1"}
    )

    assert "A" not in done.env
    assert done.env["B"] == "1"
    assert done.env["PREFECT__FLOW_RUN_ID"] != "forged"


def test_a_name_may_be_made_of_the_flow_and_its_run() -> None:
    done = prepared(BaseJobConfiguration(name="{{ ctx.flow.name }}-{{ ctx.flow_run.parameters.day }}{{ ctx.no }}"))

    assert done.name == "etl-1"
    assert prepared(BaseJobConfiguration(name="{{ ctx.nothing }}")).name == "lucky-lynx"


def test_an_old_prepare_for_flow_run_gets_three_arguments_and_its_own_type_error_is_not_hidden() -> None:
    class Old(BaseJobConfiguration):
        def prepare_for_flow_run(self, flow_run: Any, deployment: Any = None, flow: Any = None) -> None:  # type: ignore[override]
            raise TypeError("its own fault")

    class Any_(BaseJobConfiguration):
        def prepare_for_flow_run(self, flow_run: Any, *args: Any, **options: Any) -> None:
            self.labels = {name: str(value) for name, value in options.items() if name == "worker_name"}

    with pytest.raises(TypeError, match="its own fault"):
        prepared(Old())
    assert prepared(Any_()).labels == {"worker_name": "w1"}


def test_without_a_worker_the_settings_are_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://somewhere/api")
    configuration = BaseJobConfiguration()
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), name="r"))

    assert configuration.env["PREFECT_API_URL"] == "http://somewhere/api"


def test_each_field_has_its_place_in_the_template_and_may_name_another() -> None:
    class Own(BaseJobConfiguration):
        memory: int = Field(default=1, json_schema_extra={"template": "{{ memory_gb }}Gi"})

    assert Own.json_template()["memory"] == "{{ memory_gb }}Gi"
    assert Own.json_template()["command"] == "{{ command }}"
    assert "template" not in default_template(Own, None)["variables"]["properties"]["memory"]


def test_schemas_are_in_the_form_that_servers_read() -> None:
    class Inner(BaseVariables):
        model_config = {"extra": "forbid"}

    class Outer(BaseVariables):
        model_config = {"extra": "forbid"}
        inner: Inner

    schema = Outer.model_json_schema()

    assert schema["properties"]["inner"]["$ref"] == "#/definitions/Inner"
    assert "$defs" not in schema
    assert "additionalProperties" not in schema
    assert "additionalProperties" not in schema["definitions"]["Inner"]


def test_extra_variables_are_added_to_a_copy_of_a_template_that_has_none_of_them() -> None:
    extra = ProcessWorker.extra_variables
    prefects = {
        "job_configuration": {"command": "{{ command }}"},
        "variables": {"type": "object", "properties": {"command": {"type": "string"}}},
    }
    before = copy.deepcopy(prefects)

    added = with_extra_variables(prefects, TEMPLATE, extra)

    assert prefects == before
    assert added["job_configuration"]["python"] == "{{ python }}"
    assert extra < set(added["variables"]["properties"])
    assert fill_template(added, {"python": "/venv", "timeout_seconds": 5})["python"] == "/venv"


def test_fields_that_an_administrator_removed_are_not_added_back() -> None:
    trimmed = copy.deepcopy(TEMPLATE)
    del trimmed["job_configuration"]["timeout_seconds"], trimmed["variables"]["properties"]["timeout_seconds"]

    assert with_extra_variables(trimmed, TEMPLATE, ProcessWorker.extra_variables) == trimmed
    assert with_extra_variables({}, TEMPLATE, ProcessWorker.extra_variables) == {}


def test_a_result_is_true_when_its_status_code_is_0() -> None:
    assert BaseWorkerResult(identifier="1", status_code=0)
    assert not BaseWorkerResult(identifier="1", status_code=-9)


async def test_a_configuration_can_be_resolved_for_a_flow_run_directly() -> None:
    deployment = Deployment(id=uuid4(), name="d", job_variables={"env": {"A": "1"}})

    class Client:
        async def read_deployment(self, id: Any) -> Deployment:
            return deployment

        async def read_flow(self, id: Any) -> Flow:
            return Flow(id=uuid4(), name="f")

    flow_run = FlowRun(id=uuid4(), name="r", flow_id=uuid4(), deployment_id=deployment.id)
    done = await BaseJobConfiguration.resolve_for_flow_run(
        flow_run,
        client=Client(),
        work_pool=WorkPool(id=uuid4(), name="p", base_job_template=default_template(BaseJobConfiguration, None)),
        worker_name="w",
    )

    assert (done.env["A"], done.env["PREFECT__FLOW_NAME"]) == ("1", "f")
