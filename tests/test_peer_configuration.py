"""What authors of workers rely on in job configurations, beyond test_configuration.py."""

from __future__ import annotations

import copy
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator
from strategies import BLOCK_ID, World

from procworker import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult, __version__
from procworker.errors import ConfigurationError, ObjectNotFound
from procworker.process import ProcessJobConfiguration
from procworker.server.models import Deployment, Flow, FlowRun, WorkPool
from procworker.settings import Settings

FLOW = Flow(id=uuid4(), name="etl")
PLAIN = {"command": None, "env": {}, "labels": {}, "name": None}
PLACES = {name: f"{{{{ {name} }}}}" for name in PLAIN}


def template(job: dict[str, Any], **properties: Any) -> dict[str, Any]:
    return {"job_configuration": job, "variables": {"properties": properties}}


async def dumped(
    cls: type[BaseJobConfiguration], base: dict[str, Any], values: dict[str, Any] | None = None, world: Any = None
) -> dict[str, Any]:
    """What template and values make of a class, as plain data."""
    return (await cls.from_template_and_values(base, values or {}, world)).model_dump()


class Sized(BaseJobConfiguration):
    """A configuration with two required fields of its own."""

    image: str
    cpu: int = Field(json_schema_extra={"template": "{{ cpu_cores }}"})


class Nested(BaseJobConfiguration):
    """One whose own field is a structure that placeholders stand in."""

    manifest: Any = Field(default_factory=dict, json_schema_extra={"template": {"image": "{{ image }}"}})


SIZED = {"image": "{{ image }}", "cpu": "{{ cpu_cores }}"}


@pytest.mark.parametrize(
    ("properties", "values", "own"),
    [
        ({"image": {"default": "python"}, "cpu_cores": {"default": 2}}, {}, ("python", 2)),
        ({"image": {"default": "python"}, "cpu_cores": {"default": 2}, "unused": {"default": 1}}, {}, ("python", 2)),
        ({"image": {"default": "python"}, "cpu_cores": {"default": 2}}, {"image": "slim"}, ("slim", 2)),
        ({"image": {"type": "string"}, "cpu_cores": {"default": 2}}, {"image": "slim"}, ("slim", 2)),
        ({"command": {"default": "echo"}, "cpu_cores": {}}, {"image": "slim", "cpu_cores": "4"}, ("slim", 4)),
    ],
    ids=["defaults", "unused variable", "override", "required and given", "a default that the job does not use"],
)
async def test_defaults_and_values_fill_the_fields(properties: Any, values: Any, own: tuple[str, int]) -> None:
    assert await dumped(Sized, template(SIZED, **properties), values) == {**PLAIN, "image": own[0], "cpu": own[1]}


async def test_a_required_field_without_value_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="image"):
        await dumped(Sized, template(SIZED, image={"type": "string"}), {"cpu_cores": 1})


@pytest.mark.parametrize(
    ("manifest", "filled"),
    [
        ({"image": "{{ image }}", "spec": [{"cpu": "{{ cpu_cores }}"}]}, {"image": "slim", "spec": [{"cpu": 2}]}),
        (["{{ image }}", "{{ cpu_cores }}", "{{ nobody }}"], ["slim", 2]),
        ({"a": 1, "b": 1.1, "c": True, "d": None}, {"a": 1, "b": 1.1, "c": True, "d": None}),
    ],
    ids=["mapping", "list", "no placeholder"],
)
async def test_placeholders_may_stand_anywhere_in_a_structure(manifest: Any, filled: Any) -> None:
    base = template({"manifest": manifest}, image={}, cpu_cores={"default": 2})

    assert (await dumped(Nested, base, {"image": "slim"}))["manifest"] == filled


async def test_a_template_may_declare_nothing_at_all() -> None:
    base = {"job_configuration": {"manifest": {"a": 1}, "command": "true"}, "variables": {}}

    assert await dumped(Nested, base) == {**PLAIN, "command": "true", "manifest": {"a": 1}}


async def test_an_env_in_the_template_becomes_text_and_keeps_its_nulls() -> None:
    base = template({"env": {"N": 42, "YES": True, "GONE": None}, "image": "i", "cpu": 1}, env={"type": "object"})

    assert (await dumped(Sized, base))["env"] == {"N": "42", "YES": "True", "GONE": None}


@pytest.mark.parametrize("command", [None, "", "run"])
async def test_a_blank_command_of_a_deployment_is_none(command: str | None) -> None:
    base = template({"command": "{{ command }}"}, command={"type": "string"})

    assert (await dumped(BaseJobConfiguration, base, {"command": command}))["command"] == (command or None)


@pytest.mark.parametrize(
    ("job_env", "values", "env"),
    [
        ("{{ env }}", {"env.A": "1"}, {"A": "1"}),
        ("{{ env }}", {"env.A": "1", "env.B": "2"}, {"A": "1", "B": "2"}),
        ("{{ env }}", {"env.A": "dotted", "env": {"A": "nested", "B": "2"}}, {"A": "nested", "B": "2"}),
        ("{{ env }}", {"env": {"B": "2"}, "env.A": "dotted"}, {"A": "dotted", "B": "2"}),
        ({"BASE": "0"}, {"env.A": "1"}, {"BASE": "0", "A": "1"}),
    ],
)
async def test_dotted_names_set_variables_of_the_environment(job_env: Any, values: Any, env: Any) -> None:
    base = template({**PLACES, "env": job_env}, env={"type": "object"})

    assert (await dumped(BaseJobConfiguration, base, values))["env"] == env


async def test_two_deployments_that_share_a_template_see_nothing_of_each_other() -> None:
    base = template({**PLACES, "env": {"SHARED": "s"}, "labels": {}}, env={"default": {"DEFAULT": "d"}}, command={})
    before = copy.deepcopy(base)

    first = await dumped(BaseJobConfiguration, base, {"env": {"FIRST": "1"}})
    second = await dumped(BaseJobConfiguration, base, {"env": {"SECOND": "2"}})

    assert first["env"] == {"SHARED": "s", "DEFAULT": "d", "FIRST": "1"}
    assert second["env"] == {"SHARED": "s", "DEFAULT": "d", "SECOND": "2"}
    assert base == before


# References


class Registry(BaseModel):
    """What a block holds, as a worker wants it."""

    url: str
    port: int


class Pulling(BaseJobConfiguration):
    """A configuration made of a block."""

    image: str
    registry: Registry | None = None


@pytest.mark.parametrize(
    "reference",
    ["{{ prefect.blocks.docker-registry.main }}", {"$ref": {"block_document_id": BLOCK_ID}}, "by uuid"],
    ids=repr,
)
async def test_a_block_becomes_a_field(reference: Any) -> None:
    held = {"url": "registry.example", "port": 443}
    world = World(blocks={("docker-registry", "main"): held}, documents={BLOCK_ID: held})
    if reference == "by uuid":
        reference = {"$ref": {"block_document_id": UUID(BLOCK_ID)}}
    base = template({"image": "{{ image }}", "registry": "{{ registry }}"}, image={}, registry={})

    made = await Pulling.from_template_and_values(base, {"image": "i", "registry": reference}, world)

    assert made.registry == Registry(url="registry.example", port=443)


@pytest.mark.parametrize("where", ["template", "values"])
async def test_variables_of_the_server_may_stand_in_the_template_and_in_values(where: str) -> None:
    remote = {"image": "{{  prefect.variables.image }}", "env": {"REGION": "{{ prefect.variables.region }}"}}
    base = template(remote) if where == "template" else template({"image": "{{ image }}", "env": "{{ env }}"})

    made = await dumped(
        Pulling, base, {} if where == "template" else remote, World(variables={"image": "slim", "region": "eu"})
    )

    assert (made["image"], made["env"]) == ("slim", {"REGION": "eu"})


async def test_a_reference_that_nobody_can_look_up_is_refused_by_name() -> None:
    base = template({"image": "{{ image }}"}, image={"default": "{{ prefect.variables.image }}"})

    with pytest.raises(ConfigurationError, match="variable image"):
        await Pulling.from_template_and_values(base, {})
    assert (await dumped(Pulling, base, {"image": "slim"}))["image"] == "slim"


async def test_without_anybody_to_ask_an_escape_still_ends() -> None:
    base = template({"image": "{{ image }}"}, image={})

    assert (await dumped(Pulling, base, {"image": "<<! name >>"}))["image"] == "<< name >>"


# Templates of worker types


@pytest.mark.parametrize(
    ("said", "place"),
    [("{{ memory }}", "{{ memory }}"), (None, "{{ memory }}"), ("{{ mem }}Gi", "{{ mem }}Gi"), ([1], [1])],
    ids=repr,
)
def test_a_field_may_say_its_place_in_the_template(said: Any, place: Any) -> None:
    class Own(BaseJobConfiguration):
        memory: str = Field(json_schema_extra={"template": said})
        disk: int = Field(json_schema_extra={"template": "{{ disk }}"})

    assert Own.json_template() == {**PLACES, "memory": place, "disk": "{{ disk }}"}


class Bare(BaseWorker[BaseJobConfiguration, BaseVariables, BaseWorkerResult]):
    """A worker that says nothing of itself."""

    type = "bare-for-peer-tests"

    async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> BaseWorkerResult:
        raise NotImplementedError


def test_a_worker_that_says_nothing_of_itself_has_the_defaults() -> None:
    made = Bare.get_default_base_job_template()
    properties = made["variables"]["properties"]

    assert (Bare.get_logo_url(), Bare.get_documentation_url(), Bare.get_description()) == ("", "", "")
    assert made["job_configuration"] == PLACES
    assert set(properties) == set(PLAIN)
    assert "required" not in made["variables"]
    assert made["variables"]["type"] == "object"
    for name in ("command", "name"):
        assert properties[name]["anyOf"] == [{"type": "string"}, {"type": "null"}]
        assert properties[name]["default"] is None
    assert properties["env"]["additionalProperties"] == {"anyOf": [{"type": "string"}, {"type": "null"}]}
    assert properties["labels"]["additionalProperties"] == {"type": "string"}
    assert all(entry["description"] and entry["title"] for entry in properties.values())


def test_a_worker_may_say_what_it_is() -> None:
    class Told(Bare):
        type = "told-for-peer-tests"
        _logo_url = "https://example.com/logo.png"
        _documentation_url = "https://example.com/docs"
        _description = "Runs flows by carrier pigeon."

    assert Told.get_logo_url() == "https://example.com/logo.png"
    assert Told.get_documentation_url() == "https://example.com/docs"
    assert Told.get_description() == "Runs flows by carrier pigeon."


def test_a_workers_own_variables_are_the_schema_of_its_pools() -> None:
    class Variables(BaseVariables):
        image: str
        cpu_cores: int = 1

    class SizedWorker(Bare):
        type = "sized-for-peer-tests"
        job_configuration = Sized
        job_configuration_variables = Variables

    made = SizedWorker.get_default_base_job_template()

    assert made["job_configuration"] == {**PLACES, "image": "{{ image }}", "cpu": "{{ cpu_cores }}"}
    assert made["variables"]["required"] == ["image"]
    assert set(made["variables"]["properties"]) == {*PLAIN, "image", "cpu_cores"}
    assert made["variables"]["properties"]["cpu_cores"] == {"default": 1, "title": "Cpu Cores", "type": "integer"}
    assert "title" not in made["variables"]


def test_a_template_that_was_given_away_is_nobody_elses() -> None:
    Bare.get_default_base_job_template()["job_configuration"]["command"] = "spoiled"

    assert Bare.get_default_base_job_template()["job_configuration"] == PLACES


# Prepared for a flow run


def a_run(**fields: Any) -> FlowRun:
    return FlowRun(id=uuid4(), name="lucky-lynx", flow_id=FLOW.id, **fields)


def of_this_run(env: dict[str, str | None]) -> dict[str, str | None]:
    return {name: value for name, value in env.items() if name not in Settings.load().exported}


def test_prepared_for_nothing_but_a_run() -> None:
    flow_run = a_run()
    configuration = BaseJobConfiguration(env={"MINE": "1"}, labels={"mine": "1"}, name="my-name")
    configuration.prepare_for_flow_run(flow_run)

    ids = {"PREFECT__FLOW_RUN_ID": str(flow_run.id), "PREFECT__FLOW_ID": str(FLOW.id)}
    assert of_this_run(configuration.env) == {"MINE": "1", **ids}
    assert configuration.labels == {
        "mine": "1",
        "prefect.io/flow-run-id": str(flow_run.id),
        "prefect.io/flow-run-name": "lucky-lynx",
        "prefect.io/version": f"procworker-{__version__}",
    }
    assert (configuration.name, configuration.command) == ("my-name", "prefect flow-run execute")


def test_prepared_with_everything_that_a_run_belongs_to() -> None:
    deployment = Deployment(id=uuid4(), name="nightly")
    pool = WorkPool(id=uuid4(), name="pool")
    flow_run, worker_id = a_run(deployment_id=deployment.id), uuid4()
    configuration = BaseJobConfiguration(command="mine")
    configuration.prepare_for_flow_run(flow_run, deployment, FLOW, pool, "w1", worker_id=worker_id)

    assert of_this_run(configuration.env) == {
        "PREFECT__FLOW_RUN_ID": str(flow_run.id),
        "PREFECT__FLOW_ID": str(FLOW.id),
        "PREFECT__FLOW_NAME": "etl",
        "PREFECT__DEPLOYMENT_ID": str(deployment.id),
        "PREFECT__DEPLOYMENT_NAME": "nightly",
        "PREFECT__WORKER_NAME": "w1",
        "PREFECT__WORKER_ID": str(worker_id),
    }
    assert configuration.labels == {
        "prefect.io/flow-run-id": str(flow_run.id),
        "prefect.io/flow-run-name": "lucky-lynx",
        "prefect.io/version": f"procworker-{__version__}",
        "prefect.io/work-pool-id": str(pool.id),
        "prefect.io/work-pool-name": "pool",
        "prefect.io/worker-name": "w1",
        "prefect.io/flow-id": str(FLOW.id),
        "prefect.io/flow-name": "etl",
        "prefect.io/deployment-id": str(deployment.id),
        "prefect.io/deployment-name": "nightly",
    }
    assert (configuration.name, configuration.command) == ("lucky-lynx", "mine")


def test_a_name_of_flow_and_run_is_filled() -> None:
    configuration = BaseJobConfiguration(name="w/{{ ctx.flow.name }}/{{ ctx.flow_run.name }}")
    configuration.prepare_for_flow_run(a_run(), flow=FLOW)

    assert configuration.name == "w/etl/lucky-lynx"


def test_a_subclass_may_say_how_things_are_labelled() -> None:
    """Workers for clusters do: what a label may hold differs."""

    class Cluster(BaseJobConfiguration):
        @staticmethod
        def _base_flow_run_labels(flow_run: Any) -> dict[str, str]:
            return {"run": str(flow_run.id), "managed-by": "cluster"}

        @staticmethod
        def _base_flow_labels(flow: Any) -> dict[str, str]:
            return {**BaseJobConfiguration._base_flow_labels(flow), "app": flow.name if flow else "none"}

        @staticmethod
        def _base_deployment_labels(deployment: Any) -> dict[str, str]:
            return {**BaseJobConfiguration._base_deployment_labels(deployment), "app": deployment.name}

        @staticmethod
        def _base_work_pool_labels(work_pool: Any) -> dict[str, str]:
            return {"pool": work_pool.name}

        @staticmethod
        def _base_worker_name_label(worker_name: Any) -> dict[str, str]:
            return {"worker": worker_name}

    deployment, flow_run = Deployment(id=uuid4(), name="nightly"), a_run()
    configuration = Cluster(labels={"managed-by": "me"})
    configuration.prepare_for_flow_run(flow_run, deployment, FLOW, WorkPool(id=uuid4(), name="pool"), "w1")

    assert configuration.labels == {
        "run": str(flow_run.id),
        "managed-by": "me",
        "pool": "pool",
        "worker": "w1",
        "prefect.io/flow-id": str(FLOW.id),
        "prefect.io/flow-name": "etl",
        "prefect.io/deployment-id": str(deployment.id),
        "prefect.io/deployment-name": "nightly",
        "app": "nightly",
    }


def test_a_subclass_may_change_what_every_job_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Contained(BaseJobConfiguration):
        def _base_environment(self) -> dict[str, str]:
            env = super()._base_environment()
            return {**env, "PREFECT_API_URL": env["PREFECT_API_URL"].replace("localhost", "host.internal")}

        @staticmethod
        def _base_flow_run_command() -> str:
            return "entrypoint.sh"

    monkeypatch.setenv("PREFECT_API_URL", "http://localhost:4200/api")
    configuration = Contained()
    configuration.prepare_for_flow_run(a_run())

    assert configuration.env["PREFECT_API_URL"] == "http://host.internal:4200/api"
    assert configuration.command == "entrypoint.sh"


def test_a_subclass_may_hold_its_environment_in_another_form() -> None:
    """As a manifest of Kubernetes does; what it makes of it is its own affair, after the base's part."""

    class Manifest(BaseJobConfiguration):
        env: list[dict[str, Any]] | dict[str, str | None] = Field(default_factory=dict)  # type: ignore[assignment]

        @field_validator("env", mode="before")
        @classmethod
        def _coerce_env(cls, value: Any) -> Any:
            return value

        def prepare_for_flow_run(self, flow_run: FlowRun, *others: Any, **named: Any) -> None:
            listed = self.env if isinstance(self.env, list) else []
            super().prepare_for_flow_run(flow_run, *others, **named)
            assert isinstance(self.env, dict)
            self.env = [{"name": name, "value": value} for name, value in self.env.items()] + listed

    flow_run = a_run()
    secret = {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "token"}}}
    configuration = Manifest(env=[secret])
    configuration.prepare(flow_run, None, None, None, None, None)

    assert secret in configuration.env
    assert {"name": "PREFECT__FLOW_RUN_ID", "value": str(flow_run.id)} in configuration.env


# Resolved for a flow run


class Api:
    """What `resolve_for_flow_run` reads."""

    def __init__(self, deployment: Deployment | None = None) -> None:
        self.deployment = deployment

    async def read_deployment(self, id: Any) -> Deployment:
        if self.deployment is None:
            raise ObjectNotFound("404 Not Found", 404)
        return self.deployment

    async def read_flow(self, id: Any) -> Flow:
        return FLOW


def a_pool(base: dict[str, Any]) -> WorkPool:
    return WorkPool(id=uuid4(), name="pool", base_job_template=base)


@pytest.mark.parametrize("place", ["default", "job"])
@pytest.mark.parametrize(
    ("pool_env", "deployment_env", "run_env", "env"),
    [
        ({}, {"A": "1"}, {"B": "2"}, {"A": "1", "B": "2"}),
        ({"A": "1", "B": "2"}, {"A": "1", "B": "3"}, {}, {"A": "1", "B": "3"}),
        ({"A": "1", "B": "2"}, {"C": "3"}, {}, {"A": "1", "B": "2", "C": "3"}),
        ({"A": "1"}, {"C": "42"}, {"C": "3", "D": "4"}, {"A": "1", "C": "3", "D": "4"}),
        ({"A": "1", "B": "2"}, {"B": ""}, {}, {"A": "1", "B": ""}),
    ],
    ids=["run over deployment", "deployment over pool", "beside each other", "all three", "an empty text counts"],
)
async def test_environments_are_merged_from_pool_to_run(
    pool_env: Any, deployment_env: Any, run_env: Any, env: Any, place: str
) -> None:
    in_default = template({"env": "{{ env }}"}, env={"type": "object", "default": pool_env})
    base = in_default if place == "default" else template({"env": pool_env}, env={"type": "object"})
    deployment = Deployment(id=uuid4(), name="d", job_variables={"env": deployment_env})
    flow_run = a_run(deployment_id=deployment.id, job_variables={"env": run_env})
    before = copy.deepcopy((deployment, flow_run, base))

    made = await BaseJobConfiguration.resolve_for_flow_run(
        flow_run, client=Api(deployment), work_pool=a_pool(base), worker_name="w", deployment=deployment
    )

    assert {name: made.env[name] for name in env} == env
    assert (deployment, flow_run, base) == before


async def test_job_and_default_environment_of_a_pool_are_both_kept() -> None:
    base = template({"env": {"JOB": "1"}}, env={"type": "object", "default": {"DEFAULT": "2"}})
    deployment = Deployment(id=uuid4(), name="d", job_variables={"env": {"DEPLOYMENT": "3"}})

    made = await BaseJobConfiguration.resolve_for_flow_run(
        a_run(deployment_id=deployment.id), client=Api(deployment), work_pool=a_pool(base), worker_name="w"
    )

    assert {"JOB": "1", "DEFAULT": "2", "DEPLOYMENT": "3"}.items() <= made.env.items()


async def test_a_run_without_a_deployment_needs_none() -> None:
    made = await BaseJobConfiguration.resolve_for_flow_run(
        a_run(job_variables={"name": "mine"}), client=Api(), work_pool=a_pool(template(PLACES)), worker_name="w"
    )

    assert (made.name, made.env["PREFECT__FLOW_NAME"], made.env["PREFECT__WORKER_NAME"]) == ("mine", "etl", "w")
    assert "PREFECT__DEPLOYMENT_NAME" not in made.env


async def test_a_deployment_that_is_gone_is_said() -> None:
    with pytest.raises(ObjectNotFound):
        await BaseJobConfiguration.resolve_for_flow_run(
            a_run(deployment_id=uuid4()), client=Api(), work_pool=a_pool(template(PLACES)), worker_name="w"
        )


async def test_an_old_configuration_can_be_resolved_too() -> None:
    class Old(BaseJobConfiguration):
        def prepare_for_flow_run(self, flow_run: Any, deployment: Any = None, flow: Any = None) -> None:  # type: ignore[override]
            self.name = f"{flow.name}:{flow_run.name}"

    made = await Old.resolve_for_flow_run(
        a_run(), client=Api(), work_pool=a_pool(template(PLACES)), worker_name="w", worker_id=uuid4()
    )

    assert made.name == "etl:lucky-lynx"


async def test_the_processs_own_environment_lies_beneath_a_job_that_was_resolved_directly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FROM_OUTSIDE", "yes")
    monkeypatch.setenv("PREFECT_API_URL", "http://somewhere/api")

    made = await ProcessJobConfiguration.resolve_for_flow_run(
        a_run(job_variables={"command": "true"}),
        client=Api(),
        work_pool=a_pool(template({"command": "{{ command }}"}, command={})),
        worker_name="w",
    )

    assert (made.env["FROM_OUTSIDE"], made.env["PREFECT_API_URL"]) == ("yes", "http://somewhere/api")
